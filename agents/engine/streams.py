"""Two threads on one GPU: a stream for each, and an order between them where they meet. On a CPU all is at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch

from srwm_rl.agents.distributed import LostProcessError


class StreamEvent:
    """Lets one thread's work on the device begin after another's, without a thread that waits.

    Args:
        device: on a CPU nothing happens.
        cuda: `torch.cuda`; another one is for tests.
    """

    def __init__(self, device: torch.device | str, cuda: Any = torch.cuda) -> None:
        self._device = torch.device(device)
        self._cuda = cuda if self._device.type == "cuda" else None
        self._event: Any = None

    @property
    def on_device(self) -> bool:
        """Say whether work goes on where no thread sees it."""
        return self._cuda is not None

    def send(self) -> None:
        """Hand over what this thread has launched so far."""
        if self._cuda is not None:
            self._event = self._cuda.current_stream(self._device).record_event()

    def receive(self) -> None:
        """Let what this thread launches from now on wait for what was handed over last."""
        if self._cuda is not None and self._event is not None:
            self._cuda.current_stream(self._device).wait_event(self._event)


class StreamLock:
    """A lock, to be held again by the same thread, whose holders take turns on the device as well.

    What one holder has launched is done there before what the next one launches begins.

    Args:
        device: on a CPU this is a lock and nothing else.
        cuda: `torch.cuda`; another one is for tests.
    """

    def __init__(self, device: torch.device | str, cuda: Any = torch.cuda) -> None:
        self._lock = RLock()
        self._handover = StreamEvent(device, cuda)

    def __enter__(self) -> None:
        """Wait for the lock."""
        self._lock.acquire()
        try:
            self._handover.receive()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        """Let the next one in."""
        try:
            self._handover.send()
        finally:
            self._lock.release()


class StreamContext:
    """A stream for one thread's work.

    Args:
        device: on a CPU there is none.
        cuda: `torch.cuda`; another one is for tests.
    """

    def __init__(self, device: torch.device | str, cuda: Any = torch.cuda) -> None:
        self._device = torch.device(device)
        self._cuda = cuda if self._device.type == "cuda" else None
        if self._cuda is not None:
            self._stream = self._cuda.Stream(self._device)

    def begin(self) -> None:
        """Let the stream's work wait for what this thread, another one, has launched so far."""
        if self._cuda is not None:
            self._stream.wait_stream(self._cuda.current_stream(self._device))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Launch what is inside on this stream, and leave when it is done.

        A `LostProcessError` leaves at once: what the lost process takes no part in is never done.
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
        """Wait until everything on this stream is done: what it reads may then be let go."""
        if self._cuda is not None:
            self._stream.synchronize()
