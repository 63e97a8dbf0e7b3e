"""Figures against plain formulas on plain runs: no padding, all logits, one row and one token after the other."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from support import ADAPTER, BASE, HELDOUT, attached, bert, llama
from transformers import AutoTokenizer, BertForSequenceClassification, LlamaForCausalLM

from lorapack.core.adapter import Factors
from lorapack.data.batches import batches
from lorapack.data.encode import IGNORED, Encoded
from lorapack.evaluate import evaluate_adapters, metrics
from lorapack.evaluate.metrics import quality
from lorapack.evaluate.scores import Scores, score
from lorapack.model.load import load
from lorapack.model.point import place
from lorapack.read import read_adapter
from lorapack.write import write_adapter

FIGURES = ("predictions", "loss", "divergence", "agreement", "target", "predicted")
quick = settings(deadline=None, max_examples=80)


def scores(rows, **figures):
    return Scores(**{name: np.array(figures.get(name, [0.0] * rows), dtype=float) for name in FIGURES})


def drawn(rows, seed):
    """Resampled counts, and the same samples as lists of row numbers."""
    counts = metrics.resamples(rows, seed)[:6]
    return counts, [[n for n, times in enumerate(count) for _ in range(int(times))] for count in counts]


# Metrics, each as its definition says.


def mean(values):
    return sum(values) / len(values)


def naive_accuracy(true, said):
    return mean([float(t == s) for t, s in zip(true, said, strict=True)])


def naive_f1(true, said, of):
    hits = sum(t == s == of for t, s in zip(true, said, strict=True))
    found, wanted = sum(s == of for s in said), sum(t == of for t in true)
    precision, recall = hits / found if found else 0, hits / wanted if wanted else 0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def naive_correlation(one, other):
    """Of two tables of numbers, a row a sample: covariance over the root of the variances."""

    def covariance(a, b):
        return sum(
            (x - mean(column_a)) * (y - mean(column_b))
            for column_a, column_b in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True)
            for x, y in zip(column_a, column_b, strict=True)
        )

    spread = math.sqrt(max(0.0, covariance(one, one)) * max(0.0, covariance(other, other)))
    return covariance(one, other) / spread if spread > 1e-12 else 0.0


def naive_matthews(true, said, classes):
    """Gorodkin's: the correlation of the two assignments, written as tables of zeros and ones."""
    one, other = ([[float(v == c) for c in range(classes)] for v in values] for values in (true, said))
    return naive_correlation(one, other)


def naive_ranks(values):
    """A value's place in the order; equal values share the mean of their places."""
    ordered = sorted(values)
    return [[mean([n for n, other in enumerate(ordered) if other == v])] for v in values]


def naive_spearman(true, said):
    return naive_correlation(naive_ranks(true), naive_ranks(said))


@st.composite
def answers(draw, classes):
    count = draw(st.integers(1, 12))
    labels = st.lists(st.integers(0, classes - 1), min_size=count, max_size=count)
    true, said = draw(labels), draw(labels)
    return [classes - 1, *true], [draw(st.integers(0, classes - 1)), *said]  # the highest class is there


@quick
@given(answers(2), st.integers(0, 99))
def test_two_class_figures_are_their_definitions_on_every_resample(answer, seed):
    true, said = answer
    found = scores(len(true), target=true, predicted=said)
    counts, samples = drawn(len(true), seed)
    for n, sample in enumerate(samples):
        t, s = [true[i] for i in sample], [said[i] for i in sample]
        assert metrics.accuracy(counts, found)[n] == pytest.approx(naive_accuracy(t, s))
        assert metrics.f1(counts, found, 2)[n] == pytest.approx(naive_f1(t, s, of=1))
        assert metrics.matthews(counts, found, 2)[n] == pytest.approx(naive_matthews(t, s, 2), abs=1e-9)


