"""An adapter described for a reader: the value behind `lorapack inspect`."""

from dataclasses import asdict
from typing import Any

from lorapack.core.adapter import Adapter, size
from lorapack.core.names import module_type, short_types
from lorapack.read.config import COMPACT_TYPE


def describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """JSON facts: format, base, sizes by module type, shared groups, carried tensors."""
    modules = list(adapter.modules)
    types = []
    for kind, name in short_types(modules).items():
        members = [m for m in modules if module_type(m) == kind]
        pool = [adapter.pool[p] for p in dict.fromkeys(adapter.modules[m].factors for m in members)]
        own = [t for m in members for t in adapter.modules[m].own]
        types.append(
            {
                "type": name,
                "kind": ", ".join(sorted({f.kind for f in pool})),
                "modules": len(members),
                "factors": len(pool),
                "ranks": _range([f.rank for f in pool]),
                "scales": _range([adapter.scale(m) for m in members]),
                "shape": ", ".join(sorted({f"{f.shape[0]}x{f.shape[1]}" for f in pool})),
                "dtype": ", ".join(
                    sorted({f.codes.store if f.codes else str(f.A.dtype).removeprefix("torch.") for f in pool})
                ),
                "parameters": sum(f.parameters for f in pool) + sum(t.numel() for t in own),
                "bytes": sum(f.nbytes for f in pool) + sum(t.numel() * t.element_size() for t in own),
            }
        )
    return {
        "format": "lorapack compact" if adapter.config["peft_type"] == COMPACT_TYPE else "PEFT LoRA",
        "base_model": adapter.base_model,
        "task_type": adapter.task_type,
        "rslora": bool(adapter.config.get("use_rslora")),
        "types": types,
        "shared": [
            {"name": name, "rank": adapter.pool[name].rank, "modules": members, **_form(adapter, name, members[0])}
            for name, members in adapter.groups.items()
        ],
        "carried": [
            {"name": n, "shape": "x".join(map(str, t.shape)), "bytes": t.numel() * t.element_size()}
            for n, t in sorted(adapter.carried.items())
        ],
        "size": asdict(size(adapter)),
    }


def _form(adapter: Adapter, group: str, module: str) -> dict[str, Any]:
    """What each of its modules has of its own, and the seed of its factors; only what there is."""
    core, output = adapter.modules[module].form
    said = {"core": core, "output": output or None, "seed": adapter.pool[group].seed}
    return {name: value for name, value in said.items() if value is not None}


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g}–{high:.4g}"
