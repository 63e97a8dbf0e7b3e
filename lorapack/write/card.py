"""The model card of a compressed adapter, made from its report.

lorapack's part of the card stands between two markers, so that text around it can stay when the part is
written anew (`lorapack.ship.cards`).
"""

import json
import re
from typing import Any

from lorapack.core.adapter import Adapter
from lorapack.core.report import Interval, Report
from lorapack.read.config import COMPACT_TYPE
from lorapack.read.files import SAFETENSORS
from lorapack.write.form import compact_form

MODELS = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}
PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}
METRIC_IDS = {"matthews": "matthews_correlation", "spearman": "spearmanr"}  # the Hub's, where they are not ours
BEGIN, END = "<!-- lorapack:begin -->", "<!-- lorapack:end -->"
HERE = "path/to/this/directory"
_DATASET = re.compile(r"^([\w.-]+/[\w.-]+)(:|$)")


def card(adapter: Adapter, report: Report, *, place: str = HERE, expanded: bool = False) -> str:
    """`README.md`: metadata the Hub understands, how to load it, what was measured.

    Args:
        adapter: the compressed one.
        report: of how it was made.
        place: what to load it from, a directory or a Hub id.
        expanded: it is written as plain PEFT LoRA.
    """
    lines = "".join(
        f"{key}: {json.dumps(value, ensure_ascii=False)}\n"  # JSON is YAML, and its quotes hold whatever a name holds
        for key, value in card_metadata(report).items()
    )
    return f"---\n{lines}---\n\n{card_part(adapter, report, place=place, expanded=expanded)}\n"


def card_metadata(report: Report) -> dict[str, Any]:
    """The card's metadata by the Hub's keys."""
    datasets = [name for source in _sources(report) if (name := dataset_id(source))]
    results = _results(report)
    found: dict[str, Any] = {
        "base_model": report.base_model,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": PIPELINES.get(report.task),
        "tags": ["lora", "lorapack"],
        "datasets": list(dict.fromkeys(datasets)),
        "model-index": [{"name": _title(report), "results": results}] if results else None,
    }
    return {key: value for key, value in found.items() if value}


def card_part(adapter: Adapter, report: Report, *, place: str = HERE, expanded: bool = False) -> str:
    """lorapack's part of the card, with its markers; see `card`."""
    compact = not expanded and compact_form(adapter)[0]["peft_type"] == COMPACT_TYPE
    lines = [
        BEGIN,
        "<!-- `lorapack push` writes this part anew; write your own text above or below it. -->",
        "",
        f"# {_title(report)}",
        "",
        f"A LoRA for {_code(report.base_model)}, made smaller with lorapack {report.lorapack}, method "
        f"`{report.plan.method}`, from {_code(_name(report))}, whose tensors have the digest "
        f"`{report.adapter['original'][:16]}`.",
        "",
        *_loading(report, place, compact),
        "## Size",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| LoRA parameters | {report.before.parameters:,} | {report.after.parameters:,} |",
        f"| LoRA bytes | {report.before.bytes:,} | {report.after.bytes:,} |",
        f"| pairs of factors | {report.before.factors:,} | {report.after.factors:,} |",
        f"| other bytes (carried) | {report.before.carried_bytes:,} | {report.after.carried_bytes:,} |",
        "",
        *(_REPEATED if expanded and report.after.factors < report.after.modules else []),
        *_quality(report),
        END,
    ]
    return "\n".join(lines)


def dataset_id(source: str) -> str | None:
    """The Hub id of the dataset that a report's source is; None for a file or a directory."""
    found = _DATASET.match(source)
    return found[1] if found else None


_REPEATED = [
    f"Here the shared pairs are repeated for every layer, as plain PEFT needs it: `{SAFETENSORS}` is larger than that.",
    "",
]


def _name(report: Report) -> str:
    return (report.adapter["name"] or "A LoRA adapter").replace("\n", " ")


def _title(report: Report) -> str:
    return f"{_name(report)}, compressed"


