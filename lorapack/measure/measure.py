"""Measure what plans need, each part in its own pass."""

from collections.abc import Collection, Mapping

from lorapack.core.adapter import Adapter, digest
from lorapack.core.statistics import Need, Statistics, both
from lorapack.data.batches import batches, training_batches
from lorapack.data.prepare import Prepared
from lorapack.errors import InputError
from lorapack.measure.elsewhere import measure_moments_elsewhere
from lorapack.measure.gradients import measure_gradients
from lorapack.measure.moments import measure_moments
from lorapack.measure.omega import learn_omega
from lorapack.measure.on_base import measure_moments_on_base
from lorapack.measure.sums import Average
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


def measure_rows_again(
    loaded: Loaded,
    adapter: Adapter,
    smaller: Adapter,
    prepared: Prepared,
    first: Statistics,
    *,
    average: Average = "token",
    batch_tokens: int = 4096,
    watch: Watch = unwatched,
) -> Statistics:
    """The backward moments of an adapter, measured with itself before, and with what a plan made of it now.

    Args:
        loaded: the base; it is left pointing to the smaller one.
        adapter: to measure.
        smaller: of the same modules.
        prepared: its calibration rows are used.
        first: measured with the adapter itself.
        average, batch_tokens, watch: see `measure_rows`.
    """
    seen = batches(prepared.calibration, loaded.tokens_with_logits(batch_tokens), loaded.pad)
    watched = watch("measure again", seen)
    return both(first, measure_moments_elsewhere(loaded, adapter, smaller, watched, average=average))


def measure_rows_on_base(
    loaded: Loaded,
    adapters: Mapping[str, Adapter],
    prepared: Prepared,
    need: Need,
    *,
    average: Average = "token",
    batch_tokens: int = 4096,
    watch: Watch = unwatched,
) -> dict[str, Statistics]:
    """The moments of several adapters of one base in one pass over the calibration rows, see `measure_moments_on_base`.

    Args:
        loaded: the base; it is left pointing to no adapter.
        adapters: by a name, which the results have as well.
        prepared: its calibration rows are used.
        need: ``"forward"`` or ``"backward"``; what is learnt, gradients and omega, is learnt of one adapter at a time.
        average: each token weighs 1 in the moments, or each row does.
        batch_tokens: tokens a batch.
        watch: sees the batches go by.

    Raises:
        InputError: another need, or an adapter that cannot be measured so.
    """
    if need not in ("forward", "backward"):
        raise InputError(f"{need} cannot be measured of several adapters in one pass: measure each alone")
    loss = need == "backward"
    size = loaded.tokens_with_logits(batch_tokens) if loss else batch_tokens
    return measure_moments_on_base(
        loaded,
        adapters,
        watch("measure", batches(prepared.calibration, size, loaded.pad)),
        loss=loss,
        average=average,
        provenance={"base_model": loaded.base_model, "data": prepared.facts},
    )
