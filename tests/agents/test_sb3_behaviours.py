"""What SB3's and sb3-contrib's public tests ask of PPO and RecurrentPPO, asked of ours; docs/stable-baselines3.md."""

from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import (
    BitFlippingEnv,
    FakeImageEnv,
    IdentityEnv,
    IdentityEnvBox,
    IdentityEnvMultiBinary,
    IdentityEnvMultiDiscrete,
    SimpleMultiObsEnv,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecFrameStack,
    VecNormalize,
    VecTransposeImage,
)
from torch import Tensor, nn

from srwm_rl import SRWMPolicy, UserError
from srwm_rl.agents import IMPALA, PPO
from tests.agents.probe import Probe

CORE = {"core_kwargs": {"hidden_size": 8, "n_layers": 1, "n_heads": 2}}
ALGORITHMS = pytest.mark.parametrize("algo", [PPO, IMPALA])


def make(algo: Any, env: Any, policy: str = "MlpPolicy", policy_kwargs: Any = None, **settings: Any) -> Any:
    settings = {"n_steps": 16, "seed": 1, "device": "cpu", **settings}
    return algo(policy, env, policy_kwargs={**CORE, **(policy_kwargs or {})}, **settings)


# Images and Dicts.


@ALGORITHMS
@pytest.mark.parametrize(("n_channels", "channel_first"), [(1, False), (3, False), (1, True)])
def test_images_in_either_layout(algo: Any, n_channels: int, channel_first: bool, tmp_path: Path) -> None:
    env = FakeImageEnv(screen_height=40, screen_width=36, n_channels=n_channels, channel_first=channel_first)
    model = make(algo, env, "CnnPolicy", {"features_extractor_kwargs": {"features_dim": 32}}).learn(32)
    obs, _ = env.reset()
    for _ in range(3):
        assert env.action_space.contains(model.predict(obs)[0])
    action, _ = model.predict(obs, deterministic=True)
    model.save(tmp_path / "model")
    assert algo.load(tmp_path / "model").predict(obs, deterministic=True)[0] == action


@ALGORITHMS
def test_images_that_sb3_transposed_or_stacked(algo: Any) -> None:
    last = DummyVecEnv([partial(FakeImageEnv, screen_height=36, screen_width=36, n_channels=3)])
    first = DummyVecEnv([partial(FakeImageEnv, screen_height=36, screen_width=36, n_channels=5, channel_first=True)])
    stacked = VecFrameStack(first, 3, channels_order="first")
    for env in (VecTransposeImage(last), VecTransposeImage(stacked, skip=True)):
        make(algo, env, "CnnPolicy").learn(16).predict(env.reset())
    own = {"features_extractor_class": NatureCNN, "features_extractor_kwargs": {"features_dim": 16}}
    assert make(algo, VecTransposeImage(last), "CnnPolicy", own).learn(16).policy.features_dim == 16


@ALGORITHMS
@pytest.mark.parametrize("channel_last", [False, True])
def test_dicts_of_images_and_vectors_stacked(algo: Any, channel_last: bool) -> None:
    env = DummyVecEnv([partial(SimpleMultiObsEnv, random_start=True, channel_last=channel_last)])
    stack = VecFrameStack(env, 3, channels_order={"vec": None, "img": "last" if channel_last else "first"})
    policy_kwargs = {"net_arch": [32], "features_extractor_kwargs": {"cnn_output_dim": 32}}
    model = make(algo, stack, "MultiInputPolicy", policy_kwargs).learn(32)
    evaluate_policy(model, stack, n_eval_episodes=1, warn=False)
    normalized = VecNormalize(env, norm_obs_keys=["vec"])
    make(algo, normalized, "MultiInputPolicy", policy_kwargs).learn(16)


@ALGORITHMS
def test_goal_environments_and_processes(algo: Any) -> None:
    model = make(algo, BitFlippingEnv(n_bits=4), "MultiInputPolicy").learn(32)
    evaluate_policy(model, model.get_env(), n_eval_episodes=1)
    env = make_vec_env(partial(SimpleMultiObsEnv, random_start=True), 2, vec_env_cls=SubprocVecEnv)
    make(algo, env, "MultiInputPolicy").learn(64)
    env.close()


