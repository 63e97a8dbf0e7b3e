"""`lorapack.evaluate_adapters`: base, original and compressed on the same rows."""

from collections.abc import Collection, Mapping
from typing import Any

from lorapack.core.adapter import Adapter
from lorapack.core.report import Quality
from lorapack.data.batches import batches
from lorapack.data.prepare import prepare_evaluation
from lorapack.errors import InputError
from lorapack.evaluate.metrics import quality
from lorapack.evaluate.scores import score
from lorapack.model.head import at_once
from lorapack.model.load import Device, DType, load
from lorapack.model.point import place
from lorapack.watch import Watch, unwatched


def evaluate_adapters(
    original: Adapter,
    data: str,
    base: str | None = None,
    *,
    compressed: Adapter | None = None,
    used: Collection[str] = (),
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    device: Device = "auto",
    dtype: DType = "auto",
    trust_remote_code: bool = False,
    watch: Watch = unwatched,
) -> tuple[Quality, dict[str, Any]]:
    """Evaluate on all usable rows of some data.

    Args:
        original: the reference.
        data: a file or dataset, see `lorapack.data.rows.read_rows`.
        base: another place for the base model than the adapter names.
        compressed: made from the original; or None.
        used: fingerprints of rows it was made with (`Report.used_rows`); they are left out.
        columns, max_length, batch_tokens, device, dtype, trust_remote_code, watch: as in
            `lorapack.measure_adapter`.
        seed: of the resampling.

    Returns:
        The figures, and facts about the data.

    Raises:
        InputError: data or base do not fit, or the two adapters are not of one base.
    """
    if compressed is not None and not set(compressed.modules) <= set(original.modules):
        extra = next(m for m in compressed.modules if m not in original.modules)
        raise InputError(f"{extra} is in the compressed adapter and not in the original: they do not belong together")
    loaded = load(
        original, base, device=device, dtype=dtype, max_length=max_length, trust_remote_code=trust_remote_code
    )
    rows, facts = prepare_evaluation(loaded.reader, data, columns, used)
    variants = {"base": place(None, loaded.device), "original": place(original, loaded.device)}
    if compressed is not None:
        variants["compressed"] = place(compressed, loaded.device)
    each = batches(rows, at_once(loaded, batch_tokens), loaded.pad)
    found = score(loaded, variants, "original", watch("evaluate", each), len(rows))
    return quality(found, loaded.reader.classes, seed), facts