@quick
@given(answers(4), st.integers(0, 99))
def test_figures_of_more_classes_are_their_definitions_on_every_resample(answer, seed):
    true, said = answer
    found = scores(len(true), target=true, predicted=said)
    counts, samples = drawn(len(true), seed)
    for n, sample in enumerate(samples):
        t, s = [true[i] for i in sample], [said[i] for i in sample]
        assert metrics.accuracy(counts, found)[n] == pytest.approx(naive_accuracy(t, s))
        assert metrics.f1(counts, found, 4)[n] == pytest.approx(mean([naive_f1(t, s, of=c) for c in range(4)]))
        assert metrics.matthews(counts, found, 4)[n] == pytest.approx(naive_matthews(t, s, 4), abs=1e-9)


@quick
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=12), st.integers(0, 99))
def test_spearman_shares_ranks_among_ties(pairs, seed):
    true, said = [t / 2 for t, _ in pairs], [s / 3 for _, s in pairs]
    counts, samples = drawn(len(true), seed)
    found = metrics.spearman(counts, scores(len(true), target=true, predicted=said))
    for n, sample in enumerate(samples):
        expected = naive_spearman([true[i] for i in sample], [said[i] for i in sample])
        assert found[n] == pytest.approx(expected, abs=1e-9)


def test_figures_worked_by_hand():
    counts = np.ones((1, 6))
    # class 1: 2 hits, 3 said, 3 true -> F1 2/3; tp 2, tn 2, fp 1, fn 1 -> (4 - 1) / sqrt(3 * 3 * 3 * 3) = 1/3
    found = scores(6, target=[1, 1, 1, 0, 0, 0], predicted=[1, 1, 0, 1, 0, 0])
    assert metrics.accuracy(counts, found)[0] == pytest.approx(4 / 6)
    assert metrics.f1(counts, found, 2)[0] == pytest.approx(2 / 3)
    assert metrics.matthews(counts, found, 2)[0] == pytest.approx(1 / 3)
    # ranks 1 2 3 4 and 1.5 1.5 3 4: covariance 4.5, variances 5 and 4.5
    four = scores(4, target=[10, 20, 30, 40], predicted=[7, 7, 8, 9])
    assert metrics.spearman(np.ones((1, 4)), four)[0] == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    # 4 tokens of loss 8, 1 of loss 1: the mean is over tokens, not over rows
    rows = scores(2, predictions=[4, 1], loss=[8, 1])
    assert metrics.loss(np.ones((1, 2)), rows)[0] == pytest.approx(9 / 5)
    assert metrics.perplexity(np.ones((1, 2)), rows)[0] == pytest.approx(math.exp(9 / 5))


# Intervals.


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """150 samples of 60 rows with a known mean loss a token; 95% intervals, so far below 85% is wrong."""
    generator = np.random.default_rng(0)
    covered = 0
    for sample in range(150):
        tokens = generator.integers(1, 10, 60).astype(float)
        losses = tokens * generator.exponential(2.0, 60)  # a mean of 2 a token
        found = metrics.interval(
            metrics.loss(metrics.resamples(60, sample), scores(60, predictions=tokens, loss=losses))
        )
        assert found.low < found.value < found.high
        covered += found.low <= 2.0 <= found.high
    assert 0.85 <= covered / 150 < 1


def test_an_interval_is_the_middle_95_percent_of_the_resamples():
    found = metrics.interval(np.array([7.0, *range(1001)]))
    assert (found.value, found.low, found.high) == pytest.approx((7.0, 25.0, 975.0))
    assert metrics.interval(np.array([7.0, *range(1001), *[np.nan] * 500])) == found
    assert metrics.interval(np.array([7.0, np.nan])).low is None


def some_scores(seed, rows=30):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 9, rows).astype(float)
    made = {}
    for variant, level in (("original", 1.0), ("base", 3.0), ("compressed", 1.5)):
        losses = tokens * (level + generator.random(rows))
        made[variant] = scores(rows, predictions=tokens, loss=losses, divergence=tokens * generator.random(rows))
    return made


def test_the_same_seed_gives_the_same_intervals_and_another_seed_only_other_ends():
    one, same, other = (quality(some_scores(0), None, seed) for seed in (1, 1, 2))
    assert one == same != other
    assert other.metrics["loss"]["base"].value == one.metrics["loss"]["base"].value
    assert other.metrics["loss"]["base"].low != one.metrics["loss"]["base"].low


