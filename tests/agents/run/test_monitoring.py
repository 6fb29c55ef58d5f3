"""Monitoring callbacks: correct values in the log, and no influence on training."""

from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import Logger

from srwm_rl import core_names
from srwm_rl.agents import IMPALA, PPO
from srwm_rl.agents.evaluation.play_levels import play_levels
from srwm_rl.agents.run.monitoring import EditStatsCallback, HeldOutEvalCallback
from srwm_rl.envs import make_levels_env, make_vec_env
from tests.agents.probe import LogRecorder


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
    assert names == {
        f"srwm/l{layer}/{name}" for layer in (0, 1) for name in {"edit", "drift", "drift_max"} | rates
    } or (core in ("lstm", "gru") and names)
    assert all(np.isfinite(line[name]) for line in log.rows for name in names if name in line)


def test_the_logged_drift_is_the_norm_of_the_states_shift() -> None:
    agent, log = model()
    agent.learn(128, EditStatsCallback(histogram_every=1))
    assert agent._core_state is not None
    fresh = torch.as_tensor(agent._last_episode_starts)
    core: Any = agent.policy.core
    state = agent._core_state.masked_fill(fresh[:, None], 0)
    norms = state.unflatten(-1, core.layers[0].shift_shape).flatten(3).norm(dim=-1)
    for layer in (0, 1):
        assert log.rows[0][f"srwm/l{layer}/drift"] == pytest.approx(norms[layer].mean().item(), rel=1e-4)
        assert log.rows[0][f"srwm/l{layer}/drift_max"] == pytest.approx(norms[layer].max().item(), rel=1e-4)
        assert log.rows[0][f"srwm/l{layer}/drifts"].shape == (8 * 8,)
        for rate in ("y", "query", "key", "beta"):
            assert 0 < log.rows[0][f"srwm/l{layer}/rate_{rate}"] < 1


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
    callback.on_score = scores.append
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
