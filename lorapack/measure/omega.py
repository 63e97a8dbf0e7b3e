"""Learn which modules matter: a weight on each module's output, few of them not zero."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lorapack.core.adapter import Adapter
from lorapack.data.batches import Batch
from lorapack.model.forward import losses, predict
from lorapack.model.load import NAME, Loaded
from lorapack.model.memory import piecewise
from lorapack.model.point import place, point
from lorapack.watch import Watch, unwatched

FEWER = 0.7  # each stage allows so many of the modules of the one before
STEPS = 8  # of gradient descent a stage
FIRST_STEP = 0.2  # of the weight with the largest gradient


def stages(modules: int) -> list[int]:
    """How many modules may have a weight, stage by stage: all of them, fewer and fewer, one."""
    found = [modules]
    while found[-1] > 1:
        found.append(max(1, int(found[-1] * FEWER)))
    return found


def learn_omega(
    loaded: Loaded, adapter: Adapter, batches: Sequence[Batch], watch: Watch = unwatched
) -> tuple[dict[str, Tensor], list[int]]:
    """Projected gradient descent on omega, the weights of the modules' outputs; A and B are frozen.

    Every step descends the task loss of one batch and keeps the K largest |omega|; the others
    become 0. All weights begin at 0, the base model: from 1, where a trained adapter has next to no
    gradient, |omega| would say nothing. K falls from all modules to one, so one run serves every
    budget: each stage starts from the one before.

    Args:
        loaded: the base the adapter is attached to.
        adapter: whose modules are weighed.
        batches: used one a step, from the first again when they run out.
        watch: sees them go by.

    Returns:
        For each linear module its weight at the end of each stage, (stages,) float64, and the
        stages' K.

    Source: WeightLoRA (arXiv 2506.02724), algorithm 1, on a trained adapter.
    """
    placed = place(adapter, loaded.device)
    point(loaded, placed)
    modules = adapter.linear
    omega = torch.zeros(len(modules), device=loaded.device, requires_grad=True)
    rate = 0.0
    allowed = stages(len(modules))
    total = STEPS * len(allowed)
    seen = iter(watch("measure omega", list(itertools.islice(itertools.cycle(batches), total))))
    found = []

    def slope(piece: Batch) -> tuple[Tensor, int]:
        """The derivative of the sum of the losses, and of how many."""
        for module, weight in zip(modules, omega, strict=True):
            loaded.layers[module].scaling[NAME] = adapter.scale(module) * weight
        each = losses(loaded, predict(loaded, piece))
        return torch.autograd.grad(each.sum(), omega)[0], len(each)

    for most in allowed:
        for batch in itertools.islice(seen, STEPS):
            slopes, counts = zip(*piecewise(loaded, batch, slope), strict=True)
            gradient = torch.stack(slopes).sum(0) / sum(counts)
            rate = rate or FIRST_STEP / float(gradient.abs().max().clamp_min(1e-30))
            with torch.no_grad():
                omega -= rate * gradient
            project(omega, most)
        found.append(omega.detach().double().cpu().clone())
    point(loaded, placed)  # plain scales again
    table = torch.stack(found, dim=1)
    return dict(zip(modules, table, strict=True)), allowed


def project(omega: Tensor, most: int) -> None:
    """Keep the `most` largest absolute values, in place; ties go to the earlier."""
    with torch.no_grad():
        order = omega.abs().sort(descending=True, stable=True).indices
        omega[order[most:]] = 0.0
