"""The command line's entry point, and the only place that exits: signals, and one message and exit code per error."""

import os
import re
import signal
import sys
import traceback
from typing import Any, NoReturn

import typer

from moefication_cli.cli.care import add_commands
from moefication_cli.cli.commands import app
from moefication_cli.cli.console import Console
from moefication_cli.cli.early_end import take_early_ends
from moefication_cli.cli.options import ENV_PREFIX
from moefication_cli.cli.threads import share_the_machine
from moefication_cli.errors import MoEficationError, did_you_mean
from moefication_cli.runs.ranks import rank_and_size

__all__ = ["app", "exit_code", "main"]

add_commands(app)


class _StoppedError(BaseException):
    """A signal asked us to stop; unwinding releases locks and sweeps temporary files."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


def _stop_on_signals() -> None:
    """Raise where the program stands, again after 0.1 seconds and then every second until somebody catches it.

    Python drops an exception raised inside a destructor or a weak-reference callback, and prints it: once would not be
    enough, and what it prints would be a traceback.
    """

    def stop(signum: int, frame: Any) -> NoReturn:
        def again(_: int, frame: Any) -> NoReturn:
            raise _StoppedError(signum)

        signal.signal(signal.SIGALRM, again)
        signal.setitimer(signal.ITIMER_REAL, 0.1, 1.0)
        raise _StoppedError(signum)

    def dropped(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, _StoppedError):
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = dropped
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # a shell's background jobs ignore SIGINT on purpose
            signal.signal(number, stop)


def main() -> NoReturn:
    """Entry point: every error becomes one message on stderr and the documented exit code."""
    _stop_on_signals()
    take_early_ends()
    arguments = sys.argv[1:]
    if "bench" not in arguments[:1]:  # which measures what a program gets that loads the model
        share_the_machine(os.environ)
    console = Console(json_mode="--json" in arguments and rank_and_size()[0] == 0)
    sys.exit(exit_code(console, arguments))


def exit_code(console: Console, arguments: list[str]) -> int:
    """Runs the command that `arguments` are; an error becomes one message on the console, and its exit code."""
    try:
        return int(app(arguments, prog_name="moefication", standalone_mode=False) or 0)
    except MoEficationError as error:
        if os.environ.get(ENV_PREFIX + "DEBUG"):
            traceback.print_exc()
        console.error(error)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        console.error(MoEficationError("interrupted", "run the same command again: finished layers are kept"))
        return 130
    except _StoppedError as stop:
        signal.setitimer(signal.ITIMER_REAL, 0)
        name = signal.Signals(stop.signum).name
        console.error(MoEficationError(f"stopped by {name}", "run the same command again: finished layers are kept"))
        return 128 + stop.signum
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123  the reader is gone; nothing is left to say
        return 1
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        console.error(MoEficationError(f"{error.strerror or error}{place}", "check the disk and the permissions"))
        return 1
    except Exception as error:
        if hasattr(error, "format_message"):  # the command line could not be parsed
            usage = MoEficationError(error.format_message().replace("Value error, ", ""), _usage_hint(error))
            usage.code, usage.exit_code = "usage", int(getattr(error, "exit_code", 2))
            console.error(usage)
            return usage.exit_code
        traceback.print_exc()
        if console.json_mode:
            console.json({"ok": False, "error": {"code": "internal", "message": repr(error), "exit_code": 1}})
        return 1


def _usage_hint(error: Any) -> str:
    """The option or the choice that was probably meant, else which help to read."""
    where = getattr(getattr(error, "ctx", None), "command_path", "moefication")
    message = error.format_message()
    choice = re.search(r"'([^']*)' is not one of (.*)", message)
    near = did_you_mean(choice[1], re.findall(r"'([^']*)'", choice[2])) if choice else ""
    if possible := getattr(error, "possibilities", None):
        near = f"did you mean {possible[0]}?"
    return near or f"see {where} --help"


if __name__ == "__main__":
    main()
