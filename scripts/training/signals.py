"""Turn signals that ask a run to stop into an exception."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class StopSignal(BaseException):
    """A signal asked the run to stop; raised between any two bytecodes."""


@contextmanager
def raise_on_signals(ignore_signals_after: bool = False) -> Iterator[None]:
    """Raise `StopSignal` at the first SIGINT, SIGTERM or SIGHUP inside the block; restore the handlers after it.

    `ignore_signals_after` ignores them once an exception has ended the block: for process 0 of several, which still
    saves the run, as torchrun signals all processes as soon as one has ended.
    """
    numbers = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # An ignored signal stays ignored: nohup relies on it.
    previous = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}

    def restore(ignore: bool) -> None:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_IGN if ignore else handler)

    def stop(number: int, frame: object) -> None:
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
