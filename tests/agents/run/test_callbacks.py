"""Callbacks: levels recorded, states captured and saved, correct values in the log, no influence on training."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import ConvertCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from srwm_rl import core_names
from srwm_rl.agents import IMPALA, PPO
from srwm_rl.agents.distributed import SINGLE
from srwm_rl.agents.evaluation.play_levels import play_levels
from srwm_rl.agents.run import callbacks
from srwm_rl.agents.run.callbacks import (
    AttemptReturns,
    Checkpoints,
    EditStatsCallback,
    HeldOutEvalCallback,
    LevelRecorder,
    TrainingReturn,
)
from srwm_rl.envs import GroupedVecEnv, make_levels_env, make_vec_env
from srwm_rl.envs.wrappers.reward import VecNormalizeReward
from tests.agents.probe import LogRecorder

Levels = set[tuple[str, int]]


def recording_levels(env: VecEnv, into: Levels) -> VecEnv:
    """Return environments that also record the level of every environment after every step."""
    simulator: Any = env.unwrapped.batch_env  # type: ignore[union-attr]
    step, reset = simulator.step, simulator.reset

    def note(result: Any) -> Any:
        into.update(zip(simulator.game_names, simulator.level_seed().tolist(), strict=True))
        return result

    simulator.step = lambda actions: note(step(actions))
    simulator.reset = lambda *args, **more: note(reset(*args, **more))
    return env


def trainer(env: VecEnv, algo: str) -> PPO | IMPALA:
    kwargs = {"core_kwargs": {"hidden_size": 16, "n_layers": 1}, "encoder_kwargs": {"cnn": {"channels": [2]}}}
    if algo == "ppo":
        return PPO("SRWMPolicy", env, n_steps=16, n_epochs=1, policy_kwargs=kwargs, seed=0, device="cpu")
    synchronous = algo == "synchronous impala"
    return IMPALA("SRWMPolicy", env, n_steps=16, policy_kwargs=kwargs, seed=0, device="cpu", synchronous=synchronous)


@pytest.mark.parametrize(
    ("algo", "env", "levels", "steps"),
    [
        *((algo, "recall", levels, 640) for algo in ("ppo", "synchronous impala") for levels in ("0:40", "all")),
        ("impala", "fruitbot,starpilot", "3:90", 896),
    ],
)
def test_exactly_the_started_levels_are_recorded(algo: str, env: str, levels: str, steps: int) -> None:
    truth: Levels = set()
    groups = [VecNormalizeReward(recording_levels(make_vec_env(env, 4, levels, seed), truth)) for seed in (0, 4)]
    noted: list[tuple[str, int]] = []
    trainer(GroupedVecEnv(groups), algo).learn(steps, LevelRecorder(lambda game, level: noted.append((game, level))))
    assert set(noted) == truth
    assert all(type(level) is int for _, level in noted)
    assert len(truth) > 8, "no episode ended"


def test_steps_that_end_no_episode_read_no_infos() -> None:
    callback = LevelRecorder(lambda game, level: pytest.fail("nothing ended"))

    class Untouched(list):
        def __getitem__(self, index: Any) -> Any:
            pytest.fail("no episode ended")

    callback.locals = {"dones": np.zeros(64, bool), "infos": Untouched([{}] * 64)}
    assert callback._on_step()


def test_environments_without_levels_record_nothing() -> None:
    noted: list[Any] = []
    PPO("SRWMPolicy", "CartPole-v1", n_steps=64, seed=0, device="cpu").learn(
        128, LevelRecorder(lambda *levels: noted.append(levels))
    )
    assert noted == []


def test_the_returns_of_first_and_last_attempts_are_logged() -> None:
    model = trainer(make_vec_env("parity", 8, "0:40", 0, env_kwargs={"length": 4}, attempts=2), "ppo")
    log, ended = LogRecorder(), dict[int, list[float]]({0: [], 1: []})
    model.set_logger(Logger(None, [log]))

    def note(local: dict[str, Any], _: Any) -> bool:
        for info in local["infos"]:
            if "attempt" in info:
                ended[info["attempt"]].append(info["attempt_return"])
        return True

    model.learn(128, [AttemptReturns(), ConvertCallback(note)])  # one rollout, of two trials in each environment
    assert len(ended[0]) == len(ended[1]) == 16
    (row,) = (row for row in log.rows if "rollout/first_attempt_rew_mean" in row)
    assert row["rollout/first_attempt_rew_mean"] == pytest.approx(np.mean(ended[0]))
    assert row["rollout/last_attempt_rew_mean"] == pytest.approx(np.mean(ended[1]))


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_the_training_score_is_the_logged_mean_once_the_window_is_full(algo: str) -> None:
    model = trainer(make_vec_env("recall", 8, "0:40", 0), algo)
    log = LogRecorder()
    model.set_logger(Logger(None, [log]))
    scores: list[tuple[int, float]] = []
    episodes: list[int] = []

    def note(score: float, error: float) -> None:
        returns = [episode["r"] for episode in model.ep_info_buffer or ()]
        scores.append((model.num_timesteps, score))
        episodes.append(len(returns))
        assert error == pytest.approx(np.std(returns, ddof=1) / len(returns) ** 0.5)

    model.learn(128 * 14, TrainingReturn(note))
    assert set(episodes) == {100}
    assert 128 * 2 < scores[0][0] < 128 * 14, "the window was full at once, or never"
    logged = {line["step"]: line["rollout/ep_rew_mean"] for line in log.rows}
    assert scores == [(step, logged[step]) for step in sorted(logged) if step >= scores[0][0]]
    assert len(scores) > 2


class Clock:
    """A clock: capturing a state takes a second, an update a given time."""

    def __init__(self) -> None:
        self.now, self.taken = 0.0, list[float]()

    def __call__(self) -> float:
        return self.now

    def capture(self) -> dict[str, Any]:
        self.now += 1
        self.taken.append(self.now)
        return {"taken": self.now}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(callbacks, "monotonic", clock)
    return clock


def rollouts(checkpoints: Checkpoints, clock: Clock, seconds: list[float], processes: Any = SINGLE) -> None:
    """Start a rollout of 10 steps after each of the waits, in seconds, as a trainer would."""
    checkpoints.model = SimpleNamespace(processes=processes)  # type: ignore[assignment]
    checkpoints.num_timesteps = 0
    checkpoints._on_training_start()
    for wait in seconds:
        clock.now += wait
        checkpoints._on_rollout_start()
        checkpoints.num_timesteps += 10


@pytest.mark.parametrize(
    ("grace", "update", "n", "taken"),
    [
        (0.0, 25.0, 4, [26, 52, 78, 104]),  # slow updates: before each
        (0.0, 4.0, 12, [5, 22, 43]),  # fast ones: a twentieth of the time
        (2.5, 4.0, 12, [5, 10, 15, 20, 33, 54]),  # except at the start
    ],
)
def test_capturing_states_costs_a_share_of_the_time(
    grace: float, update: float, n: int, taken: list[float], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "GRACE", grace)
    saved = list[dict[str, Any]]()
    checkpoints = Checkpoints(clock.capture, saved.append, 10**9, 10**9)
    rollouts(checkpoints, clock, [update] * n)
    assert clock.taken == taken
    assert saved == []
    checkpoints.save_latest()
    assert saved == [{"taken": taken[-1]}]


def test_a_due_state_is_captured_and_saved_even_if_updates_are_fast(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "GRACE", 0.0)
    saved = list[dict[str, Any]]()
    by_steps = Checkpoints(clock.capture, saved.append, 30, 10**9)
    rollouts(by_steps, clock, [0.5] * 7)
    assert clock.taken == [1.5, 4.0, 6.5]  # at 0, 30 and 60 steps
    assert [state["taken"] for state in saved] == [4.0, 6.5]
    clock.now, saved = 0.0, []
    by_seconds = Checkpoints(clock.capture, saved.append, 10**9, 2.0)
    rollouts(by_seconds, clock, [0.5] * 9)
    assert saved == [{"taken": time} for time in (3.0, 6.0)]


def test_all_processes_capture_when_process_0_does(clock: Clock) -> None:
    def all_gather(tree: Any) -> list[Any]:
        asked.append(tree)
        clock.now += 50  # until all are there
        return [len(asked) == 3, tree]

    asked = list[bool]()
    checkpoints = Checkpoints(clock.capture, lambda _: None, 10**9)
    rollouts(checkpoints, clock, [99.0] * 4, SimpleNamespace(all_gather=all_gather))
    assert asked == [True] * 4
    assert clock.taken == [4.0 * 99 - 99 + 3 * 50 + 1]
    assert checkpoints.spent == 1


def model(core: str = "srwm") -> tuple[PPO, LogRecorder]:
    env = make_vec_env("recall", 8, "0:50", 0)
    kwargs = {"core": core, "core_kwargs": {"hidden_size": 16, "n_layers": 2}}
    agent = PPO("SRWMPolicy", env, n_steps=16, n_epochs=1, policy_kwargs=kwargs, seed=0, device="cpu")
    log = LogRecorder()
    agent.set_logger(Logger(None, [log]))
    return agent, log


def held_out(model: PPO, every: int) -> HeldOutEvalCallback:
    def play(levels: str) -> Any:
        return play_levels(model.policy, make_levels_env("recall", 4, levels, 1, 0))

    return HeldOutEvalCallback({"train": lambda: play("0:6"), "test": lambda: play("100:106")}, every)


@pytest.mark.parametrize("core", core_names())
def test_edits_and_drifts_are_logged_for_cores_with_state(core: str) -> None:
    agent, log = model(core)
    agent.learn(3 * 128, EditStatsCallback())
    names = {name for line in log.rows for name in line if name.startswith("srwm/")}
    if not agent.policy.core.state_size:
        assert names == set()
        return
    rates = {"rate_y", "rate_query", "rate_key", "rate_beta"} if "sr" in core else set()
    assert names == {f"srwm/l{layer}/{name}" for layer in (0, 1) for name in {"edit", "drift", "drift_max"} | rates}
    assert all(np.isfinite(line[name]) for line in log.rows for name in names if name in line)


def test_the_logged_drift_is_the_norm_of_the_states_shift() -> None:
    agent, log = model()
    agent.learn(128, EditStatsCallback(histogram_every=1))
    assert agent._core_state is not None
    core: Any = agent.policy.core
    norms = agent._core_state.unflatten(-1, core.layers[0].shift_shape).flatten(3).norm(dim=-1)
    for layer in (0, 1):
        assert log.rows[0][f"srwm/l{layer}/drift"] == pytest.approx(norms[layer].mean().item(), rel=1e-4)
        assert log.rows[0][f"srwm/l{layer}/drift_max"] == pytest.approx(norms[layer].max().item(), rel=1e-4)
        assert log.rows[0][f"srwm/l{layer}/drifts"].shape == (8 * 8,)
        for rate in ("y", "query", "key", "beta"):
            assert 0 < log.rows[0][f"srwm/l{layer}/rate_{rate}"] < 1


def test_the_logged_drift_is_of_the_end_where_rollouts_are_whole_episodes() -> None:
    env = make_vec_env("bandit", 4, "0:50", 0, env_kwargs={"n_pulls": 16})
    agent = PPO("SRWMPolicy", env, n_steps=16, batch_size=64, policy_kwargs={"core": "srwm"}, seed=0, device="cpu")
    log = LogRecorder()
    agent.set_logger(Logger(None, [log]))
    agent.learn(2 * 64, EditStatsCallback())
    assert agent._last_episode_starts.all()
    assert min(line["srwm/l0/drift"] for line in log.rows) > 0


def test_callbacks_do_not_change_training() -> None:
    plain, _ = model()
    plain.learn(4 * 128)
    watched, _ = model()
    watched.learn(4 * 128, [EditStatsCallback(), held_out(watched, 128)])
    for mine, theirs in zip(plain.policy.parameters(), watched.policy.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_evaluations_fall_on_multiples_and_are_scored() -> None:
    agent, log = model()
    scores: list[float] = []
    callback = held_out(agent, 300)
    callback.on_score = lambda score, error: scores.append(score)
    agent.learn(8 * 128, callback)
    lines = [line for line in log.rows if "eval/gap" in line]
    assert [line["step"] for line in lines] == [384, 640, 1024]  # the first updates beyond 300, 600 and 900
    assert scores == [line["eval_test/mean_reward"] for line in lines]
    for line in lines:
        assert line["eval/gap"] == pytest.approx(line["eval_train/mean_reward"] - line["eval_test/mean_reward"])
        assert 0 <= line["eval_test/success_rate"] <= 1
        assert 6 <= line["eval_test/mean_ep_length"] <= 13


def test_edit_stats_do_not_disturb_a_concurrent_learner() -> None:
    env = make_vec_env("recall", 8, "0:50", 0)
    kwargs = {"core": "srwm", "core_kwargs": {"hidden_size": 16, "n_layers": 2}}
    agent = IMPALA("SRWMPolicy", env, n_steps=8, policy_kwargs=kwargs, seed=0, device="cpu")
    log = LogRecorder()
    agent.set_logger(Logger(None, [log]))
    agent.learn(60 * 64, EditStatsCallback())  # raised from the learner's thread when the two shared a network
    assert sum("srwm/l0/edit" in line for line in log.rows) == 60
