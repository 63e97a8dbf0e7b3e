"""How far merged weights are from the exact sum: lorapack, a sum in float32, PEFT's `safe_merge`.

    python benchmarks/rounding.py [-o benchmarks/results/rounding.json]

One random linear layer of 1024 x 1024 with a LoRA of rank 16, in bfloat16; the update is a fiftieth of the
weights, as large as they are, or nearly their opposite. Units are those in the last place of the exact (float64)
result. These are no times: the same machine and versions give the same figures.
"""

import argparse
import json
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorapack.merge.merge import merge_adapter

SIZE, RANK, SCALE = 1024, 16, 2.0


def figures(weight: Tensor, a: Tensor, b: Tensor, place: Path) -> dict[str, dict[str, float]]:
    """Of each way to merge: the worst number in units, numbers beyond half a unit, numbers unlike float32's bits."""
    for name in ("base", "adapter"):
        (place / name).mkdir(parents=True)
    save_file({"layer.weight": weight}, place / "base" / "model.safetensors")
    (place / "base" / "config.json").write_text("{}")
    factors = {f"base_model.model.layer.lora_{part}.weight": t for part, t in (("A", a), ("B", b))}
    save_file(factors, place / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALE * RANK, "target_modules": ["layer"]}
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    merge_adapter(place / "adapter", place / "out", place / "base")
    net = nn.Sequential(OrderedDict(layer=nn.Linear(SIZE, SIZE, bias=False, dtype=weight.dtype)))
    net.layer.weight.data.copy_(weight)
    peft = PeftModel.from_pretrained(net, place / "adapter").merge_and_unload(safe_merge=True)
    float32 = (weight.float() + SCALE * (b @ a)).to(weight.dtype)
    ways = {
        "lorapack": load_file(place / "out" / "model.safetensors")["layer.weight"],
        "float32": float32,
        "peft_safe_merge": peft.layer.weight.data,
    }
    exact = weight.double() + SCALE * b.double() @ a.double()
    _, exponent = torch.frexp(exact)
    unit = 2.0 ** (exponent.double() - 8)
    return {
        name: {
            "worst_units": round(((found.double() - exact).abs() / unit).max().item(), 4),
            "beyond_half": int(((found.double() - exact).abs() / unit > 0.5).sum()),
            "unlike_float32": int((found != float32).sum()),
        }
        for name, found in ways.items()
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("-o", "--out", type=Path)
    given = options.parse_args()
    torch.manual_seed(0)
    a, b = torch.randn(RANK, SIZE) / SIZE**0.5, torch.randn(SIZE, RANK) / RANK**0.5
    update = SCALE * b @ a
    weight = torch.randn(SIZE, SIZE) * update.std()
    result: dict[str, object] = {"torch": torch.__version__, "numbers": SIZE * SIZE}
    with tempfile.TemporaryDirectory() as place:
        for name, base, factor in (
            ("a fiftieth", weight, 0.02),
            ("as large", weight, 1.0),
            ("nearly the opposite", -update * (1 + torch.randn(SIZE, SIZE) / 512), 1.0),
        ):
            result[name] = figures(base.bfloat16(), a, b * factor, Path(place) / name)
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
