"""loralib's state dicts: ``….lora_A`` and ``….lora_B`` without a configuration, so without the alpha.

A merged projection (`MergedLinear`, such as GPT-2's ``c_attn``) stacks the A's of the parts that have a LoRA and their
B's; where those parts lie in the layer its ``enable_lora`` says, which the file does not hold.

Source: loralib ``layers.py`` (``Linear``, ``MergedLinear.merge_AB``, ``zero_pad``; scaling = lora_alpha / r).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorapack.convert.pairs import Pair, adapter_of, check_finite
from lorapack.core.adapter import Adapter
from lorapack.core.names import PREFIX
from lorapack.errors import InputError

_HALVES = (".lora_A", ".lora_B")
_CLASSIFIERS = ("classifier", "score")  # PEFT saves modules of these names for a sequence classification


def from_loralib(
    tensors: Mapping[str, Tensor], alpha: float | None, enabled: Sequence[bool] | None, where: str
) -> Adapter:
    """The adapter of a loralib state dict; other modules in it are saved modules.

    Args:
        tensors: of the file.
        alpha: the ``lora_alpha`` it was trained with.
        enabled: the ``enable_lora`` of its merged projections; None where it has none.
        where: the file, for messages.

    Raises:
        InputError: no alpha, merged projections without `enabled` or that do not fit it, a half without the other,
            or a tensor that could be of a base model.
    """
    if alpha is None:
        raise InputError(f"{where} is a loralib state dict, which does not hold its alpha; name it with --alpha")
    halves: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, dot, half = name.rpartition(".")
        if dot + half in _HALVES:
            halves.setdefault(module, {})[half] = tensor
        else:
            rest[name] = tensor
    pairs = {}
    for module, parts in halves.items():
        for here, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
            if here not in parts:
                raise InputError(f"{where}: {module} has {other} but no {here}")
        pairs[module] = _pair(parts["lora_A"], parts["lora_B"], alpha, enabled, f"{where}: {module}")
    check_finite(rest.values(), f"{where}: a saved module")
    saved = _saved(rest, pairs, where)
    task = "SEQ_CLS" if any(name in _CLASSIFIERS for name in saved) else None
    return adapter_of(
        pairs,
        where,
        {f"{PREFIX}{name}": tensor for name, tensor in rest.items()},
        modules_to_save=saved or None,
        task_type=task,
    )


def _pair(a: Tensor, b: Tensor, alpha: float, enabled: Sequence[bool] | None, where: str) -> Pair:
    """A plain pair; that of a merged projection has the parts' ranks side by side, and zeros where B has no rows.

    Args:
        a: (parts x rank, d_in).
        b: (parts x rows, rank), with rows those of one part.
    """
    if not a.ndim == b.ndim == 2 or 0 in (*a.shape, *b.shape) or a.shape[0] % b.shape[1]:
        raise InputError(f"{where} has factors of the shapes {tuple(a.shape)} and {tuple(b.shape)}")
    parts, rank = a.shape[0] // b.shape[1], b.shape[1]
    if parts == 1:
        return Pair(a, b, alpha)
    if enabled is None:
        raise InputError(
            f"{where} is a merged projection, {parts} parts of which have a LoRA; name its enable_lora with "
            "--enable-lora, for example true,false,true for query and value"
        )
    if sum(enabled) != parts or b.shape[0] % parts:
        raise InputError(f"{where} has a LoRA on {parts} parts, which is not what --enable-lora says")
    rows = b.shape[0] // parts
    whole = torch.zeros(len(enabled) * rows, a.shape[0], dtype=b.dtype)
    for part, place in enumerate(place for place, on in enumerate(enabled) if on):
        columns = slice(part * rank, (part + 1) * rank)
        whole[place * rows : (place + 1) * rows, columns] = b[part * rows : (part + 1) * rows]
    return Pair(a, whole, alpha * parts)  # the rank is `parts` times that which alpha was for


def _saved(rest: Mapping[str, Tensor], pairs: Mapping[str, Pair], where: str) -> list[str]:
    """The modules that PEFT is to save: those whose first component has no LoRA in it."""
    adapted = {module.partition(".")[0] for module in pairs}
    saved = []
    for name in rest:
        first, dot, _ = name.partition(".")
        if not dot or first in adapted:
            raise InputError(
                f"{where}: {name} is a trained tensor of the base model itself, which is not converted; leave it out "
                "of the file (loralib's lora_state_dict with bias='none')"
            )
        saved.append(first)
    return list(dict.fromkeys(saved))
