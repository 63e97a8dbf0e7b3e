"""What is compared: methods as `lorapack sweep` writes them, and controls."""

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
FULL, HALF = "the full adapter", "half the rank, trained from scratch"
# the paper's own claims: the first against the second
CLAIMS = (
    ("lora-drop", "lora-drop:pruned=drop"),
    ("lora-drop", "lora-drop:select=inverse"),
    ("lora-drop", "lora-drop:select=random"),
    ("lora-drop", "lora-drop:select=top"),
)
