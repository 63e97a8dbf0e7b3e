"""Data: which rows are used, for what, and how they become tokens."""

import csv
import json
import os
import random
import subprocess
import sys
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import BASE, CALIBRATION, HELDOUT
from transformers import AutoTokenizer

from lorapack import InputError
from lorapack.data.batches import batches, training_batches
from lorapack.data.columns import Example, detect, examples
from lorapack.data.encode import IGNORED, Encoded, encode
from lorapack.data.prepare import Reader, fingerprint, prepare, prepare_evaluation
from lorapack.data.rows import read_rows
from lorapack.data.split import split, spread

ROWS = [{"text": "Once upon a time"}, {"text": 'a "quoted", word\nand a line'}, {"text": "überall"}]
PARTS = ("calibration", "recovery", "selection", "evaluation")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def write(path, rows):
    """The same rows in the format of the file's ending."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def refusal(work, *needles):
    with pytest.raises(InputError) as found:
        work()
    message = str(found.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message, message


# Formats


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(ending, tmp_path):
    assert read_rows(write(tmp_path / f"rows{ending}", ROWS)) == ROWS


def test_a_line_of_a_text_file_is_a_row(tmp_path):
    (tmp_path / "rows.txt").write_text("one \n\n   \n  two\nthree", encoding="utf-8")
    assert read_rows(tmp_path / "rows.txt") == [{"text": "one"}, {"text": "  two"}, {"text": "three"}]


def test_a_json_object_that_holds_one_list_is_that_list(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"version": "1", "data": ROWS}))
    assert read_rows(tmp_path / "rows.json") == ROWS


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".txt"])
def test_the_byte_order_mark_of_windows_is_no_part_of_the_data(ending, tmp_path):
    path = tmp_path / f"rows{ending}"
    rows = [{"text": "one"}, {"text": "two"}]
    path.write_text("one\ntwo\n") if ending == ".txt" else write(path, rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_rows(path) == rows


def test_a_folder_is_loaded_by_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "mine"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS)
    write(folder / "test.jsonl", ROWS[:1])
    assert read_rows(str(folder)) == ROWS
    assert read_rows(f"{folder}:test") == ROWS[:1]
    refusal(lambda: read_rows(f"{folder}:other"), "other")


def broken(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


BROKEN = {
    "broken JSON in line 2": ("rows.jsonl", '{"text": "fine"}\n{"text": \n', ["line 2", "not JSON"]),
    "a line that is a number": ("rows.jsonl", '{"text": "fine"}\n\n7\n', ["line 3", "not a JSON object"]),
    "an endless number": ("rows.jsonl", '{"n": ' + "9" * 5000 + "}", ["line 1", "not JSON"]),
    "nested without end": ("rows.json", "[" * 100_000, ["not JSON"]),
    "broken JSON": ("rows.json", '[{"text": "a"},', ["not JSON"]),
    "JSON that is no list": ("rows.json", '{"text": "a"}', ["not a list of JSON objects"]),
    "an empty file": ("rows.jsonl", "", ["no rows"]),
    "an empty list": ("rows.json", "[]", ["no rows"]),
    "an empty table": ("rows.csv", "text,label\n", ["no rows"]),
    "an empty CSV": ("rows.csv", "", ["no rows"]),
    "blank lines alone": ("rows.txt", "\n  \n", ["no rows"]),
    "JSON that is not UTF-8": ("rows.json", b'[{"text": "\xff"}]', ["UTF-8"]),
    "not UTF-8": ("rows.jsonl", b'{"text": "\xff"}', ["UTF-8"]),
    "a comma that is not quoted": ("rows.csv", "text,label\nfine,1\nHello, world,1\n", ["line 3", "quote"]),
    "no Parquet": ("rows.parquet", "text\na\n", ["not Parquet"]),
    "an unknown ending": ("rows.xlsx", "PK", [".xlsx", ".jsonl"]),
    "no ending": ("rows", "text", ["without ending", ".jsonl"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_by_its_name(case, tmp_path):
    name, text, needles = BROKEN[case]
    path = broken(tmp_path / name, text)
    refusal(lambda: read_rows(path), str(path), *needles)


@pytest.mark.parametrize("name", ["rows.jsonl", "folder", "./x:test"])
def test_what_does_not_exist_is_said_so(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal(lambda: read_rows(name if name.startswith(".") else str(tmp_path / name)), name, "does not exist")


# Columns


def columns_of(row, labelled=False, **named):
    found = detect([row], labelled, named)
    return found.form, dict(found.roles)


@pytest.mark.parametrize(
    ("row", "form", "roles"),
    [
        ({"text": "a", "id": 1}, "text", {"text": "text"}),
        ({"anything": "a"}, "text", {"text": "anything"}),
        ({"prompt": "a", "completion": "b"}, "prompt", {"prompt": "prompt", "completion": "completion"}),
        ({"instruction": "a", "output": "b"}, "prompt", {"prompt": "instruction", "completion": "output"}),
        ({"question": "a", "answer": "b", "text": "c"}, "prompt", {"prompt": "question", "completion": "answer"}),
        ({"messages": [], "text": "c"}, "messages", {"messages": "messages"}),
        ({"conversations": []}, "messages", {"messages": "conversations"}),
    ],
)
def test_the_usual_names_are_recognised_for_a_language_model(row, form, roles):
    assert columns_of(row) == (form, roles)


@pytest.mark.parametrize(
    ("row", "roles"),
    [
        ({"sentence": "a", "label": 1, "idx": 3}, {"sentence": "sentence", "label": "label"}),
        ({"text": "a", "label": 1}, {"sentence": "text", "label": "label"}),
        (
            {"sentence1": "a", "sentence2": "b", "label": 1},
            {"sentence": "sentence1", "sentence2": "sentence2", "label": "label"},
        ),
        (
            {"premise": "a", "hypothesis": "b", "label": 1},
            {"sentence": "premise", "sentence2": "hypothesis", "label": "label"},
        ),
        (
            {"question1": "a", "question2": "b", "label": 1},
            {"sentence": "question1", "sentence2": "question2", "label": "label"},
        ),
        ({"review": "a", "class": "good"}, {"sentence": "review", "label": "class"}),
    ],
)
def test_the_usual_names_are_recognised_for_classification(row, roles):
    assert columns_of(row, labelled=True) == ("sentence", roles)


def test_both_sentences_of_glue_s_qnli_are_used():
    form, roles = columns_of({"question": "a", "sentence": "b", "label": 0, "idx": 0}, labelled=True)
    assert (form, roles) == ("sentence", {"sentence": "question", "sentence2": "sentence", "label": "label"})


def test_named_columns_go_before_the_usual_ones():
    row = {"prompt": "a", "completion": "b", "frage": "c", "antwort": "d", "text": "e"}
    assert columns_of(row, prompt="frage", completion="antwort") == (
        "prompt",
        {"prompt": "frage", "completion": "antwort"},
    )
    assert columns_of(row, text="frage") == ("text", {"text": "frage"})
    assert columns_of({**row, "label": 1}, labelled=True, sentence="frage", label="label")[1]["sentence"] == "frage"


def test_wrong_columns_are_refused_with_those_there_are():
    refusal(lambda: columns_of({"titel": "a", "inhalt": "b"}), "titel, inhalt", "--columns")
    refusal(lambda: columns_of({"text": "a", "klasse": "b"}, labelled=True), "text, klasse", "--columns")
    refusal(lambda: columns_of({"text": "a"}, text="body"), "'body'", "text")
    refusal(lambda: columns_of({"text": "a"}, body="text"), "'body'", "prompt", "label")


# Rows


def test_rows_that_cannot_be_used_are_left_out():
    rows = [
        {"sentence": "good", "label": 1},
        {"sentence": "not labelled, as in GLUE's test sets", "label": -1},
        {"sentence": "", "label": 1},
        {"sentence": "   ", "label": 0},
        {"sentence": None, "label": 0},
        {"sentence": "no label", "label": None},
        {"label": 1},
        {"sentence": "also good", "label": "0"},
        {"sentence": "not a number", "label": float("nan")},
    ]
    found = examples(rows, detect(rows, True, {}))
    assert [(e.row, e.label) for e in found] == [(0, 1), (7, 0)]


def test_prompts_without_completion_and_chats_without_a_last_answer_are_left_out():
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}, {"prompt": "a"}]
    assert [e.row for e in examples(rows, detect(rows, False, {}))] == [0]
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
    chats = [[user, assistant], [user], [assistant], [], "hi", [user, {"role": "assistant"}], [user, assistant, user]]
    rows = [{"messages": chat} for chat in chats]
    assert [e.row for e in examples(rows, detect(rows, False, {}))] == [0]


def test_rows_with_half_a_character_are_left_out_as_no_tokenizer_takes_them(tmp_path, tokenizer):
    path = broken(tmp_path / "rows.jsonl", '{"text": "cut \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n')
    rows = read_rows(path)
    found = examples(rows, detect(rows, False, {}))
    assert [e.values["text"] for e in found] == ["whole \U0001f600"]
    assert len(encode(found, tokenizer, 50)) == 1
    user, half = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "\ud83d"}
    rows = [{"messages": [user, half]}]
    assert examples(rows, detect(rows, False, {})) == []


@pytest.mark.parametrize(
    ("label", "expected"),
    [(1, 1), ("1", 1), (True, 1), (2.5, 2.5), ("2.5", 2.5), (" good ", "good"), ("", None), (None, None)],
)
def test_labels_are_classes_numbers_or_words(label, expected):
    rows = [{"sentence": "a", "label": label}]
    found = examples(rows, detect(rows, True, {}))
    assert [e.label for e in found] == ([] if expected is None else [expected])
    assert all(type(e.label) is type(expected) for e in found)


# Tokens


def texts(*values):
    return [Example(n, "text", {"text": value}) for n, value in enumerate(values)]


def prompts(*pairs):
    return [Example(n, "prompt", {"prompt": p, "completion": c}) for n, (p, c) in enumerate(pairs)]


def test_of_a_text_every_token_is_predicted(tokenizer):
    (row,) = encode(texts("Once upon a time"), tokenizer, 100)
    assert list(row.input_ids) == tokenizer("Once upon a time")["input_ids"]
    assert row.labels == row.input_ids and row.cut == 0


def test_a_long_text_is_cut_at_its_end(tokenizer):
    whole, cut = encode(texts("Once upon a time there was"), tokenizer, 100) + encode(
        texts("Once upon a time there was"), tokenizer, 5
    )
    assert cut.input_ids == whole.input_ids[:5] and cut.cut == len(whole.input_ids) - 5


def test_only_the_completion_is_predicted(tokenizer):
    (row,) = encode(prompts(("Once upon", " a time")), tokenizer, 100)
    prompt = tokenizer("Once upon")["input_ids"]
    predicted = [label for label in row.labels if label != IGNORED]
    assert list(row.labels[: len(prompt)]) == [IGNORED] * len(prompt)
    assert predicted[-1] == tokenizer.eos_token_id
    assert predicted == list(row.input_ids[len(prompt) :])
    assert tokenizer.decode(predicted, skip_special_tokens=True).strip() == "a time"


def test_a_long_prompt_loses_its_beginning_and_the_completion_stays_whole(tokenizer):
    (whole,) = encode(prompts(("Once upon a time there was a little girl", " and a dog")), tokenizer, 100)
    answer = sum(label != IGNORED for label in whole.labels)
    longest = answer + 3
    (row,) = encode(prompts(("Once upon a time there was a little girl", " and a dog")), tokenizer, longest)
    assert row.input_ids == whole.input_ids[-longest:] and row.labels == whole.labels[-longest:]
    assert row.cut == len(whole.input_ids) - longest


def test_a_completion_longer_than_allowed_is_cut_at_its_end(tokenizer):
    (whole,) = encode(prompts(("Once", " upon a time there was a little girl")), tokenizer, 100)
    (row,) = encode(prompts(("Once", " upon a time there was a little girl")), tokenizer, 4)
    answer = [label for label in whole.labels if label != IGNORED]
    assert list(row.input_ids) == answer[:4] and row.labels == row.input_ids


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat(*contents):
    roles = ["user", "assistant"] * 3
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return [Example(0, "messages", {"messages": messages})]


@pytest.fixture
def chatty():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_of_a_chat_only_the_last_answer_is_predicted(chatty):
    (row,) = encode(chat("hello", "first answer", "go on", "second answer"), chatty, 200)
    predicted = [label for label in row.labels if label != IGNORED]
    assert predicted == list(row.input_ids[len(row.input_ids) - len(predicted) :])
    assert chatty.decode(predicted).strip() == "second answer"
    assert "first answer" in chatty.decode(row.input_ids)


def test_where_the_template_rewrites_earlier_turns_everything_is_predicted(chatty):
    chatty.chat_template = "{{ messages | length }}" + TEMPLATE
    (row,) = encode(chat("hello", "an answer"), chatty, 200)
    assert IGNORED not in row.labels


def test_a_chat_without_template_or_one_that_refuses_is_an_error(chatty):
    chatty.chat_template = "{{ raise_exception('roles must alternate') }}"
    refusal(lambda: encode(chat("hello", "an answer"), chatty, 200), "row 0", "roles must alternate")
    chatty.chat_template = None
    refusal(lambda: encode(chat("hello", "an answer"), chatty, 200), "no chat template")


def sentences(*values, label=1):
    return [Example(n, "sentence", {"sentence": v}, label) for n, v in enumerate(values)]


def test_words_as_labels_become_the_model_s_classes(tokenizer):
    rows = encode(sentences("a b", label="good") + sentences("a b", label="bad"), tokenizer, 50, {"good": 1, "bad": 0})
    assert [row.labels for row in rows] == [1, 0]
    refusal(lambda: encode(sentences("a", label="ugly"), tokenizer, 50, {"good": 1}), "row 0", "'ugly'")


def test_a_pair_of_sentences_is_one_row_and_cut_to_length(tokenizer):
    pair = [Example(0, "sentence", {"sentence": "Once upon a time", "sentence2": "there was"}, 0)]
    (row,) = encode(pair, tokenizer, 50)
    assert list(row.input_ids) == tokenizer("Once upon a time", "there was")["input_ids"]
    (cut,) = encode(pair, tokenizer, 4)
    assert len(cut.input_ids) == 4 and cut.cut == len(row.input_ids) - 4


def test_a_row_with_nothing_to_predict_is_left_out(tokenizer):
    assert encode(texts("Once upon", "a", ""), tokenizer, 1) == []  # the first token has nothing before it


# Parts


def labelled(labels):
    return [Example(n, "sentence", {"sentence": f"row {n}"}, label) for n, label in enumerate(labels)]


def part_rows(parts):
    return {name: [e.row for e in getattr(parts, name)] for name in PARTS}


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=120),
    st.integers(0, 5),
    st.sampled_from(["20%", "1%", "100%", "1", "7", "1000"]),
    st.none() | st.lists(st.integers(0, 30), min_size=1, max_size=20),
)
@example([1] * 50, 0, "20%", None)
def test_no_row_and_no_copy_of_a_row_is_in_two_parts(contents, seed, sample, evaluation):
    """Rows are drawn from 31 texts, so that many are copies; the evaluation file shares some."""
    rows = [Example(n, "text", {"text": str(c)}) for n, c in enumerate(contents)]
    own = None if evaluation is None else [Example(n, "text", {"text": str(c)}) for n, c in enumerate(evaluation)]
    left = set(contents) - set(evaluation or ())
    if len(left) < (4 if evaluation is None else 3):
        with pytest.raises(InputError, match="too few"):
            split(rows, sample=sample, seed=seed, evaluation=own)
        return
    parts = split(rows, sample=sample, seed=seed, evaluation=own)
    found = [e.values["text"] for name in PARTS for e in getattr(parts, name)]
    assert len(found) == len(set(found))
    assert set(found) == {str(c) for c in set(contents) | set(evaluation or ())}, "and no row is lost"
    assert all(getattr(parts, name) for name in PARTS)
    if evaluation is not None:
        assert {e.values["text"] for e in parts.evaluation} == {str(c) for c in evaluation}


@given(st.integers(0, 1000))
def test_the_same_seed_gives_the_same_parts_and_another_seed_others(seed):
    rows = texts(*[f"row {n}" for n in range(60)])
    one, two, other = (split(rows, sample="20%", seed=s, evaluation=None) for s in (seed, seed, seed + 1))
    assert part_rows(one) == part_rows(two)
    assert part_rows(one) != part_rows(other)


def test_the_parts_do_not_depend_on_the_process():
    """Python's own hashes change from run to run; the parts must not."""
    code = (
        "from lorapack.data.columns import Example; from lorapack.data.split import split;"
        "rows = [Example(n, 'sentence', {'sentence': f'row {n}'}, 'abc'[n % 3]) for n in range(90)];"
        "print([[e.row for e in getattr(split(rows, sample='20%', seed=3), p)]"
        " for p in ('calibration', 'recovery', 'selection', 'evaluation')])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": s}
        ).stdout
        for s in ("1", "2")
    }
    here = split(labelled(["abc"[n % 3] for n in range(90)]), sample="20%", seed=3)
    assert said == {f"{list(part_rows(here).values())}\n"}


