"""Streams of two threads: what one needs of the other is done before, in whatever order a device runs the rest.

A device is stood in for by one that runs what is launched later, in any order that its events allow.
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
from stable_baselines3.common.vec_env import DummyVecEnv

from srwm_rl.agents import IMPALA, impala
from srwm_rl.agents.collecting.unroll_queue import UnrollQueue, Unrolls
from srwm_rl.agents.distributed import LostProcessError
from srwm_rl.agents.engine.streams import StreamContext, StreamEvent, StreamLock
from tests.agents.probe import Probe


class Event:
    done = False


class Stream:
    """A row of work that waits to be done; the device does one piece at a time, of any stream."""

    def __init__(self, device: "Device") -> None:
        self.device = device
        self.queue: deque[tuple[str, Any]] = deque()

    def launch(self, name: str) -> None:
        with self.device.lock:
            self.queue.append(("work", name))

    def record_event(self) -> Event:
        event = Event()
        with self.device.lock:
            self.queue.append(("record", event))
        return event

    def wait_event(self, event: Event) -> None:
        with self.device.lock:
            self.queue.append(("wait", event))

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.device.run(lambda: not self.queue)


class Device:
    """What `StreamContext` and the others use of `torch.cuda`."""

    def __init__(self, seed: int = 0) -> None:
        self.lock = RLock()
        self.chance = random.Random(seed)
        self.done: list[str] = []
        self.streams: list[Stream] = []
        self.default = self.Stream()
        self._here = local()

    def Stream(self, device: Any = None) -> Stream:
        self.streams.append(Stream(self))
        return self.streams[-1]

    def current_stream(self, device: Any = None) -> Stream:
        stream: Stream = getattr(self._here, "stream", self.default)
        return stream

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._here.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._here.stream = before

    def launch(self, *names: str) -> None:
        for name in names:
            self.current_stream().launch(name)

    def run(self, enough: Callable[[], bool] | None = None) -> None:
        """Work until it is enough, or all is done."""
        with self.lock:
            while enough is None or not enough():
                ready = [each for each in self.streams if each.queue and self._may_go(*each.queue[0])]
                if not ready:
                    assert enough is None, "it waits for ever"
                    return
                kind, what = self.chance.choice(ready).queue.popleft()
                if kind == "work":
                    self.done.append(what)
                elif kind == "record":
                    what.done = True

    @staticmethod
    def _may_go(kind: str, what: Any) -> bool:
        return kind != "wait" or what.done


class Untouched:
    """Stands where nothing may be asked of a GPU."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"asked for {name}")


def torn(done: list[str]) -> bool:
    """Say whether the two halves of some work had other work between them."""
    return any(first[:-1] != second[:-1] for first, second in zip(done[::2], done[1::2], strict=True))


@pytest.mark.parametrize("ordered", [True, False])
def test_holders_of_a_lock_take_turns_on_the_device_as_well(ordered: bool) -> None:
    found = []
    for seed in range(50):
        device = Device(seed)
        turns: Any = StreamLock("cuda", device) if ordered else RLock()
        streams = {name: device.Stream() for name in ("step", "copy")}
        for i in range(4):
            for name, stream in streams.items():
                with device.stream(stream), turns, turns:  # it may be held twice
                    device.launch(f"{name}{i}a", f"{name}{i}b")
        device.run()
        assert len(device.done) == 16
        found.append(torn(device.done))
    assert any(found) is not ordered  # a lock of the threads alone is not enough


def test_a_turn_ends_where_something_is_raised() -> None:
    device, order = Device(), []
    turns = StreamLock("cuda", device)
    with pytest.raises(KeyError), turns:
        raise KeyError
    other = device.Stream()
    with device.stream(other), turns:
        order.append(1)
    device.run()
    assert order == [1]


def test_what_is_handed_over_is_done_before_and_nothing_else_is_waited_for() -> None:
    orders = set()
    for seed in range(50):
        device = Device(seed)
        event, learner = StreamEvent("cuda", device), device.Stream()
        device.launch("played")
        event.record()
        device.launch("more")
        with device.stream(learner):
            device.launch("before")
            event.wait()
            device.launch("learned")
        device.run()
        assert device.done.index("played") < device.done.index("learned")
        orders.add(tuple(device.done))
    assert any(each.index("learned") < each.index("more") for each in orders)
    assert any(each.index("before") < each.index("played") for each in orders)


def test_a_lane_begins_after_what_was_launched_and_ends_done() -> None:
    for seed in range(20):
        device = Device(seed)
        lane = StreamContext("cuda", device)
        device.launch("weights")
        lane.begin()
        device.launch("acting")
        with lane.entered():
            device.launch("learned")
            lane.finish()
            assert device.done[-1] == "learned"
            device.launch("half")
        assert device.done.index("weights") < device.done.index("learned") < device.done.index("half")
        assert device.current_stream() is device.default


