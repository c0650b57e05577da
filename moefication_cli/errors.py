"""Every error a user can meet: what was wrong, where, and the command to run next.

The library raises these and never prints or exits; `cli` turns them into one message on stderr, the exit code
of the class (DESIGN: 1 failure, 2 usage, 3 upstream missing or stale, 4 corrupt artifact, 5 locked, 75 run again) and, under
`--json`, an object with `code`.
"""

import difflib
from collections.abc import Iterable


class MoEficationError(Exception):
    """Base of all errors raised on purpose; exit code 1."""

    exit_code = 1
    code = "failure"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(MoEficationError):
    """An option or an input the user chose cannot be used (missing model or data, E that does not divide F, ...)."""

    exit_code = 2
    code = "usage"


class UnsupportedModelError(ConfigError):
    """No FFN family matches the model, or the model cannot be permuted (quantised, already a MoE, ...)."""

    code = "unsupported_model"


class UnavailableError(ConfigError):
    """A device, a backend or an optional package that was asked for is not here."""

    code = "unavailable"


class NonFiniteError(MoEficationError):
    """NaN or infinity where numbers were expected: activations, scores, targets. Names the layer."""

    code = "non_finite"


class MissingArtifactError(MoEficationError):
    """A stage's input has not been made yet."""

    exit_code = 3
    code = "missing_input"


class StaleArtifactError(MoEficationError):
    """A stage's input was made from something that has changed since."""

    exit_code = 3
    code = "stale_input"


class CorruptArtifactError(MoEficationError):
    """A file of a finished stage is truncated, altered or not in its schema."""

    exit_code = 4
    code = "corrupt_artifact"


class LockedError(MoEficationError):
    """Another live process works on the same layer or stage."""

    exit_code = 5
    code = "locked"


class RunAgainError(MoEficationError):
    """Somebody asked for an early end (SIGUSR1): what was finished is kept, the same command does the rest.

    75 is EX_TEMPFAIL of sysexits.h: try again later.
    """

    exit_code = 75
    code = "run_again"

    def __init__(self, message: str = "stopped early, as SIGUSR1 asked", hint: str = "") -> None:
        super().__init__(message, hint or "run the same command again: what is finished is kept")


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, for one-line messages; its class where it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """A hint that names what is spelled most like `word`; `otherwise` where nothing is close."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}?" if near else otherwise
