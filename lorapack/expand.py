"""`lorapack.expand_adapter`: an adapter as the plain PEFT directory that a serving engine reads."""

from pathlib import Path

from lorapack.core.adapter import Adapter
from lorapack.engines import rules
from lorapack.engines.engine import Base, base_of
from lorapack.errors import InputError
from lorapack.hub import find_base_config
from lorapack.read.files import read_json
from lorapack.write import new_directory
from lorapack.write.expanded import arranged, put_expanded


def expand_adapter(
    adapter: Adapter,
    out: str | Path,
    engine: str = "peft",
    *,
    base: str | Path | None = None,
    source: str | Path | None = None,
    verify: bool = False,
    overwrite: bool = False,
) -> Adapter:
    """Write an adapter as plain PEFT LoRA, as an engine computes it (docs/engines.md).

    Args:
        adapter: any, shared factors, cores, codes and seeds included.
        out: the directory to make.
        engine: ``peft``, ``vllm``, ``sglang``, ``tgi`` or ``llama.cpp``.
        base: the base model's directory or Hub id, if not as the adapter says; only its `config.json` is read,
            and only where the engine wants layers that the adapter lacks.
        source: the directory that the adapter was read from, which must not be written to.
        verify: load `source` and the result on the base and compare their outputs (`lorapack.verify`) before the
            result gets its name.
        overwrite: replace an existing directory.

    Returns:
        The adapter as it was written.

    Raises:
        InputError: an unknown engine, or what it cannot compute; nothing was written.
        OutputError: it exists, cannot be written, or reads back differently.
        GateError: `verify` found other outputs.
    """
    title = rules(engine).title
    written = arranged(adapter, engine, lambda: _base(base or adapter.base_model, title))
    with new_directory(out, overwrite=overwrite, inputs=() if source is None else (source,)) as directory:
        put_expanded(adapter, written, engine, directory)
        if verify:
            from lorapack.verify import demand_same
            from lorapack.verify import verify as compare

            if source is None:
                raise InputError("to verify, name the directory that the adapter was read from: source")
            demand_same(compare(source, directory, base))
    return written


def _base(base: str | Path | None, engine: str) -> Base:
    wants = f"{engine} wants layers that the adapter may lack, and the base model's config.json describes them"
    if base is None:
        raise InputError(f"{wants}: name it with --base")
    try:
        path = find_base_config(base)
        return base_of(read_json(path), str(path))
    except InputError as error:
        raise InputError(f"{wants}; {error}. Name it with --base") from None
