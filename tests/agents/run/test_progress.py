"""Progress of a run: time left by whole updates, minibatches that are learned, and what the bar shows."""

from typing import Any

import pytest

from srwm_rl.agents import IMPALA, PPO, Supervised
from srwm_rl.agents.run import progress
from srwm_rl.agents.run.progress import Pace, ProgressBar
from srwm_rl.envs import make_vec_env

SMALL: dict[str, Any] = {"policy_kwargs": {"core_kwargs": {"hidden_size": 16, "n_layers": 1}}, "device": "cpu"}


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_counts_learning() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.begin(0)
    clock.now += 28  # a rollout of 1,000 steps
    pace.end_rollout(1000, n_to_learn=4)
    assert pace.seconds_left(10_000) is None  # learning may take any time
    clock.now += 27
    pace.learn()  # the first of four
    assert pace.seconds_left(10_000) == pytest.approx(10 * (28 + 4 * 27) - 28 - 27)
    clock.now += 81
    for _ in range(3):
        pace.learn()
    assert not pace.is_known
    pace.begin(1000)
    assert pace.is_known
    assert pace.seconds_per_step == pytest.approx(0.136)
    assert pace.seconds_left(10_000) == pytest.approx(9 * 136)
    clock.now += 28  # playing alone does not change it
    pace.end_rollout(2000, n_to_learn=4)
    assert pace.seconds_left(10_000) == pytest.approx(9 * 136 - 28)


def test_the_first_update_does_not_count_once_there_are_others() -> None:
    clock = Clock()
    pace = Pace(clock)
    for steps, seconds in ((0, 50), (100, 10), (200, 20)):
        pace.begin(steps)
        clock.now += seconds
    pace.begin(300)
    assert pace.seconds_per_step == pytest.approx(0.15)
    assert pace.seconds_left(300) == 0.0
    assert pace.seconds_left(1000) == pytest.approx(105)


def test_nothing_is_known_before_the_first_rollout() -> None:
    pace = Pace(Clock())
    assert pace.seconds_per_step is None
    assert pace.seconds_left(10) is None


@pytest.mark.parametrize(
    ("algorithm", "task", "settings", "expected"),
    [
        (PPO, "recall", {"n_steps": 16, "batch_size": 32, "n_epochs": 3}, 6),
        (PPO, "recall", {"n_steps": 16, "batch_size": 31, "n_epochs": 1}, 4),
        (PPO, "recall", {"n_steps": 16, "batch_size": 20, "n_epochs": 2, "sequence_length": 8}, 8),
        (PPO, "recall", {"n_steps": 16, "n_epochs": 2}, 8),
        (IMPALA, "recall", {"n_steps": 16, "batch_size": 32, "synchronous": True}, 2),
        (Supervised, "recall", {"n_steps": 16}, 1),
    ],
)
def test_every_minibatch_is_counted(algorithm: Any, task: str, settings: dict[str, Any], expected: int) -> None:
    env = make_vec_env(task, 4, "0:40", 0, inputs=() if algorithm is Supervised else ("action", "reward", "step"))
    model = algorithm("SRWMPolicy", env, **settings, **SMALL)
    bar, gradients = ProgressBar(shown=False), []
    planned: list[int] = []
    model.engine.listeners.append(lambda: gradients.append(model.num_timesteps))
    model.engine.listeners.append(lambda: planned.append(bar.pace.n_to_learn))
    model.learn(128, bar)
    assert gradients == [64] * expected + [128] * expected
    assert set(planned) == {expected}


def test_the_bar_shows_minibatches_and_calls_back_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    paces: list[tuple[float, float]] = []
    model = PPO("SRWMPolicy", make_vec_env("recall", 4, "0:40", 0), n_steps=16, n_epochs=1, batch_size=32, **SMALL)
    model.learn(256, ProgressBar(on_pace=lambda *pace: paces.append(pace)))
    shown = capfd.readouterr().err
    assert "learning 0/2" in shown
    assert "learning 1/2" in shown
    assert "<?, ?step/s" in shown  # before anything was learned
    assert "100%" in shown.splitlines()[-1].rpartition("\r")[2]
    ((update, left),) = paces
    assert left == pytest.approx(3 * update, rel=0.01)
    assert model.engine.listeners == []  # the next bar is the only one


def test_a_bar_of_a_training_that_never_began_is_closed() -> None:
    ProgressBar().close()


def test_a_bar_that_is_not_shown_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model = PPO("SRWMPolicy", make_vec_env("recall", 4, "0:40", 0), n_steps=16, n_epochs=1, batch_size=32, **SMALL)
    bar = ProgressBar(shown=False)
    model.learn(128, bar)
    bar.note("evaluating")
    bar.close()
    assert capfd.readouterr().err == ""
