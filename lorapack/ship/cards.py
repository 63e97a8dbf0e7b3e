"""The card that is pushed: lorapack's part written anew, and what people wrote around it kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from huggingface_hub import CardData, ModelCardData, RepoCard

from lorapack.errors import InputError
from lorapack.write.card import BEGIN, END

Prose = Literal["hub", "dir"]
OURS = ("base_model", "base_model_relation", "library_name", "model-index")  # describe these very bytes
LISTS = ("tags", "datasets")  # both have a share in them


@dataclass(frozen=True)
class Written:
    """A card in parts: its metadata, and the text before and after lorapack's part."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    before: str = ""
    after: str = ""

    @property
    def prose(self) -> tuple[str, str]:
        return self.before, self.after


def parts(text: str, where: str) -> Written:
    """Take a card apart; one without lorapack's part is all text before it.

    Raises:
        InputError: its metadata is no YAML.
    """
    data: Mapping[str, Any] = {}
    if text.lstrip().startswith("---"):
        try:
            found = RepoCard(text)
        except Exception as error:  # PyYAML's own, or a ValueError of the Hub's client
            reason = (str(error).splitlines() or [""])[0]
            raise InputError(f"{where} has metadata that cannot be read ({reason[:120]}): correct it first") from None
        data, text = found.data.to_dict(), found.text  # type: ignore[no-untyped-call]
    end = text.find(END)
    begin = text.rfind(BEGIN, 0, max(end, 0))
    if begin < 0:
        return Written(data, text.strip())
    return Written(data, text[:begin].strip(), text[end + len(END) :].strip())


def merged(
    metadata: Mapping[str, Any],
    part: str,
    local: Written,
    remote: Written,
    prose: Prose | None,
    licence: str | None = None,
) -> str:
    """The card to push.

    Args:
        metadata, part: lorapack's own.
        local: of the directory's card.
        remote: of the card on the Hub; empty where there is none.
        prose: whose text stays where both have some and they differ.
        licence: the Hub's name of it, instead of the one in the cards.

    Raises:
        InputError: both have text and it differs, or the metadata are not the Hub's.
    """
    if prose is None and any(local.prose) and any(remote.prose) and local.prose != remote.prose:
        raise InputError(
            "README.md and the card on the Hub have text of their own, and it differs: "
            "say with --prose dir or --prose hub which is to stay"
        )
    first, second = (remote, local) if prose == "hub" else (local, remote)
    kept = first if any(first.prose) or prose else second
    told = _merged_metadata(metadata, local.metadata, remote.metadata)
    told |= {"license": licence} if licence else {}
    try:
        ModelCardData(**told)
    except (TypeError, ValueError) as error:
        raise InputError(f"the card's metadata are not the Hub's: {str(error).splitlines()[0]}") from None
    text = "\n\n".join(each for each in (kept.before, part, kept.after) if each)
    return f"---\n{CardData(**told).to_yaml(original_order=list(told))}\n---\n\n{text}\n"


def _merged_metadata(ours: Mapping[str, Any], local: Mapping[str, Any], remote: Mapping[str, Any]) -> dict[str, Any]:
    """What describes these bytes is ours; what people chose (licence, language, task) stays, the directory's first."""
    chosen = {key: value for key, value in local.items() if value != ours.get(key)}
    told = {**ours, **remote, **chosen}
    told = {key: value for key, value in told.items() if key not in OURS or key in ours}
    told |= {key: ours[key] for key in OURS if key in ours}
    for key in LISTS:
        both = [each for data in (ours, remote, local) for each in _listed(data.get(key))]
        told |= {key: list(dict.fromkeys(both))} if both else {}
    return told


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
