"""DropLoRA: in every step some ranks are off, so that no rank is needed by the others (docs/methods/droplora.md)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from lorapack.data.batches import Batch
from lorapack.model.load import NAME, Loaded
from lorapack.model.point import Placed

RankMask = Literal["token", "step"]


class Masks:
    """Bernoulli masks on ``h = A x`` of the trained adapter, ``h * mask / (1 - p)``.

    Source: DropLoRA (arXiv 2508.17337): a mask between A and B, drawn per token in the published code;
    and one mask a step for all tokens of a pair of factors (`step`), which is the same as dropping ranks.
    """

    def __init__(self, p: float, kind: RankMask, seed: int) -> None:
        self.p, self.kind, self.seed = p, kind, seed
        self.generator = torch.Generator().manual_seed(seed)
        self._kept: dict[str, Tensor] = {}
        self._on = True

    def renew(self, step: bool = False) -> None:
        """Before every batch that is run, and before every step: draw anew. Until then masks stay, as recomputed
        activations (checkpointing) need the ones of the first time.
        """
        if step or self.kind == "token":
            self._kept = {}

    @contextmanager
    def on(self, loaded: Loaded, student: Placed) -> Iterator[None]:
        """For as long as the block runs, the student (its factors have gradients) is masked and nothing else is."""

        def hook(module: str) -> Any:
            def forward(layer: Any, _: Any, h: Tensor) -> Tensor | None:
                if not self._on or not layer.weight.requires_grad:
                    return None
                name = module if self.kind == "token" else student.pointers[module][0]
                shape = h.shape if self.kind == "token" else h.shape[-1:]
                if name not in self._kept or self._kept[name].shape != shape:  # another piece, where memory was short
                    self._kept[name] = (torch.rand(shape, generator=self.generator) >= self.p).to(h.device)
                return h * self._kept[name] / (1 - self.p)

            return forward

        handles = [
            loaded.layers[module].lora_A[NAME].register_forward_hook(hook(module)) for module in student.pointers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def off(self) -> Iterator[None]:
        """For as long as the block runs, nothing is masked."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def fixed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, each with masks that are the same whenever these batches come by."""
        training, self.generator = self.generator, torch.Generator().manual_seed(self.seed)
        try:
            for batch in batches:
                self.renew(step=True)
                yield batch
        finally:
            self.generator = training
            self.renew(step=True)
