"""PPO: rollouts, gradients, and the methods that SB3 users call."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO as SB3PPO
from stable_baselines3.common.logger import Logger

from srwm_rl import UserError, core_names
from srwm_rl.agents import PPO
from srwm_rl.envs import make_vec_env
from srwm_rl.nn.policy import ActStep
from tests.agents.probe import (
    LogRecorder,
    Probe,
    StopAtMeanReturn,
    collect_rollout,
    mean_return,
    probe_env,
    small_model,
)

SMALL = {"core_kwargs": {"hidden_size": 16, "n_layers": 1}}


def probe_model(n_envs: int = 4, n_steps: int = 16, core: str = "srwm", **settings: Any) -> PPO:
    policy_kwargs = {"core": core, **settings.pop("policy_kwargs", {})}
    model: PPO = small_model("ppo", n_envs=n_envs, n_steps=n_steps, policy_kwargs=policy_kwargs, **settings)
    return model


@pytest.mark.parametrize("core", core_names())
@pytest.mark.parametrize("sequence_length", [None, 8])
def test_evaluating_whole_sequences_repeats_the_acting_steps_values_and_log_probs(
    core: str, sequence_length: int | None
) -> None:
    model = probe_model(core=core, sequence_length=sequence_length, batch_size=16)
    collect_rollout(model)
    if model.policy.core.state_size and model.policy.core.carries_over:
        assert model._core_state is not None
        assert model._core_state.abs().max() > 0
    buffer = collect_rollout(model, continued=True)  # begins in the middle of episodes
    assert buffer.tensors.episode_starts[1:].any()
    old = next(buffer.gather(np.arange(buffer.n_sequences)))
    with torch.no_grad():
        new = model.policy.evaluate_sequence(old.observations, old.actions, old.core_state, old.episode_starts)
    torch.testing.assert_close(new.values, old.old_values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new.log_probs, old.old_log_probs, rtol=1e-4, atol=1e-5)


def test_the_sequence_length_is_changed_where_a_zip_is_loaded(tmp_path: Path) -> None:
    probe_model(n_steps=16, sequence_length=8, batch_size=16).save(tmp_path / "model.zip")
    for n_steps, length in ((16, 4), (12, None)):
        settings = {"n_steps": n_steps, "sequence_length": length}
        model = PPO.load(tmp_path / "model.zip", env=probe_env(), **settings)  # type: ignore[arg-type]
        assert model.rollout_buffer.sequence_length == (length or n_steps)
        model.learn(4 * n_steps)
    with pytest.raises(UserError, match="PPO has no setting 'n_step'; did you mean 'n_steps'"):
        PPO.load(tmp_path / "model.zip", n_step=8)


def test_an_epoch_that_target_kl_stops_is_counted_as_in_sb3() -> None:
    settings = {"n_steps": 8, "batch_size": 8, "learning_rate": 0.1, "target_kl": 1e-6, "seed": 0, "device": "cpu"}
    ours, theirs = (algorithm("MlpPolicy", Probe(), **settings) for algorithm in (PPO, SB3PPO))  # type: ignore[operator]
    # The first epoch is made, at a divergence of 0; the second is stopped.
    assert ours.learn(8)._n_updates == theirs.learn(8)._n_updates == 2


def test_without_a_batch_size_a_minibatch_has_the_whole_sequences_of_a_quarter_rollout() -> None:
    for n_envs, n_minibatches in ((1, 1), (3, 3), (4, 4), (6, 6), (8, 4), (11, 6)):
        assert probe_model(n_envs=n_envs, n_epochs=1).minibatches_per_update == n_minibatches


def test_a_rollout_stores_one_core_state_per_sequence() -> None:
    model = probe_model(n_steps=16, sequence_length=8, batch_size=16)
    assert collect_rollout(model).core_states.shape[1] == 2 * 4
    assert collect_rollout(probe_model(n_steps=16)).core_states.shape[1] == 4


def test_advantages_of_a_single_step_are_not_normalised() -> None:
    model = probe_model(n_envs=3, n_steps=1, batch_size=2)  # minibatches of two steps and of one
    buffer = collect_rollout(model)
    two_steps, one_step = (next(parts).advantages for parts, _ in model._minibatches())
    torch.testing.assert_close(two_steps.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(two_steps.std(), torch.tensor(1.0))
    model.normalize_advantage = False
    assert one_step.item() in buffer.tensors.advantages
    raw = torch.cat([part.advantages.flatten() for parts, _ in model._minibatches() for part in parts])
    assert sorted(raw.tolist()) == sorted(buffer.tensors.advantages.flatten().tolist())


def test_terminated_episodes_do_not_bootstrap() -> None:
    assert collect_rollout(probe_model(n_envs=1, n_steps=4, length=4)).rewards[:, 0].tolist() == [1, 2, 3, 4]


def test_truncation_without_a_last_observation_uses_the_value_before_it() -> None:
    model = probe_model(n_envs=2)
    rewards = np.ones(2, np.float32)
    infos = [{"TimeLimit.truncated": True}, {"TimeLimit.truncated": False}]
    values = torch.tensor([10.0, 10.0])
    acted = ActStep(torch.zeros(2), values, torch.zeros(2), model.policy.initial_state(2))
    result = model._bootstrap_truncated(rewards, np.ones(2, bool), infos, acted, range(2))
    assert result.tolist() == pytest.approx([1 + model.gamma * 10, 1])


@pytest.mark.parametrize(
    "observation_space",
    [
        spaces.Discrete(4),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(4),
        spaces.Box(0, 255, (24, 24, 3), np.uint8),
        spaces.Box(0, 255, (3, 24, 24), np.uint8),
        spaces.Dict(
            a=spaces.Box(-1, 1, (2, 2), np.float32), b=spaces.Discrete(3), c=spaces.Box(0, 255, (16, 16, 1), np.uint8)
        ),
    ],
    ids=["discrete", "multidiscrete", "multibinary", "hwc", "chw", "dict"],
)
def test_observation_spaces(observation_space: Any) -> None:
    model = probe_model(observation_space=observation_space, n_epochs=1)
    model.learn(64)
    stored = model.rollout_buffer.tensors.observations
    pairs = (
        [(stored[key], space) for key, space in observation_space.spaces.items()]
        if isinstance(stored, dict)
        else [(stored, observation_space)]
    )
    for tensor, space in pairs:
        assert tensor.dtype == torch.from_numpy(np.empty(0, space.dtype)).dtype  # frames stay uint8


def test_a_callback_can_stop_training() -> None:
    model = probe_model()
    model.learn(10_000, lambda local, _: local["self"].num_timesteps < 40)
    assert model.num_timesteps == 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 8}, "holds no whole sequence of 16 steps"),
        ({"sequence_length": 5, "batch_size": 32}, "must divide n_steps"),
        ({"bptt": 0}, "bptt must be"),
        ({"policy_kwargs": {"core": "lstn"}}, "did you mean 'lstm'"),
        ({"policy_kwargs": {"core_kwargs": {"hiden_size": 3}}}, "did you mean 'hidden_size'"),
    ],
)
def test_invalid_settings_raise_a_one_line_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        probe_model(**settings)
    assert "\n" not in str(error.value)


def test_a_batch_with_part_of_a_sequence_warns_of_the_steps_that_it_leaves_out() -> None:
    with pytest.warns(UserWarning, match="no multiple of the sequences' 16 steps: minibatches have at most 32"):
        probe_model(batch_size=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe_model(batch_size=32)


def test_a_small_memory_task_is_learned_by_the_srwm_and_not_without_memory() -> None:
    success, n_timesteps = {}, 60_000  # at 40,000 one seed of ten has not learned it yet
    for core in ("srwm", "feedforward"):
        # Without its previous action among the inputs: a network without memory could remember by its actions.
        env = make_vec_env("recall", 32, "0:100000", 0, env_kwargs={"n_symbols": 2, "delay": 2}, inputs=("step",))
        model = PPO(
            "SRWMPolicy", env, learning_rate=3e-3, n_steps=16, batch_size=128, ent_coef=0.01, seed=0,
            policy_kwargs={"core": core, "core_kwargs": {"hidden_size": 16, "n_layers": 1}}, stats_window_size=500,
        )  # fmt: skip
        model.learn(n_timesteps, StopAtMeanReturn(0.92))
        success[core], n_timesteps = mean_return(model), model.num_timesteps
    assert success["srwm"] > 0.9
    assert success["feedforward"] < 0.65


def test_returns_are_logged_per_game() -> None:
    env = make_vec_env("bigfish,dodgeball", 8, "0:200", 0)
    model = small_model("ppo", env, n_steps=128, n_epochs=1)
    model.set_logger(Logger(None, [log := LogRecorder()]))
    model.learn(1024)
    env.close()
    for game in ("bigfish", "dodgeball"):
        returns = [episode["r"] for episode in model.ep_info_buffer if episode["game"] == game]
        assert log.column(f"rollout/{game}/ep_rew_mean") == [pytest.approx(np.mean(returns))]


MEMORY = """
import re
from itertools import islice
from srwm_rl.agents import PPO
from srwm_rl.envs import make_vec_env

env = make_vec_env("bigfish", 64, "0:200", 0)
model = PPO("SRWMPolicy", env, n_steps=256, batch_size=2048, n_epochs=1)
_, callback = model._setup_learn(64 * 256)
buffer, minibatches = model.rollout_buffer, model._minibatches
model.collect_rollouts(env, callback, buffer, 16)
for tensor in (*buffer.tensors.observations.values(), buffer.tensors.actions):  # the other steps repeat the first 16
    tensor.unflatten(0, (16, 16))[1:] = tensor[:16]
buffer._numbers.unflatten(1, (16, 16))[:, 1:] = buffer._numbers[:, None, :16]
model._minibatches = lambda: islice(minibatches(), 1)
model.train()
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_procgen_rollout_of_64_environments_and_256_steps_fits_in_2_gib() -> None:
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(result.stdout.split()[-1]) < 2 * 1024**2
