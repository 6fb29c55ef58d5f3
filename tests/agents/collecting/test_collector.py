"""Playing in groups: what overlaps, what is stored, what callbacks see, and what happens when something fails."""

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

from srwm_rl.agents import IMPALA, PPO
from srwm_rl.agents.collecting import collector
from srwm_rl.agents.collecting.collector import groups_of
from srwm_rl.agents.collecting.rollout_buffer import SequenceRolloutBuffer
from srwm_rl.envs import GroupedVecEnv, make_vec_env
from srwm_rl.nn.policy import ActStep
from tests.agents.probe import Probe

SMALL = {"core_kwargs": {"hidden_size": 16, "n_layers": 1}, "encoder_kwargs": {"cnn": {"channels": [4]}}}
IMAGES = spaces.Dict(a=spaces.Box(-1, 1, (3,), np.float32), b=spaces.Box(0, 255, (16, 16, 3), np.uint8))


def probes(*lengths: int, **probe: Any) -> DummyVecEnv:
    return DummyVecEnv([partial(Probe, length=length, **probe) for length in lengths])


def build(env: VecEnv, algo: str = "ppo", n_steps: int = 8, **settings: Any) -> PPO | IMPALA:
    shared: dict[str, Any] = {"n_steps": n_steps, "seed": 0, "device": "cpu", "policy_kwargs": SMALL, **settings}
    return PPO("SRWMPolicy", env, **shared) if algo == "ppo" else IMPALA("SRWMPolicy", env, synchronous=True, **shared)


def fill(model: PPO | IMPALA, callback: BaseCallback | None = None, again: bool = False) -> Any:
    _, called = model._setup_learn(10**6, callback, reset_num_timesteps=not again)
    called.on_training_start({}, {})
    assert model.env is not None
    assert model.collect_rollouts(model.env, called, model.rollout_buffer, model.n_steps)  # type: ignore[arg-type]
    return model.rollout_buffer


def stored(model: PPO) -> dict[str, torch.Tensor]:
    """Return all that a rollout keeps."""
    buffer = model.rollout_buffer
    obs = buffer.observations if isinstance(buffer.observations, dict) else {"obs": buffer.observations}
    states = {f"state {i}": each for i, each in enumerate(buffer.core_states)}
    return {**obs, **states, "actions": buffer.actions, "numbers": buffer._numbers}


@contextmanager
def in_turn(n_groups: int) -> Iterator[collector.StartStep]:
    """Step every group in the calling thread, after all others have been acted for."""
    yield lambda env, actions: partial(env.step, actions)


