"""The model card of a compressed adapter, made from its report."""

import json

from lorapack.core.adapter import Adapter
from lorapack.core.report import Interval, Report
from lorapack.read.config import COMPACT_TYPE
from lorapack.write.form import compact_form


def card(adapter: Adapter, report: Report) -> str:
    """`README.md`: metadata the Hub understands, how to load it, what was measured."""
    compact = compact_form(adapter)[0]["peft_type"] == COMPACT_TYPE
    kind = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}[report.task]
    pipeline = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}[report.task]
    first = "import lorapack  # teaches PEFT the compact format\n" if compact else ""
    used = report.data["parts"]
    lines = [
        "---",
        f"base_model: {json.dumps(report.base_model)}",  # quoted: it comes from the checkpoint
        "library_name: peft",
        f"pipeline_tag: {pipeline}",
        "tags: [lora, lorapack]",
        "---",
        "",
        f"# {report.adapter['name'] or 'A LoRA adapter'}, compressed",
        "",
        f"Made with lorapack {report.lorapack}, method `{report.plan.method}`.",
        "",
        "```python",
        f"{first}from peft import PeftModel",
        f"from transformers import {kind}",
        "",
        f"base = {kind}.from_pretrained({json.dumps(report.base_model)})",
        'model = PeftModel.from_pretrained(base, "path/to/this/directory")',
        "```",
        "",
        *(
            [
                "Without lorapack, PEFT refuses it rather than loading the shared layers as zeros;",
                "`lorapack expand DIR -o OUT` writes a plain PEFT adapter.",
                "",
            ]
            if compact
            else []
        ),
        "## Size",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| LoRA parameters | {report.before.parameters:,} | {report.after.parameters:,} |",
        f"| LoRA bytes | {report.before.bytes:,} | {report.after.bytes:,} |",
        f"| pairs of factors | {report.before.factors:,} | {report.after.factors:,} |",
        f"| other bytes (carried) | {report.before.carried_bytes:,} | {report.after.carried_bytes:,} |",
        "",
        "## Quality",
        "",
        f"On {report.quality.rows:,} rows that were not used to make it; 95% bootstrap intervals over rows.",
        "",
        "| | base | original | compressed |",
        "|---|---|---|---|",
        *(
            f"| {name} | " + " | ".join(shown(found.get(v)) for v in ("base", "original", "compressed")) + " |"
            for name, found in report.quality.metrics.items()
        ),
        "",
        f"Gain retained: {shown(report.quality.retained, percent=True)}. "
        f"Divergence from the original: {shown(report.quality.divergence)} nats a prediction.",
        "",
        f"Calibrated on {used['calibration']['rows']} rows ({used['calibration']['tokens']:,} tokens)"
        + (f", recovered on {used['recovery']['rows']}." if report.recovery else ", without recovery."),
        "",
    ]
    return "\n".join(lines)


def shown(figure: Interval | None, percent: bool = False) -> str:
    """A figure with its interval, ``1.234 [1.200, 1.270]``."""
    if figure is None or figure.value is None or figure.low is None or figure.high is None:
        return "–"
    if percent:
        return f"{figure.value:.1%} [{figure.low:.1%}, {figure.high:.1%}]"
    return f"{figure.value:.4g} [{figure.low:.4g}, {figure.high:.4g}]"
