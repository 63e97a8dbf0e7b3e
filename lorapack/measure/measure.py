"""Measure what plans need, each part in its own pass."""

from collections.abc import Collection

from lorapack.core.adapter import Adapter, digest
from lorapack.core.statistics import Need, Statistics
from lorapack.data.batches import batches, training_batches
from lorapack.data.prepare import Prepared
from lorapack.measure.gradients import measure_gradients
from lorapack.measure.moments import Average, measure_moments
from lorapack.measure.omega import learn_omega
from lorapack.model.load import Loaded
from lorapack.model.point import place, point
from lorapack.watch import Watch, unwatched

ROWS = 8  # a batch, where what is measured depends on the batches


def measure_rows(
    loaded: Loaded,
    adapter: Adapter,
    prepared: Prepared,
    needs: Collection[Need],
    *,
    average: Average = "token",
    seed: int = 0,
    batch_tokens: int = 4096,
    watch: Watch = unwatched,
) -> Statistics:
    """The statistics that all of the needs ask for, on the calibration rows.

    Args:
        loaded: the base the adapter is attached to.
        adapter: to measure.
        prepared: its calibration rows are used.
        needs: see `lorapack.core.statistics.Need`; the forward moments are always measured.
        average: each token weighs 1 in the moments, or each row does.
        seed: of the batches that gradients and omega are learnt on.
        batch_tokens: tokens a batch of the moments.
        watch: sees the batches go by.
    """
    loss = bool({"backward", "gradients", "omega"} & set(needs))
    rows = prepared.calibration
    point(loaded, place(adapter, loaded.device))
    found = measure_moments(
        loaded,
        adapter.linear,
        watch("measure", batches(rows, loaded.tokens_with_logits(batch_tokens) if loss else batch_tokens, loaded.pad)),
        loss=loss,
        average=average,
        provenance={"adapter": digest(adapter), "base_model": loaded.base_model, "data": prepared.facts},
    )
    if not {"gradients", "omega"} & set(needs):
        return found
    small = list(training_batches(rows, ROWS, max(1, len(rows) // ROWS), loaded.pad, seed))
    if "gradients" in needs:
        gradients = measure_gradients(loaded, adapter, watch("measure gradients", small))
        found = found.having({m: {"taylor_a": a, "taylor_b": b, "triplets": t} for m, (a, b, t) in gradients.items()})
    if "omega" in needs:
        omega, allowed = learn_omega(loaded, adapter, small, watch)
        found = found.having({m: {"omega": weights} for m, weights in omega.items()}, omega=allowed)
    return found
