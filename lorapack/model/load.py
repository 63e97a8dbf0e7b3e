"""Load the base model and attach an adapter to it."""

import atexit
import contextlib
import dataclasses
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lorapack.core.adapter import Adapter
from lorapack.core.names import head_classes
from lorapack.data.prepare import Reader
from lorapack.errors import InputError
from lorapack.model.shard import check_shardable, shard
from lorapack.read.files import refuse_elsewhere
from lorapack.read.patterns import check_time
from lorapack.write.form import peft_form

Device = Literal["auto", "cuda", "cpu", "split", "shard"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Task = Literal["CAUSAL_LM", "SEQ_CLS"]
NAME = "default"
LONGEST = 512  # tokens a row, unless the user or the model says otherwise
MOST_LOGITS = 2**27  # half a gigabyte of float32


@dataclass(frozen=True, eq=False)
class Loaded:
    """A base model with LoRA layers whose factors can be exchanged (`lorapack.model.point`).

    Attributes:
        model: PEFT's model, frozen, in eval mode.
        reader: how it reads rows.
        layers: PEFT's LoRA layer of every module of the adapter.
        task: what kind of head it has.
        base_model: the id or path it was loaded from.
        sharded: whether its layers are cut over the processes (`lorapack.model.shard`).
    """

    model: nn.Module
    reader: Reader
    layers: dict[str, Any]
    task: Task
    base_model: str
    device: torch.device
    sharded: bool = False

    @property
    def base(self) -> Any:
        """transformers' model, LoRA layers inside."""
        return self.model.get_base_model()  # type: ignore[operator]

    @property
    def pad(self) -> int:
        return int(self.reader.tokenizer.pad_token_id or 0)

    def tokens_with_logits(self, tokens: int) -> int:
        """How many of `tokens` a batch may have where logits are computed: at most `MOST_LOGITS` numbers."""
        classes = self.base.config.get_text_config().vocab_size if self.task == "CAUSAL_LM" else 1
        return max(1, min(tokens, MOST_LOGITS // classes))

    @property
    def is_regression(self) -> bool:
        return self.reader.classes == 1


def load(
    adapter: Adapter,
    base: str | None = None,
    *,
    device: Device = "auto",
    dtype: DType = "auto",
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load the base model (a path or a Hub id) and attach the adapter.

    Args:
        adapter: its configuration names base and task.
        base: another place for the base model.
        device: ``auto`` takes a CUDA device where there is one; ``split`` lays the layers over all of them, and
            what does not fit into the CPU's memory and, at last, into temporary files (accelerate's ``auto``);
            ``shard`` cuts each layer over the processes (`lorapack.model.shard`).
        dtype: of the base weights; ``auto`` is float32 on the CPU and the checkpoint's on a GPU.
            The factors are always float32.
        max_length: the most tokens a row may have; `LONGEST` or the model's own limit by default.
        trust_remote_code: run code that the base model brings along.

    Raises:
        InputError: no base, one that cannot be loaded, or one the adapter does not fit.
    """
    source = base or adapter.base_model
    if not source:
        raise InputError("the adapter names no base model; name it with --base")
    refuse_elsewhere(source)
    if device == "shard":
        check_shardable()
    where = find_device(device)
    torch_dtype = _dtype(dtype, where)
    revision = adapter.config.get("revision") if base is None else None
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with quiet():
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(source, **options)
            task = _task(adapter, config)
            if task == "SEQ_CLS":
                config.num_labels = head_classes(adapter.carried) or config.num_labels
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
            kind = {
                "CAUSAL_LM": transformers.AutoModelForCausalLM,
                "SEQ_CLS": transformers.AutoModelForSequenceClassification,
            }[task]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # a head that no file holds is drawn at random
                if device == "split":
                    options |= {"device_map": "auto", "offload_folder": _temporary()}
                model = kind.from_pretrained(source, config=config, dtype=torch_dtype, **options)
        except InputError:
            raise
        except Exception as error:  # transformers, the Hub's client and safetensors raise their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            hint = "" if base else "; name it with --base"
            raise InputError(f"the base model {source!r} cannot be loaded ({reason[:200]}){hint}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    check_fits(adapter, model, source)
    weights = set(model.parameters())
    attached = attach(adapter, model if device in ("split", "shard") else model.to(where), source)
    if device == "shard":
        shard(attached, attached.get_base_model().base_model, weights, where)
    modules = dict(attached.base_model.model.named_modules())
    return Loaded(
        model=attached,
        reader=Reader(
            tokenizer,
            longest=longest(max_length, config, tokenizer),
            classes=int(model.config.num_labels) if task == "SEQ_CLS" else None,
            label_ids={str(name): int(n) for name, n in (model.config.label2id or {}).items()},
            vocabulary=getattr(model.get_input_embeddings(), "num_embeddings", None),
        ),
        layers={module: modules[module] for module in adapter.modules},
        task=task,
        base_model=source,
        device=where,
        sharded=device == "shard",
    )


def attach(adapter: Adapter, model: nn.Module, source: str) -> Any:
    """PEFT's model of a base with the adapter on it, frozen, in eval mode; `source` is the base's name in messages.

    Raises:
        InputError: the adapter does not fit, or a pattern of its configuration takes too long.
    """
    from peft import LoraConfig, PeftModel
    from peft.utils import set_peft_model_state_dict

    config, tensors = peft_form(adapter)
    check_time(config, [name for name, _ in model.named_modules()])
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    settings = LoraConfig(**{k: v for k, v in config.items() if k in known and k not in ("peft_type", "auto_mapping")})
    with quiet():
        attached = PeftModel(model, settings, NAME)
        try:
            result = set_peft_model_state_dict(attached, tensors, NAME)
        except KeyError as error:
            raise InputError(f"the adapter's modules_to_save want {error}, which its file does not hold") from None
        except RuntimeError as error:
            lines = str(error).splitlines()
            raise InputError(f"the adapter does not fit {source!r}: {lines[min(1, len(lines) - 1)].strip()}") from None
    if result.unexpected_keys:
        raise InputError(f"the base model {source!r} has no place for the adapter's tensor {result.unexpected_keys[0]}")
    _keep_gradients(attached)
    return attached.requires_grad_(False).eval()


def _keep_gradients(model: nn.Module) -> None:
    """On some CPUs bitsandbytes packs 4-bit weights anew at their first use, for a kernel that gives no gradient."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (no attribute of nn.Module)


def _temporary() -> str:
    """A directory that goes when the process ends."""
    found = tempfile.TemporaryDirectory(prefix="lorapack-")
    atexit.register(found.cleanup)
    return found.name


def check_fits(adapter: Adapter, model: nn.Module, source: str) -> None:
    """Every module of the adapter must be there, in the adapter's shape; LoRA layers may be on it already.

    Raises:
        InputError: one is not.
    """
    modules = dict(model.named_modules())
    for module in adapter.modules:
        if module not in modules:
            raise InputError(
                f"the base model {source!r} has no module {module}: it is not the one this adapter was trained on"
            )
        layer = getattr(modules[module], "base_layer", modules[module])
        weight = getattr(layer, "weight", None)
        factors = adapter.factors(module)
        if factors.kind != "linear" or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            continue
        if isinstance(layer, nn.Linear):
            d_out, d_in = layer.out_features, layer.in_features
        elif type(layer).__name__ == "Conv1D":
            d_in, d_out = weight.shape
        else:
            continue
        if factors.shape != (d_out, d_in):
            raise InputError(
                f"{module} is {d_out}x{d_in} in the base model {source!r} and {factors.shape[0]}x{factors.shape[1]} "
                "in the adapter: it is not the one this adapter was trained on"
            )


def _task(adapter: Adapter, config: Any) -> Task:
    task = adapter.task_type
    if task is None:
        architecture = " ".join(config.architectures or [])
        task = "SEQ_CLS" if "ForSequenceClassification" in architecture else "CAUSAL_LM"
        if task == "CAUSAL_LM" and "LMHead" not in architecture and "ForCausalLM" not in architecture:
            raise InputError(f"the adapter names no task_type and the base is a {architecture or config.model_type}")
    if task not in ("CAUSAL_LM", "SEQ_CLS"):
        raise InputError(f"task_type {task} cannot be measured yet (possible: CAUSAL_LM, SEQ_CLS)")
    return "SEQ_CLS" if task == "SEQ_CLS" else "CAUSAL_LM"


def longest(max_length: int | None, config: Any, tokenizer: Any) -> int:
    """The most tokens a row may have: as asked, or `LONGEST`, or what model and tokenizer take.

    Raises:
        InputError: more was asked than they take, or less than 2.
    """
    limits = [getattr(config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    possible = min(int(limit) for limit in (*limits, 1_000_000) if limit)
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        possible -= 2  # their positions begin behind the padding index
    if max_length is not None and not 2 <= max_length <= possible:
        raise InputError(f"--max-length {max_length} is outside 2 to {possible}, what the base model takes")
    return max_length or min(LONGEST, possible)


def find_device(device: Device) -> torch.device:
    """The device meant.

    Raises:
        InputError: CUDA is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no CUDA device")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _dtype(dtype: DType, device: torch.device) -> Any:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep other libraries' warnings and progress bars from the user, who gets one clear line instead."""
    import transformers

    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
