"""What measuring yields: for every module, r x r moments of its low-rank branch.

With ``h = A x`` (r numbers a token) and ``u = dloss/dh``, the sums over tokens

    forward = sum w h h^T        backward = sum w u u^T        cross = sum w u h^T

determine what most plans need, and nothing of size d x d is stored. They are *sums*: the
statistics of two shards of the data add up to the statistics of the whole. Some methods want more,
see `Need`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lorapack.core.adapter import Adapter
from lorapack.core.names import by_type, module_type
from lorapack.core.plan import Metric
from lorapack.errors import InputError

VERSION = 1
Need = Literal["nothing", "forward", "backward", "gradients", "omega"]
"""What a plan wants measured: the forward moments; the backward ones as well; besides, the gradients of the
factors; besides the moments, the learnt weights of whole modules."""
NEEDED: dict[Metric, Need] = {
    "weight": "nothing",
    "output": "forward",
    "loss": "backward",
    "fisher": "backward",
}
"""What a metric needs."""
_SQUARE = ("forward", "backward", "cross", "row_forward", "row_backward", "token_forward", "token_backward")
_SUMS = (*_SQUARE, "taylor_a", "taylor_b")
PARTS = (*_SUMS, "triplets", "omega")


@dataclass(frozen=True, eq=False)
class Moments:
    """What was measured of one module, float64; None what was not.

    Attributes:
        forward: (r, r) sum over calibration tokens of ``w h h^T`` with ``h = A x``.
        backward: (r, r) sum of ``w u u^T`` with ``u = dloss/dh``.
        cross: (r, r) sum of ``w u h^T``. Its trace is the loss's derivative by the module's output
            scale.
        row_forward, row_backward: (r, r) sums over rows of ``w D^T (A A^T) D`` and
            ``w D (B^T B) D^T`` with the row's ``D = sum u h^T``: the two sides of the
            Kronecker-factored Fisher matrix of the update.
        token_forward, token_backward: the same with each token's ``D = u h^T``, summed over tokens.
        taylor_a, taylor_b: (r, d_in) and (d_out, r), sums of ``theta * dloss/dtheta`` for the
            elements of the `canonical` factors.
        triplets: (r,) AdaLoRA's importance of each singular triplet, the largest singular value first.
        omega: (n,) the learnt weight of the module's output, one for each entry of
            ``provenance["omega"]``, the numbers of modules that were allowed a weight.
    """

    forward: Tensor
    backward: Tensor | None = None
    cross: Tensor | None = None
    row_forward: Tensor | None = None
    row_backward: Tensor | None = None
    token_forward: Tensor | None = None
    token_backward: Tensor | None = None
    taylor_a: Tensor | None = None
    taylor_b: Tensor | None = None
    triplets: Tensor | None = None
    omega: Tensor | None = None

    @property
    def saliency(self) -> Tensor:
        """``|theta * dloss/dtheta|`` of every element of the canonical factors, A row by row and then B, one dimension.

        Raises:
            InputError: it was not measured.
        """
        if self.taylor_a is None or self.taylor_b is None:
            raise InputError("snip needs gradients: `lorapack measure --method snip`, or give --data")
        return torch.cat([self.taylor_a.reshape(-1), self.taylor_b.reshape(-1)]).abs()


@dataclass(frozen=True, eq=False)
class Statistics:
    """Measured moments with what they were measured on.

    Attributes:
        modules: moments by module name.
        weight: the sum of the token weights ``w``. With ``average == "token"`` each token weighs 1
            and this is the token count; with ``"sample"`` the tokens of a row share the weight 1
            and it is the row count.
        tokens, samples: how many there were, padding excluded.
        average: ``"token"`` or ``"sample"``.
        provenance: JSON facts (adapter digest, base model, data, seed).
    """

    modules: Mapping[str, Moments]
    weight: float
    tokens: int
    samples: int
    average: str
    provenance: Mapping[str, Any]

    def mean(self, module: str) -> Tensor:
        """E[h h^T], (rank, rank) float64."""
        return self.modules[module].forward / self.weight

    def having(self, parts: Mapping[str, Mapping[str, Tensor]], **provenance: Any) -> "Statistics":
        """The same with further parts of each module's `Moments`, and further facts."""
        modules = {module: replace(moments, **parts[module]) for module, moments in self.modules.items()}
        return replace(self, modules=modules, provenance={**self.provenance, **provenance})


def add(first: Statistics, second: Statistics) -> Statistics:
    """The statistics of both shards together: of their sums; what is learnt (triplets, omega) does not add.

    Raises:
        InputError: they are of different modules, adapters, bases, activations or averages.
    """
    if first.modules.keys() != second.modules.keys():
        raise InputError("the two statistics are of different modules and cannot be added")
    for name, one, two in (
        ("average", first.average, second.average),
        *((k, first.provenance.get(k), second.provenance.get(k)) for k in ("adapter", "base_model", "activations")),
    ):
        if one != two:
            raise InputError(f"the two statistics differ in {name} ({one!r} and {two!r}) and cannot be added")

    def total(one: Tensor | None, two: Tensor | None) -> Tensor | None:
        return None if one is None or two is None else one + two

    return Statistics(
        modules={
            name: Moments(
                a.forward + second.modules[name].forward,
                **{part: total(getattr(a, part), getattr(second.modules[name], part)) for part in _SUMS[1:]},
            )
            for name, a in first.modules.items()
        },
        weight=first.weight + second.weight,
        tokens=first.tokens + second.tokens,
        samples=first.samples + second.samples,
        average=first.average,
        provenance=first.provenance,
    )


