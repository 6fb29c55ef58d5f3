"""A signal that asks a run to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class StopSignal(BaseException):
    """A signal asked the run to stop; raised between two bytecodes of whatever was going on."""


@contextmanager
def raise_on_signals(ignore_signals_after: bool = False) -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into `StopSignal`; after it, they work as they did before.

    Args:
        ignore_signals_after: after `StopSignal`, or whatever else ends the block too early, such signals do nothing any more. For the
            process that saves a run of several: torchrun signals all that are left as soon as any of them has ended.
    """
    numbers = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # An ignored signal stays ignored: under nohup the run is to outlive its terminal.
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if ignore_signals_after else handler)

    def stop(number: int, frame: object) -> None:
        restore()
        raise StopSignal(signal.Signals(number).name)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except BaseException:
        restore()
        raise
    ignore_signals_after = False
    restore()