@settings(deadline=None)
@given(st.integers(4, 200), st.floats(0, 1), st.integers(0, 100), st.sampled_from(["20%", "10%", "9", "100%"]))
def test_every_part_has_two_labels_in_proportion_within_one_row(count, share, seed, sample):
    ones = round(share * count)
    labels = [1] * ones + [0] * (count - ones)
    random.Random(seed).shuffle(labels)
    parts = split(labelled(labels), sample=sample, seed=seed)
    for name in PARTS:
        part = getattr(parts, name)
        expected = len(part) * ones / count
        assert abs(sum(e.label for e in part) - expected) <= 1 + 1e-9, name


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=8, max_size=150), st.integers(0, 100))
def test_any_stretch_of_the_order_has_the_labels_in_proportion(labels, seed):
    ordered = spread(labelled(labels), seed)
    assert sorted(e.row for e in ordered) == list(range(len(labels)))
    whole = Counter(labels)
    for start in range(0, len(labels), 7):
        stretch = ordered[start : start + 20]
        for label, count in Counter(e.label for e in stretch).items():
            assert abs(count - len(stretch) * whole[label] / len(labels)) < len(whole)


@pytest.mark.parametrize(
    ("sample", "rows"), [("10%", 20), ("20%", 40), ("0.1%", 1), ("1", 1), ("33", 33), ("100%", 129), ("5000", 129)]
)
def test_a_sample_is_a_share_or_a_number_of_rows(sample, rows):
    parts = split(texts(*[f"row {n}" for n in range(200)]), sample=sample, seed=0)
    assert len(parts.calibration) == rows  # of 200: 50 are for the evaluation, 20 for the selection, 1 for recovery
    assert (len(parts.evaluation), len(parts.selection)) == (50, 20)


