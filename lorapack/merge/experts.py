"""LoRA on the fused experts of a layer (PEFT's `target_parameters`), as updates of the experts' own tensors.

In memory, transformers 5 holds the experts of a layer as `gate_up_proj` (experts, 2·d_ff, d) and `down_proj`
(experts, d, d_ff); in the files each expert has its own gate, up and down matrix. PEFT 0.21 keeps, for the E
experts together, A as (E·r, d_in), the experts one after the other, and B as (d_out, r·E), the experts
alternating; where both parameters of a layer are adapted, the inner one's name has a `base_layer` in it.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorapack.errors import InputError
from lorapack.merge.numbers import Array
from lorapack.merge.updates import Update, Updates, is_fused


@dataclass(frozen=True)
class Layout:
    """Where the files of a kind of model have the experts, and what its configuration calls their width."""

    experts: str
    gate: str
    up: str
    down: str
    width: str


_QWEN = Layout("mlp.experts", "gate_proj", "up_proj", "down_proj", "moe_intermediate_size")
LAYOUTS = {
    "mixtral": Layout("block_sparse_moe.experts", "w1", "w3", "w2", "intermediate_size"),
    "qwen2_moe": _QWEN,
    "qwen3_moe": _QWEN,
}
MODULE = "mlp.experts"  # in memory


def split(updates: Updates, config: Mapping[str, Any]) -> Updates:
    """The updates with every pair on fused experts replaced by one for each matrix of each expert.

    Args:
        updates: of an adapter.
        config: the base's `config.json`.

    Raises:
        InputError: how this kind of model keeps its experts is not certain; names the module.
    """
    fused = {module: update for module, update in updates.modules.items() if is_fused(module, updates.config)}
    if not fused:
        return updates
    kind = config.get("model_type")
    stems = {module: module.replace(".base_layer", "") for module in fused}
    strange = next((module for module, stem in stems.items() if not stem.endswith(f".{MODULE}")), None)
    patterns = updates.settings.rank_pattern or updates.settings.alpha_pattern
    if kind not in LAYOUTS or strange or patterns:
        what = strange or next(iter(fused))
        why = "with rank_pattern or alpha_pattern" if patterns else f"in a model of type {kind!r}"
        raise InputError(
            f"{what}: how LoRA on fused parameters (target_parameters) {why} maps to the files is not certain; "
            "use PEFT's merge_and_unload"
        )
    layout = LAYOUTS[str(kind)]
    whole = functools.lru_cache(maxsize=4)(lambda module: fused[module].read())  # for the experts that follow
    modules = {module: update for module, update in updates.modules.items() if module not in fused}
    for module, update in fused.items():
        stem = stems[module].removesuffix(MODULE) + layout.experts
        for expert, matrix, rows in _matrices(module, update, updates.settings.r, layout, config):
            modules[f"{stem}.{expert}.{matrix}"] = replace(
                update,
                a=(updates.settings.r, update.a[1]),
                b=(rows.stop - rows.start, updates.settings.r),
                read=functools.partial(_of_expert, whole, module, expert, updates.settings.r, rows),
            )
    return replace(updates, modules=modules)


def _matrices(
    module: str, update: Update, rank: int, layout: Layout, config: Mapping[str, Any]
) -> list[tuple[int, str, slice]]:
    """For each matrix in the files: its expert, its name, and its rows of B."""
    experts = config.get("num_local_experts", config.get("num_experts", 0))
    width, hidden = config.get(layout.width, 0), config.get("hidden_size", 0)
    shape = (update.b[0], update.a[1])
    known = isinstance(experts, int) and isinstance(width, int)
    if known and update.kind == "linear" and update.a[0] == update.b[1] == experts * rank:
        if shape == (2 * width, hidden):
            names = [(layout.gate, slice(0, width)), (layout.up, slice(width, shape[0]))]
            return [(expert, name, rows) for expert in range(experts) for name, rows in names]
        if shape == (hidden, width):
            return [(expert, layout.down, slice(0, shape[0])) for expert in range(experts)]
    raise InputError(
        f"{module} has factors {list(update.a)} and {list(update.b)}, which fit neither the experts' gate_up_proj nor "
        "their down_proj in the base: it is not the one this adapter was trained on"
    )


def _of_expert(whole: Any, module: str, expert: int, rank: int, rows: slice) -> tuple[Array, Array]:
    a, b = whole(module)
    experts = a.shape[0] // rank
    return a[expert * rank : (expert + 1) * rank], b.reshape(b.shape[0], rank, experts)[rows, :, expert]
