"""The state of a recovery on disk, from which it can go on; tensors and JSON, no pickle."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorapack.errors import InputError
from lorapack.read.files import read_safetensors
from lorapack.write.file import new_file

KIND = "lorapack_recovery"
MOMENTS = "step", "exp_avg", "exp_avg_sq"  # AdamW's, of each parameter


@dataclass(eq=False)
class State:
    """Where a recovery stands.

    Attributes:
        step: taken so far; `best` the one with the best objective; the last `worse` checks were surely worse, and the
            rate has been cut `cuts` times.
        curve: (step, objective on the selection rows).
        now, kept: the parameters, and those of the best step.
        judged: the best step's objective by row, see `lorapack.recover.objective.measured_by_row`.
        moments: of the optimiser, by name; empty before its first step.
        generator: of the rank masks.
    """

    now: list[Tensor]
    kept: list[Tensor]
    judged: Tensor
    curve: list[tuple[int, float]] = field(default_factory=list)
    step: int = 0
    best: int = 0
    worse: int = 0
    cuts: int = 0
    moments: dict[str, Tensor] = field(default_factory=dict)
    generator: Tensor | None = None


def save(state: State, path: Path, facts: Mapping[str, Any]) -> None:
    """Write the state, whole or not at all; `facts` say which recovery it is of.

    Raises:
        OutputError: it cannot be written.
    """
    tensors = {f"now.{n}": t for n, t in enumerate(state.now)} | {f"kept.{n}": t for n, t in enumerate(state.kept)}
    tensors["judged"] = state.judged
    tensors |= {f"moments.{name}": t for name, t in state.moments.items()}
    if state.generator is not None:
        tensors["generator"] = state.generator
    header = {name: getattr(state, name) for name in ("curve", "step", "best", "worse", "cuts")}
    metadata = {KIND: json.dumps({"facts": facts, **header})}
    with new_file(path, overwrite=True) as temporary:
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, temporary, metadata)


def load(path: Path, facts: Mapping[str, Any], like: Sequence[Tensor], rows: int) -> State:
    """Read a state of such parameters and of so many selection rows.

    Raises:
        InputError: it is no such file, or of another recovery; names what differs.
    """
    tensors, metadata = read_safetensors(path)
    try:
        header = json.loads(metadata[KIND])
        before = header.pop("facts")
        differs = sorted(name for name in {*before, *facts} if before.get(name) != facts.get(name))
        if differs:
            raise InputError(f"{path} is the state of another recovery: it differs in {', '.join(differs)}")

        def several(name: str) -> list[Tensor]:
            return [_of_shape(tensors, f"{name}.{n}", p.shape).to(p.device) for n, p in enumerate(like)]

        stepped = sorted({name.split(".")[1] for name in tensors if name.startswith("moments.")})
        shapes = {str(n): p.shape for n, p in enumerate(like)}
        return State(
            now=several("now"),
            kept=several("kept"),
            judged=_of_shape(tensors, "judged", (2, rows)),
            curve=[(int(step), float(value)) for step, value in header.pop("curve")],
            moments={
                f"{n}.{of}": _of_shape(tensors, f"moments.{n}.{of}", () if of == "step" else shapes.get(n))
                for n in stepped
                for of in MOMENTS
            },
            generator=tensors.get("generator"),
            **{name: int(value) for name, value in header.items()},
        )
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no state of a recovery ({error!r})") from None


def _of_shape(tensors: Mapping[str, Tensor], name: str, shape: Sequence[int] | None) -> Tensor:
    found = tensors[name]
    if shape is None:
        raise ValueError(f"{name} is of no parameter")
    if tuple(found.shape) != tuple(shape) or not found.is_floating_point():
        raise ValueError(f"{name} is {found.dtype} of shape {tuple(found.shape)}, not floats of shape {tuple(shape)}")
    return found


def moments(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    return {
        f"{n}.{name}": value for n, p in enumerate(parameters) for name, value in optimizer.state.get(p, {}).items()
    }


def restore_moments(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], found: Mapping[str, Tensor]
) -> None:
    optimizer.state.clear()
    for name, value in found.items():
        n, _, which = name.partition(".")
        p = parameters[int(n)]
        optimizer.state[p][which] = value if which == "step" else value.to(p.device)
