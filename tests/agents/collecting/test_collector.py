"""Collecting in groups of environments: overlap, storage, callbacks and errors."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from srwm_rl.agents import PPO
from srwm_rl.agents.collecting import collector
from srwm_rl.agents.collecting.collector import groups_of
from srwm_rl.agents.collecting.rollout_buffer import RolloutWriter, SequenceRolloutBuffer
from srwm_rl.envs import GroupedVecEnv, make_vec_env
from srwm_rl.nn.policy import ActStep
from tests.agents.probe import FailingProbe, Probe, collect_rollout, small_model, weight_vector

IMAGES = spaces.Dict(a=spaces.Box(-1, 1, (3,), np.float32), b=spaces.Box(0, 255, (16, 16, 3), np.uint8))


def probe_vec_env(*lengths: int, **probe: Any) -> DummyVecEnv:
    return DummyVecEnv([partial(Probe, length=length, **probe) for length in lengths])


def stored_tensors(model: PPO) -> tuple[Any, ...]:
    """Return all that the rollout buffer stores."""
    buffer = model.rollout_buffer
    return buffer.tensors.observations, buffer.tensors.actions, buffer._numbers, buffer.core_states


@contextmanager
def step_when_awaited(n_groups: int) -> Iterator[collector.StartStep]:
    """Step every group when its step is awaited, in the calling thread."""
    yield lambda env, actions: partial(env.step, actions)


class ThreadRecorder(BaseCallback):
    """Records the threads in which environments step."""

    def _on_training_start(self) -> None:
        self.names: set[str] = set()
        for group in groups_of(self.training_env):
            group.env.step = partial(self.step, group.env.step)  # type: ignore[method-assign]

    def step(self, step: Any, actions: np.ndarray) -> Any:
        self.names.add(threading.current_thread().name)
        return step(actions)

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("kind", ["probes", "images", "recall", "bandit"])
def test_overlapping_groups_give_the_rollout_and_weights_of_sequential_groups(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def group(number: int) -> VecEnv:
        if kind in ("probes", "images"):
            space = IMAGES if kind == "images" else None
            return VecNormalize(probe_vec_env(3, 4, 5, observation_space=space, cut=True), norm_obs=False)
        return make_vec_env(kind, 3, "0:100", 50 * number)

    models, rollouts = [], []
    for overlapping in (True, False):
        if not overlapping:
            monkeypatch.setattr(collector, "step_starter", step_when_awaited)
        env = GroupedVecEnv([group(0), group(1)])
        model = small_model("ppo", env, sequence_length=4, batch_size=12, n_epochs=2)
        model.learn(2 * 6 * 8, recorder := ThreadRecorder())
        models.append(model)
        rollouts.append(stored_tensors(model))
        assert model._n_updates == 4
        assert {name.startswith("srwm-step") for name in recorder.names} == {overlapping}
    assert models[0].rollout_buffer.tensors.episode_starts.any()
    torch.testing.assert_close(rollouts[0], rollouts[1], rtol=0, atol=0)
    assert torch.equal(weight_vector(models[0]), weight_vector(models[1]))


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_the_policy_acts_for_one_group_while_another_steps(algo: str) -> None:
    model = small_model(algo, GroupedVecEnv([probe_vec_env(5, 5), probe_vec_env(5, 5)]))
    first = groups_of(model.env)[0].env
    act, step, n_acted = model.policy.act, first.step, threading.Semaphore(0)

    def counting_act(*args: Any) -> ActStep:
        n_acted.release()
        return act(*args)  # type: ignore[no-any-return]

    def step_after_two_acts(actions: np.ndarray) -> Any:
        # For this group and for the second group, which happens only if the policy does not wait for this thread.
        assert all(n_acted.acquire(timeout=600) for _ in range(2))
        return step(actions)

    model.policy.act = counting_act
    first.step = step_after_two_acts  # type: ignore[method-assign]
    collect_rollout(model)


@pytest.mark.parametrize("algo", ["ppo", "impala"])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_single_group_steps_in_the_calling_thread(algo: str, grouped: bool) -> None:
    env = probe_vec_env(5, 5)
    model = small_model(algo, GroupedVecEnv([env]) if grouped else env)
    collect_rollout(model, recorder := ThreadRecorder())
    assert recorder.names == {threading.current_thread().name}


def test_evaluating_rollouts_of_groups_repeats_the_acting_steps_and_carries_the_core_state() -> None:
    env = GroupedVecEnv([probe_vec_env(5), probe_vec_env(5, 6, 7)])
    model = small_model("ppo", env, n_steps=16, sequence_length=8, batch_size=16)
    state = model.policy.initial_state(4)
    for continued in (False, True):
        buffer = collect_rollout(model, continued=continued)
        assert buffer.tensors.episode_starts[1:].any(dim=0).all()
        with torch.no_grad():
            new = model.policy.evaluate_sequence(
                buffer.tensors.observations, buffer.tensors.actions, state, buffer.tensors.episode_starts
            )
        torch.testing.assert_close(new.values, buffer.tensors.values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(new.log_probs, buffer.tensors.log_probs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(buffer.core_states[:, :4], state)
        assert model._core_state is not None
        torch.testing.assert_close(model._core_state, state := new.core_state, rtol=1e-4, atol=1e-5)
    assert not buffer.tensors.episode_starts[0].any(), "the second rollout must begin in the middle of episodes"
    (old,) = buffer.gather(np.arange(buffer.n_sequences))
    with torch.no_grad():
        halves = model.policy.evaluate_sequence(old.observations, old.actions, old.core_state, old.episode_starts)
    torch.testing.assert_close(halves.values, old.old_values, rtol=1e-4, atol=1e-5)


def test_truncated_episodes_bootstrap_in_every_group_with_the_core_state_of_the_episode() -> None:
    lengths = (4, 2, 3)
    model = small_model(
        "ppo", GroupedVecEnv([probe_vec_env(4, cut=True), probe_vec_env(2, 3, cut=True)]), n_steps=4, gamma=0.9
    )
    last_obs: dict[int, torch.Tensor] = {}

    class LastObsRecorder(BaseCallback):
        def _on_step(self) -> bool:
            for i in np.flatnonzero(self.locals["dones"]):
                last_obs.setdefault(int(i), torch.as_tensor(self.locals["infos"][i]["terminal_observation"]))
            return True

    buffer = collect_rollout(model, LastObsRecorder())
    for i, length in enumerate(lengths):
        observations = torch.cat((buffer.tensors.observations[:length, i], last_obs[i][None]))[:, None]
        starts = torch.tensor([1.0] + length * [0.0])[:, None]
        with torch.no_grad():
            actions = torch.zeros(length + 1, 1, dtype=torch.int64)
            state = model.policy.initial_state(1)
            value = model.policy.evaluate_sequence(observations, actions, state, starts).values[-1, 0]
        assert abs(value) > 1e-3
        assert buffer.tensors.rewards[: length - 1, i].tolist() == list(range(1, length))
        torch.testing.assert_close(buffer.tensors.rewards[length - 1, i], length + 0.9 * value)


@pytest.mark.parametrize("algo", ["ppo", "impala"])
@pytest.mark.parametrize(("n_groups", "stopped_at"), [(1, 40), (2, 42)])
def test_training_continues_where_a_callback_stopped_it(algo: str, n_groups: int, stopped_at: int) -> None:
    env = GroupedVecEnv([make_vec_env("recall", 4 // n_groups, "0:100", 50 * g) for g in range(n_groups)])
    model = small_model(algo, env)
    model.learn(10_000, lambda local, _: local["self"].num_timesteps < 40)
    # With several groups the first has started its next step when the last finishes the tenth.
    assert model.num_timesteps == stopped_at
    assert isinstance(model._last_obs, dict)
    for key, expected in env.observe().items():  # type: ignore[union-attr]
        np.testing.assert_array_equal(model._last_obs[key], expected)
    before = model._n_updates
    model.learn(64, reset_num_timesteps=False)
    assert model._n_updates > before


@pytest.mark.parametrize("algo", ["ppo", "impala"])
@pytest.mark.parametrize("failing_group", [0, 1])
def test_an_error_in_a_groups_thread_ends_the_run_and_is_raised(algo: str, failing_group: int) -> None:
    groups = [probe_vec_env(5, 5), probe_vec_env(5, 5)]
    groups[failing_group] = DummyVecEnv([FailingProbe, Probe])
    model = small_model(algo, GroupedVecEnv(groups))
    with pytest.raises(RuntimeError, match="the simulator is gone"):
        model.learn(10_000)
    assert model.num_timesteps == 3 * 4 + 2  # and the step that the other group had started
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("srwm-step")]


class LocalsRecorder(BaseCallback):
    """Records the locals of callbacks, and doubles the rewards in place."""

    def __init__(self) -> None:
        super().__init__()
        self.rewards: list[list[float]] = []
        self.names: set[str] = set()

    def _on_step(self) -> bool:
        n = self.training_env.num_envs
        self.names |= self.locals.keys()
        assert len(self.locals["infos"]) == len(self.locals["dones"]) == len(self.locals["rewards"]) == n
        assert self.locals["env"] is self.training_env
        assert self.locals["rollout_buffer"] is self.model.rollout_buffer  # type: ignore[attr-defined]
        if "new_obs" in self.locals:
            assert len(self.locals["new_obs"]) == n
        self.rewards.append(self.locals["rewards"].tolist())
        self.locals["rewards"] *= 2
        return True


@pytest.mark.parametrize("n_groups", [1, 2])
def test_callbacks_see_all_environments_and_may_change_rewards(n_groups: int) -> None:
    env = probe_vec_env(2, 3, 4, 5) if n_groups == 1 else GroupedVecEnv([probe_vec_env(2, 3), probe_vec_env(4, 5)])
    model = small_model("ppo", env)
    buffer = collect_rollout(model, recorder := LocalsRecorder())
    assert recorder.rewards[:5] == [[1, 1, 1, 1], [2, 2, 2, 2], [1, 3, 3, 3], [2, 1, 4, 4], [1, 2, 1, 5]]
    assert (buffer.tensors.rewards == 2 * torch.tensor(recorder.rewards)).all()
    assert {
        "self",
        "env",
        "callback",
        "rollout_buffer",
        "n_rollout_steps",
        "rewards",
        "dones",
        "infos",
    } <= recorder.names
    assert ("new_obs" in recorder.names) == (n_groups == 1)


def test_wrapped_groups_are_one_group() -> None:
    env = GroupedVecEnv([probe_vec_env(5, 5), probe_vec_env(5)])
    assert [(group.env, group.env_indices) for group in groups_of(env)] == [
        (env.groups[0], range(2)),
        (env.groups[1], range(2, 3)),
    ]
    wrapped = VecNormalize(env, norm_obs=False, clip_reward=0.5)
    (group,) = groups_of(wrapped)
    assert group.env is wrapped
    assert collect_rollout(small_model("ppo", wrapped)).rewards.max() == 0.5  # normalised over all environments


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_writer_writes_its_environments_rows_only(device: str) -> None:
    space = spaces.Dict(a=spaces.Box(0, 255, (2,), np.uint8), b=spaces.Discrete(9))
    buffer = SequenceRolloutBuffer(4, space, spaces.MultiBinary(3), device, n_envs=5, sequence_length=2)
    buffer.reset(torch.zeros(1, 5, 7, device=device))
    assert buffer.core_states.shape == (1, 2 * 5, 7)
    buffer.core_states.zero_()
    writer = RolloutWriter(buffer.tensors, buffer.core_states, slice(1, 3))
    obs = {"a": np.array([[1, 2], [3, 4]], np.uint8), "b": np.array([5, 6])}
    acted = ActStep(torch.ones(2, 3), torch.tensor([1.5, 2.5]), torch.tensor([-1.0, -2.0]), torch.zeros(1, 2, 7))
    for t in range(4):
        writer.observe(t, obs, np.array([True, False]))
        writer.act(t, acted, torch.full((1, 2, 7), float(t), device=device))
        writer.reward(t, np.array([t, 10.0 * t]))
    rows = {key: torch.from_numpy(np.stack(5 * [array])).to(device) for key, array in obs.items()}
    writer.finish(rows if device == "cuda" else None)
    own, others = [1, 2], [0, 3, 4]
    assert buffer.tensors.observations["a"][3, own].tolist() == [[1, 2], [3, 4]]  # type: ignore[call-overload,index]
    assert buffer.tensors.observations["b"][0].tolist() == [0, 5, 6, 0, 0]  # type: ignore[index,call-overload]
    assert buffer.tensors.actions[:, own].eq(1).all()
    assert buffer.tensors.rewards[:, own].tolist() == [[0, 0], [1, 10], [2, 20], [3, 30]]
    assert buffer.tensors.values[2].tolist() == [0, 1.5, 2.5, 0, 0]
    assert buffer.tensors.log_probs[2].tolist() == [0, -1, -2, 0, 0]
    assert buffer.tensors.episode_starts[1].tolist() == [0, 1, 0, 0, 0]
    states = buffer.core_states.view(1, 2, 5, 7)
    assert states[:, 1, own].eq(2).all()  # the state at the start of the sequence
    states[:, 1, own] = 0
    assert not states.any()
    assert not buffer._numbers[:, :, others].any()


class NonReentrantVecEnv(DummyVecEnv):
    """Environments that must not be called during a step, and that overwrite the arrays they returned."""

    def step_wait(self) -> Any:
        self.stepping = True
        time.sleep(0.005)
        obs, self._rewards, self._dones, infos = super().step_wait()
        self.stepping = False
        self._returned = getattr(self, "_returned", (np.zeros_like(self._rewards), np.zeros_like(self._dones)))
        for returned, array in zip(self._returned, (self._rewards, self._dones), strict=True):
            returned[:] = array
        return obs, *self._returned, infos

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        assert not getattr(self, "stepping", False), "called during a step"
        return super().get_attr(attr_name, indices)


class EnvCallingCallback(BaseCallback):
    """Calls the environments after every step."""

    def _on_step(self) -> bool:
        assert len(self.training_env.get_attr("length")) == 4
        self.training_env.env_method("close")
        return True


def test_a_callback_may_call_the_environments_while_groups_step() -> None:
    rollouts = []
    for vec_env_class in (NonReentrantVecEnv, DummyVecEnv):
        groups = [vec_env_class([partial(Probe, length=length) for length in lengths]) for lengths in ((3, 4), (5, 6))]
        model = small_model("ppo", GroupedVecEnv(groups))
        collect_rollout(model, EnvCallingCallback())
        rollouts.append(stored_tensors(model))
    torch.testing.assert_close(rollouts[0], rollouts[1], rtol=0, atol=0)  # overwritten arrays were copied before


class FailingCallback(BaseCallback):
    """Raises in the fifth step."""

    def _on_step(self) -> bool:
        if self.n_calls == 5:
            raise KeyboardInterrupt
        return True


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_after_an_error_in_a_callback_the_next_rollout_continues_from_the_present_state(algo: str) -> None:
    env = GroupedVecEnv([make_vec_env("recall", 2, "0:100", seed) for seed in (0, 50)])
    model = small_model(algo, env)
    with pytest.raises(KeyboardInterrupt):
        model.learn(1000, FailingCallback())
    assert isinstance(model._last_obs, dict)
    for key, array in env.observe().items():  # type: ignore[union-attr]
        assert np.array_equal(model._last_obs[key], array), key
    assert model.num_timesteps == 5 * 4 + 2  # the first group had started its sixth step
    model.learn(64, reset_num_timesteps=False)


def test_after_a_failed_step_all_environments_are_reset() -> None:
    env = GroupedVecEnv([probe_vec_env(3, 4), probe_vec_env(5, 6)])
    step, calls = env.groups[1].step, [0]

    def fail_in_the_third_step(actions: np.ndarray) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("the simulator is gone")
        return step(actions)

    env.groups[1].step = fail_in_the_third_step  # type: ignore[method-assign]
    model = small_model("ppo", env)
    with pytest.raises(RuntimeError, match="is gone"):
        model.learn(1000)
    assert model._last_obs is None
    model.learn(64, reset_num_timesteps=False)
    assert model._last_obs is not None


def test_episodes_that_end_in_an_abandoned_step_are_counted() -> None:
    env = GroupedVecEnv([make_vec_env("bandit", 3, "0:100", seed) for seed in (0, 50)])  # of 10 pulls
    model = small_model("ppo", env, n_steps=16)
    model.learn(1000, lambda local, _: local["self"].num_timesteps < 9 * 6)
    assert len(model.ep_info_buffer or ()) == 3  # of the first group, which had started its tenth step
    assert model.num_timesteps == 9 * 6 + 3


class SB3Reader(BaseCallback):
    """Reads a step and the buffer under SB3's names."""

    def _on_step(self) -> bool:
        names = self.locals
        n = self.training_env.num_envs
        assert names["actions"].shape == names["clipped_actions"].shape == (n, 2)
        np.testing.assert_array_equal(np.clip(names["actions"], -1, 1), names["clipped_actions"])
        assert names["values"].shape == (n, 1)
        assert names["log_probs"].shape == (n,)
        assert ("obs_tensor" in names) == ("new_obs" in names) == (n == 4)
        buffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        if hasattr(buffer, "pos"):
            assert buffer.pos == buffer.size() == self.n_calls - 1
            assert not buffer.full
        return True


@pytest.mark.parametrize("algo", ["ppo", "impala"])
@pytest.mark.parametrize(("n_envs", "n_groups"), [(4, 1), (6, 2)])
def test_callbacks_read_sb3s_names(algo: str, n_envs: int, n_groups: int) -> None:
    model = small_model(algo, n_envs=n_envs, n_groups=n_groups, action_space=spaces.Box(-1, 1, (2,)))
    buffer = collect_rollout(model, SB3Reader())
    if algo == "ppo":
        assert buffer.full
        for name in ("actions", "rewards", "values", "log_probs", "advantages", "returns", "episode_starts"):
            array = getattr(buffer, name)
            assert isinstance(array, np.ndarray)
            assert np.shares_memory(array, getattr(buffer.tensors, name).numpy())
