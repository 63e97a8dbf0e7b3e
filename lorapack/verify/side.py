"""One of the two directories, opened: a model, or an adapter on its base."""

import contextlib
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorapack.core.names import head_classes
from lorapack.errors import InputError
from lorapack.model.load import Device, DType, find_device, quiet
from lorapack.read.adapter import read_tensors
from lorapack.read.files import CONFIG, read_json, refuse_elsewhere
from lorapack.read.patterns import check_time

MODEL_CONFIG = "config.json"
# for other tasks, and where an adapter names none, the model's own class (`architectures`) is taken
OF_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


@dataclass(frozen=True)
class Place:
    """What a directory is: an adapter and where its base lies, or a model. ONNX will be a third kind.

    Attributes:
        directory: as given.
        source: path or Hub id of what transformers loads: the base, or the directory itself.
        revision: of the source.
        task: the adapter's `task_type`; None where there is none.
        adapter: whether it is one.
    """

    directory: Path
    source: str
    revision: str | None = None
    task: str | None = None
    adapter: bool = False


@dataclass(frozen=True, eq=False)
class Side:
    """A model that can be run.

    Attributes:
        model: transformers' model in eval mode, the adapter's layers inside.
        wrapped: PEFT's model around it; None for a plain model.
        stored: the type of its weights in the files.
        device: where it is.
    """

    model: Any
    wrapped: Any
    stored: torch.dtype
    device: torch.device

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The outputs for one row, float32 on the CPU: logits, or what the model gives first."""
        moved = {
            name: t.to(self.device, self.model.dtype if t.is_floating_point() else None) for name, t in inputs.items()
        }
        with torch.inference_mode():
            found = self.model(**moved)
        outputs: Tensor = found["logits"] if "logits" in found else found[0]
        return outputs.float().cpu()

    def without_adapter(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the adapter is off."""
        off: contextlib.AbstractContextManager[None] = self.wrapped.disable_adapter()
        return off


def find(directory: str | Path, base: str | Path | None) -> Place:
    """Say what a directory is.

    Raises:
        InputError: neither an adapter nor a model, or an adapter without a base that can be looked for.
    """
    path = Path(directory)
    if (path / CONFIG).is_file():
        config = read_json(path / CONFIG)
        source = base or config.get("base_model_name_or_path")
        if not source:
            raise InputError(f"{path} names no base model; name it with --base")
        refuse_elsewhere(str(source))
        return Place(path, str(source), config.get("revision") if base is None else None, config.get("task_type"), True)
    if (path / MODEL_CONFIG).is_file():
        return Place(path, str(path))
    raise InputError(f"{path} has neither {CONFIG} nor {MODEL_CONFIG}: it is no adapter and no model directory")


def kind_of(places: tuple[Place, Place], trust_remote_code: bool) -> Any:
    """The class that both sides are loaded with: of the adapter's task, else the first model's own."""
    import transformers

    task = next((place.task for place in places if place.task), None)
    if task in OF_TASK:
        return getattr(transformers, OF_TASK[task])
    with loading(places[0]):
        config = transformers.AutoConfig.from_pretrained(
            places[0].source, revision=places[0].revision, trust_remote_code=trust_remote_code
        )
    found = getattr(transformers, (config.architectures or ["AutoModel"])[0], None)
    own = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if own else transformers.AutoModel


@contextlib.contextmanager
def opened(place: Place, kind: Any, device: Device, dtype: DType, trust_remote_code: bool) -> Iterator[Side]:
    """Load a side; its memory is free again after the block.

    Raises:
        InputError: it cannot be loaded, or adapter and base do not belong together.
    """
    where = find_device(device)
    options = {"revision": place.revision, "trust_remote_code": trust_remote_code}
    with loading(place):
        import transformers

        config = transformers.AutoConfig.from_pretrained(place.source, **options)
        if place.adapter and place.task == "SEQ_CLS":
            config.num_labels = head_classes(read_tensors(place.directory)[0]) or config.num_labels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a head that no file holds is drawn at random
            model = kind.from_pretrained(place.source, config=config, dtype="auto", **options)
        stored = model.dtype
        if dtype != "auto" or where.type == "cpu":
            model = model.to(torch.float32 if dtype == "auto" else getattr(torch, dtype))
        model = model.to(where).eval()
        wrapped = _attached(model, place) if place.adapter else None
    try:
        yield Side(model if wrapped is None else wrapped.get_base_model(), wrapped, stored, where)
    finally:
        del model, wrapped
        gc.collect()


def _attached(model: Any, place: Place) -> Any:
    """PEFT's own way from the directory to the model (it knows the compact format, as lorapack is imported).

    Raises:
        InputError: a tensor is lacking or left over, or a pattern takes too long.
    """
    from peft import PeftModel

    check_time(read_json(place.directory / CONFIG), [name for name, _ in model.named_modules()])
    found = PeftModel.from_pretrained(model, place.directory)
    loaded = found.load_adapter(place.directory, "default")  # again: only this call says what it did not find
    if loaded.missing_keys:
        raise InputError(
            f"{place.directory} has no tensor {loaded.missing_keys[0]}, which the base model has a place for"
        )
    if loaded.unexpected_keys:
        raise InputError(
            f"{place.directory} has {loaded.unexpected_keys[0]}, and the base model {place.source!r} no place for it"
        )
    return found.requires_grad_(False).eval()


@contextlib.contextmanager
def loading(place: Place) -> Iterator[None]:
    """What other libraries raise while they load becomes one line.

    Raises:
        InputError: names the directory and the reason.
    """
    with quiet():
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # transformers, PEFT, the Hub's client and safetensors raise their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            of = f" on {place.source!r}" if place.adapter else ""
            raise InputError(f"{place.directory}{of} cannot be loaded ({reason[:200]})") from None
