"""What PPO and IMPALA have in common: gradients, the end of episodes, saving, and SB3's callbacks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env as sb3_make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from srwm_rl import core_names
from srwm_rl.agents import IMPALA, PPO
from tests.agents.probe import collect_rollout, gradient_of, small_model, unroll_gradient

ALGORITHMS = pytest.mark.parametrize("algo", ["ppo", "impala"])
OVERLAPPED = ("ppo", "impala", "impala overlapped")


def trainer(algo: str, **settings: Any) -> Any:
    """Return a small model, IMPALA's with two groups of environments; "impala overlapped" acts while it learns."""
    if algo != "ppo":
        settings = {"n_groups": 2, "synchronous": algo == "impala", **settings}
    return small_model(algo.split()[0], **settings)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights' gradients of one rollout's loss."""
    rollout = collect_rollout(model)
    if isinstance(model, PPO):
        gradient_of(model, np.arange(rollout.n_sequences))
    else:
        unroll_gradient(model, rollout)
    result = {name: parameter.grad for name, parameter in model.policy.named_parameters()}
    assert all(gradient is not None for gradient in result.values())
    return result


@pytest.mark.parametrize("algo", OVERLAPPED)
@pytest.mark.parametrize("core", core_names())
def test_learning_changes_every_parameter(core: str, algo: str) -> None:
    model = trainer(algo, policy_kwargs={"core": core}, ent_coef=0.01)
    before = {name: parameter.detach().clone() for name, parameter in model.policy.named_parameters()}
    model.learn(4 * 8 * 4)
    assert model.num_timesteps == 4 * 8 * 4
    assert model._n_updates >= 1
    for name, parameter in model.policy.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert torch.isfinite(parameter).all(), name


@ALGORITHMS
def test_full_bptt_trains_the_self_modification_and_bptt_1_does_not(algo: str) -> None:
    largest = []
    for bptt in (None, 1):
        model = trainer(algo, bptt=bptt)
        weight = gradients(model)["core.layers.0.weight"]  # columns of y, query, key and beta
        size = weight.shape[1]
        largest.append([part.abs().max().item() for part in weight.split((size, size, size, 4), dim=-1)])
    assert min(largest[0]) > 0
    assert largest[1][0] > 0
    assert largest[1][1:] == [0, 0, 0]


@ALGORITHMS
def test_micro_batches_give_the_gradient_of_the_batch(algo: str) -> None:
    image = spaces.Box(0, 255, (32, 32, 3), np.uint8)
    whole, parts = (gradients(trainer(algo, observation_space=image, frames_at_once=n)) for n in (10**6, 1))
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, parts[name], rtol=1e-3, atol=1e-6, msg=name)


@ALGORITHMS
def test_truncated_episodes_bootstrap_with_the_core_state_of_the_episode(algo: str) -> None:
    model = trainer(algo, n_envs=1, n_groups=1, n_steps=4, length=4, cut=True, gamma=0.9)
    steps: list[Any] = []
    step = model.env.step
    model.env.step = lambda actions: steps.append(step(actions)) or steps[-1]  # type: ignore[func-returns-value]
    rollout = collect_rollout(model)
    stored = rollout.tensors if algo == "ppo" else rollout
    final = torch.as_tensor(steps[-1][3][0]["terminal_observation"])
    observations = torch.cat((stored.observations[:4, 0], final[None]))[:, None]  # [5, 1, 3]
    starts = torch.tensor([[1.0], [0], [0], [0], [0]])
    with torch.no_grad():
        actions = torch.zeros(5, 1, dtype=torch.int64)
        values = model.policy.evaluate_sequence(observations, actions, model.policy.initial_state(1), starts).values
    assert stored.rewards[:3, 0].tolist() == [1, 2, 3]
    torch.testing.assert_close(stored.rewards[3, 0], 4 + 0.9 * values[4, 0])
    assert abs(values[4, 0]) > 1e-3


@pytest.mark.parametrize("algo", ["ppo", "impala overlapped"])
def test_a_loaded_model_acts_the_same_and_continues_learning(algo: str, tmp_path: Path) -> None:
    model = trainer(algo)
    model.learn(128)
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", env=model.env, device="cpu")
    obs = np.random.default_rng(0).uniform(-1, 1, (4, 3)).astype(np.float32)
    state = loaded_state = None
    for _ in range(3):
        actions, state = model.predict(obs, state, deterministic=True)
        loaded_actions, loaded_state = loaded.predict(obs, loaded_state, deterministic=True)
        np.testing.assert_array_equal(actions, loaded_actions)
        np.testing.assert_equal(state, loaded_state)
    loaded.learn(64)
    assert loaded.num_timesteps == 64
    assert type(loaded.policy.optimizer) is type(model.policy.optimizer)


@pytest.mark.parametrize("algo", [PPO, IMPALA])  # IMPALA acts while it learns
def test_sb3s_callbacks_evaluate_policy_and_progress_bar_work(algo: type[Any], tmp_path: Path) -> None:
    model = algo(
        "MlpPolicy", sb3_make_vec_env("CartPole-v1", 4), n_steps=16, seed=0, device="cpu",
        policy_kwargs={"core_kwargs": {"hidden_size": 16, "n_layers": 1}}, tensorboard_log=str(tmp_path / "tb"),
    )  # fmt: skip
    held_out = sb3_make_vec_env("CartPole-v1", 2)
    callbacks = [
        CheckpointCallback(64, str(tmp_path)),
        EvalCallback(held_out, eval_freq=32, n_eval_episodes=2, best_model_save_path=str(tmp_path), verbose=0),
    ]
    model.learn(256, callbacks, progress_bar=True)
    assert (tmp_path / "best_model.zip").exists()
    assert list(tmp_path.glob("rl_model_*_steps.zip"))
    assert list((tmp_path / "tb" / f"{algo.__name__}_1").glob("events*"))
    mean, _ = evaluate_policy(model, held_out, 4)
    assert mean >= 8  # CartPole's shortest episodes have that many steps
