"""`lorapack.measure_adapter`: from an adapter and a data file to statistics."""

from collections.abc import Mapping

from lorapack.core.adapter import Adapter
from lorapack.core.statistics import Need, Statistics
from lorapack.data.prepare import prepare
from lorapack.data.split import SAMPLE
from lorapack.measure.measure import measure_rows
from lorapack.measure.sums import Average
from lorapack.model.load import Device, DType, load
from lorapack.watch import Watch, unwatched


def measure_adapter(
    adapter: Adapter,
    data: str,
    base: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    sample: str = SAMPLE,
    seed: int = 0,
    needs: Need = "backward",
    average: Average = "token",
    max_length: int | None = None,
    batch_tokens: int = 4096,
    device: Device = "auto",
    dtype: DType = "auto",
    trust_remote_code: bool = False,
    watch: Watch = unwatched,
) -> Statistics:
    """Measure every linear module of an adapter on the calibration part of some data.

    The parts are cut as `compress_adapter` cuts them with the same data, sample and seed, so the
    statistics can be given back to it.

    Args:
        adapter: to measure.
        data: a file or dataset, see `lorapack.data.rows.read_rows`.
        base: another place for the base model than the adapter names.
        columns: role to column, where the usual names do not fit.
        sample: how much of the data to calibrate on, ``"20%"`` or a number of rows.
        seed: of the cut.
        needs: what to measure, see `lorapack.core.statistics.Need`; `Method.needs` tells what a method wants.
        average: each token weighs 1, or each row does.
        max_length: tokens a row; batch_tokens: tokens a batch.
        device, dtype, trust_remote_code: see `lorapack.model.load.load`.
        watch: sees the batches go by.

    Raises:
        InputError: data or base do not fit.
    """
    loaded = load(adapter, base, device=device, dtype=dtype, max_length=max_length, trust_remote_code=trust_remote_code)
    prepared = prepare(loaded.reader, data, columns=columns, sample=sample, seed=seed, most_recovery=0)
    return measure_rows(
        loaded, adapter, prepared, {needs}, average=average, seed=seed, batch_tokens=batch_tokens, watch=watch
    )
