"""Every reader of a file from outside, as a function of that file's bytes; for the tests and `benchmarks/fuzz.py`.

Each writes the bytes to where the reader expects them, beside whatever else it needs, and reads. Raising
`InputError` is an answer; anything else is a fault.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from lorapack.cli import files
from lorapack.cli.config import defaults, find_config
from lorapack.cli.main import cli
from lorapack.conversion import read_any
from lorapack.convert import diffusers, kohya
from lorapack.convert.gguf import to_gguf
from lorapack.core import plan, report, statistics
from lorapack.data.rows import read_rows
from lorapack.merge.base import read_base
from lorapack.merge.updates import read_updates
from lorapack.read import read_adapter
from lorapack.read.files import read_json, read_safetensors, read_text
from lorapack.recover import state

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
PREFIX = "base_model.model."
LORA = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "rank_pattern": {"layers.1.self_attn.q_proj": 2},
    "alpha_pattern": {"^model.layers.1.*": 8},
    "base_model_name_or_path": "somebody/something",
    "task_type": "CAUSAL_LM",
    "use_rslora": False,
    "bias": "none",
}
COMPACT = LORA | {
    "peft_type": "LORAPACK",
    "lorapack": {
        "version": 1,
        "shared": {"shared.q": [Q, K]},
        "forms": {"shared.q": {"core": "diagonal", "output": True}},
        "stored": {},
    },
}
PAIRS = {
    f"{PREFIX}{m}.lora_{p}.weight": torch.ones(2, 3) if p == "A" else torch.ones(4, 2) for m in (Q, K) for p in "AB"
}
SHARED = {"lorapack.shared.q.A": torch.ones(2, 3), "lorapack.shared.q.B": torch.ones(4, 2)}
SHARED |= {f"lorapack.{m}.core": torch.ones(2) for m in (Q, K)}
SHARED |= {f"lorapack.{m}.output": torch.ones(4) for m in (Q, K)}
PLAN = {
    "method": "rank",
    "options": {"metric": "loss"},
    "choices": [
        {"module": Q, "action": "keep", "rank": 1, "group": None, "score": 0.5, "reason": "", "scale": 1.0},
        {"module": K, "action": "share", "rank": None, "group": "g", "score": None, "reason": "", "scale": 1.0},
    ],
    "groups": {"g": 1},
    "adapter": "",
    "metric": "loss",
    "sharing": {"g": "diagonal"},
    "version": 1,
}
SIZE = report.Size(2, 2, 28, 112, 0, 0)
REPORT = report.Report(
    version=1,
    lorapack="0.1.0",
    base_model="a/b",
    task="CAUSAL_LM",
    adapter={"name": "a"},
    before=SIZE,
    after=SIZE,
    types=(report.TypeRow("q_proj", 2, 2, 0, 0, 28, 28),),
    plan=plan.from_json(json.dumps(PLAN)),
    settings={},
    versions={},
    run={},
    data={"parts": {"calibration": {"rows": 1, "tokens": 3, "fingerprints": ["f"]}}},
    quality=report.Quality(1, 3, {"loss": {"base": report.Interval(1.0, 0.5, 1.5)}}),
)
HEADER = {"version": 1, "weight": 3.0, "tokens": 3, "samples": 1, "average": "token", "provenance": {}}
MOMENTS = save({f"{Q}.forward": torch.eye(2).double()}, {"lorapack_statistics": json.dumps(HEADER)})
BASE = save({f"{Q}.weight": torch.ones(4, 3)}, {"format": "pt"})
INDEX = {"metadata": {"total_size": 48}, "weight_map": {f"{Q}.weight": "model-00001-of-00001.safetensors"}}
POINTS = [{"method": "rank", "budget": "50%", "parameters": 14, "share": 0.5, "quality": None, "reason": ""}]
TOML = b"""[compress]
method = "rank"
budget = "50%"
seed = 7
learning-rate = 3e-3
[compress.rank]
metric = "weight"
[merge]
dtype = "bfloat16"
weights = "0.7,0.3"
"""
STATE = {"facts": {}, "curve": [[0, 1.0]], "step": 0, "best": 0, "worse": 0, "cuts": 0}
KEPT = save(
    {"now.0": torch.ones(2), "kept.0": torch.ones(2), "judged": torch.ones(2, 3)}, {state.KIND: json.dumps(STATE)}
)


LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": None}
PAIR = {"down": torch.ones(2, 3), "up": torch.ones(4, 2)}
KOHYA = {f"lora_unet_conv_in.lora_{half}.weight": tensor for half, tensor in PAIR.items()}
KOHYA |= {"lora_unet_conv_in.alpha": torch.tensor(4.0)}
DIFFUSERS = {f"unet.conv_in.lora_{name}.weight": PAIR[half] for name, half in (("A", "down"), ("B", "up"))}
DIFFUSERS_METADATA = {"unet.r": 2, "unet.lora_alpha": 4, "unet.rank_pattern": {"conv_in": 2}}
LORALIB = {"encoder.q.lora_A": PAIR["down"], "encoder.q.lora_B": PAIR["up"], "head.weight": torch.ones(2, 2)}
MLX = {f"{Q}.lora_{name}": PAIR[half].T.contiguous() for name, half in (("a", "down"), ("b", "up"))}
MLX_CONFIG = {"fine_tune_type": "lora", "model": "a/b", "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}}


@dataclass(frozen=True)
class Reader:
    """A name, a good file, and the function that reads its bytes in an empty directory."""

    good: bytes
    read: Callable[[bytes, Path], object]


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _bin() -> bytes:
    buffer = io.BytesIO()
    torch.save(PAIRS, buffer)
    return buffer.getvalue()


def _adapter(config: bytes, tensors: bytes, directory: Path, name: str = "adapter_model.safetensors") -> object:
    (directory / "adapter_config.json").write_bytes(config)
    (directory / name).write_bytes(tensors)
    return read_adapter(directory)


def _statistics(data: bytes, directory: Path) -> object:
    (directory / "statistics.safetensors").write_bytes(data)
    return statistics.from_tensors(*read_safetensors(directory / "statistics.safetensors"))


def _parsed(parse: Callable[[str], object]) -> Callable[[bytes, Path], object]:
    def read(data: bytes, directory: Path) -> object:
        (directory / "file.json").write_bytes(data)
        return parse(read_text(directory / "file.json"))

    return read


def _base(directory: Path, **files: bytes) -> object:
    (directory / "config.json").write_bytes(files.get("config", b"{}"))
    for name, data in files.items():
        if name != "config":
            (directory / NAMES[name]).write_bytes(data)
    (directory / "work").mkdir(exist_ok=True)
    return read_base(directory, directory / "work")


NAMES = {
    "single": "model.safetensors",
    "shard": "model-00001-of-00001.safetensors",
    "index": "model.safetensors.index.json",
}


def _state(data: bytes, directory: Path) -> object:
    (directory / "state").write_bytes(data)
    return state.load(directory / "state", {}, [torch.ones(2)], 3)


def _file(data: bytes, directory: Path) -> object:
    (directory / "lora.safetensors").write_bytes(data)
    return read_any(directory / "lora.safetensors", alpha=4.0)


def _mlx(config: bytes, tensors: bytes, directory: Path) -> object:
    (directory / "adapter_config.json").write_bytes(config)
    (directory / "adapters.safetensors").write_bytes(tensors)
    return read_any(directory)


def _plain(directory: Path) -> object:
    _adapter(_json(LORA), save(PAIRS), directory)
    return read_adapter(directory)


def _object(data: bytes, directory: Path) -> dict:
    (directory / "config.json").write_bytes(data)
    return read_json(directory / "config.json")


def _said(data: bytes) -> str:
    """Bytes as text that a safetensors header can hold."""
    return data.decode(errors="replace")


def _toml(data: bytes, directory: Path) -> object:
    (directory / "lorapack.toml").write_bytes(data)
    found = find_config(str(directory / "lorapack.toml"))
    return defaults(found, cli, methods_of=cli.commands) if found else None


def _points(data: bytes, directory: Path) -> object:
    (directory / "points.json").write_bytes(data)
    return files.read_points(str(directory / "points.json"))


def _updates(config: bytes, tensors: bytes, directory: Path) -> object:
    (directory / "adapter_config.json").write_bytes(config)
    (directory / "adapter_model.safetensors").write_bytes(tensors)
    return read_updates(directory)


def _rows(ending: str) -> Callable[[bytes, Path], object]:
    def read(data: bytes, directory: Path) -> object:
        (directory / f"rows{ending}").write_bytes(data)
        return read_rows(directory / f"rows{ending}")

    return read


READERS = {
    "adapter_config": Reader(_json(LORA), lambda data, d: _adapter(data, save(PAIRS), d)),
    "adapter_safetensors": Reader(save(PAIRS), lambda data, d: _adapter(_json(LORA), data, d)),
    "adapter_bin": Reader(_bin(), lambda data, d: _adapter(_json(LORA), data, d, "adapter_model.bin")),
    "compact_config": Reader(_json(COMPACT), lambda data, d: _adapter(data, save(SHARED), d)),
    "compact_safetensors": Reader(save(SHARED), lambda data, d: _adapter(_json(COMPACT), data, d)),
    "plan": Reader(_json(PLAN), _parsed(plan.from_json)),
    "report": Reader(report.to_json(REPORT).encode(), _parsed(lambda text: report.from_json(text).used_rows())),
    "statistics": Reader(MOMENTS, _statistics),
    "base_config": Reader(b'{"model_type": "llama"}', lambda data, d: _base(d, config=data, single=BASE)),
    "base_safetensors": Reader(BASE, lambda data, d: _base(d, single=data)),
    "base_index": Reader(_json(INDEX), lambda data, d: _base(d, index=data, shard=BASE)),
    "recovery_state": Reader(KEPT, _state),
    "kohya": Reader(save(KOHYA), _file),
    "kohya_names": Reader(
        _json({"unet": ["conv_in"]}), lambda data, d: _file(save(KOHYA, {kohya.NAMES: _said(data)}), d)
    ),
    "diffusers": Reader(save(DIFFUSERS), _file),
    "diffusers_metadata": Reader(
        _json(DIFFUSERS_METADATA), lambda data, d: _file(save(DIFFUSERS, {diffusers.METADATA: _said(data)}), d)
    ),
    "loralib": Reader(save(LORALIB), _file),
    "mlx_config": Reader(_json(MLX_CONFIG), lambda data, d: _mlx(data, save(MLX), d)),
    "mlx_tensors": Reader(save(MLX), lambda data, d: _mlx(_json(MLX_CONFIG), data, d)),
    "gguf_config": Reader(_json(LLAMA), lambda data, d: to_gguf(_plain(d), _object(data, d), "config.json")),
    "points": Reader(_json(POINTS), _points),
    "lorapack_toml": Reader(TOML, _toml),
    "merge_config": Reader(_json(LORA), lambda data, d: _updates(data, save(PAIRS), d)),
    "merge_safetensors": Reader(save(PAIRS), lambda data, d: _updates(_json(LORA), data, d)),
    "jsonl": Reader(b'{"text": "one"}\n{"text": "two"}\n', _rows(".jsonl")),
    "csv": Reader(b'text,label\n"one, two",1\n', _rows(".csv")),
}