def test_the_gain_retained_is_the_part_of_the_way_from_base_to_original():
    made = some_scores(1)
    found = quality(made, None, 0)
    base, original, compressed = (found.metrics["loss"][v].value for v in ("base", "original", "compressed"))
    assert found.retained.value == pytest.approx((base - compressed) / (base - original))
    assert quality(made | {"compressed": made["original"]}, None, 0).retained.low == pytest.approx(1)
    assert quality(made | {"compressed": made["base"]}, None, 0).retained.high == pytest.approx(0)


def test_the_gain_retained_is_paired_row_by_row():
    """A variant that keeps exactly half on every row keeps half on every resample: the interval is a point."""
    made = some_scores(2)
    half = replace(made["base"], loss=(made["base"].loss + made["original"].loss) / 2)
    found = quality(made | {"compressed": half}, None, 0).retained
    assert (found.low, found.value, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_where_the_original_is_not_better_than_the_base_nothing_is_said_of_the_gain():
    made = some_scores(3)
    assert quality(made | {"base": made["original"]}, None, 0).retained is None
    assert quality(made | {"base": made["original"], "original": made["base"]}, None, 0).retained is None


# Whole models.


def noisy(adapter, size, seed=0):
    """The adapter with every linear factor and scale moved a little: something to tell from the original."""
    generator = torch.Generator().manual_seed(seed)

    def moved(tensor):
        return tensor + size * tensor.std() * torch.randn(tensor.shape, generator=generator)

    pool = {name: Factors(moved(f.A), moved(f.B), f.kind) for name, f in adapter.pool.items()}
    modules = {m: replace(pointer, scale=pointer.scale * (1 + size / 2)) for m, pointer in adapter.modules.items()}
    return replace(adapter, pool=pool, modules=modules)


def plain_model(kind, base, adapter, folder):
    """transformers' model, with the adapter written out and attached by PEFT; no lorapack in between."""
    model = kind.from_pretrained(base)
    if adapter is None:
        return model.eval()
    write_adapter(adapter, folder, expand=True)
    return PeftModel.from_pretrained(model, str(folder)).eval()


def naive_text(model, teacher, row):
    """(predictions, loss, KL from the teacher, agreement) of one row of a language model."""
    with torch.no_grad():
        logits, reference = (
            m(input_ids=torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1) for m in (model, teacher)
        )
    figures = [0, 0.0, 0.0, 0]
    for at in range(1, len(row.input_ids)):
        if row.labels[at] == -100:
            continue
        p, q = reference[at - 1], logits[at - 1]
        figures[0] += 1
        figures[1] -= float(q[row.labels[at]])
        figures[2] += sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
        figures[3] += int(p.argmax() == q.argmax())
    return figures


def text_rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n, (length, prompt) in enumerate([(9, 0), (3, 1), (12, 7), (5, 4), (7, 0), (2, 1)]):
        ids = torch.randint(3, 512, (length,), generator=generator).tolist()
        found.append(Encoded(n, tuple(ids), (*[IGNORED] * prompt, *ids[prompt:])))
    return found


def test_loss_divergence_and_agreement_are_those_of_plain_runs_without_padding(tmp_path):
    adapter, loaded = attached(llama(2), tmp_path, target_modules=["q_proj", "v_proj", "up_proj"], lora_alpha=64)
    other = noisy(adapter, 0.3)
    rows = text_rows()
    variants = {"base": None, "original": adapter, "compressed": other}
    placed = {name: place(variant, loaded.device) for name, variant in variants.items()}
    found = score(loaded, placed, "original", batches(rows, 24, loaded.pad), len(rows))
    models = {n: plain_model(LlamaForCausalLM, tmp_path / "base", v, tmp_path / n) for n, v in variants.items()}
    for name, model in models.items():
        naive = np.array([naive_text(model, models["original"], row) for row in rows], dtype=float)
        assert found[name].predictions.tolist() == naive[:, 0].tolist()
        assert found[name].loss == pytest.approx(naive[:, 1], rel=1e-5)
        assert found[name].divergence == pytest.approx(naive[:, 2], rel=1e-4, abs=1e-6)
        assert found[name].agreement.tolist() == naive[:, 3].tolist()
    assert found["base"].divergence.min() > 1e-3 < abs(found["base"].loss - found["original"].loss).max()
    assert found["base"].agreement.sum() < found["base"].predictions.sum()
    assert not found["original"].divergence.any()


def test_scores_do_not_depend_on_the_batching(tmp_path):
    adapter, loaded = attached(llama(1), tmp_path, target_modules=["q_proj"])
    rows, variants = text_rows(), {"base": place(None, loaded.device), "original": place(adapter, loaded.device)}
    one, other = (score(loaded, variants, "original", batches(rows, n, loaded.pad), len(rows)) for n in (1, 1000))
    for name in variants:
        for figure in FIGURES:
            first, second = getattr(one[name], figure), getattr(other[name], figure)
            assert first == pytest.approx(second, rel=1e-5, abs=1e-6)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    """Twelve rows of the held-out text, as they are and as prompt and completion."""
    texts = [text for line in HELDOUT.read_text().splitlines() if len(text := json.loads(line)["text"]) > 160][:12]
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": t[:80], "completion": t[80:160]} for t in texts]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t[:200]}) + "\n" for t in texts))
    return folder


@pytest.mark.parametrize("form", ["prompts", "texts"])
def test_the_reported_figures_are_those_of_plain_runs_over_the_file(heldout, tmp_path, form):
    original = read_adapter(ADAPTER)
    other = noisy(original, 0.5)
    path = heldout / f"{form}.jsonl"
    found, _ = evaluate_adapters(original, str(path), str(BASE), compressed=other, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        before = tokenizer(row["prompt"])["input_ids"] if "prompt" in row else []
        if "prompt" in row:
            after = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        else:
            after = tokenizer(row["text"])["input_ids"]
        rows.append(Encoded(0, (*before, *after), (*[-100] * len(before), *after)))
    variants = {"base": None, "original": original, "compressed": other}
    models = {n: plain_model(LlamaForCausalLM, BASE, v, tmp_path / n) for n, v in variants.items()}
    for name, model in models.items():
        naive = np.array([naive_text(model, models["original"], row) for row in rows]).sum(axis=0)
        loss = naive[1] / naive[0]
        assert found.metrics["loss"][name].value == pytest.approx(loss, rel=1e-5)
        assert found.metrics["perplexity"][name].value == pytest.approx(math.exp(loss), rel=1e-5)
        if name == "compressed":
            assert found.divergence.value == pytest.approx(naive[2] / naive[0], rel=1e-4)
            assert found.agreement.value == pytest.approx(naive[3] / naive[0], abs=2 / naive[0])
    assert (found.rows, found.predictions) == (12, naive[0])


def test_the_original_retains_all_of_its_gain_and_an_adapter_with_nothing_left_none(heldout):
    original = read_adapter(ADAPTER)
    nothing = original.with_pool({}, {})
    for compressed, part in ((original, 1.0), (nothing, 0.0)):
        found, _ = evaluate_adapters(
            original, str(heldout / "texts.jsonl"), str(BASE), compressed=compressed, device="cpu"
        )
        assert (found.retained.low, found.retained.value, found.retained.high) == pytest.approx((part,) * 3, abs=1e-6)
        same = "original" if part else "base"
        assert found.metrics["loss"]["compressed"].value == pytest.approx(found.metrics["loss"][same].value, rel=1e-6)
    assert found.agreement.value < 1


# Classification and regression.


def labelled(labels):
    generator = torch.Generator().manual_seed(4)
    found = []
    for n, label in enumerate(labels):
        length = 3 + n
        ids = torch.randint(3, 512, (length,), generator=generator).tolist()
        found.append(Encoded(n, tuple(ids), label, tuple(int(i > length // 2) for i in range(length))))
    return found


def classifier(tmp_path, labels):
    """A BERT, an adapter whose saved head differs from the base model's, and a plain model for any variant."""
    adapter, _ = attached(
        bert(2, labels), tmp_path, target_modules=["query", "value"], task_type="SEQ_CLS", lora_alpha=99
    )
    head = next(name for name in adapter.carried if name.endswith("classifier.weight"))
    generator = torch.Generator().manual_seed(5)
    adapter = replace(adapter, carried={**adapter.carried, head: torch.randn(labels, 32, generator=generator)})

    def plain(variant, name):
        """The base model is what is left of the adapter without its low-rank updates: its head stays."""
        model = plain_model(BertForSequenceClassification, tmp_path / "base", variant, tmp_path / name)
        if variant is None:
            with torch.no_grad():
                model.classifier.weight.copy_(adapter.carried[head])
        return model

    return adapter, load(adapter, str(tmp_path / "base"), device="cpu"), plain


def outputs(model, row):
    with torch.no_grad():
        types = torch.tensor([row.token_types])
        return model(input_ids=torch.tensor([row.input_ids]), token_type_ids=types).logits[0].double()


@pytest.mark.parametrize("classes", [2, 3])
def test_a_classifier_is_scored_as_plain_runs_are(tmp_path, classes):
    adapter, loaded, plain = classifier(tmp_path, classes)
    assert loaded.base.config.num_labels == classes
    rows = labelled([n % classes for n in range(7)])
    variants = {"base": None, "original": adapter, "compressed": noisy(adapter, 1.0)}
    placed = {name: place(variant, loaded.device) for name, variant in variants.items()}
    found = score(loaded, placed, "original", batches(rows, 20, loaded.pad), len(rows))
    teacher = plain(adapter, "teacher")
    for name, variant in variants.items():
        model = plain(variant, name)
        for n, row in enumerate(rows):
            p, q = (outputs(m, row).log_softmax(-1) for m in (teacher, model))
            assert found[name].predictions[n] == 1
            assert found[name].loss[n] == pytest.approx(-float(q[row.labels]), rel=1e-4)
            assert found[name].divergence[n] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3, abs=1e-6)
            assert found[name].target[n] == row.labels
            assert found[name].predicted[n] == int(q.argmax())
            assert found[name].agreement[n] == (p.argmax() == q.argmax())
    figures = quality(found, loaded.reader.classes, 0)
    right = mean([float(found["base"].predicted[n] == row.labels) for n, row in enumerate(rows)])
    assert figures.metrics["accuracy"]["base"].value == pytest.approx(right)
    assert figures.metrics.keys() == {"loss", "accuracy", "f1", "matthews"}


def test_a_regression_is_scored_as_plain_runs_are(tmp_path):
    adapter, loaded, plain = classifier(tmp_path, 1)
    assert loaded.is_regression
    rows = labelled([0.5, 2.0, -1.0, 4.5, 0.0])
    variants = {"base": None, "original": adapter}
    placed = {name: place(variant, loaded.device) for name, variant in variants.items()}
    found = score(loaded, placed, "original", batches(rows, 20, loaded.pad), len(rows))
    teacher = plain(adapter, "teacher")
    for name, variant in variants.items():
        model = plain(variant, name)
        for n, row in enumerate(rows):
            value, reference = float(outputs(model, row)[0]), float(outputs(teacher, row)[0])
            assert found[name].loss[n] == pytest.approx((value - row.labels) ** 2, rel=1e-3)
            assert found[name].divergence[n] == pytest.approx((value - reference) ** 2, rel=1e-3, abs=1e-6)
            assert found[name].predicted[n] == pytest.approx(value, rel=1e-4)
    figures = quality(found, 1, 0).metrics
    said = list(found["original"].predicted)
    assert figures["spearman"]["original"].value == pytest.approx(naive_spearman([r.labels for r in rows], said))
    assert figures["squared error"]["original"].value == pytest.approx(mean(list(found["original"].loss)))


def test_an_adapter_on_the_head_changes_the_predictions_as_it_should(tmp_path):
    adapter, loaded = attached(llama(1), tmp_path, target_modules=["q_proj", "lm_head"], lora_alpha=64)
    rows = text_rows()
    found = score(
        loaded, {"original": place(adapter, loaded.device)}, "original", batches(rows, 24, loaded.pad), len(rows)
    )
    model = plain_model(LlamaForCausalLM, tmp_path / "base", adapter, tmp_path / "plain")
    naive = [naive_text(model, model, row)[1] for row in rows]
    assert found["original"].loss == pytest.approx(naive, rel=1e-5)
