"""The one error a user can cause, and the nearest-match hint its messages carry."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Say in one line what is wrong with what the user gave, and what to do.

    The command line prints it without a traceback and exits with code 2; in Python code it is a `ValueError`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class FaultError(RuntimeError):
    """Something broke while training: a number that is not finite, or an environment that raised.

    The message names the quantity and where it turned up. The command line keeps the last good checkpoint, prints the
    message in one line and exits with code 3.
    """


def one_line(text: str, most: int = 2000) -> str:
    """Return a text without line breaks and terminal codes, which names in a file may hold, and not too long."""
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text[: most + 1])
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def check_settings(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a `UserError` that names the first setting `owner` does not have, and the nearest one it has."""
    names = list(known)
    for name in given:
        if name not in names:
            raise UserError(f"{owner} has no setting {name!r}{did_you_mean(str(name), names)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest known name, or the list of known names when none is near."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
