"""The compression methods. To add one: a file beside this, and its line here (docs/methods/adding.md)."""

from lorapack.plan.method import Method
from lorapack.plan.methods import lora_drop, rank, tied, vera

METHODS: dict[str, Method] = {
    "lora-drop": lora_drop.METHOD,
    "rank": rank.METHOD,
    "tied": tied.METHOD,
    "vera": vera.METHOD,
}