@pytest.mark.parametrize("sample", ["", "%", "0", "0%", "-3", "-5%", "many", "1.5", "nan%", "inf%", "1e400%", "20 %x"])
def test_a_sample_that_is_no_such_number_is_refused(sample):
    refusal(lambda: split(texts(*"abcdefgh"), sample=sample, seed=0), "--sample", repr(sample))


# From a file to the parts


def reader(tokenizer, classes=None, longest=64):
    return Reader(tokenizer, longest, classes)


def test_prepare_accounts_for_every_row(tokenizer):
    found = prepare(reader(tokenizer), str(CALIBRATION), sample="20%", seed=1, most_recovery=40)
    parts = found.facts["parts"]
    assert {name: part["rows"] for name, part in parts.items()} == {
        name: len(getattr(found, name)) for name in ("calibration", "recovery", "selection", "evaluation")
    }
    assert parts["recovery"]["rows"] == 40 and parts["calibration"]["rows"] == 53
    assert found.facts["rows"] == 267 and found.facts["rows_unusable"] == 0
    used = [f for part in parts.values() for f in part["fingerprints"]]
    assert len(used) == len(set(used)) == sum(part["rows"] for part in parts.values())
    for part in parts:
        rows = getattr(found, part)
        assert parts[part]["tokens"] == sum(len(row.input_ids) for row in rows)
    assert found.facts["tokens_cut"] > 0 and found.facts["longest"] == 64