def both(first: Statistics, second: Statistics) -> Statistics:
    """One adapter's moments measured in two places of the model, with an equal say.

    What an adapter that has lost much leaves to do makes the slopes larger, so those of the second count in the measure
    of the first: what is quadratic in u is multiplied by the ratio of the sums, over the modules, of
    ``tr(forward backward)``, the mean of ``(u^T h)^2`` for u and h that are independent, and the cross moments, linear
    in u, by its root.

    Args:
        first, second: of the same modules, with backward moments, on the same rows.

    Returns:
        The sums of both, with the facts of the first; what is learnt, or of the factors, is not in it.
    """
    sizes = [sum(float((m.forward * _there(m.backward)).sum()) for m in s.modules.values()) for s in (first, second)]
    ratio = sizes[0] / sizes[1] if sizes[1] > 0 else 0.0

    def total(part: str, one: Moments, two: Moments) -> Tensor:
        power = {"forward": 0.0, "cross": 0.5}.get(part, 1.0)
        return _there(getattr(one, part)) + math.pow(ratio, power) * _there(getattr(two, part))

    modules = {
        name: Moments(**{part: total(part, moments, second.modules[name]) for part in _SQUARE})
        for name, moments in first.modules.items()
    }
    return replace(first, modules=modules, weight=first.weight + second.weight)


def _there(moment: Tensor | None) -> Tensor:
    assert moment is not None
    return moment


def output_norms(adapter: Adapter, statistics: Statistics) -> dict[str, float]:
    """E||scale * B h||^2 of every measured module: the mean squared norm of the LoRA output.

    Exact, from the identity E||s B h||^2 = s^2 tr(B^T B E[h h^T]).

    Source: LoRA-drop (arXiv 2402.07721), section 3.2.
    """
    norms = {}
    for module in statistics.modules:
        b = adapter.factors(module).B.double()
        norms[module] = adapter.scale(module) ** 2 * float(((b.T @ b) * statistics.mean(module)).sum())
    return norms


def importances(norms: Mapping[str, float]) -> dict[str, float]:
    """Each module's share of the output norms of its type; 0 where its type gives nothing out.

    Args:
        norms: `output_norms`, by module.

    Source: LoRA-drop (arXiv 2402.07721), section 3.2; per module type.
    """
    total = {kind: math.fsum(norms[m] for m in modules) for kind, modules in by_type(norms).items()}
    return {m: norm / total[module_type(m)] if total[module_type(m)] > 0 else 0.0 for m, norm in norms.items()}


def check_fits(statistics: Statistics, adapter: Adapter) -> None:
    """Refuse statistics that were not measured on this adapter's modules.

    Raises:
        InputError: a module without moments, or moments of another rank; names the module.
    """
    for module in adapter.linear:
        if module not in statistics.modules:
            raise InputError(f"the statistics have nothing on {module}: measure this adapter first")
        rank, measured = adapter.factors(module).rank, statistics.modules[module].forward.shape[0]
        if rank != measured:
            raise InputError(f"the statistics of {module} are of rank {measured}, the adapter's is {rank}")
        d_out, d_in = adapter.factors(module).shape
        for part, shape in (("taylor_a", (rank, d_in)), ("taylor_b", (d_out, rank)), ("triplets", (rank,))):
            found = getattr(statistics.modules[module], part)
            if found is not None and tuple(found.shape) != shape:
                raise InputError(f"the statistic {part} of {module} is {tuple(found.shape)}, the adapter wants {shape}")


def to_tensors(statistics: Statistics) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors and its metadata; `from_tensors` is the way back."""
    tensors = {
        f"{module}.{part}": value.contiguous()
        for module, moments in statistics.modules.items()
        for part in PARTS
        if (value := getattr(moments, part)) is not None
    }
    header = {
        "version": VERSION,
        "weight": statistics.weight,
        "tokens": statistics.tokens,
        "samples": statistics.samples,
        "average": statistics.average,
        "provenance": dict(statistics.provenance),
    }
    return tensors, {"lorapack_statistics": json.dumps(header, sort_keys=True)}


def from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Statistics:
    """Rebuild statistics from a file's tensors and metadata.

    Raises:
        InputError: not such a file, an unknown version, or a moment that is not square or finite.
    """
    try:
        header = json.loads(metadata["lorapack_statistics"])
        version = header["version"]
        if version != VERSION:
            raise InputError(f"statistics of version {version}; this lorapack reads version {VERSION}")
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            module, _, part = name.rpartition(".")
            if part not in PARTS or not module:
                raise InputError(f"statistics hold {name!r}, which is no moment")
            if not torch.isfinite(tensor).all():
                raise InputError(f"the statistic {name!r} has numbers that are not finite")
            if part in _SQUARE and (tensor.ndim != 2 or tensor.shape[0] != tensor.shape[1]):
                raise InputError(f"the moment {name!r} is not a square matrix")
            parts.setdefault(module, {})[part] = tensor.double()
        for module, found in parts.items():
            if "forward" not in found:
                raise InputError(f"statistics of {module} have no forward moment")
        return Statistics(
            modules={module: Moments(**found) for module, found in parts.items()},
            weight=float(header["weight"]),
            tokens=int(header["tokens"]),
            samples=int(header["samples"]),
            average=str(header["average"]),
            provenance=dict(header["provenance"]),
        )
    except (KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"no statistics written by `lorapack measure` ({error})") from error
