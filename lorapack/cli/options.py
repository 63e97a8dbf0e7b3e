"""Options that several commands have, each written once."""

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from lorapack.errors import InputError

Command = TypeVar("Command", bound=Callable[..., Any])


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator for several options, in the order of the help."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def parse_columns(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, str]:
    """``prompt=question,completion=answer`` as a dictionary."""
    if not value:
        return {}
    pairs = [part.partition("=") for part in value.split(",")]
    if not all(role.strip() and column.strip() for role, _, column in pairs):
        raise InputError(f"--columns {value!r}: write role=column, for example prompt=question,completion=answer")
    return {role.strip(): column.strip() for role, _, column in pairs}


def parse_share(_: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """``99%`` or ``0.99`` as 0.99."""
    if value is None:
        return None
    try:
        return float(value[:-1]) / 100 if value.endswith("%") else float(value)
    except ValueError:
        raise InputError(f"{parameter.opts[0]} {value!r} is not a share like 99%") from None


def parse_weights(_: click.Context, __: click.Parameter, value: str | None) -> list[float] | None:
    """``0.7,0.3`` as numbers."""
    try:
        return None if value is None else [float(part) for part in value.split(",")]
    except ValueError:
        raise InputError(f"--weights {value!r}: write numbers, for example 0.7,0.3") from None


def parse_bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """``200KB`` or ``200000`` as 200000."""
    if value is None:
        return None
    unit = next((unit for unit in UNITS if value.upper().endswith(unit)), "")
    try:
        return int(float(value[: len(value) - len(unit)]) * UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        raise InputError(f"--max-bytes {value!r} is not a size like 200KB") from None


def spelled(ctx: click.Context) -> list[str]:
    """The command in words that do the same again: what was typed, and what a file gave."""
    words = ["lorapack", str(ctx.info_name)]
    for parameter in ctx.command.params:
        value, source = ctx.params[str(parameter.name)], ctx.get_parameter_source(str(parameter.name))
        if isinstance(parameter, click.Argument):
            words += value if isinstance(value, tuple) else [value]
        elif source is not ParameterSource.DEFAULT and value not in (None, {}):
            name = max(parameter.opts, key=len)
            if isinstance(value, bool):
                words += [name] if value else parameter.secondary_opts
            else:
                text = ",".join("=".join(pair) for pair in value.items()) if isinstance(value, dict) else str(value)
                words += [name, text]
    for option, text in ctx.params.get("method_options", {}).items():
        words += ["--" + option.replace("_", "-"), text]
    return words


UNITS = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}
ADAPTER = click.argument("adapter", metavar="ADAPTER")
REVISION = click.option("--revision", metavar="REV", help="Branch, tag or commit of an adapter on the Hub.")
OUT = together(
    click.option("-o", "--out", required=True, metavar="OUT", help="Where to write."),
    click.option("--overwrite", is_flag=True, help="Replace OUT if it exists."),
)
VERIFY = click.option(
    "--verify", is_flag=True, help="Load both and compare their outputs first; exit 3, nothing written, if they differ."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
PLAN_MEMORY = click.option(
    "--plan-memory", is_flag=True, help="Say how much memory it will need, and end; nothing is loaded."
)
SEED = click.option("--seed", type=int, default=0, show_default=True, help="Of everything that is random.")
BASE = click.option("--base", metavar="MODEL", help="The base model's path or Hub id, if not as the adapter says.")


def _place(*more: str, about: str | None = None) -> Callable[[Command], Command]:
    devices = click.Choice(["auto", "cuda", "cpu", *more])
    return together(
        BASE,
        click.option("--device", type=devices, default="auto", show_default=True, help=about),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            default="auto",
            show_default=True,
            help="Of the base weights; auto: float32 on the CPU, the checkpoint's on a GPU.",
        ),
        click.option("--trust-remote-code", is_flag=True, help="Run code that the base model brings along."),
    )


PLACE = _place()
MODEL = together(
    _place(
        "split", "shard", about="split: over all GPUs, then the CPU, then the disk; shard: over torchrun's processes."
    ),
    click.option("--max-length", type=int, metavar="N", help="Tokens a row; longer ones are cut. [default: 512]"),
    click.option("--batch-tokens", type=int, default=4096, show_default=True, help="Tokens a batch."),
)
ROWS = "Rows: .jsonl .json .csv .parquet .txt, or ID[:CONFIG][:SPLIT]."
COLUMNS = click.option(
    "--columns", callback=parse_columns, metavar="ROLE=COL,…", help="Which columns to use, if not the usual ones."
)
DATA = together(click.option("--data", required=True, metavar="FILE", help=ROWS), COLUMNS)
SAMPLE = click.option(
    "--sample", default="20%", show_default=True, metavar="N|P%", help="How many rows to calibrate on."
)
AVERAGE = click.option(
    "--average",
    type=click.Choice(["token", "sample"]),
    default="token",
    show_default=True,
    help="What weighs the same in the statistics: each token or each row.",
)
METHOD = together(
    click.option(
        "--method",
        default="adaptive",
        show_default=True,
        help="How to choose what to keep; `lorapack methods` lists them, and the options that each has of its own.",
    ),
    click.option("--budget", metavar="N|P%|KB", help="Parameters allowed, or bytes: 5000B, 200KB, 1.5MB."),
)
RETAIN = click.option(
    "--retain",
    callback=parse_share,
    metavar="P%",
    help="Instead of a budget: the smallest size that keeps this much of the gain; 99% for adaptive without a budget.",
)
SHARE_INIT = click.option(
    "--share-init",
    type=click.Choice(["closed", "copy", "fresh"]),
    default="closed",
    show_default=True,
    help="Where a shared adapter starts: least squares, a copy of one layer, or anew.",
)
RECOVER_STEPS = click.option(
    "--recover-steps", type=int, default=100, show_default=True, help="Steps of recovery, 0 for none."
)
CALIBRATION = click.option("--data", metavar="FILE", help=ROWS + " Only methods that measure nothing go without.")
EVALUATION = click.option("--eval-data", metavar="FILE", help="Rows to evaluate on; otherwise cut off the data.")
STORE = click.option(
    "--store",
    type=click.Choice(["fp32", "bf16", "fp16", "int8", "int4"]),
    help="How the factors are stored; --budget P% then is of the bytes.  [default: as in ADAPTER]",
)
BATCH_SIZE = click.option(
    "--batch-size", type=int, show_default="8; 32 for a classifier", help="Rows a step of the recovery."
)
TRAINING = together(
    click.option(
        "--objective",
        type=click.Choice(["kl", "task", "both"]),
        default="both",
        show_default=True,
        help="Of the recovery: the original's predictions, the rows' own labels, or the mean.",
    ),
    click.option("--learning-rate", type=float, show_default="by the size of the factors", help="Of the recovery."),
    BATCH_SIZE,
    click.option(
        "--refit/--no-refit",
        default=None,
        help="Least squares before the first step, if better.  [default: where there are steps]",
    ),
    click.option(
        "--rank-dropout", type=float, default=0.0, metavar="P", help="DropLoRA: ranks are off with this probability."
    ),
    click.option(
        "--rank-mask",
        type=click.Choice(["token", "step"]),
        default="token",
        show_default=True,
        help="What has its own mask.",
    ),
    click.option("--checkpointing", is_flag=True, help="Less memory in the recovery, a third slower."),
)
RECOVERY = together(
    TRAINING,
    click.option("--state", metavar="FILE", help="Keep the recovery's state here."),
    click.option("--resume", is_flag=True, help="Go on from --state."),
)

LIMITS = together(
    click.option(
        "--min-retained",
        callback=parse_share,
        metavar="P%",
        help="Exit 3 unless the lower bound of the gain retained reaches this.",
    ),
    click.option(
        "--max-loss-increase",
        type=float,
        metavar="X",
        help="Exit 3 if the upper bound of the loss increase is above this.",
    ),
    click.option("--max-bytes", callback=parse_bytes, metavar="N|KB", help="Exit 3 if there are more LoRA bytes."),
    click.option("--max-params", type=int, metavar="N", help="Exit 3 if there are more LoRA parameters."),
)
GATES = together(
    LIMITS,
    click.option("--junit", metavar="FILE", help="Write the gates and their outcome as JUnit XML."),
)


class MethodCommand(click.Command):
    """A command that takes ``--option value`` for whatever options the chosen method has.

    Which those are, the method itself declares, so a new method needs nothing here; they arrive as
    ``method_options``, still text.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = {name for parameter in self.get_params(ctx) for name in (*parameter.opts, *parameter.secondary_opts)}
        mine, own = [], {}
        left = iter(args)
        for arg in left:
            name, equals, value = arg.partition("=")
            if not name.startswith("--") or name in known or name == "--":
                mine.append(arg)
                continue
            given = value if equals else next(left, None)
            if given is None:
                raise InputError(f"{name} is no option of this command; one of the method needs a value: {name} VALUE")
            own[name[2:].replace("-", "_")] = given
        rest = super().parse_args(ctx, mine)
        _file_yields(ctx, "budget", "retain")
        in_file = (ctx.default_map or {}).get(ctx.params["method"], {})
        ctx.params["method_options"] = {**in_file, **own}
        return rest


def _file_yields(ctx: click.Context, *names: str) -> None:
    """Of parameters that exclude each other, what the command line gives sends away what a file gives."""
    sources = {name: ctx.get_parameter_source(name) for name in names}
    if ParameterSource.COMMANDLINE in sources.values():
        ctx.params |= {name: None for name, source in sources.items() if source is ParameterSource.DEFAULT_MAP}