def test_rows_of_the_evaluation_file_are_in_no_other_part(tokenizer, tmp_path):
    rows = read_rows(CALIBRATION)[:60]
    whole, held = write(tmp_path / "all.jsonl", rows), write(tmp_path / "held.jsonl", rows[:20])
    found = prepare(reader(tokenizer), str(whole), eval_data=str(held), sample="20%", seed=0, most_recovery=1000).facts[
        "parts"
    ]
    held_out = {fingerprint(e) for e in examples(rows[:20], detect(rows, False, {}))}
    assert set(found["evaluation"]["fingerprints"]) == held_out
    for name in ("calibration", "recovery", "selection"):
        assert not held_out & set(found[name]["fingerprints"])


def test_evaluating_leaves_out_the_rows_that_were_used(tokenizer, tmp_path):
    rows = read_rows(HELDOUT)[:20]
    path = write(tmp_path / "rows.jsonl", rows + rows[:3])
    usable = examples(rows, detect(rows, False, {}))
    used = {fingerprint(e) for e in usable[:8]}
    found, facts = prepare_evaluation(reader(tokenizer), str(path), used=used)
    assert [row.row for row in found] == list(range(8, 20))
    assert facts["rows_used_before"] == 8
    everything = {fingerprint(e) for e in usable}
    refusal(lambda: prepare_evaluation(reader(tokenizer), str(path), used=everything), str(path), "every usable row")


