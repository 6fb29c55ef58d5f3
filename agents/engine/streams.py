"""Streams for two threads on one GPU, and the order between them; on a CPU all of it does nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch

from srwm_rl.agents.distributed import LostProcessError


class StreamEvent:
    """Orders one thread's work on the device after another's without blocking a thread.

    Args:
        device: on a CPU nothing happens.
        cuda: `torch.cuda`; tests replace it.
    """

    def __init__(self, device: torch.device | str, cuda: Any = torch.cuda) -> None:
        self._device = torch.device(device)
        self._cuda = cuda if self._device.type == "cuda" else None
        self._event: Any = None

    @property
    def on_device(self) -> bool:
        """Whether work may still be running on the device when its call has returned."""
        return self._cuda is not None

    def record(self) -> None:
        """Record the work that this thread has launched so far."""
        if self._cuda is not None:
            self._event = self._cuda.current_stream(self._device).record_event()

    def wait(self) -> None:
        """Let the work that this thread launches from now on wait for what was recorded last."""
        if self._cuda is not None and self._event is not None:
            self._cuda.current_stream(self._device).wait_event(self._event)


class StreamLock:
    """A reentrant lock that also orders its holders' work on the device, one after the other.

    Args:
        device: on a CPU this is a lock and nothing else.
        cuda: `torch.cuda`; tests replace it.
    """

    def __init__(self, device: torch.device | str, cuda: Any = torch.cuda) -> None:
        self._lock = RLock()
        self._event = StreamEvent(device, cuda)

    def __enter__(self) -> None:
        """Acquire the lock."""
        self._lock.acquire()
        try:
            self._event.wait()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        try:
            self._event.record()
        finally:
            self._lock.release()


class StreamContext:
    """A stream for one thread's work.

    Args:
        device: on a CPU there is none.
        cuda: `torch.cuda`; tests replace it.
    """

    def __init__(self, device: torch.device | str, cuda: Any = torch.cuda) -> None:
        self._device = torch.device(device)
        self._cuda = cuda if self._device.type == "cuda" else None
        if self._cuda is not None:
            self._stream = self._cuda.Stream(self._device)

    def begin(self) -> None:
        """Let the stream's work wait for what the calling thread has launched so far."""
        if self._cuda is not None:
            self._stream.wait_stream(self._cuda.current_stream(self._device))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Launch the work inside on this stream, and leave when it is done.

        A `LostProcessError` leaves at once: collective work that a lost process takes no part in is never done.
        """
        if self._cuda is None:
            yield
            return
        with self._cuda.stream(self._stream):
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
        if self._cuda is not None:
            self._stream.synchronize()
