"""ONNX Runtime against torch: the written files against the base with PEFT's adapter, on text.

torch goes first and is let go of, so that the model is never in memory twice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorapack.errors import GateError, InputError
from lorapack.export.tasks import Task
from lorapack.merge.numbers import Array
from lorapack.model.load import longest, quiet

TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3}  # of every number, times the largest of the reference where that is above 1
LENGTHS = (1, 2, 7, 20)  # tokens of the rows of the padded batch
MOST_NUMBERS = 1 << 25  # of the output for the row that stands alone
STEPS = 64  # tokens that are continued
TEXT = (
    "The harbour was quiet when the ferry came in. A man with two suitcases asked the way to the station, and the "
    "woman at the counter, who had been reading, drew it for him on the back of a ticket: left at the church, then "
    "straight on for ten minutes. He thanked her twice. It had rained in the night and the stones were still wet. "
    "Most of the shops would not open before nine, but the bakery on the corner had its lights on, and for the first "
    "time in weeks he was hungry. "
)
Feeds = Mapping[str, Any]  # arrays; torch's cache is one object
Step = Callable[[Feeds], dict[str, Any]]


@dataclass(frozen=True)
class Figures:
    """How far ONNX Runtime is from torch.

    Attributes:
        largest: the largest difference of a number in the outputs.
        scale: the largest number in torch's.
        numbers: how many were compared.
        lengths: of the rows, in tokens.
        decisions: labels, or greedily continued tokens, that were compared.
        equal: how many of them are the same.
    """

    largest: float
    scale: float
    numbers: int
    lengths: list[int]
    decisions: int
    equal: int

    def check(self, dtype: str, what: str) -> None:
        """Refuse a difference above the tolerance; of 8 bits nothing is asked.

        Raises:
            GateError: says both.
        """
        allowed = TOLERANCE.get(dtype, float("inf")) * max(1.0, self.scale)
        if not self.largest <= allowed:  # a NaN too
            raise GateError(
                f"{what} differs from torch by {self.largest:.2g}, allowed are {allowed:.2g}: nothing was written. "
                "--no-verify writes it all the same"
            )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Rows:
    """Token ids to check with: short rows that are padded to one batch, and a long one."""

    short: list[list[int]]
    long: list[int]
    pad: int

    @property
    def lengths(self) -> list[int]:
        return [*map(len, self.short), len(self.long)]


@dataclass(frozen=True, eq=False)
class Answers:
    """What one side says: outputs where tokens are, and decisions."""

    outputs: list[Array]
    decisions: list[int]


def read_rows(directory: Path, config: Any, task: Task) -> Rows:
    """Rows of real text, as long as the model takes, with room to be continued.

    Args:
        directory: holds the tokenizer.
        config: transformers' configuration.
        task: of the model.

    Raises:
        InputError: there is no tokenizer.
    """
    import transformers

    try:
        with quiet():  # the text is longer than the model takes, on purpose
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
            ids = [int(n) for n in tokenizer(TEXT * 6)["input_ids"]]
    except Exception as error:  # transformers and tokenizers raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the base has no tokenizer that can be loaded ({reason[:120]}), and the check reads text: "
            "put one beside the base, or export with --no-verify"
        ) from None
    most = longest(None, config, tokenizer)
    if task == "CAUSAL_LM":
        most = min(max(1, most - STEPS), MOST_NUMBERS // config.get_text_config().vocab_size)
    return Rows([ids[: min(n, most)] for n in LENGTHS], ids[:most], config.get_text_config().pad_token_id or 0)


def compare(one: Answers, two: Answers, rows: Rows) -> Figures:
    """The figures of two sides, torch's first.

    Raises:
        ValueError: outputs of other shapes.
    """
    largest = scale = 0.0
    for torchs, ours in zip(one.outputs, two.outputs, strict=True):
        if torchs.shape != ours.shape:
            raise ValueError(f"an output of shape {ours.shape} instead of {torchs.shape}")
        difference = np.abs(torchs - ours.astype(np.float32)).max()
        largest = float(difference) if not difference <= largest else largest
        scale = max(scale, float(np.abs(torchs).max()))
    return Figures(
        largest=largest,
        scale=scale,
        numbers=sum(output.size for output in one.outputs),
        lengths=rows.lengths,
        decisions=len(one.decisions),
        equal=sum(a == b for a, b in zip(one.decisions, two.decisions, strict=True)),
    )


def answer(task: Task, rows: Rows, step: Step, inputs: Sequence[str]) -> Answers:
    """Everything that is asked of one side.

    Args:
        task: decides what is asked.
        rows: the tokens.
        step: one pass: inputs by name to outputs by name. A decoder's takes and gives the cache.
        inputs: the names that it takes.
    """
    if task == "CAUSAL_LM":
        return _continue(rows, step)
    return _translate(rows, step) if task == "SEQ_2_SEQ_LM" else _encode(task, rows, step, inputs)


def _encode(task: Task, rows: Rows, step: Step, inputs: Sequence[str]) -> Answers:
    outputs, decisions = [], []
    for batch in (rows.short, [rows.long]):
        ids, mask = _padded(batch, rows.pad, left=False)
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        (found,) = step({name: feeds[name] for name in inputs}).values()
        kept = found if task == "SEQ_CLS" else found[mask.astype(bool)]
        outputs.append(kept)
        if task != "FEATURE_EXTRACTION":
            decisions += kept.argmax(-1).tolist()
    return Answers(outputs, decisions)


def _continue(rows: Rows, step: Step) -> Answers:
    """A padded batch and its next tokens out of the cache, a long row, and a greedy continuation."""
    ids, mask = _padded(rows.short, rows.pad, left=True)
    first = step(_feeds(ids, mask))
    outputs = [first.pop("logits")[mask.astype(bool)]]
    mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
    outputs.append(step({**_feeds(ids[:, -1:], mask), **_past(first)})["logits"])
    last = step(_feeds(*_padded([rows.long], rows.pad, left=True)))
    outputs.append(last.pop("logits")[0])
    chosen: list[int] = []
    logits = outputs[-1][-1]
    mask = np.ones((1, len(rows.long)), np.int64)
    for _ in range(STEPS):
        chosen.append(int(logits.argmax()))
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
        last = step({**_feeds(np.array([[chosen[-1]]]), mask), **_past(last)})
        logits = last.pop("logits")[0, -1]
    return Answers(outputs, chosen)


def _translate(rows: Rows, step: Step) -> Answers:
    """A padded batch through the encoder and a few tokens of the decoder, and a greedy continuation of a long row."""
    ids, mask = _padded(rows.short, rows.pad, left=False)
    found = step({"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :3]})
    outputs = [found.pop("logits")]
    outputs.append(step({**found, "attention_mask": mask, "decoder_input_ids": ids[:, 3:4]})["logits"])
    ids, mask = _padded([rows.long], rows.pad, left=False)
    feeds = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": np.full((1, 1), rows.pad, np.int64)}
    chosen: list[int] = []
    for _ in range(STEPS):
        found = step(feeds)
        logits = found.pop("logits")[:, -1]
        outputs += [] if chosen else [logits]
        chosen.append(int(logits.argmax()))
        feeds = {**found, "attention_mask": mask, "decoder_input_ids": np.array([chosen[-1:]])}
    return Answers(outputs, chosen)


def _padded(batch: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Array, Array]:
    """Ids and mask, both (rows, longest) int64."""
    longest = max(map(len, batch))
    ids, mask = np.full((len(batch), longest), pad, np.int64), np.zeros((len(batch), longest), np.int64)
    for n, row in enumerate(batch):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[n, place], mask[n, place] = row, 1
    return ids, mask


def _feeds(ids: Array, mask: Array) -> dict[str, Array]:
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def _past(present: Mapping[str, Array]) -> dict[str, Array]:
    return {name.replace("present", "past_key_values", 1): tensor for name, tensor in present.items()}


class Session:
    """The written graph in ONNX Runtime, on the CPU."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.file = f"{path.stem}.onnx_adapter"
        self.activate(None)

    def activate(self, adapters: Path | None) -> None:
        """Run with the adapter in this directory from now on; None: without."""
        import onnxruntime

        self.options = onnxruntime.RunOptions()
        if adapters is not None:
            self.adapter = onnxruntime.LoraAdapter()  # kept: the options only point to it
            self.adapter.Load(str(adapters / self.file))
            self.options.add_active_adapter(self.adapter)

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        given = {name: tensor for name, tensor in feeds.items() if name in self.inputs}
        given |= {name: _empty(value, feeds) for name, value in self.inputs.items() if name not in given}
        return dict(zip(self.outputs, self.session.run(None, given, self.options), strict=True))


