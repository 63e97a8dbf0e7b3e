"""The model card of a compressed adapter, made from its report."""

import json

from lorapack.core.adapter import Adapter
from lorapack.core.report import Interval, Report
from lorapack.read.config import COMPACT_TYPE
from lorapack.write.form import compact_form

MODELS = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}
PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}


def card(adapter: Adapter, report: Report) -> str:
    """`README.md`: metadata the Hub understands, how to load it, what was measured."""
    name = (report.adapter["name"] or "A LoRA adapter").replace("\n", " ")
    lines = [
        "---",
        f"base_model: {json.dumps(report.base_model)}",  # quoted: it comes from the checkpoint
        "library_name: peft",
        *([f"pipeline_tag: {PIPELINES[report.task]}"] if report.task in PIPELINES else []),
        "tags: [lora, lorapack]",
        "---",
        "",
        f"# {name}, compressed",
        "",
        f"Made with lorapack {report.lorapack}, method `{report.plan.method}`.",
        "",
        *_loading(adapter, report),
        "## Size",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| LoRA parameters | {report.before.parameters:,} | {report.after.parameters:,} |",
        f"| LoRA bytes | {report.before.bytes:,} | {report.after.bytes:,} |",
        f"| pairs of factors | {report.before.factors:,} | {report.after.factors:,} |",
        f"| other bytes (carried) | {report.before.carried_bytes:,} | {report.after.carried_bytes:,} |",
        "",
        *_quality(report),
    ]
    return "\n".join(lines)


def _loading(adapter: Adapter, report: Report) -> list[str]:
    compact = compact_form(adapter)[0]["peft_type"] == COMPACT_TYPE
    model = MODELS.get(report.task, "AutoModel")
    lines = [
        "```python",
        *(["import lorapack  # teaches PEFT the compact format"] if compact else []),
        "from peft import PeftModel",
        f"from transformers import {model}",
        "",
        f"base = {model}.from_pretrained({json.dumps(report.base_model)})",
        'model = PeftModel.from_pretrained(base, "path/to/this/directory")',
        "```",
        "",
    ]
    if compact:
        lines += [
            "Without lorapack, PEFT refuses it rather than loading a part of it;",
            "`lorapack expand DIR -o OUT` writes a plain PEFT adapter.",
            "",
        ]
    return lines


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
        f"On {found.rows:,} rows that were not used to make it; 95% bootstrap intervals over rows.",
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
        f"Calibrated on {parts['calibration']['rows']} rows ({parts['calibration']['tokens']:,} tokens)"
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