def test_a_lane_is_left_done_also_where_something_is_raised() -> None:
    device = Device()
    lane = StreamContext("cuda", device)

    def fail() -> None:
        with lane.entered():
            device.launch("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert device.done == ["half"]
    assert device.current_stream() is device.default


def test_nobody_waits_for_what_a_lost_process_takes_no_part_in() -> None:
    device = Device()
    lane = StreamContext("cuda", device)

    def fail() -> None:
        with lane.entered():
            device.launch("a sum over all processes")
            raise LostProcessError("it has ended")

    with pytest.raises(LostProcessError):
        fail()
    assert device.done == []
    assert device.current_stream() is device.default


def test_on_a_cpu_nothing_is_asked_of_a_gpu() -> None:
    nothing = Untouched()
    lane, turns, event = StreamContext("cpu", nothing), StreamLock("cpu", nothing), StreamEvent("cpu", nothing)
    with lane.entered(), turns, turns:
        event.record()
        event.wait()
        lane.begin()
        lane.finish()
    assert not event.on_device


def unrolls() -> Unrolls:
    box, choice = spaces.Box(-1, 1, (3,)), spaces.Discrete(2)
    return Unrolls.empty(4, 2, box, choice, torch.zeros(1, 2, 5), version=0)


def test_a_batch_is_put_together_after_it_was_played_and_its_parts_outlive_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device()
    queue = UnrollQueue(4)
    queue._filled = StreamEvent("cuda", device)
    joined = "srwm_rl.agents.collecting.unroll_queue.concatenate"
    monkeypatch.setattr(joined, lambda parts: device.launch("joined") or parts[0])  # type: ignore[func-returns-value]
    device.launch("first")
    queue.put(unrolls())
    device.launch("second")
    queue.put(unrolls())
    with device.stream(device.Stream()):
        assert queue.take(4) is not None
    device.run()
    assert device.done == ["first", "second", "joined"]
    assert len(queue._taken) == 2
    assert queue.take(4) is None
    assert queue._taken == []


def model_on(device: str) -> IMPALA:
    env = DummyVecEnv([Probe] * 4)
    kwargs = {"core_kwargs": {"hidden_size": 16, "n_layers": 1}}
    return IMPALA("SRWMPolicy", env, n_steps=8, batch_size=16, seed=0, device=device, policy_kwargs=kwargs)


@pytest.mark.parametrize("ordered", [True, False])
def test_the_actors_copy_whole_steps_of_the_learner(ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner's steps and the actors' copies are two pieces of work each, on a device that runs them later."""
    found = []
    for seed in range(6):
        device = Device(seed)
        monkeypatch.setattr(impala, "StreamContext", lambda _, device=device: StreamContext("cuda", device))
        monkeypatch.setattr(
            impala, "StreamLock", lambda _, device=device: StreamLock("cuda", device) if ordered else RLock()
        )
        model = model_on("cpu")
        step, copy = model.policy.optimizer.step, impala.copy_weights

        def stepped(*given: Any, device: Device = device, step: Any = step) -> Any:
            device.launch("step a", "step b")
            return step(*given)

        def copied(*given: Any, device: Device = device, copy: Any = copy) -> Any:
            device.launch("copy a", "copy b")
            return copy(*given)

        monkeypatch.setattr(model.policy.optimizer, "step", stepped)
        monkeypatch.setattr(impala, "copy_weights", copied)
        # Else the learner is done with each step before the next batch, and so rarely meets a copy.
        monkeypatch.setattr(StreamContext, "finish", lambda _: None)
        model.learn(4 * 8 * 12)
        monkeypatch.undo()
        device.run()
        names = [each[:4] for each in device.done]
        assert names.count("step") >= 20
        assert names.count("copy") >= 2
        found.append(torn(device.done))
    assert any(found) is not ordered


def test_the_learner_works_in_its_lane_and_leaves_it_done(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(impala, "StreamContext", lambda _: StreamContext("cuda", device))
    model = model_on("cpu")
    device.launch("built")
    update = IMPALA._update

    def updated(self: IMPALA, batch: Unrolls) -> None:
        assert device.current_stream() is not device.default
        device.launch("update")
        update(self, batch)

    monkeypatch.setattr(IMPALA, "_update", updated)
    model.learn(4 * 8 * 4)
    assert device.done == ["built", *["update"] * 8]


@pytest.mark.gpu
def test_a_learner_on_a_gpu_beside_its_actors() -> None:
    model = model_on("cuda")
    before = torch.cat([each.detach().flatten() for each in model.policy.parameters()])
    model.learn(4 * 8 * 20)
    after = torch.cat([each.detach().flatten() for each in model.policy.parameters()])
    assert model._n_updates == 40
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)
