"""`VecMemoryInputs`: previous action, reward and episode step as observations."""

import copy
import itertools

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecTransposeImage

from srwm_rl.envs import BanditBatch, BatchVecEnv, GymnasiumBatch, ProcgenVecEnv, RecallBatch, VecMemoryInputs
from srwm_rl.envs.tasks import MDPBatch
from srwm_rl.envs.wrappers.memory_inputs import ActionEncoder
from srwm_rl.errors import UserError


class StepCountEnv(gymnasium.Env):
    """Observes the step number, pays -3 times it, and ends after four steps."""

    def __init__(self, action_space=None, keys=("a", "b")):
        self.action_space = action_space or spaces.Discrete(3, start=2)
        self.observation_space = spaces.Dict({key: spaces.Box(-9, 9, (1,), np.float32) for key in keys})

    def _obs(self):
        return {key: np.array([self.clock], np.float32) for key in self.observation_space.spaces}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.clock = 0
        return self._obs(), {}

    def step(self, action):
        self.clock += 1
        return self._obs(), -3.0 * self.clock, self.clock == 4, False, {}


gymnasium.register("tests/StepCount-v0", entry_point=StepCountEnv, disable_env_checker=True)


def step_count_env(n=2, **kwargs):
    return BatchVecEnv(GymnasiumBatch("tests/StepCount-v0", n, env_kwargs=kwargs))


def test_inputs_are_the_previous_action_the_clipped_reward_and_the_step():
    env = VecMemoryInputs(step_count_env(), reward_clip=5.0)
    obs = env.reset()
    assert set(obs) == {"a", "b", "previous_action", "previous_reward", "episode_step"}
    for key in ("previous_action", "previous_reward", "episode_step"):
        assert (obs[key] == 0).all()
    for k in (1, 2, 3):
        obs, *_ = env.step(np.array([2, 4]))
        assert obs["previous_action"].tolist() == [[1, 0, 0], [0, 0, 1]]
        assert obs["previous_reward"].tolist() == [[max(-5, -3 * k)]] * 2
        assert obs["episode_step"].tolist() == [[k]] * 2
        assert obs["a"].tolist() == [[k]] * 2
        assert env.observation_space.contains({key: value[0] for key, value in obs.items()})
    obs, _, dones, infos = env.step(np.array([3, 4]))
    assert dones.all()
    assert all((obs[key] == 0).all() for key in obs)
    last = infos[0]["terminal_observation"]
    assert {key: value.tolist() for key, value in last.items()} == {
        "a": [4],
        "b": [4],
        "previous_action": [0, 1, 0],
        "previous_reward": [-5],
        "episode_step": [4],
    }
    obs, *_ = env.step(np.array([2, 2]))
    assert obs["episode_step"].tolist() == [[1]] * 2


def test_the_action_is_copied_when_the_step_starts():
    env = VecMemoryInputs(BatchVecEnv(BanditBatch(2)))
    env.reset()
    actions = np.array([1, 3])
    env.step_async(actions)
    actions[:] = 0
    assert env.step_wait()[0]["previous_action"].argmax(1).tolist() == [1, 3]


def test_later_steps_do_not_overwrite_observations():
    env = VecMemoryInputs(BatchVecEnv(BanditBatch(2, n_pulls=3)))
    env.reset()
    observations = [env.step(np.array([1, 2]))[0] for _ in range(2)]
    before = copy.deepcopy(observations)
    for _ in range(5):
        env.step(np.array([0, 0]))
    np.testing.assert_equal(observations, before)


def test_inputs_can_be_selected_and_rewards_left_unclipped():
    env = VecMemoryInputs(step_count_env(), inputs=("reward",), reward_clip=None)
    env.reset()
    env.step(np.array([2, 2]))
    obs, *_ = env.step(np.array([2, 2]))
    assert set(obs) == {"a", "b", "previous_reward"}
    assert obs["previous_reward"].tolist() == [[-6], [-6]]


def test_frames_are_not_copied():
    inner = ProcgenVecEnv("maze", 2)
    env = VecMemoryInputs(inner)
    steps = []
    step_wait = inner.step_wait
    inner.step_wait = lambda: (steps.append(step := step_wait()), step)[1]
    env.reset()
    obs, *_ = env.step(np.array([4, 4]))
    assert obs["observation"] is steps[0][0]
    assert obs["observation"].dtype == np.uint8


@pytest.mark.parametrize(
    ("space", "actions", "encoded"),
    [
        (spaces.Discrete(3), [0, 2], [[1, 0, 0], [0, 0, 1]]),
        (spaces.Discrete(3, start=-1), [-1, 1], [[1, 0, 0], [0, 0, 1]]),
        (spaces.MultiDiscrete([2, 3]), [[1, 0], [0, 2]], [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]),
        (spaces.MultiDiscrete([2, 3], start=[5, 7]), [[6, 7]], [[0, 1, 1, 0, 0]]),
        (spaces.MultiBinary(3), [[1, 0, 1]], [[1, 0, 1]]),
        (spaces.Box(-1, 2, (2,), np.float32), [[-5, 0.5], [1, 9]], [[-1, 0.5], [1, 2]]),
        (spaces.Box(3, 4, (1, 2), np.float32), [[[3, 4]]], [[3, 4]]),
    ],
)
def test_actions_are_encoded_within_the_encoders_space(space, actions, encoded):
    encoder = ActionEncoder(space)
    rows = encoder.encode(np.array(actions))
    assert rows.tolist() == encoded
    assert rows.dtype == np.float32
    assert all(encoder.space.contains(row) for row in [*rows, np.zeros_like(rows[0])])


