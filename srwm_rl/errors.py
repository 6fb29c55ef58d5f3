"""The errors that the command line prints without a traceback, and hints for misspelt names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

MAX_LETTERS = 2000


class UserError(ValueError):
    """Invalid input by the user; the message says in one line what is wrong and what to do.

    The command line prints it without a traceback and exits with code 2; in Python code it is a `ValueError`.
    """

    def __init__(self, message: str) -> None:
        # Line breaks and terminal codes are escaped.
        line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in message[: MAX_LETTERS + 1])
        super().__init__(line if len(line) <= MAX_LETTERS else f"{line[: MAX_LETTERS - 3]}...")


class FaultError(RuntimeError):
    """A failure while training: a number that is not finite, or an environment that raised.

    The message names the quantity and its origin. The command line keeps the last good checkpoint, prints the
    message in one line and exits with code 3.
    """


@contextmanager
def named(source: str) -> Iterator[None]:
    """Put the file's name before the message of every `UserError` in the block that lacks it."""
    try:
        yield
    except UserError as error:
        raise error if source in str(error) else UserError(f"{source}: {error}") from error


def check_settings(owner: str, settings: Iterable[str], known: Iterable[str]) -> None:
    """Raise a `UserError` for the first setting that is not known, with the nearest known name."""
    names = list(known)
    for name in settings:
        if name not in names:
            raise UserError(f"{owner} has no setting {name!r}{did_you_mean(str(name), names)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest known name, or the list of known names if none is near."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
