"""CUDA streams of two threads: their work is ordered where one needs the other's results.

A simulated device runs what was launched later, in a random order that its events allow.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock, local
from typing import Any

import pytest
import torch
from gymnasium import spaces

from srwm_rl.agents import IMPALA, impala
from srwm_rl.agents.collecting.unroll_queue import UnrollQueue, Unrolls
from srwm_rl.agents.distributed import LostProcessError
from srwm_rl.agents.engine.streams import StreamContext, StreamEvent, StreamLock
from tests.agents.probe import small_model, weight_vector


class SimulatedEvent:
    done = False


class SimulatedStream:
    """A queue of launched work; the device does one piece at a time, of any stream."""

    def __init__(self, device: "SimulatedCuda") -> None:
        self.device = device
        self.queue: deque[tuple[str, Any]] = deque()

    def launch(self, name: str) -> None:
        with self.device.lock:
            self.queue.append(("work", name))

    def record_event(self) -> SimulatedEvent:
        event = SimulatedEvent()
        with self.device.lock:
            self.queue.append(("record", event))
        return event

    def wait_event(self, event: SimulatedEvent) -> None:
        with self.device.lock:
            self.queue.append(("wait", event))

    def wait_stream(self, stream: "SimulatedStream") -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self.device.run(lambda: not self.queue)


class SimulatedCuda:
    """The part of `torch.cuda` that is used by `StreamContext`, `StreamLock` and `StreamEvent`."""

    def __init__(self, seed: int = 0) -> None:
        self.lock = RLock()
        self.random = random.Random(seed)
        self.done: list[str] = []
        self.streams: list[SimulatedStream] = []
        self.default = self.Stream()
        self._thread_local = local()

    def Stream(self, device: Any = None) -> SimulatedStream:
        self.streams.append(SimulatedStream(self))
        return self.streams[-1]

    def current_stream(self, device: Any = None) -> SimulatedStream:
        stream: SimulatedStream = getattr(self._thread_local, "stream", self.default)
        return stream

    @contextmanager
    def stream(self, stream: SimulatedStream) -> Iterator[None]:
        before, self._thread_local.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._thread_local.stream = before

    def launch(self, *names: str) -> None:
        for name in names:
            self.current_stream().launch(name)

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Work until a condition holds; None: until all is done."""
        with self.lock:
            while until is None or not until():
                ready = [stream for stream in self.streams if stream.queue and self._is_ready(*stream.queue[0])]
                if not ready:
                    assert until is None, "deadlock"
                    return
                kind, item = self.random.choice(ready).queue.popleft()
                if kind == "work":
                    self.done.append(item)
                elif kind == "record":
                    item.done = True

    @staticmethod
    def _is_ready(kind: str, item: Any) -> bool:
        return kind != "wait" or item.done


class NoCuda:
    """Stands in for `torch.cuda` where it must not be used."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"torch.cuda.{name} is used")


def is_interleaved(done: list[str]) -> bool:
    """Return whether some work's two halves, `...a` and `...b`, have other work between them."""
    return any(first[:-1] != second[:-1] for first, second in zip(done[::2], done[1::2], strict=True))


@pytest.mark.parametrize("ordered", [True, False])
def test_a_stream_lock_orders_its_holders_work_on_the_device(ordered: bool) -> None:
    interleaved = []
    for seed in range(50):
        device = SimulatedCuda(seed)
        lock: Any = StreamLock("cuda", device) if ordered else RLock()
        streams = {name: device.Stream() for name in ("step", "copy")}
        for i in range(4):
            for name, stream in streams.items():
                with device.stream(stream), lock, lock:  # reentrant
                    device.launch(f"{name}{i}a", f"{name}{i}b")
        device.run()
        assert len(device.done) == 16
        interleaved.append(is_interleaved(device.done))
    assert any(interleaved) is not ordered  # a lock of the threads alone does not order the device


def test_an_exception_releases_the_stream_lock() -> None:
    device = SimulatedCuda()
    lock = StreamLock("cuda", device)
    with pytest.raises(KeyError), lock:
        raise KeyError
    with device.stream(device.Stream()), lock:
        device.launch("work")
    device.run()
    assert device.done == ["work"]


def test_a_stream_event_orders_the_recorded_work_and_nothing_else() -> None:
    orders = set()
    for seed in range(50):
        device = SimulatedCuda(seed)
        event, learner = StreamEvent("cuda", device), device.Stream()
        device.launch("collected")
        event.record()
        device.launch("later")
        with device.stream(learner):
            device.launch("before")
            event.wait()
            device.launch("learned")
        device.run()
        assert device.done.index("collected") < device.done.index("learned")
        orders.add(tuple(device.done))
    assert any(order.index("learned") < order.index("later") for order in orders)
    assert any(order.index("before") < order.index("collected") for order in orders)