@pytest.mark.parametrize(
    "make",
    [lambda seed: ProcgenVecEnv("leaper", 4, "0:9", seed=seed), lambda seed: BatchVecEnv(RecallBatch(4, seed=seed))],
)
def test_a_restored_state_continues_bit_exactly(make):
    rng = np.random.default_rng(0)
    env = VecMemoryInputs(make(1))
    actions = rng.integers(0, env.action_space.n, (160, 4))
    env.reset()
    last = [env.step(action)[0] for action in actions[:37]][-1]
    state = copy.deepcopy(env.get_state())
    steps = [env.step(action)[:2] for action in actions[37:]]
    restored = VecMemoryInputs(make(2))
    restored.set_state(state)
    np.testing.assert_equal(restored.observe(), last)
    np.testing.assert_equal([restored.step(action)[:2] for action in actions[37:]], steps)
    with pytest.raises(UserError):
        VecMemoryInputs(make(1), inputs=("step",)).set_state(state)
    with pytest.raises(UserError):
        restored.set_state({**state, "steps": np.zeros(2, np.int64)})


def test_states_can_be_saved_and_restored_through_outer_wrappers():
    env = VecTransposeImage(VecMemoryInputs(ProcgenVecEnv("maze", 2)))
    env.reset()
    env.step(np.array([7, 7]))
    state = env.get_state()
    assert set(state) == {"venv", "steps", "previous_action", "previous_reward", "episode_step"}
    env.set_state(state)


def test_invalid_arguments_are_refused():
    for kwargs in ({"inputs": ("actions",)}, {"reward_clip": 0}, {"reward_clip": float("nan")}):
        with pytest.raises(UserError):
            VecMemoryInputs(BatchVecEnv(BanditBatch(1)), **kwargs)
    with pytest.raises(UserError, match="'step'"):
        VecMemoryInputs(step_count_env(keys=("episode_step",)))
    assert (
        "previous_action"
        in VecMemoryInputs(step_count_env(keys=("episode_step",)), inputs=("action",)).observation_space.spaces
    )


@pytest.mark.parametrize("make", [lambda: ProcgenVecEnv("bossfight", 2, "0:9"), lambda: BatchVecEnv(BanditBatch(2))])
def test_sb3s_ppo_learns(make):
    model = PPO("MultiInputPolicy", VecMemoryInputs(make()), n_steps=16, batch_size=32, n_epochs=1, device="cpu")
    model.learn(64)
    assert model.num_timesteps == 64


class VectorsEnv(StepCountEnv):
    """Observes a discrete and a continuous value of the step number, in a Dict."""

    def __init__(self):
        super().__init__()
        parts = {
            "d": spaces.Discrete(5, start=1),
            "v": spaces.Box(-1, 9, (2, 1), np.float64),
            "b": spaces.MultiBinary(2),
        }
        self.observation_space = spaces.Dict(parts)

    def _obs(self):
        bits = np.array([self.clock % 2, 1], np.int8)
        return {"d": self.clock + 1, "v": np.array([[self.clock], [-0.5]]), "b": bits}


gymnasium.register("tests/Vectors-v0", entry_point=VectorsEnv, disable_env_checker=True)


def test_the_previous_observation_is_one_vector_and_zero_at_an_episodes_start():
    env = VecMemoryInputs(BatchVecEnv(GymnasiumBatch("tests/Vectors-v0", 2)), inputs=("observation",))
    space = env.observation_space["previous_observation"]
    assert (space.low[-1], space.high[-1], space.dtype) == (-1, 9, np.float32)
    obs = env.reset()
    assert obs["previous_observation"].tolist() == [[0] * 9] * 2
    for k in range(4):
        obs, _, dones, infos = env.step(np.array([2, 3]))
        row = [k % 2, 1, *np.eye(5)[k], k, -0.5]
        if k < 3:
            assert obs["previous_observation"].tolist() == [row] * 2
            assert all(space.contains(row) for row in obs["previous_observation"])
    assert dones.all()
    assert infos[1]["terminal_observation"]["previous_observation"].tolist() == row
    assert (obs["previous_observation"] == 0).all()
    assert env.step(np.array([2, 3]))[0]["previous_observation"][0].tolist() == [0, 1, 1, 0, 0, 0, 0, 0, -0.5]


def test_the_previous_observation_is_what_was_observed_and_its_state_is_restored_exactly():
    rng, env = np.random.default_rng(0), VecMemoryInputs(BatchVecEnv(MDPBatch(3, "0:9")), ("observation", "step"))
    env.reset()
    observations = [env.observe()]
    actions = rng.integers(0, 5, (130, 3))
    for action in actions[:57]:
        observations.append(env.step(action)[0])
    before = copy.deepcopy(observations)
    state = copy.deepcopy(env.get_state())
    steps = [env.step(action)[:2] for action in actions[57:]]
    restored = VecMemoryInputs(BatchVecEnv(MDPBatch(3, "0:9", 5)), ("observation", "step"))
    restored.set_state(state)
    np.testing.assert_equal(restored.observe(), before[-1])
    np.testing.assert_equal([restored.step(action)[:2] for action in actions[57:]], steps)
    np.testing.assert_equal(observations, before)
    for last, present in itertools.pairwise(before):
        np.testing.assert_equal(present["previous_observation"], last["observation"])


def test_the_previous_observation_of_images_is_refused():
    with pytest.raises(UserError, match="leave out 'observation'") as error:
        VecMemoryInputs(ProcgenVecEnv("maze", 1), inputs=("observation",))
    assert "\n" not in str(error.value)
