"""`lorapack.verify`: two directories on the same inputs, compared number by number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorapack.errors import GateError, InputError
from lorapack.model.load import Device, DType
from lorapack.verify.inputs import Inputs, drawn, given
from lorapack.verify.side import Place, Side, find, kind_of, loading, opened

# The greatest difference allowed, in standard deviations of the outputs, by the coarsest type at work: what
# rounding every weight of a deep model once in that type may do to its outputs.
TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.15}
EXACT = 1e-5  # a mean difference of so many standard deviations is float32's own


@dataclass(frozen=True)
class Verification:
    """How far apart the outputs of two directories are.

    Attributes:
        outputs: how many numbers were compared.
        greatest, mean: of the absolute differences.
        spread: standard deviation of the first one's outputs: the unit of the tolerance.
        agreement: share of positions whose greatest output is the same one (top-1); None where
            there is only one output a position.
        effect: mean absolute difference that the adapter itself makes; None where neither is an adapter.
        tolerance: greatest difference allowed, in units of `spread`.
        dtype: the coarsest type at work, which the tolerance comes from.
        reasons: why they are not the same; empty where they are.
    """

    outputs: int
    greatest: float
    mean: float
    spread: float
    agreement: float | None
    effect: float | None
    tolerance: float
    dtype: str
    reasons: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        return not self.reasons


def verify(
    one: str | Path,
    other: str | Path,
    base: str | Path | None = None,
    *,
    data: str | None = None,
    columns: Mapping[str, str] | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    device: Device = "auto",
    dtype: DType = "auto",
    trust_remote_code: bool = False,
) -> Verification:
    """Run two directories on the same inputs and compare their outputs.

    Each is an adapter directory (plain, expanded or compact, put on its base by PEFT) or a model directory.
    They are loaded one after the other. Logits are compared where there are some, else the model's first output.

    Args:
        one: the reference.
        other: what should say the same.
        base: of adapters, if not as they say.
        data, columns: real rows, see `lorapack.data.rows.read_rows`; otherwise inputs are drawn.
        tolerance: greatest difference allowed, in standard deviations of the outputs; by default what the
            coarsest type of weights makes likely (`TOLERANCES`).
        seed: of drawn inputs.
        device: ``auto`` takes a CUDA device where there is one.
        dtype: computed in; ``auto`` is float32 on the CPU and the checkpoint's type on a GPU.
        trust_remote_code: run code that the base model brings along.

    Raises:
        InputError: one of them is neither, cannot be loaded, or the data do not fit.
    """
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"--tolerance {tolerance} must be 0 or more")
    places = find(one, base), find(other, base)
    kind = kind_of(places, trust_remote_code)
    outputs, effect, types = [], None, set()
    inputs: list[Inputs] = []
    for place in places:
        with opened(place, kind, device, dtype, trust_remote_code) as side:
            inputs = inputs or _inputs(side, place, data, columns, seed, trust_remote_code)
            outputs.append([_outputs(side, each, place) for each in inputs])
            if effect is None and side.wrapped is not None:
                with side.without_adapter():
                    effect = _mean(outputs[-1], [side.run(each) for each in inputs])
            types |= {side.stored, side.model.dtype}
    coarsest = max(types, key=lambda each: torch.finfo(each).eps)
    allowed = TOLERANCES[coarsest] if tolerance is None else tolerance
    return _compared(outputs[0], outputs[1], effect, coarsest, allowed)


def demand_same(found: Verification) -> None:
    """Let a difference end the command.

    Raises:
        GateError: says how far apart the two are.
    """
    if not found.same:
        raise GateError(f"the two do not say the same: {'; '.join(found.reasons)}")


def _inputs(
    side: Side, place: Place, data: str | None, columns: Mapping[str, str] | None, seed: int, trust_remote_code: bool
) -> list[Inputs]:
    if data is None:
        return drawn(side.model, seed)
    with loading(place):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            place.source, revision=place.revision, trust_remote_code=trust_remote_code
        )
    return given(side.model, tokenizer, data, columns, seed)


def _outputs(side: Side, inputs: Inputs, place: Place) -> Tensor:
    try:
        return side.run(inputs)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:  # whatever the architecture's code says
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{place.directory} cannot be run on the sample inputs ({reason[:200]})") from None


def _mean(one: Sequence[Tensor], two: Sequence[Tensor]) -> float:
    """Of the absolute differences, over all rows."""
    return sum(float((a - b).abs().sum(dtype=torch.float64)) for a, b in zip(one, two, strict=True)) / _count(one)


def _count(outputs: Sequence[Tensor]) -> int:
    return sum(each.numel() for each in outputs)


def _compared(
    one: Sequence[Tensor], two: Sequence[Tensor], effect: float | None, coarsest: torch.dtype, tolerance: float
) -> Verification:
    shapes = [(tuple(a.shape), tuple(b.shape)) for a, b in zip(one, two, strict=True) if a.shape != b.shape]
    if shapes:
        raise InputError(f"their outputs have the shapes {shapes[0][0]} and {shapes[0][1]}: two different models")
    greatest, mean = max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True)), _mean(one, two)
    spread = float(torch.cat([each.reshape(-1) for each in one]).std(correction=0))
    same = [(a.argmax(-1) == b.argmax(-1)).reshape(-1) for a, b in zip(one, two, strict=True)]
    agreement = float(torch.cat(same).float().mean()) if one[0].shape[-1] > 1 else None
    reasons = []
    if not greatest <= tolerance * spread:  # also where it is not a number
        reasons.append(f"the greatest difference is {greatest:.3g}, allowed are {tolerance:g} x {spread:.3g}")
    if effect is not None and mean > max(effect / 2, EXACT * spread):
        reasons.append(f"on average they differ by {mean:.3g}, and the adapter itself makes {effect:.3g}")
    return Verification(
        outputs=_count(one),
        greatest=greatest,
        mean=mean,
        spread=spread,
        agreement=agreement,
        effect=effect,
        tolerance=tolerance,
        dtype=str(coarsest).removeprefix("torch."),
        reasons=tuple(reasons),
    )
