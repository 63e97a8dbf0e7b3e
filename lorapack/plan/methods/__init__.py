"""The compression methods. To add one: a file beside this, and its line here (docs/methods/adding.md)."""

from lorapack.plan.methods import lora_drop

METHODS = {
    "lora-drop": lora_drop.plan,
}
