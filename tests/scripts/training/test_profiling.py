"""`srwm-rl train --profile`: nested parts, threads, no influence on training, the table's sums, a browser's trace."""

import gzip
import json
import time
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from srwm_rl.agents import IMPALA as ImpalaTrainer
from srwm_rl.agents import PPO
from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.ops import cpu
from srwm_rl.scripts.training.profiling import Spent, Stopwatch, table, time_parts
from tests.agents.probe import Probe
from tests.scripts.conftest import IMPALA, RECALL

IN_C = not isinstance(cpu.load_kernel(), str)


@pytest.mark.parametrize("argv", [RECALL, IMPALA, (*IMPALA, "--synchronous")])
def test_a_profiled_run(argv: tuple[str, ...], call: Any, tmp_path: Path) -> None:
    result = call("train", *argv, "-n", 6 * 64, "--profile", "-f", tmp_path)
    assert result.code == 0, result
    lines = result.out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("An update of 64 steps takes "))
    parts = {line[:40].strip().split("  ")[0] for line in lines[head + 2 :]}
    assert {"collect", "act", "encoder", "core", "environments", "gradient", "optimizer"} <= parts
    if argv != RECALL:  # recall's gradient is a single call of C
        assert {"forward", "backward"} <= parts
    trace = next(tmp_path.rglob("profile.json.gz"))
    assert str(trace) in result.out
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    named = {event.get("name") for event in events}
    assert {"act", "encoder", "core", "aten::addmm"} <= named
    assert f"done: {6 * 64} steps" in result.out


def test_the_trace_contains_all_threads(call: Any, tmp_path: Path) -> None:
    small = ["--n-envs", 64, "--n-steps", 2, "--batch-size", 64, "--n-epochs", 1, "--n-threads", 2, "--no-progress"]
    plain = ["--cnn-kernels", "plain"]  # tiles are one call, whose threads the profiler does not see
    result = call("train", "--env", "coinrun", *small, *plain, "-n", 6 * 128, "--profile", "-f", tmp_path)
    assert result.code == 0, result
    events = json.loads(gzip.decompress(next(tmp_path.rglob("profile.json.gz")).read_bytes()))["traceEvents"]
    by = {
        name: {event["tid"] for event in events if event.get("name") == name} for name in ("learn", "aten::convolution")
    }
    assert len(by["learn"]) == 1
    assert by["aten::convolution"] - by["learn"]  # in which the CNN computes: see srwm_rl.ops.thread_parallel


def test_a_run_that_ends_early_prints_what_it_timed_or_why_it_could_not(call: Any, tmp_path: Path) -> None:
    result = call("train", *RECALL, "-n", 2 * 64, "--profile", "-f", tmp_path / "two")
    assert result.code == 0
    assert "An update of 64 steps takes " in result.out
    result = call("train", *RECALL, "-n", 64, "--profile", "-f", tmp_path / "one")
    assert result.code == 0
    assert "no profile: the run ended within its first update" in result.err
    assert "An update of" not in result.out


def test_a_resumed_run_is_profiled_only_with_the_option(call: Any, tmp_path: Path) -> None:
    assert "An update of" in call("train", *RECALL, "-n", 2 * 64, "--profile", "-f", tmp_path).out
    (run,) = tmp_path.glob("*/*_1")
    assert "An update of" not in call("train", "--resume", run, "-n", 4 * 64).out
    assert "An update of" in call("train", "--resume", run, "-n", 6 * 64, "--profile").out


