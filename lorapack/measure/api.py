"""`lorapack.measure_adapter`: from an adapter and a data file to statistics."""

from collections.abc import Mapping

from lorapack.core.adapter import Adapter, digest
from lorapack.core.statistics import Statistics
from lorapack.data.batches import batches
from lorapack.data.prepare import prepare
from lorapack.data.split import SAMPLE
from lorapack.measure.moments import Average, measure_moments
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
    loss: bool = False,
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
        loss: also the backward moments (a backward pass).
        average: each token weighs 1, or each row does.
        max_length: tokens a row; batch_tokens: tokens a batch.
        device, dtype, trust_remote_code: see `lorapack.model.load.load`.
        watch: sees the batches go by.

    Raises:
        InputError: data or base do not fit.
    """
    loaded = load(adapter, base, device=device, dtype=dtype, max_length=max_length, trust_remote_code=trust_remote_code)
    prepared = prepare(loaded.reader, data, columns=columns, sample=sample, seed=seed, most_recovery=0)
    rows = prepared.calibration
    return measure_moments(
        loaded,
        adapter.linear,
        watch("measure", batches(rows, loaded.tokens_with_logits(batch_tokens) if loss else batch_tokens, loaded.pad)),
        loss=loss,
        average=average,
        provenance={
            "adapter": digest(adapter),
            "base_model": loaded.base_model,
            "data": prepared.facts,
            "loss": loss,
        },
    )