class Sessions:
    """An encoder and its decoder."""

    def __init__(self, encoder: Path, decoder: Path) -> None:
        self.encoder, self.decoder = Session(encoder), Session(decoder)

    def activate(self, adapters: Path | None) -> None:
        """Run with the two adapters of this directory from now on; None: without."""
        self.encoder.activate(adapters)
        self.decoder.activate(adapters)

    def __call__(self, feeds: Feeds) -> dict[str, Any]:
        hidden = feeds.get("encoder_hidden_states")
        if hidden is None:
            hidden = self.encoder(feeds)["last_hidden_state"]
        given = {
            **_past(feeds),
            "input_ids": feeds["decoder_input_ids"],
            "encoder_attention_mask": feeds["attention_mask"],
        }
        return {**self.decoder({**given, "encoder_hidden_states": hidden}), "encoder_hidden_states": hidden}


def _empty(value: Any, feeds: Feeds) -> Array:
    """The cache before the first token."""
    batch = len(feeds["input_ids"])
    dtype = np.float16 if "float16" in value.type else np.float32
    return np.zeros([batch, value.shape[1], 0, value.shape[3]], dtype)


def torch_step(model: Any, task: Task, inputs: Sequence[str]) -> Step:
    """A step of transformers' model; a decoder's cache is its own, and is handed through as one object."""
    import torch

    def run(feeds: Feeds) -> dict[str, Any]:
        given = {name: torch.from_numpy(tensor) for name, tensor in feeds.items() if name in inputs}
        with torch.no_grad():
            if task == "SEQ_2_SEQ_LM":
                kept = {name: feeds[name] for name in ("encoder_outputs", "past_key_values") if name in feeds}
                found = model(**given, **kept, use_cache=True)
                kept = {"encoder_outputs": (found.encoder_last_hidden_state,), "past_key_values": found.past_key_values}
                return {"logits": found.logits.numpy(), **kept}
            if task == "FEATURE_EXTRACTION":
                return {"last_hidden_state": model(**given).last_hidden_state.numpy()}
            if task != "CAUSAL_LM":
                return {"logits": model(**given).logits.numpy()}
            found = model(**given, past_key_values=feeds.get("past_key_values"), use_cache=True)
        return {"logits": found.logits.numpy(), "present": found.past_key_values}

    return run
