"""What stands for `lora_A` and `lora_B` in a layer that has something of its own beside shared factors.

PEFT looks at a factor's ``weight``, in the forward pass and when it merges; here that is computed from
the shared factor, which is one and the same module in every layer of a group, and the layer's own
parameter:

    lora_A.weight = K @ shared.weight               K = diag(core), or core where it is a matrix
    lora_B.weight = diag(output) @ shared.weight
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Frozen(nn.Module):
    """A seeded factor: a buffer that is neither trained nor saved."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype))


class WithCore(nn.Module):
    """`lora_A`: the shared A, (rank, d_in), and a core, (rank,) or (rank, rank)."""

    shared: nn.Linear | Frozen

    def __init__(self, shared: nn.Linear | Frozen, core: nn.Parameter) -> None:
        super().__init__()
        self.shared, self.core = shared, core

    @property
    def weight(self) -> Tensor:
        shared = self.shared.weight.to(self.core.dtype)
        return torch.matmul(self.core, shared) if self.core.ndim == 2 else self.core[:, None] * shared

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class WithOutput(nn.Module):
    """`lora_B`: the shared B, (d_out, rank), and a vector on the outputs, (d_out,)."""

    shared: nn.Linear | Frozen

    def __init__(self, shared: nn.Linear | Frozen, output: nn.Parameter) -> None:
        super().__init__()
        self.shared, self.output = shared, output

    @property
    def weight(self) -> Tensor:
        return self.output[:, None] * self.shared.weight.to(self.output.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)