def test_data_without_a_usable_row_are_refused(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": ""}] * 9)
    refusal(
        lambda: prepare(reader(tokenizer), str(path), sample="20%", seed=0, most_recovery=9),
        str(path),
        "none of its 9 rows",
        "prompt=prompt, completion=completion",
    )


def test_rows_with_nothing_to_predict_in_a_whole_part_are_refused(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": chr(97 + n)} for n in range(9)])
    tight = reader(tokenizer, longest=1)
    refusal(lambda: prepare(tight, str(path), sample="20%", seed=0, most_recovery=9), str(path), "part")


@pytest.mark.parametrize("label", [2, 7, 0.5])
def test_a_label_that_is_no_class_of_the_model_is_refused_with_its_row(label, tokenizer, tmp_path):
    rows = [{"sentence": f"row {n}", "label": n % 2} for n in range(20)]
    rows[11]["label"] = label
    path = write(tmp_path / "rows.jsonl", rows)
    model = reader(tokenizer, 2)
    refusal(lambda: prepare(model, str(path), sample="20%", seed=0, most_recovery=100), str(path), "row 11", str(label))


def test_numbers_are_labels_of_a_regression(tokenizer, tmp_path):
    rows = [{"sentence": f"row {n}", "label": n / 3} for n in range(20)]
    model = reader(tokenizer, 1)
    found = prepare(model, str(write(tmp_path / "r.jsonl", rows)), sample="20%", seed=0, most_recovery=100)
    assert all(row.labels == row.row / 3 for row in found.evaluation)


# Batches


@st.composite
def encoded_rows(draw):
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=30))
    return [Encoded(n, tuple(range(1, k + 1)), tuple(range(1, k + 1))) for n, k in enumerate(lengths)]