def test_a_trace_that_cannot_be_written_does_not_end_the_run(call: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("srwm_rl.scripts.training.profiling.TRACE", "no/such/folder/profile.json.gz")
    result = call("train", *RECALL, "-n", 6 * 64, "--profile", "-f", tmp_path)
    assert result.code == 0
    assert "no trace: " in result.out
    assert "done: " in result.out


def test_the_table_accounts_for_everything() -> None:
    spent = {
        ("collect",): Spent(4.0, 2),
        ("collect", "act"): Spent(3.0, 20),
        ("collect", "act", "core"): Spent(1.0, 20),
        ("learn",): Spent(5.0, 2),
    }
    lines = table(spent, seconds=10.0, updates=2, steps=1000).splitlines()
    assert lines[0] == "An update of 500 steps takes 5.000 s (100 steps/s):"
    cells = [line.split() for line in lines[2:]]
    assert [(" ".join(row[:-3]), *row[-3:]) for row in cells if row[0] not in ("other", "between")] == [
        ("learn", "2,500.0", "50.0%", "1"),
        ("collect", "2,000.0", "40.0%", "1"),
        ("act", "1,500.0", "30.0%", "10"),
        ("core", "500.0", "10.0%", "10"),
    ]
    remainders = [row[-2:] for row in cells if row[0] in ("other", "between")]
    assert remainders == [["1,000.0", "20.0%"], ["500.0", "10.0%"], ["500.0", "10.0%"]]


class Clock:
    """A clock that advances only by `now`."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Work:
    """A function that takes time and calls its own parts."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def outer(self) -> str:
        self.clock.now += 1.0
        self.inner(2.0)
        self.inner(3.0)
        return "done"

    def inner(self, seconds: float) -> None:
        self.clock.now += seconds
        if seconds == 3.0:
            raise_if_asked()


def raise_if_asked() -> None:
    pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_parts_are_counted_below_the_part_that_called_them(clock: Clock) -> None:
    work, watch = Work(clock), Stopwatch()
    watch.wrap(work, "outer", "out")
    watch.wrap(work, "inner", "in")
    assert work.outer() == "done"
    work.inner(4.0)
    assert watch.spent == {("out",): (6.0, 1), ("out", "in"): (5.0, 2), ("in",): (4.0, 1)}
    watch.reset()
    work.inner(1.0)
    assert watch.spent == {("in",): (1.0, 1)}


def test_a_part_that_raises_is_counted(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    work, watch = Work(clock), Stopwatch()
    watch.wrap(work, "outer", "out")
    watch.wrap(work, "inner", "in")

    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(globals(), "raise_if_asked", fail)
    with pytest.raises(ZeroDivisionError):
        work.outer()
    assert watch.spent == {("out",): (6.0, 1), ("out", "in"): (5.0, 2)}
    with watch.part("after"):
        clock.now += 1.0
    assert watch.spent[("after",)] == (1.0, 1)


def test_another_threads_parts_are_at_the_top_level(clock: Clock) -> None:
    work, watch = Work(clock), Stopwatch()
    watch.wrap(work, "inner", "in")
    with watch.part("main"):
        thread = Thread(target=work.inner, args=(1.0,))
        thread.start()
        thread.join()
        work.inner(2.0)
    assert watch.spent == {("main",): (3.0, 1), ("main", "in"): (2.0, 1), ("in",): (1.0, 1)}


def test_unwrap_restores_the_methods(clock: Clock) -> None:
    work, watch = Work(clock), Stopwatch()
    work.outer = Work(clock).outer  # type: ignore[method-assign]
    own = work.outer
    watch.wrap(work, "outer", "out")
    watch.wrap(work, "inner", "in")
    watch.unwrap()
    assert work.outer is own
    assert "inner" not in vars(work)
    work.outer()
    assert watch.spent == {}


class Timed(BaseCallback):
    """Time a training from start to end."""

    model: RecurrentAlgorithm

    def _on_training_start(self) -> None:
        self.watch = time_parts(self.model)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.watch.unwrap()


def trained(algo: str, callback: BaseCallback | None) -> tuple[RecurrentAlgorithm, torch.Tensor]:
    shared: dict[str, Any] = {"n_steps": 8, "seed": 0, "device": "cpu"}
    shared["policy_kwargs"] = {"core_kwargs": {"hidden_size": 16, "n_layers": 1}}
    env = DummyVecEnv([Probe, Probe])
    model: RecurrentAlgorithm
    if algo == "ppo":
        model = PPO("SRWMPolicy", env, n_epochs=2, **shared)
    else:
        model = ImpalaTrainer("SRWMPolicy", env, synchronous=algo == "impala", **shared)
    model.learn(4 * 16, callback)
    return model, torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach()


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_a_timed_training_is_bit_identical(algo: str) -> None:
    backward = torch.autograd.backward
    model, weights = trained(algo, timed := Timed())
    assert torch.equal(weights, trained(algo, None)[1])
    assert torch.autograd.backward is backward
    for owner in (
        model,
        model.nan_guard,
        model.policy.features_extractor,
        model.policy.core,
        model.policy.optimizer,
        model.env,
    ):
        assert not {"act", "forward", "train"} & vars(owner).keys()
    assert not {"step"} & (vars(model.policy.optimizer).keys() | vars(model.env).keys())
    spent = timed.watch.spent
    assert spent[("collect", "act")].calls == 4 * (8 + (algo == "ppo"))
    updates = 4 * 2 * 2 if algo == "ppo" else 4  # iterations, epochs, minibatches
    below = ("learn",) if algo == "ppo" else ("learn", "update")
    steps = [(*below, "optimizer"), (*below, "gradient")]
    # With the C kernel, PPO's gradient of vectors is a single call.
    steps += [(*below, "gradient", part) for part in ("forward", "backward") if algo == "impala" or not IN_C]
    assert {path: spent[path].calls for path in steps} == dict.fromkeys(steps, updates)
    for path, time_spent in spent.items():
        inside = sum(time.seconds for below, time in spent.items() if below[:-1] == path)
        assert 0 <= inside <= time_spent.seconds


@pytest.mark.skipif(not IN_C, reason="without C the encoder runs as a whole")
def test_an_image_network_is_timed_apart_from_the_c_code_around_it() -> None:
    frames = spaces.Box(0, 255, (8, 8, 3), np.uint8)
    kwargs = {"core_kwargs": {"hidden_size": 16}, "encoder_kwargs": {"cnn": {"channels": [4], "features": 8}}}
    timed = Timed()
    PPO(
        "SRWMPolicy",
        DummyVecEnv([lambda: Probe(frames)] * 2),
        n_steps=8,
        n_epochs=2,
        batch_size=8,
        device="cpu",
        policy_kwargs=kwargs,
    ).learn(2 * 16, timed)
    spent = timed.watch.spent
    assert (
        spent[("collect", "act", "images")].calls == 2 * 9 + 3
    )  # and when the three kinds of C were compared with the policy
    for part in ("images", "backward"):
        assert spent[("learn", "gradient", part)].calls == 2 * 2 * 2
    assert not {"forward"} & vars(timed.model.policy.features_extractor.images["observation"]).keys()  # type: ignore[union-attr]


def test_a_learner_beside_the_actors_is_timed_by_itself() -> None:
    _, _ = trained("overlapped", timed := Timed())
    # The last batches may be learned from after the training's end.
    assert 1 <= timed.watch.spent[("update", "gradient", "forward")].calls <= 4
    assert timed.watch.spent[("collect", "act")].calls == 4 * 8
