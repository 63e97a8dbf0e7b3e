"""The group of commands, and how their errors reach the user."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from lorapack import __version__
from lorapack.cli.compact import compact
from lorapack.cli.compress import compress
from lorapack.cli.config import config_group, defaults, find_config
from lorapack.cli.convert import convert
from lorapack.cli.diff import diff
from lorapack.cli.evaluate import evaluate
from lorapack.cli.expand import expand
from lorapack.cli.export import export
from lorapack.cli.extract import extract
from lorapack.cli.fleet import fleet
from lorapack.cli.inspect import inspect
from lorapack.cli.measure import measure
from lorapack.cli.merge import merge
from lorapack.cli.methods import methods
from lorapack.cli.plan import plan
from lorapack.cli.pull import pull
from lorapack.cli.push import push
from lorapack.cli.recover import recover
from lorapack.cli.report import report
from lorapack.cli.say import nobody_reads, plain, spell_out_letters
from lorapack.cli.sweep import sweep
from lorapack.cli.verify import verify
from lorapack.errors import GateError, InputError
from lorapack.processes import join, tells

BAD_INPUT, GATE, INTERRUPTED, INTERNAL = 2, 3, 130, 1
HELP = ["-h", "--help"]
HALF = "no output is half written"


@click.group(context_settings={"help_option_names": HELP, "max_content_width": 100})
@click.version_option(__version__, prog_name="lorapack")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--config", metavar="FILE", help="Defaults of options.  [default: lorapack.toml, pyproject.toml]")
@click.pass_context
def cli(ctx: click.Context, debug: bool, config: str | None) -> None:
    """Make a LoRA adapter smaller, and prove what it cost."""
    if ctx.invoked_subcommand == config_group.name or set(HELP) & set(sys.argv):  # they work beside a bad file too
        return
    join()
    found = find_config(config)
    if found is not None:
        ctx.default_map = defaults(found, cli, methods_of=[str(ctx.invoked_subcommand)])


for command in (
    compress,
    fleet,
    inspect,
    measure,
    plan,
    methods,
    recover,
    sweep,
    evaluate,
    diff,
    report,
    expand,
    compact,
    merge,
    verify,
    convert,
    extract,
    export,
    push,
    pull,
    config_group,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line; exit 0, or with one line on stderr: 2 bad input, 3 a gate not met, 1 a fault of ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours says how far it is
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        # GNU's OpenMP reads it when torch is imported. Its threads wait for each other spinning, which on a machine
        # with other work takes the processor from the very thread that is waited for
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    debug = "--debug" in sys.argv
    if debug:  # wherever it stands
        sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    spell_out_letters()
    code = _run(lambda: cli.main(standalone_mode=False), debug, _heed_signals())
    gc.freeze()  # the process ends: nothing is gained by looking for cycles in all that was imported
    sys.exit(code)


def _heed_signals() -> Sequence[signal.Signals]:
    """Let a signal end the run so that what is half written is removed; those that came are told by what it gives."""
    came: list[signal.Signals] = []

    def stop(number: int, _: Any) -> None:
        """End the run so that what is half written is removed."""
        came.append(signal.Signals(number))
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in usual.items():
        if signal.getsignal(number) == handler:  # in the background the first is ignored, under `nohup` the last
            signal.signal(number, stop)
    return came


class Stopped(BaseException):
    """A signal that ends the run, by its number. Of KeyboardInterrupt click makes its own."""


def _run(work: Callable[[], Any], debug: bool, came: Sequence[signal.Signals]) -> int:
    try:
        return work() or 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except Stopped as stop:
        return _ended(signal.Signals(stop.args[0]))
    except (KeyboardInterrupt, click.Abort):
        return _say(f"interrupted; {HALF}", INTERRUPTED)
    except BrokenPipeError:  # help and click's own
        nobody_reads()
        return 0
    except click.ClickException as error:
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            error.show()
            return BAD_INPUT
        where = getattr(error, "ctx", None)
        hint = f" (see `{where.command_path} --help`)" if where else ""
        return _say(error.format_message().replace("\n", " ") + hint, BAD_INPUT)
    except InputError as error:
        if came:  # it struck inside a library, which made an error of its own of it
            return _ended(came[0])
        if debug:
            raise
        return _say(str(error), BAD_INPUT)
    except GateError as missed:
        return _say(str(missed).replace("\n", " "), GATE)
    except Exception as error:
        if came:
            return _ended(came[0])
        if debug:
            raise
        if isinstance(error, OSError) and error.strerror:  # the system's no, such as a full disk behind `>`
            return _say(f"{error.filename or 'reading or writing'}: {error.strerror}".replace("\n", " "), BAD_INPUT)
        first = (str(error).splitlines() or [""])[0]
        return _say(f"a fault in lorapack: {type(error).__name__}: {first} (--debug shows where)", INTERNAL)


def _ended(by: signal.Signals) -> int:
    return _say(f"ended by {by.name}; {HALF}", 128 + by)


def _say(message: str, code: int) -> int:
    if tells():
        click.echo(f"lorapack: {plain(message)}", err=True)
    return code
