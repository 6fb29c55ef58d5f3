"""The signals that ask a command to stop: SIGINT, SIGTERM and SIGHUP.

A signal that is ignored when a block begins stays ignored: nohup relies on it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
Handlers = dict[signal.Signals, Any]


class StopSignal(BaseException):
    """A signal asked the run to stop; raised between any two bytecodes."""


@contextmanager
def catch_signals(act: Callable[[int], object] | None = None) -> Iterator[list[int]]:
    """Catch stop signals in the block, call `act` with the number of each, and give the list of those caught so far."""
    caught: list[int] = []

    def catch(number: int, _frame: FrameType | None) -> None:
        caught.append(number)
        if act is not None:
            act(number)

    with restore_handlers() as previous:
        for number in previous:
            signal.signal(number, catch)
        yield caught


@contextmanager
def restore_handlers() -> Iterator[Handlers]:
    """Restore the handlers of stop signals after the block; give those that may be replaced in it."""
    handlers = _handlers()
    try:
        yield handlers
    finally:
        _restore(handlers)


@contextmanager
def raise_on_signals(ignored_after: Collection[int] = ()) -> Iterator[None]:
    """Raise `StopSignal` at the first stop signal inside the block; restore the handlers after it.

    Signals `ignored_after` are ignored from then on if an exception has ended the block: one that comes twice is not to
    end the process while it saves the run. `restore_handlers` around the block ends that.
    """
    previous = _handlers()
    after = {number: _ignore if number in ignored_after else handler for number, handler in previous.items()}

    def stop(number: int, _frame: FrameType | None) -> None:
        _restore(after)
        raise StopSignal(signal.Signals(number).name)

    try:
        for number in previous:
            signal.signal(number, stop)
        yield
    except BaseException:
        _restore(after)
        raise
    _restore(previous)


@contextmanager
def hold_signals() -> Iterator[None]:
    """Handle stop signals after the block, which an exception must not leave half done."""
    held: list[int] = []
    try:
        with catch_signals() as held:
            yield
    finally:
        for number in held:
            signal.raise_signal(number)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Ignore a signal; under SIG_IGN Python prints an error about one that came before that was set."""


def _handlers() -> Handlers:
    """Return the handlers of stop signals, without those that are ignored or that are not of Python (None)."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    return {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}


def _restore(handlers: Handlers) -> None:
    for number in reversed(handlers):  # SIGINT last: its handler may raise, and the others would not be restored
        if signal.getsignal(number) != handlers[number]:  # only the main thread may replace one
            signal.signal(number, handlers[number])