def assert_padded_right(batch, rows, pad):
    for place, ids, mask, labels in zip(batch.places, batch.input_ids, batch.attention_mask, batch.labels, strict=True):
        length = len(rows[place].input_ids)
        assert ids.tolist() == [*rows[place].input_ids, *[pad] * (len(ids) - length)]
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length)
        assert labels.tolist() == [*rows[place].labels, *[IGNORED] * (len(ids) - length)]


@settings(deadline=None)
@given(encoded_rows(), st.integers(1, 40))
def test_batches_hold_every_row_once_longest_first_and_padding_masked(rows, tokens):
    found = batches(rows, tokens, pad=0)
    assert sorted(place for batch in found for place in batch.places) == list(range(len(rows)))
    lengths = [len(rows[place].input_ids) for batch in found for place in batch.places]
    assert lengths == sorted(lengths, reverse=True)
    for batch in found:
        assert batch.input_ids.numel() <= max(tokens, batch.input_ids.shape[1])
        assert_padded_right(batch, rows, 0)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(encoded_rows(), st.integers(1, 6), st.integers(1, 20), st.integers(0, 3))
def test_training_batches_are_even_and_go_through_every_row_before_any_comes_again(rows, size, steps, seed):
    found = list(training_batches(rows, size, steps, 0, seed))
    assert len(found) == steps
    an_epoch = -(-len(rows) // size)
    for start in range(0, steps - an_epoch + 1, an_epoch):
        seen = [place for batch in found[start : start + an_epoch] for place in batch.places]
        assert sorted(seen) == list(range(len(rows)))
    lengths = [len(batch.places) for batch in found]
    assert max(lengths) <= size and max(lengths) - min(lengths) <= 1
    again = list(training_batches(rows, size, steps, 0, seed))
    assert [b.places for b in again] == [b.places for b in found]
    for batch in found:
        assert_padded_right(batch, rows, 0)


def test_class_labels_and_token_types_go_into_a_batch(tokenizer):
    rows = [Encoded(0, (1, 2, 3), 1, (0, 0, 1)), Encoded(1, (4,), 0, (0,))]
    (batch,) = batches(rows, 100, pad=9)
    assert batch.labels.tolist() == [1, 0]
    assert batch.token_types.tolist() == [[0, 0, 1], [0, 0, 0]]
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.input_ids, batch.input_ids) and moved.places == batch.places
