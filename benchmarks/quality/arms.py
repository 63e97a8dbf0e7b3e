"""What is compared: methods as `lorapack sweep` writes them, and controls."""

from dataclasses import dataclass
from typing import Literal

from lorapack.core.codes import Store

STORED = "in "
SEPARATOR = " · "  # between an arm and how it was made
BATCH = 8  # rows a step of the recovery
BY_SIZE = "by size"  # of the factors' elements: what `compress` takes without --learning-rate
DEFAULT = "adaptive"  # what every other arm is paired with
ARMS = (
    DEFAULT,
    *(f"rank:metric={m},allocation={a}" for m in ("loss", "output", "weight") for a in ("global", "uniform")),
    "lora-drop",
    "lora-drop:pruned=drop",
    "lora-drop:select=top",
    "lora-drop:select=inverse",
    "lora-drop:select=random",
    "weightlora",
    "snip",
    "snip:unit=element",
    "adalora",
    "tied",
    "vera",
)
BUDGETS = (50.0, 25.0, 12.5, 6.0, 3.0, 1.5)  # percent of the parameters
BYTE_BUDGETS = (1.0, 0.5)  # percent of the bytes, where the result is stored in fewer
FULL, HALF = "the full adapter", "half the rank, trained from scratch"
# the paper's own claims: the first against the second
CLAIMS = (
    ("lora-drop", "lora-drop:pruned=drop"),
    ("lora-drop", "lora-drop:select=inverse"),
    ("lora-drop", "lora-drop:select=random"),
    ("lora-drop", "lora-drop:select=top"),
)


@dataclass(frozen=True)
class Recipe:
    """How an arm is stored and recovered. What is not as in most rows is written behind the arm's name.

    Attributes:
        store: of the result; budgets are then percent of the original's bytes. None: fp32, and of its parameters.
        batch: rows a step.
        objective: of the recovery.
        rate: the learning rate; `BY_SIZE` as `compress` chooses it; None for the task's own.
        training_rows: whether the rows that the adapter was trained on are recovered on as well.
        bf16: whether it is recovered in bfloat16. It stands in the result, not behind the arm's name.
    """

    store: Store | None = None
    batch: int = BATCH
    objective: Literal["kl", "both"] = "both"
    rate: float | str | None = None
    training_rows: bool = False
    bf16: bool = False

    def named(self, arm: str) -> str:
        notes = [
            self.store and f"{STORED}{self.store}",
            self.objective != "both" and f"{self.objective} objective",
            self.rate and f"rate {self.rate if self.rate == BY_SIZE else format(self.rate, 'g')}",
            self.training_rows and "with training rows",
            self.batch != BATCH and f"{self.batch} rows a step",
        ]
        return SEPARATOR.join([arm, *(note for note in notes if note)])


def bare(name: str) -> str:
    """An arm's name without how it was made."""
    return name.split(SEPARATOR)[0]


def default_like(name: str) -> str:
    """The default, made as this arm was."""
    return DEFAULT + name.removeprefix(bare(name))


def stored(name: str) -> bool:
    """Whether it was stored in fewer bytes, so that its budget is of bytes."""
    return any(note.startswith(STORED) for note in name.split(SEPARATOR))