def test_a_stream_context_begins_after_earlier_work_and_leaves_its_own_finished() -> None:
    for seed in range(20):
        device = SimulatedCuda(seed)
        context = StreamContext("cuda", device)
        device.launch("weights")
        context.record()
        device.launch("acting")
        with context.entered():
            device.launch("learned")
            context.finish()
            assert device.done[-1] == "learned"
            device.launch("unfinished")
        assert device.done.index("weights") < device.done.index("learned") < device.done.index("unfinished")
        assert device.current_stream() is device.default


def test_a_stream_context_finishes_its_work_after_an_exception() -> None:
    device = SimulatedCuda()
    context = StreamContext("cuda", device)

    def fail() -> None:
        with context.entered():
            device.launch("unfinished")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert device.done == ["unfinished"]
    assert device.current_stream() is device.default


def test_a_stream_context_does_not_wait_after_a_lost_process() -> None:
    device = SimulatedCuda()
    context = StreamContext("cuda", device)

    def fail() -> None:
        with context.entered():
            device.launch("a sum over all processes")
            raise LostProcessError("process 1 has ended")

    with pytest.raises(LostProcessError):
        fail()
    assert device.done == []
    assert device.current_stream() is device.default


def test_on_a_cpu_cuda_is_not_used() -> None:
    cuda = NoCuda()
    context, lock, event = StreamContext("cpu", cuda), StreamLock("cpu", cuda), StreamEvent("cpu", cuda)
    with context.entered(), lock, lock:
        event.record()
        event.wait()
        context.record()
        context.finish()
    assert not event.on_device


def unrolls() -> Unrolls:
    return Unrolls.empty(4, 2, spaces.Box(-1, 1, (3,)), spaces.Discrete(2), torch.zeros(1, 2, 5), version=0)


def test_a_batch_is_concatenated_after_its_unrolls_were_collected_and_they_are_kept_until_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = SimulatedCuda()
    queue = UnrollQueue(4)
    queue._filled = StreamEvent("cuda", device)
    concatenate = "srwm_rl.agents.collecting.unroll_queue.concatenate"
    monkeypatch.setattr(concatenate, lambda parts: device.launch("concatenated") or parts[0])  # type: ignore[func-returns-value]
    device.launch("first")
    queue.put(unrolls())
    device.launch("second")
    queue.put(unrolls())
    with device.stream(device.Stream()):
        assert queue.take(4) is not None
    device.run()
    assert device.done == ["first", "second", "concatenated"]
    assert len(queue._taken) == 2
    assert queue.take(4) is None
    assert queue._taken == []


def model_on(device: str) -> IMPALA:
    model: IMPALA = small_model("impala", batch_size=16, synchronous=False, device=device)
    return model


@pytest.mark.parametrize("ordered", [True, False])
def test_the_actors_copy_weights_between_optimizer_steps_only(ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Optimizer steps and copies are two pieces of work each, on a device that runs them later.
    interleaved = []
    for seed in range(6):
        device = SimulatedCuda(seed)
        monkeypatch.setattr(impala, "StreamContext", lambda _, device=device: StreamContext("cuda", device))
        monkeypatch.setattr(
            impala, "StreamLock", lambda _, device=device: StreamLock("cuda", device) if ordered else RLock()
        )
        model = model_on("cpu")
        step, copy = model.policy.optimizer.step, impala.copy_weights

        def launch_step(*args: Any, device: SimulatedCuda = device, step: Any = step) -> Any:
            device.launch("step a", "step b")
            return step(*args)

        def launch_copy(*args: Any, device: SimulatedCuda = device, copy: Any = copy) -> Any:
            device.launch("copy a", "copy b")
            return copy(*args)

        monkeypatch.setattr(model.policy.optimizer, "step", launch_step)
        monkeypatch.setattr(impala, "copy_weights", launch_copy)
        # Else the learner finishes each step before the next batch, so that steps rarely overlap with copies.
        monkeypatch.setattr(StreamContext, "finish", lambda _: None)
        model.learn(4 * 8 * 12)
        monkeypatch.undo()
        device.run()
        names = [work[:4] for work in device.done]
        assert names.count("step") >= 20
        assert names.count("copy") >= 2
        interleaved.append(is_interleaved(device.done))
    assert any(interleaved) is not ordered


def test_the_learner_works_on_its_own_stream_and_finishes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimulatedCuda()
    monkeypatch.setattr(impala, "StreamContext", lambda _: StreamContext("cuda", device))
    model = model_on("cpu")
    device.launch("built")
    update = IMPALA._update

    def launch_update(self: IMPALA, batch: Unrolls) -> None:
        assert device.current_stream() is not device.default
        device.launch("update")
        update(self, batch)

    monkeypatch.setattr(IMPALA, "_update", launch_update)
    model.learn(4 * 8 * 4)
    assert device.done == ["built", *["update"] * 8]


@pytest.mark.gpu
def test_a_learner_and_its_actors_share_a_gpu() -> None:
    model = model_on("cuda")
    before = weight_vector(model)
    model.learn(4 * 8 * 20)
    after = weight_vector(model)
    assert model._n_updates == 40
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)
