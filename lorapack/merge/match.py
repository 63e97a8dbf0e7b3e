"""Which tensor of the base an update belongs to: found with certainty, or refused by name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lorapack.errors import InputError
from lorapack.merge.base import WAY_OUT, Base
from lorapack.merge.experts import split
from lorapack.merge.layout import FLOATS, Entry
from lorapack.merge.updates import Carried, Update, Updates

# Layers of these models hold their weight transposed (transformers' Conv1D), under these names.
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D_LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")
HEADS = ("lm_head", "embed_out", "decoder", "output", "generator_lm_head", "proj_out")
EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "embed_in",
    "shared",
    "tok_embeddings",
    "tokens_embed",
    "word_embedding",
)
WITH_A_HEAD = ("LMHead", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining", "ForSpeechSeq2Seq")


@dataclass(frozen=True, eq=False)
class Change:
    """What happens to one tensor of the base: replaced, then added to, or one of both.

    Attributes:
        update: what is added; None for nothing.
        transposed: the weight is (d_in, d_out), so the transpose of B @ A is added.
        carried: what takes its place first; None where it stays.
    """

    update: Update | None = None
    transposed: bool = False
    carried: Carried | None = None


@dataclass(frozen=True, eq=False)
class Matched:
    """What happens to the base's tensors.

    Attributes:
        changes: by the tensor's name in the files; all others stay.
        untied: a tensor that the result has in addition, to the one of the base that it starts as.
    """

    changes: Mapping[str, Change]
    untied: Mapping[str, str]


def match(updates: Updates, base: Base) -> Matched:
    """The base's tensors that change.

    Raises:
        InputError: a module with no tensor or several, of another shape, quantised, or tied to another layer.
    """
    updates = split(updates, base.config)
    twin = _twin(base)
    entries = base.entries | {new: base.entries[old] for new, old in twin.items()}
    wanted = {f"{module}.weight": update for module, update in updates.modules.items()}
    names = places([*wanted, *updates.carried], entries, str(base.directory))
    changes: dict[str, Change] = {}
    for name, carried in updates.carried.items():
        entry = entries[names[name]]
        if carried.dtype not in FLOATS:
            raise InputError(f"the adapter's {name} is stored as {carried.dtype}, which cannot be merged")
        if carried.shape != entry.shape:
            raise InputError(_misfit(name, carried.shape, entry, base))
        changes[names[name]] = Change(carried=carried)
    for name, update in wanted.items():
        place = names[name]
        transposed = _transposed(name, update, entries[place], updates, base)
        carried_too = changes[place].carried if place in changes else None
        changes[place] = Change(update, transposed, carried_too)
    for place in changes:
        if entries[place].dtype not in FLOATS:
            raise InputError(f"{place} of the base is stored as {entries[place].dtype}, it is quantised: {WAY_OUT}")
    untied = {new: old for new, old in twin.items() if new in changes or old in changes}
    for ends in untied.items():
        _both_frozen(changes, *ends)
    if not untied or updates.config.get("ensure_weight_tying"):
        _refuse_tied(changes, base)
    return Matched(changes, untied)


def _both_frozen(changes: dict[str, Change], one: str, two: str) -> None:
    """Two tied tensors: where the adapter brings one as its base had it, the other was the same."""
    for here, there in ((one, two), (two, one)):
        carried = changes[here].carried if here in changes else None
        if carried is not None and carried.frozen:
            other = changes.get(there, Change())
            changes[there] = replace(other, carried=other.carried or carried)


def _twin(base: Base) -> dict[str, str]:
    """The output layer of a language model that is tied to its embedding and so not in the files, to that embedding.

    Only where the model can be untied by its configuration and everything has its usual name.
    """
    architectures = base.config.get("architectures") or []
    parts = {name: name.removesuffix(".weight").split(".") for name in base.entries if name.endswith(".weight")}
    embeddings = [name for name, part in parts.items() if part[-1] in EMBEDDINGS and len(part) > 1]
    able = len(architectures) == 1 and str(architectures[0]).endswith(("ForCausalLM", "GPT2LMHeadModel"))
    if not able or len(embeddings) != 1 or base.config.get("tie_word_embeddings") is False:
        return {}
    if any(part[-1] in HEADS and part[0] in HEADS for part in parts.values()):
        return {}
    return {"lm_head.weight": embeddings[0]}


def places(names: Iterable[str], entries: Mapping[str, Entry], base: str) -> dict[str, str]:
    """For each tensor name in the model its name in the files.

    Files may lack the model's first component (GPT-2's ``transformer.``) or have one more. The same holds for
    all that are not found under their own name, or nothing is certain.

    Raises:
        InputError: names the tensor.
    """
    found = {name: name for name in names if name in entries}
    rest = [name for name in names if name not in entries]
    if not rest:
        return found
    dropped = {name.partition(".")[0] for name in rest}
    ways = [(f"{first}.", "") for first in dropped] if len(dropped) == 1 else []
    ways += [("", f"{first}.") for first in sorted({name.partition(".")[0] for name in entries})]
    fitting = [
        (lacking, more) for lacking, more in ways if all(more + n.removeprefix(lacking) in entries for n in rest)
    ]
    if len(fitting) == 1:
        lacking, more = fitting[0]
        mapped = {name: more + name.removeprefix(lacking) for name in rest}
        if not set(mapped.values()) & set(found.values()):
            return found | mapped
    if fitting:
        raise InputError(f"{rest[0]} could be one of several tensors of the base {base}; which one is not certain")
    missing = next((n for n in rest if not any(m + n.removeprefix(k) in entries for k, m in ways)), rest[0])
    raise InputError(
        f"the base {base} has no tensor {missing}: it is not the one this adapter was trained on, it was saved without "
        "that layer (a new head, a tied one), or it names its layers otherwise; save the model as the adapter saw it "
        "(save_pretrained) and give that as --base"
    )


def _transposed(name: str, update: Update, entry: Entry, updates: Updates, base: Base) -> bool:
    """Whether the product is added transposed; the shapes must fit."""
    if update.kind != "linear":
        if entry.shape != update.weight:
            raise InputError(_misfit(name, update.weight, entry, base))
        return update.kind == "embedding"
    layer = name.split(".")[-2]
    conv1d = base.config.get("model_type") in CONV1D_MODELS and layer in CONV1D_LAYERS
    straight, turned = update.weight, update.weight[::-1]
    if entry.shape not in (straight, turned) or (conv1d and entry.shape != turned):
        raise InputError(_misfit(name, turned if conv1d else straight, entry, base))
    if conv1d or straight == turned:
        if not conv1d and updates.settings.fan_in_fan_out and base.config.get("model_type") not in CONV1D_MODELS:
            raise InputError(
                f"{name} is square and the adapter has fan_in_fan_out: how the base holds it is not certain"
            )
        return conv1d
    if entry.shape == turned and not updates.settings.fan_in_fan_out:
        raise InputError(_misfit(name, straight, entry, base))
    return entry.shape == turned


def _misfit(name: str, wanted: tuple[int, ...], entry: Entry, base: Base) -> str:
    return (
        f"{name} is {list(entry.shape)} in the base {base.directory} and {list(wanted)} for the adapter: it is not the "
        "one this adapter was trained on, or its vocabulary was resized"
    )


def _refuse_tied(changes: Mapping[str, Change], base: Base) -> None:
    """A weight that is both embedding and output layer: merging would change the other one too.

    A model can be untied, a file cannot say so for every architecture; so this is refused.

    Raises:
        InputError: names the tensor.
    """
    parts = {name: name.removesuffix(".weight").rpartition(".")[2] for name in base.entries if name.endswith(".weight")}
    ends = [name for name in changes if parts.get(name) in (*HEADS, *EMBEDDINGS)]
    ends = [name for name in ends if len(base.entries[name].shape) == 2]
    heads = [name for name, part in parts.items() if part in HEADS]
    architectures = base.config.get("architectures") or ["ForCausalLM"]
    if not ends or not any(word in str(a) for a in architectures for word in WITH_A_HEAD):
        return
    text = base.config.get("text_config") or {}
    tied = base.config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    shapes = {base.entries[name].shape for name in heads}
    if tied is False or (tied is None and base.entries[ends[0]].shape in shapes):
        return
    raise InputError(
        f"{ends[0]} is tied to the model's other end (embedding and output layer are one tensor): merging would "
        "change both. Untie them first (save the base with tie_word_embeddings=False and both weights), and give that "
        "as --base"
    )