def _code(text: str) -> str:
    """A name from a checkpoint, which is no Markdown."""
    return f"`{text}`".replace("\n", " ") if text and "`" not in text else json.dumps(text)


def _loading(report: Report, place: str, compact: bool) -> list[str]:
    model = MODELS.get(report.task, "AutoModel")
    lines = [
        "## Loading it",
        "",
        "```python",
        *(["import lorapack  # teaches PEFT the compact format"] if compact else []),
        "from peft import PeftModel",
        f"from transformers import {model}",
        "",
        f"base = {model}.from_pretrained({json.dumps(report.base_model)})",
        f"model = PeftModel.from_pretrained(base, {json.dumps(place)})",
        "```",
        "",
    ]
    if not compact:
        return [*lines, "This is plain PEFT LoRA: lorapack is not needed to load it.", ""]
    return [
        *lines,
        "Without lorapack, PEFT refuses it rather than loading a part of it. To use it where lorapack is not",
        "installed, make a plain PEFT adapter of it first:",
        "",
        "```console",
        f"$ lorapack expand {place} -o plain",
        "```",
        "",
    ]


def _sources(report: Report) -> list[str]:
    """Where its rows came from: first the data it was made with, then those it was evaluated on, if they are others."""
    facts = report.data or {}
    return [found["source"] for found in (facts, facts.get("evaluation_source")) if found]


def _results(report: Report) -> list[dict[str, Any]]:
    """The figures of the compressed adapter as a ``model-index`` has them; none where nothing was measured."""
    found, sources = report.quality, _sources(report)
    if found is None or not sources or report.task not in PIPELINES:
        return []
    figures = {name: each.get("compressed") for name, each in found.metrics.items()} | {"gain retained": found.retained}
    metrics = [_metric(name, f.value, f) for name, f in figures.items() if f and f.value is not None]
    source = sources[-1]
    dataset = {"type": dataset_id(source) or "other", "name": f"{found.rows:,} held-out rows of {source}"}
    return [{"task": {"type": PIPELINES[report.task]}, "dataset": dataset, "metrics": metrics}] if metrics else []


def _metric(name: str, value: float, figure: Interval) -> dict[str, Any]:
    bounds = (
        "" if figure.low is None or figure.high is None else f" (95% interval {figure.low:.4g} to {figure.high:.4g})"
    )
    return {"type": METRIC_IDS.get(name, name.replace(" ", "_")), "name": f"{name}{bounds}", "value": value}


def _quality(report: Report) -> list[str]:
    found = report.quality
    if found is None or report.data is None:
        return ["Made without data: its quality was not measured.", ""]
    parts = report.data["parts"]
    kept = (
        f"Gain retained: {shown(found.retained, percent=True)}."
        if found.retained
        else "On these rows the original is not measurably better than the base, so gain retained is not defined."
    )
    return [
        "## Quality",
        "",
        f"On {found.rows:,} rows of {_code(_sources(report)[-1])} that were not used to make it; "
        "95% bootstrap intervals over rows.",
        "",
        "| | base | original | compressed |",
        "|---|---|---|---|",
        *(
            f"| {name} | " + " | ".join(shown(each.get(v)) for v in ("base", "original", "compressed")) + " |"
            for name, each in found.metrics.items()
        ),
        "",
        f"{kept} Divergence from the original: {shown(found.divergence)} nats a prediction.",
        "",
        f"Calibrated on {parts['calibration']['rows']} rows ({parts['calibration']['tokens']:,} tokens) of "
        f"{_code(_sources(report)[0])}"
        + (f", recovered on them and {parts['recovery']['rows']} more." if report.recovery else ", without recovery."),
        "",
    ]


def shown(figure: Interval | None, percent: bool = False) -> str:
    """A figure with its interval, ``1.234 [1.200, 1.270]``."""
    if figure is None or figure.value is None or figure.low is None or figure.high is None:
        return "–"
    if percent:
        return f"{figure.value:.1%} [{figure.low:.1%}, {figure.high:.1%}]"
    return f"{figure.value:.4g} [{figure.low:.4g}, {figure.high:.4g}]"
