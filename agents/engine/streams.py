"""Streams for two threads on one GPU, and the order between them; on a CPU all of it does nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch

from srwm_rl.agents.distributed import LostProcessError

SWITCH_INTERVAL = 5e-4  # seconds: about an acting step on a GPU; Python's default is ten times as long


class StreamEvent:
    """Orders one thread's work on the device after another's without blocking a thread.

    Args:
        device: on a CPU nothing happens.
        cuda: `torch.cuda`; tests replace it.

    Attributes:
        on_device: whether work may still be running on the device when its call has returned.
    """

    def __init__(self, device: torch.device | str, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = torch.device(device), cuda
        self.on_device = self._device.type == "cuda"
        self._event: Any = None

    def record(self) -> None:
        """Record the work that this thread has launched so far."""
        if self.on_device:
            self._event = self._cuda.current_stream(self._device).record_event()

    def wait(self) -> None:
        """Let the work that this thread launches from now on wait for what was recorded last."""
        if self._event is not None:
            self._cuda.current_stream(self._device).wait_event(self._event)


class StreamLock(StreamEvent):
    """A reentrant lock that also orders its holders' work on the device, one after the other."""

    def __init__(self, device: torch.device | str, cuda: Any = torch.cuda) -> None:
        super().__init__(device, cuda)
        self._lock = RLock()

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self.wait()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self.record()
        finally:
            self._lock.release()


class StreamContext(StreamEvent):
    """A stream for one thread's work, which waits for the work of other threads that was recorded."""

    def __init__(self, device: torch.device | str, cuda: Any = torch.cuda) -> None:
        super().__init__(device, cuda)
        self._stream = cuda.Stream(self._device) if self.on_device else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Launch the work inside on this stream, and leave when it is done.

        A `LostProcessError` leaves at once: collective work that a lost process takes no part in is never done.
        """
        if self._stream is None:
            yield
            return
        with self._cuda.stream(self._stream):
            self.wait()
            try:
                yield
            except LostProcessError:
                raise
            except BaseException:
                self.finish()
                raise
            self.finish()

    def finish(self) -> None:
        """Wait until all work on this stream is done, so that the memory it reads may be freed."""
        if self._stream is not None:
            self._stream.synchronize()


@contextmanager
def short_switch_interval() -> Iterator[None]:
    """Let threads wait for Python's interpreter for at most `SWITCH_INTERVAL`: one acts while another learns."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