class Threads(BaseCallback):
    """Notes in which threads environments step."""

    def _on_training_start(self) -> None:
        self.seen: set[str] = set()
        for group in groups_of(self.training_env):
            group.env.step = partial(self.step, group.env.step)  # type: ignore[method-assign]

    def step(self, step: Any, actions: np.ndarray) -> Any:
        self.seen.add(threading.current_thread().name)
        return step(actions)

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("env", ["probes", "images", "recall", "bandit"])
def test_groups_that_overlap_play_and_learn_what_groups_in_turn_do(env: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def group(number: int) -> VecEnv:
        if env in ("probes", "images"):
            seen = IMAGES if env == "images" else None
            return VecNormalize(probes(3, 4, 5, observation_space=seen, cut=True), norm_obs=False)
        return make_vec_env(env, 3, "0:100", 50 * number)

    models, rollouts = [], []
    for overlapping in (True, False):
        if not overlapping:
            monkeypatch.setattr(collector, "step_starter", in_turn)
        made = build(GroupedVecEnv([group(0), group(1)]), sequence_length=4, batch_size=12, n_epochs=2)
        made.learn(2 * 6 * 8, threads := Threads())
        models.append(made)
        rollouts.append(stored(made))  # type: ignore[arg-type]
        assert made._n_updates == 4
        assert {name.startswith("srwm-step") for name in threads.seen} == {overlapping}
    assert rollouts[0]["numbers"][0].any(), "no episode began"
    for name, one in rollouts[0].items():
        assert torch.equal(one, rollouts[1][name]), name
    for one, other in zip(models[0].policy.parameters(), models[1].policy.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_one_group_is_acted_for_while_another_steps(algo: str) -> None:
    model = build(GroupedVecEnv([probes(5, 5), probes(5, 5)]), algo)
    first = groups_of(model.env)[0].env  # type: ignore[arg-type]
    act, step, acted = model.policy.act, first.step, threading.Semaphore(0)

    def acting(*given: Any) -> ActStep:
        acted.release()
        return act(*given)

    def stepping(actions: np.ndarray) -> Any:
        # Its own actions, and those of the second group, which are only chosen if this thread is not waited for.
        assert all(acted.acquire(timeout=30) for _ in range(2))
        return step(actions)

    model.policy.act = acting  # type: ignore[method-assign,assignment]
    first.step = stepping  # type: ignore[method-assign]
    fill(model)


@pytest.mark.parametrize("algo", ["ppo", "impala"])
@pytest.mark.parametrize("grouped", [False, True])
def test_one_group_steps_in_the_thread_that_calls(algo: str, grouped: bool) -> None:
    env = probes(5, 5)
    model = build(GroupedVecEnv([env]) if grouped else env, algo)
    fill(model, threads := Threads())
    assert threads.seen == {threading.current_thread().name}


def test_rollouts_of_groups_evaluate_to_what_was_acted_and_carry_every_memory_on() -> None:
    env = GroupedVecEnv([probes(5), probes(5, 6, 7)])
    model = build(env, n_steps=16, sequence_length=8, batch_size=16)
    state = model.policy.initial_state(4)
    for again in (False, True):
        buffer = fill(model, again=again)
        assert buffer.episode_starts[1:].any(dim=0).all()
        with torch.no_grad():
            new = model.policy.evaluate_sequence(buffer.observations, buffer.actions, state, buffer.episode_starts)
        torch.testing.assert_close(new.values, buffer.values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(new.log_probs, buffer.log_probs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(buffer.core_states[0], state)
        assert model._core_state is not None
        torch.testing.assert_close(model._core_state, state := new.core_state, rtol=1e-4, atol=1e-5)
    assert not buffer.episode_starts[0].any(), "the memory with which the second began played no part"
    (old,) = buffer.gather(np.arange(buffer.n_sequences))
    with torch.no_grad():
        halves = model.policy.evaluate_sequence(old.observations, old.actions, old.core_state, old.episode_starts)
    torch.testing.assert_close(halves.values, old.old_values, rtol=1e-4, atol=1e-5)


def test_truncated_episodes_bootstrap_in_every_group_with_the_state_that_saw_them() -> None:
    lengths = (4, 2, 3)
    model = build(GroupedVecEnv([probes(4, cut=True), probes(2, 3, cut=True)]), n_steps=4, gamma=0.9)
    ends: dict[int, torch.Tensor] = {}

    class Ends(BaseCallback):
        def _on_step(self) -> bool:
            for i in np.flatnonzero(self.locals["dones"]):
                ends.setdefault(int(i), torch.as_tensor(self.locals["infos"][i]["terminal_observation"]))
            return True

    buffer = fill(model, Ends())
    for i, length in enumerate(lengths):
        observations = torch.cat((buffer.observations[:length, i], ends[i][None]))[:, None]
        starts = torch.tensor([1.0] + length * [0.0])[:, None]
        with torch.no_grad():
            actions = torch.zeros(length + 1, 1, dtype=torch.int64)
            state = model.policy.initial_state(1)
            value = model.policy.evaluate_sequence(observations, actions, state, starts).values[-1, 0]
        assert abs(value) > 1e-3
        assert buffer.rewards[: length - 1, i].tolist() == list(range(1, length))
        torch.testing.assert_close(buffer.rewards[length - 1, i], length + 0.9 * value)


@pytest.mark.parametrize("algo", ["ppo", "impala"])
@pytest.mark.parametrize(("n_groups", "stopped_at"), [(1, 40), (2, 42)])
def test_a_callback_can_stop_training_and_it_goes_on_from_there(algo: str, n_groups: int, stopped_at: int) -> None:
    env = GroupedVecEnv([make_vec_env("recall", 4 // n_groups, "0:100", 50 * g) for g in range(n_groups)])
    model = build(env, algo)
    model.learn(10_000, lambda local, _: local["self"].num_timesteps < 40)
    # With several groups the first had begun its next step when the last had made the tenth.
    assert model.num_timesteps == stopped_at
    assert isinstance(model._last_obs, dict)
    for key, expected in env.observe().items():  # type: ignore[union-attr]
        np.testing.assert_array_equal(model._last_obs[key], expected)
    before = model._n_updates
    model.learn(64, reset_num_timesteps=False)
    assert model._n_updates > before


@pytest.mark.parametrize("algo", ["ppo", "impala"])
@pytest.mark.parametrize("sick", [0, 1])
def test_a_crash_in_a_groups_thread_ends_the_run_with_its_error(algo: str, sick: int) -> None:
    class Broken(Probe):
        def step(self, action: Any) -> Any:
            if self.t == 3:
                raise RuntimeError("the simulator is gone")
            return super().step(action)

    groups = [probes(5, 5), probes(5, 5)]
    groups[sick] = DummyVecEnv([Broken, Probe])
    model = build(GroupedVecEnv(groups), algo)
    with pytest.raises(RuntimeError, match="the simulator is gone"):
        model.learn(10_000)
    assert model.num_timesteps == 3 * 4 + 2  # and what the other group was in the middle of
    assert not [each.name for each in threading.enumerate() if each.name.startswith("srwm-step")]


class Seen(BaseCallback):
    """Notes what callbacks find, and doubles the rewards where they stand."""

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
    env = probes(2, 3, 4, 5) if n_groups == 1 else GroupedVecEnv([probes(2, 3), probes(4, 5)])
    model = build(env)
    buffer = fill(model, seen := Seen())
    assert seen.rewards[:5] == [[1, 1, 1, 1], [2, 2, 2, 2], [1, 3, 3, 3], [2, 1, 4, 4], [1, 2, 1, 5]]
    assert (buffer.rewards == 2 * torch.tensor(seen.rewards)).all()
    assert {"self", "env", "callback", "rollout_buffer", "n_rollout_steps", "rewards", "dones", "infos"} <= seen.names
    assert ("new_obs" in seen.names) == (n_groups == 1)


def test_what_is_wrapped_around_groups_is_one_group() -> None:
    env = GroupedVecEnv([probes(5, 5), probes(5)])
    assert [(each.env, each.env_indices) for each in groups_of(env)] == [
        (env.groups[0], range(2)),
        (env.groups[1], range(2, 3)),
    ]
    wrapped = VecNormalize(env, norm_obs=False, clip_reward=0.5)
    (group,) = groups_of(wrapped)
    assert group.env is wrapped
    assert fill(build(wrapped)).rewards.max() == 0.5  # normalised once, over all of them


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_steps_are_written_into_their_own_columns(kind: str) -> None:
    space = spaces.Dict(a=spaces.Box(0, 255, (2,), np.uint8), b=spaces.Discrete(9))
    buffer = SequenceRolloutBuffer(4, space, spaces.MultiBinary(3), n_envs=5, sequence_length=2)
    buffer.reset(torch.zeros(1, 5, 7))
    assert [each.shape for each in buffer.core_states] == [(1, 5, 7)] * 2
    for each in buffer.core_states:
        each.zero_()
    steps = buffer.writer(slice(1, 3))
    if kind == "tensor":  # as where the storage is not on a CPU
        for name in ("_episode_starts", "_actions", "_log_probs", "_rewards", "_values"):
            setattr(steps, name, torch.from_numpy(getattr(steps, name)))
        steps._observations = {key: torch.from_numpy(each) for key, each in steps._observations.items()}
    obs = {"a": np.array([[1, 2], [3, 4]], np.uint8), "b": np.array([5, 6])}
    acted = ActStep(torch.ones(2, 3), torch.tensor([1.5, 2.5]), torch.tensor([-1.0, -2.0]), torch.zeros(1, 2, 7))
    for t in range(4):
        seen = {key: torch.from_numpy(each) for key, each in obs.items()} if kind == "tensor" else obs
        steps.observe(t, seen, np.array([True, False]))
        steps.act(t, acted, torch.full((1, 2, 7), float(t)))
        steps.reward(t, np.array([t, 10.0 * t]))
    own, others = [1, 2], [0, 3, 4]
    assert buffer.observations["a"][3, own].tolist() == [[1, 2], [3, 4]]  # type: ignore[call-overload,index]
    assert buffer.observations["b"][0].tolist() == [0, 5, 6, 0, 0]  # type: ignore[index,call-overload]
    assert buffer.actions[:, own].eq(1).all()
    assert buffer.rewards[:, own].tolist() == [[0, 0], [1, 10], [2, 20], [3, 30]]
    assert buffer.values[2].tolist() == [0, 1.5, 2.5, 0, 0]
    assert buffer.log_probs[2].tolist() == [0, -1, -2, 0, 0]
    assert buffer.episode_starts[1].tolist() == [0, 1, 0, 0, 0]
    for chunk, first in enumerate((0.0, 2.0)):  # the state with which the sequence began, no later one
        assert buffer.core_states[chunk][:, own].eq(first).all()
    assert not buffer._numbers[:, :, others].any()


class Private(DummyVecEnv):
    """Environments that must be asked nothing within a step, and that write over the arrays they have returned."""

    def step_wait(self) -> Any:
        self.within = True
        time.sleep(0.005)
        obs, self._rewards, self._dones, infos = super().step_wait()
        self.within = False
        self._kept = getattr(self, "_kept", (np.zeros_like(self._rewards), np.zeros_like(self._dones)))
        for kept, new in zip(self._kept, (self._rewards, self._dones), strict=True):
            kept[:] = new
        return obs, *self._kept, infos

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        assert not getattr(self, "within", False), "asked within a step"
        return super().get_attr(attr_name, indices)


class Asking(BaseCallback):
    """Asks the environments something after every step."""

    def _on_step(self) -> bool:
        assert len(self.training_env.get_attr("length")) == 4
        self.training_env.env_method("close")
        return True


def test_a_callback_may_ask_the_environments_while_others_step() -> None:
    kinds = []
    for kind in (Private, DummyVecEnv):
        groups = [kind([partial(Probe, length=length) for length in lengths]) for lengths in ((3, 4), (5, 6))]
        model = build(GroupedVecEnv(groups))
        fill(model, Asking())
        kinds.append(stored(model))  # type: ignore[arg-type]
    for name, one in kinds[0].items():  # and what is stored is what there was, not what was written over it
        assert torch.equal(one, kinds[1][name]), name


class Failing(BaseCallback):
    """Raises in the fifth step."""

    def _on_step(self) -> bool:
        if self.n_calls == 5:
            raise KeyboardInterrupt
        return True


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_after_an_error_the_next_rollout_goes_on_where_the_environments_are(algo: str) -> None:
    env = GroupedVecEnv([make_vec_env("recall", 2, "0:100", seed) for seed in (0, 50)])
    model = build(env, algo)
    with pytest.raises(KeyboardInterrupt):
        model.learn(1000, Failing())
    assert isinstance(model._last_obs, dict)
    for key, each in env.observe().items():  # type: ignore[union-attr]
        assert np.array_equal(model._last_obs[key], each), key
    assert model.num_timesteps == 5 * 4 + 2  # the first group had begun its sixth step
    model.learn(64, reset_num_timesteps=False)


def test_after_a_failed_step_all_environments_begin_anew() -> None:
    env = GroupedVecEnv([probes(3, 4), probes(5, 6)])
    step, calls = env.groups[1].step, [0]

    def sick(actions: np.ndarray) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("the simulator is gone")
        return step(actions)

    env.groups[1].step = sick  # type: ignore[method-assign]
    model = build(env)
    with pytest.raises(RuntimeError, match="is gone"):
        model.learn(1000)
    assert model._last_obs is None
    model.learn(64, reset_num_timesteps=False)
    assert model._last_obs is not None


def test_episodes_that_end_in_an_abandoned_step_are_counted() -> None:
    class StopSignal(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 9

    env = GroupedVecEnv([make_vec_env("bandit", 3, "0:100", seed) for seed in (0, 50)])  # of 10 pulls
    model = build(env, n_steps=16)
    model.learn(1000, StopSignal())
    assert len(model.ep_info_buffer or ()) == 3  # of the first group, which had begun its tenth step
    assert model.num_timesteps == 9 * 6 + 3
