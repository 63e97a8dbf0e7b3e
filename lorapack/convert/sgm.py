"""SDXL's UNet under the names of its original code (``input_blocks_4_1_…``), as kohya trains it."""

import re

_LAYERS = 3  # places in a block: two layers, and what changes the resolution

_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_BLOCK = re.compile(r"^(?P<side>input|output)_blocks_(?P<at>\d+)_(?P<inner>\d+)_(?P<rest>.+)$")
_MIDDLE = re.compile(r"^middle_block_(?P<at>[012])_(?P<rest>.+)$")


def diffusers_name(flat: str) -> str:
    """The underscored name in diffusers' UNet; any other name as it is.

    Source: the numbering of the blocks in Stability's ``openaimodel.py`` with two layers a block, beside that of
    diffusers' ``UNet2DConditionModel``.
    """
    if flat in _OUTSIDE:
        return _OUTSIDE[flat]
    if middle := _MIDDLE.match(flat):
        at = int(middle["at"])
        inside = f"attentions_0_{middle['rest']}" if at == 1 else f"resnets_{at // 2}_{_resnet(middle['rest'])}"
        return f"mid_block_{inside}"
    match = _BLOCK.match(flat)
    if not match:
        return flat
    at, inner, rest = int(match["at"]), int(match["inner"]), match["rest"]
    down = match["side"] == "input"
    block, layer = divmod(at - 1 if down else at, _LAYERS)
    start = f"{'down' if down else 'up'}_blocks_{block}"
    if rest == "op":
        return f"{start}_downsamplers_0_conv"
    if rest == "conv":
        return f"{start}_upsamplers_0_conv"
    if inner == 0:
        return f"{start}_resnets_{layer}_{_resnet(rest)}"
    return f"{start}_attentions_{layer}_{rest}"


def _resnet(name: str) -> str:
    return _RESNET.get(name, name)
