"""Action masks, as sb3-contrib's `MaskablePPO` reads them, together with a memory."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from srwm_rl import UserError
from srwm_rl.agents import PPO, VecActionMasks
from srwm_rl.agents.evaluation.baselines import ConstantAgent
from srwm_rl.agents.evaluation.play_levels import RandomAgent
from srwm_rl.envs import VecMemoryInputs
from tests.agents.probe import Probe, collect_rollout, small_model

CHOICES: list[Any] = [spaces.Discrete(4), spaces.MultiDiscrete([2, 3])]


class InfoMaskedProbe(Probe):
    """Allows one action per step, drawn anew, and raises at any other; masks are in the infos."""

    def _draw(self) -> dict[str, Any]:
        self.allowed = self.action_space.sample()
        parts = getattr(self.action_space, "nvec", [getattr(self.action_space, "n", 0)])
        chosen = np.atleast_1d(self.allowed)
        self.mask = np.concatenate([np.arange(n) == c for n, c in zip(parts, chosen, strict=True)])
        return {"action_mask": self.mask.astype(np.int8)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return super().reset(seed=seed)[0], self._draw()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert np.array_equal(action, self.allowed), "an action that is not allowed"
        return (*super().step(action)[:4], self._draw())


class MaskedProbe(InfoMaskedProbe):
    """The same with the method `action_masks`."""

    def _draw(self) -> dict[str, Any]:
        super()._draw()
        return {}

    def action_masks(self) -> np.ndarray:
        return self.mask


def masked_env(probe: type[Probe] = MaskedProbe, n_envs: int = 4, **settings: Any) -> VecEnv:
    return DummyVecEnv([lambda: probe(**{"action_space": spaces.Discrete(4), **settings})] * n_envs)


@pytest.mark.parametrize("algo", ["ppo", "impala", "overlapping"])
@pytest.mark.parametrize("action_space", CHOICES)
@pytest.mark.parametrize("cut", [False, True])
def test_only_allowed_actions_are_taken_and_learned(algo: str, action_space: Any, cut: bool) -> None:
    env = VecMemoryInputs(masked_env(action_space=action_space, cut=cut))
    settings = {"synchronous": False} if algo == "overlapping" else {}
    model = small_model(algo, env, ent_coef=0.01, **settings)
    assert model.policy.masked
    model.learn(96)  # the probe raises at an action that is not allowed
    obs = model.get_env().reset()
    actions, _ = model.predict(obs)
    model.get_env().step(actions)


@pytest.mark.parametrize("action_space", CHOICES)
def test_masks_are_stored_with_the_rollout_and_leave_one_certain_action(action_space: Any) -> None:
    model = small_model("ppo", masked_env(action_space=action_space))
    buffer = collect_rollout(model)
    assert float(np.abs(np.asarray(buffer.log_probs)).max()) == 0.0  # one action is allowed: its probability is 1
    batch = next(buffer.gather(np.arange(4)))
    n_choices = len(getattr(action_space, "nvec", [1]))
    assert (batch.observations["action_mask"].sum(-1) == n_choices).all()
    result = model.policy.evaluate_sequence(batch.observations, batch.actions, batch.core_state, batch.episode_starts)
    assert result.entropy.abs().max() == 0
    fused = model.engine.evaluate_sequence(batch.observations, batch.actions, batch.core_state, batch.episode_starts)
    assert not model.engine.fused(model.policy).disabled  # logits in C, masks in torch
    torch.testing.assert_close(fused.log_probs, result.log_probs)
    torch.testing.assert_close(fused.values, result.values)


def test_masks_in_infos_need_the_wrapper(caplog: Any) -> None:
    model = small_model("ppo", VecActionMasks(masked_env(InfoMaskedProbe)))
    model.learn(64)
    plain = small_model("ppo", masked_env(InfoMaskedProbe))
    with pytest.raises(AssertionError, match="not allowed"):
        plain.learn(64)
    assert "wrap the environments in srwm_rl.agents.VecActionMasks" in caplog.text


def test_predict_takes_masks_as_maskable_ppo_does() -> None:
    model = small_model("ppo", masked_env())
    obs = np.zeros((3, 3), np.float32)
    for allowed in range(4):
        masks = np.zeros((3, 4), bool)
        masks[:, allowed] = True
        for deterministic in (False, True):
            actions, _ = model.predict(obs, action_masks=masks, deterministic=deterministic)
            assert actions.tolist() == [allowed] * 3
        action, _ = model.predict(obs[0], action_masks=masks[0])
        assert action == allowed
    with pytest.raises(UserError, match="give action_masks"):
        model.predict(obs)
    with pytest.raises(UserError, match=r"of shape \(3, 4\), not \(3, 5\)"):
        model.predict(obs, action_masks=np.ones((3, 5)))
    with pytest.raises(UserError, match="environment 1 allows no action"):
        model.predict(obs, action_masks=np.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]))
    unmasked = small_model("ppo", action_space=spaces.Discrete(4))  # trained without
    assert unmasked.predict(obs, action_masks=np.array([[0, 0, 1, 0]] * 3))[0].tolist() == [2, 2, 2]
    continuous = small_model("ppo", action_space=spaces.Box(-1, 1, (2,)))
    with pytest.raises(UserError, match="none for such actions"):
        continuous.predict(obs, action_masks=np.ones((3, 2)))


def test_sb3_evaluates_and_loads_a_masked_model(tmp_path: Any) -> None:
    model = small_model("ppo", masked_env())
    model.learn(32)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=masked_env())
    assert loaded.policy.masked
    loaded.learn(32)
    mean, _ = evaluate_policy(loaded, VecActionMasks(masked_env()), n_eval_episodes=4, warn=False)
    assert mean == 15


def test_a_mask_of_all_ones_changes_nothing() -> None:
    space = spaces.Dict({"observation": spaces.Box(-1, 1, (3,)), "action_mask": spaces.MultiBinary(4)})
    masked = small_model("ppo", observation_space=space, action_space=spaces.Discrete(4))
    plain = small_model("ppo", action_space=spaces.Discrete(4))
    assert masked.policy.features_dim == plain.policy.features_dim
    obs, ones = torch.rand(5, 3), torch.ones(5, 4, dtype=torch.int8)
    state, starts = plain.policy.initial_state(5), torch.ones(5)
    plain.policy.load_state_dict(deepcopy(masked.policy.state_dict()))
    expected, *_ = plain.policy._step(obs, state, starts)
    distribution, *_ = masked.policy._step({"observation": obs, "action_mask": ones}, state, starts)
    assert torch.equal(distribution.distribution.logits, expected.distribution.logits)


def test_masks_that_do_not_fit_are_one_line() -> None:
    for action_space in (spaces.Box(-1, 1, (2,)), spaces.MultiBinary(2)):
        with pytest.raises(UserError, match="for Discrete and MultiDiscrete"):
            small_model("ppo", masked_env(action_space=action_space))

    class Wrong(MaskedProbe):
        def action_masks(self) -> np.ndarray:
            return np.ones(9)

    with pytest.raises(UserError, match="must have 4 entries, not 9"):
        small_model("ppo", masked_env(Wrong)).learn(8)
    with pytest.raises(UserError, match=r"neither action_masks\(\) nor"):
        VecActionMasks(masked_env(Probe)).reset()


@pytest.mark.parametrize("action_space", CHOICES)
def test_random_play_keeps_to_the_masks(action_space: Any) -> None:
    env = VecActionMasks(masked_env(action_space=action_space))
    obs, agent = env.reset(), RandomAgent(action_space)
    for _ in range(12):
        obs, *_ = env.step(agent.predict(obs)[0])


def test_a_constant_action_gives_way_where_it_is_not_allowed() -> None:
    masks = np.array([[0, 1, 1], [0, 0, 1]])
    obs = {"observation": np.zeros((2, 3)), "action_mask": masks}
    assert ConstantAgent(1).predict(obs)[0].tolist() == [1, 2]
