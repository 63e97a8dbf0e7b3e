"""Rows as token ids with the positions that count for the loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorapack.data.columns import Example
from lorapack.errors import InputError

IGNORED = -100  # no label here


@dataclass(frozen=True)
class Encoded:
    """One row for the model.

    Attributes:
        row: its number in the source.
        input_ids: token ids, no padding.
        labels: for a language model one a position, `IGNORED` where nothing is predicted; for
            classification the class or number alone.
        token_types: 0 or 1 a position, where the tokenizer tells two sentences apart.
        cut: tokens left out to fit the longest allowed length.
    """

    row: int
    input_ids: tuple[int, ...]
    labels: tuple[int, ...] | int | float
    token_types: tuple[int, ...] | None = None
    cut: int = 0


def encode(
    examples: Sequence[Example], tokenizer: Any, longest: int, label_ids: Mapping[str, int] | None = None
) -> list[Encoded]:
    """Tokenise rows; those with nothing to predict are left out.

    Too long rows are cut: prompts from their beginning, everything else from its end.

    Args:
        examples: of one form.
        tokenizer: of the base model.
        longest: the most tokens a row may have.
        label_ids: the model's own names of its classes, for labels that are words.

    Raises:
        InputError: a chat without a template, or a label the model does not know.
    """
    encoders = {"text": _text, "prompt": _prompt, "messages": _messages}
    found = []
    for example in examples:
        if example.form == "sentence":
            found.append(_sentence(example, tokenizer, longest, label_ids or {}))
        else:
            row = encoders[example.form](example, tokenizer, longest)
            assert isinstance(row.labels, tuple)
            if any(label != IGNORED for label in row.labels[1:]):
                found.append(row)
    return found


def _text(example: Example, tokenizer: Any, longest: int) -> Encoded:
    ids = _ids(tokenizer, example.values["text"])
    kept = ids[:longest]
    return Encoded(example.row, tuple(kept), tuple(kept), cut=len(ids) - len(kept))


def _prompt(example: Example, tokenizer: Any, longest: int) -> Encoded:
    prompt = _ids(tokenizer, example.values["prompt"])
    completion = _ids(tokenizer, example.values["completion"], special=False)
    if tokenizer.eos_token_id is not None:
        completion.append(tokenizer.eos_token_id)
    return _joined(example.row, prompt, completion, longest)


def _messages(example: Example, tokenizer: Any, longest: int) -> Encoded:
    if not tokenizer.chat_template:
        raise InputError("the data are chats (messages) and the base model's tokenizer has no chat template")
    messages = example.values["messages"]
    try:
        before = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # the template is the model author's program and may raise anything
        raise InputError(f"row {example.row}: the chat template refuses it ({str(error).splitlines()[0]})") from None
    if not whole.startswith(before):  # a template that rewrites earlier turns: predict everything
        before = ""
    prompt = _ids(tokenizer, before, special=False) if before else []
    return _joined(example.row, prompt, _ids(tokenizer, whole[len(before) :], special=False), longest)


def _sentence(example: Example, tokenizer: Any, longest: int, label_ids: Mapping[str, int]) -> Encoded:
    texts = [example.values[role] for role in ("sentence", "sentence2") if role in example.values]
    whole = tokenizer(*texts, return_length=False)
    ids = whole["input_ids"]
    cut = tokenizer(*texts, truncation=True, max_length=longest) if len(ids) > longest else whole
    label = example.label
    if isinstance(label, str):
        if label not in label_ids:
            raise InputError(f"row {example.row}: the model has no class {label!r}; give its number as the label")
        label = label_ids[label]
    assert label is not None
    types = cut.get("token_type_ids")
    kept = cut["input_ids"]
    return Encoded(example.row, tuple(kept), label, tuple(types) if types else None, cut=len(ids) - len(kept))


def _joined(row: int, prompt: list[int], completion: list[int], longest: int) -> Encoded:
    room = max(0, longest - len(completion))
    kept = (prompt[len(prompt) - min(room, len(prompt)) :], completion[:longest])
    cut = len(prompt) + len(completion) - len(kept[0]) - len(kept[1])
    return Encoded(row, (*kept[0], *kept[1]), (*(IGNORED for _ in kept[0]), *kept[1]), cut=cut)


def _ids(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