def test_a_vector_is_learned_from_as_a_dict_of_it() -> None:
    models = []
    for space, policy in ((spaces.Box(-1, 1, (2,)), "MlpPolicy"), (None, "MultiInputPolicy")):
        model = make(PPO, Probe(space or spaces.Dict({"vec": spaces.Box(-1, 1, (2,))})), policy)
        models.append(model)
    models[1].policy.load_state_dict(models[0].policy.state_dict())
    obs = np.array([0.3, -0.2], np.float32)
    state = models[0].predict(obs, deterministic=True)[1]
    np.testing.assert_array_equal(state[0], models[1].predict({"vec": obs}, deterministic=True)[1][0])


# Train and eval mode.


class NoisyExtractor(BaseFeaturesExtractor):
    """Batch normalisation, then dropout."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, spaces.flatdim(observation_space))
        self.norm, self.dropout = nn.BatchNorm1d(self._features_dim), nn.Dropout(0.5)

    def forward(self, observations: Tensor) -> Tensor:
        return self.dropout(self.norm(observations.flatten(1)))  # type: ignore[no-any-return]


@ALGORITHMS
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_batch_norm_and_dropout_are_on_while_learning_alone(algo: Any, env: str) -> None:
    model = make(algo, env, policy_kwargs={"features_extractor_class": NoisyExtractor}, n_steps=32)
    norm = model.policy.features_extractor.norm

    def stats() -> list[Tensor]:
        return [norm.bias.detach().clone(), norm.running_mean.clone()]

    before = stats()
    obs = model.get_env().reset()
    states = [model.predict(obs, deterministic=True)[1][0] for _ in range(4)]
    assert all(np.array_equal(state, states[0]) for state in states)
    _, callback = model._setup_learn(64)
    callback.on_training_start({}, {})
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    for value, old in zip(stats(), before, strict=True):
        assert torch.equal(value, old)
    model = make(algo, env, policy_kwargs={"features_extractor_class": NoisyExtractor}, n_steps=32)
    norm = model.policy.features_extractor.norm
    before = stats()
    model.learn(64)
    for value, old in zip(stats(), before, strict=True):
        assert (value != old).all()
    actor = model.acting_policy.features_extractor.norm  # IMPALA's actors have a copy
    assert torch.equal(actor.running_mean, norm.running_mean)


# Policies of one's own.


@ALGORITHMS
@pytest.mark.parametrize(
    ("net_arch", "pi", "vf"),
    [
        (None, [], []),
        ([], [], []),
        ([4], [4], [4]),
        ([4, 4], [4, 4], [4, 4]),
        ({}, [], []),
        ({"pi": [8]}, [8], []),
        ({"vf": [8, 4]}, [], [8, 4]),
        ({"vf": [16], "pi": [8]}, [8], [16]),
        ([{"pi": [4]}], [4], []),
    ],
)
def test_every_net_arch(algo: Any, net_arch: Any, pi: list[int], vf: list[int]) -> None:
    policy = make(algo, "CartPole-v1", policy_kwargs={"net_arch": net_arch}).learn(32).policy
    for head, output, wanted in (("policy_net", policy.action_net, pi), ("value_net", policy.value_net, vf)):
        layers = getattr(policy.mlp_extractor, head)
        assert [layer.out_features for layer in layers if isinstance(layer, nn.Linear)] == wanted
        assert output.in_features == (wanted or [policy.core.output_size])[-1]


@pytest.mark.parametrize("net_arch", [[12, {"vf": [16]}], [4.5], [-1], "wide", {"value": [8]}, {"pi": [0]}, 16])
def test_a_wrong_net_arch_is_one_line(net_arch: Any) -> None:
    with pytest.raises(UserError, match="net_arch"):
        make(PPO, "CartPole-v1", policy_kwargs={"net_arch": net_arch})


@ALGORITHMS
@pytest.mark.parametrize("optimizer_kwargs", [None, {"weight_decay": 0.01}])
def test_every_optimizer(algo: Any, optimizer_kwargs: Any) -> None:
    for optimizer in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam):
        settings = {"optimizer_class": optimizer, "optimizer_kwargs": optimizer_kwargs, "activation_fn": nn.SiLU}
        model = make(algo, "Pendulum-v1", policy_kwargs=settings).learn(32)
        assert type(model.policy.optimizer) is optimizer


class ConstantValuePolicy(SRWMPolicy):
    """A critic that is always 1 while acting."""

    def act(self, *args: Any, **kwargs: Any) -> Any:
        step = super().act(*args, **kwargs)
        return step._replace(values=torch.ones_like(step.values))


@pytest.mark.parametrize("gae_lambda", [1.0, 0.9])
@pytest.mark.parametrize("gamma", [1.0, 0.99])
def test_advantages_of_a_policy_with_a_constant_critic(gae_lambda: float, gamma: float) -> None:
    length, n_episodes = 8, 3
    env, policy = Probe(length=length), ConstantValuePolicy
    model = PPO(policy, env, n_steps=length * n_episodes, gamma=gamma, gae_lambda=gae_lambda, policy_kwargs=CORE)
    seen: list[np.ndarray] = []

    class Recorder(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            buffer = self.model.rollout_buffer  # type: ignore[attr-defined]
            assert buffer.size() == length * n_episodes
            seen.extend((buffer.advantages.flatten(), buffer.returns.flatten()))

    model.learn(length * n_episodes, Recorder())
    expected = np.zeros(length)
    following = 0.0
    for t in reversed(range(length)):
        value = 0.0 if t == length - 1 else 1.0  # of the next observation
        following = (t + 1) + gamma * value - 1 + gamma * gae_lambda * following
        expected[t] = following
    np.testing.assert_allclose(seen[0], np.tile(expected, n_episodes), rtol=1e-5)
    np.testing.assert_allclose(seen[1], np.tile(expected + 1, n_episodes), rtol=1e-5)


@ALGORITHMS
def test_methods_that_are_not_called_are_refused(algo: Any) -> None:
    for method in ("forward", "evaluate_actions", "predict_values", "get_distribution"):
        policy = type("OwnPolicy", (SRWMPolicy,), {method: lambda self, *args, **kwargs: None})
        with pytest.raises(UserError, match=f"OwnPolicy overrides {method}"):
            algo(policy, "CartPole-v1")
    both = type("OwnPolicy", (ConstantValuePolicy,), {"forward": lambda self, *args, **kwargs: None})
    algo(both, "CartPole-v1", policy_kwargs=CORE)


@ALGORITHMS
def test_other_policies_are_one_line(algo: Any) -> None:
    with pytest.raises(UserError, match="name CnnPolicy, with policy_kwargs="):
        algo("CnnLstmPolicy", "CartPole-v1")
    with pytest.raises(UserError, match="did you mean 'MlpPolicy'"):
        algo("MlpPolcy", "CartPole-v1")
    with pytest.raises(UserError, match="no subclass of srwm_rl"):
        algo(dict, "CartPole-v1")


# Predicting, saving, going on.


@ALGORITHMS
@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
def test_one_or_several_environments_are_told_by_their_shape(algo: Any, env: str) -> None:
    model, single = make(algo, env), gymnasium.make(env)
    obs, info = single.reset()
    for values in (obs, obs.tolist(), torch.as_tensor(obs)):
        action, _ = model.predict(values)
        assert single.action_space.contains(np.asarray(action, single.action_space.dtype))
    actions, _ = model.predict(make_vec_env(env, 2).reset())
    assert len(actions) == 2
    with pytest.raises(UserError, match=r"is a tuple: give the first"):
        model.predict((obs, info))
    with pytest.raises(UserError, match="must be an array"):
        model.predict([[1.0, 2.0], [3.0]])


@ALGORITHMS
def test_saving_including_and_excluding(algo: Any, tmp_path: Path) -> None:
    model = make(algo, "CartPole-v1", verbose=2, learning_rate=lambda left: 1e-3 * left).learn(16)
    model.save(tmp_path / "without", exclude=["verbose"])
    model.save(tmp_path / "with", exclude=["verbose"], include=["verbose"])
    assert (algo.load(tmp_path / "without").verbose, algo.load(tmp_path / "with").verbose) == (0, 2)
    loaded = algo.load(tmp_path / "with")
    with pytest.raises(UserError, match="call set_env"):
        loaded.learn(16)
    loaded.set_env(make_vec_env("CartPole-v1", 1))
    assert loaded.learn(16, reset_num_timesteps=False).num_timesteps == 32
    assert algo.load(tmp_path / "with", env="CartPole-v1").learn(16).num_timesteps == 16
    assert algo.load(tmp_path / "with", env=make_vec_env("CartPole-v1", 3)).learn(48).n_envs == 3
    with pytest.raises(ValueError, match="spaces do not match"):
        algo.load(tmp_path / "with", env="Pendulum-v1")
    model.policy.save(tmp_path / "policy")
    policy = SRWMPolicy.load(tmp_path / "policy")
    for value, expected in zip(policy.parameters(), model.policy.parameters(), strict=True):
        assert torch.equal(value, expected)
    parameters = model.get_parameters()
    assert parameters.keys() == {"policy", "policy.optimizer"}
    loaded.set_parameters(parameters)
    with pytest.raises(ValueError, match="Names of parameters"):
        loaded.set_parameters({"policy": parameters["policy"]}, exact_match=True)


@ALGORITHMS
def test_every_callback(algo: Any, tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", 2))
    evaluated = VecNormalize(make_vec_env("Pendulum-v1", 1), training=False)
    evaluation = EvalCallback(
        evaluated,
        eval_freq=20,
        n_eval_episodes=1,
        callback_on_new_best=StopTrainingOnRewardThreshold(0.0),
        callback_after_eval=StopTrainingOnNoModelImprovement(10**6),
        best_model_save_path=str(tmp_path),
        log_path=str(tmp_path),
        verbose=0,
    )
    checkpoints = CheckpointCallback(32, str(tmp_path / "checkpoints"), save_vecnormalize=True)
    each = EveryNTimesteps(50, CheckpointCallback(1, str(tmp_path / "each")))
    model = make(algo, env)
    model.learn(128, CallbackList([evaluation, checkpoints, each, StopTrainingOnMaxEpisodes(10**6)]))
    assert {"best_model.zip", "evaluations.npz"} <= {path.name for path in tmp_path.iterdir()}
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {"rl_model_64_steps.zip", "rl_model_vecnormalize_64_steps.pkl"} <= names
    assert len(list((tmp_path / "each").iterdir())) == 2
    model.learn(32, lambda local_values, global_values: True)
    assert make(algo, "CartPole-v1").learn(10**6, StopTrainingOnMaxEpisodes(2)).num_timesteps < 1100


@ALGORITHMS
def test_the_same_seed_gives_the_same_run(algo: Any) -> None:
    settings = {"synchronous": True} if algo is IMPALA else {}
    first, second = (make(algo, "CartPole-v1", **settings).learn(64) for _ in range(2))
    for value, expected in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(value, expected)


def test_coefficients_out_of_range_are_one_line() -> None:
    wrong: tuple[tuple[str, Any], ...] = (
        ("clip_range_vf", -0.2), ("max_grad_norm", 0), ("max_grad_norm", -1.0), ("target_kl", -0.1), ("target_kl", 0),
        ("n_steps", 0), ("n_epochs", 0), ("batch_size", 0), ("gamma", 1.5), ("gae_lambda", 2), ("n_steps", 2.5),
        ("gamma", None), ("max_grad_norm", None), ("ent_coef", "auto"), ("ent_coef", float("nan")), ("vf_coef", None),
        ("clip_range", None), ("clip_range", "linear"), ("clip_range_vf", "0.2"), ("target_kl", "0.1"),
    )  # fmt: skip
    for name, value in wrong:
        with pytest.raises(UserError, match=name):
            make(PPO, "CartPole-v1", **{name: value})
    for name, value in (("max_grad_norm", -1), ("rho_clip", "1"), ("vtrace_lambda", None)):
        with pytest.raises(UserError, match=name):
            make(IMPALA, "CartPole-v1", **{name: value})
    for value in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="learning rate"):
            make(PPO, "CartPole-v1", learning_rate=value)
    with pytest.raises(UserError, match="IMPALA has no setting 'n_epochs'; did you mean 'n_steps'"):
        make(IMPALA, "CartPole-v1", n_epochs=2)


@ALGORITHMS
def test_a_network_or_rollout_larger_than_memory_is_one_line(algo: Any) -> None:
    with pytest.raises(UserError, match="more memory than there is"):
        make(algo, "CartPole-v1", policy_kwargs={"encoder_kwargs": {"mlp": [10**13]}})
    with pytest.raises(UserError, match="more memory than there is"):
        make(algo, "CartPole-v1", n_steps=10**14).learn(10**14)


@pytest.mark.parametrize("env", [IdentityEnv, IdentityEnvMultiDiscrete, IdentityEnvMultiBinary, IdentityEnvBox])
def test_ppo_learns_the_identity_in_every_action_space(env: Any) -> None:
    """The reward is 1 for the observation as the action, or for one near it; a random agent's return is 25, or 30."""
    environment = env(eps=0.5) if env is IdentityEnvBox else env(2)
    venv = DummyVecEnv([lambda: environment])
    settings = {"n_steps": 64, "learning_rate": 1e-3, "gamma": 0.0, "n_epochs": 8, "device": "cpu"}
    core_kwargs = {"hidden_size": 32, "n_layers": 1, "n_heads": 2}
    model = PPO("MlpPolicy", venv, **settings, seed=0, policy_kwargs={"core_kwargs": core_kwargs})
    model.learn(3000)
    mean, _ = evaluate_policy(model, venv, n_eval_episodes=5, warn=False)
    assert mean > 90
