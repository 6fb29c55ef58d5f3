"""The signals that ask a command to stop: SIGINT, SIGTERM and SIGHUP.

A signal that is ignored when a block begins stays ignored: nohup relies on it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


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

    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def raise_on_signals(ignore_signals_after: bool = False) -> Iterator[None]:
    """Raise `StopSignal` at the first stop signal inside the block; restore the handlers after it.

    `ignore_signals_after` ignores them once an exception has ended the block: for process 0 of several, which still
    saves the run, as torchrun signals all processes as soon as one has ended.
    """
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    previous = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}

    def restore(ignore: bool) -> None:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_IGN if ignore else handler)

    def stop(number: int, _frame: FrameType | None) -> None:
        restore(ignore_signals_after)
        raise StopSignal(signal.Signals(number).name)

    for number in previous:
        signal.signal(number, stop)
    try:
        yield
    except BaseException:
        restore(ignore_signals_after)
        raise
    restore(ignore=False)


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
