"""`ProcgenBatch`: raw ProcGen's steps, with levels, partial resets, saved states and checked arguments."""

import copy
import importlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from srwm_rl.envs.procgen.batch import ProcgenBatch
from srwm_rl.envs.procgen.games import EXPLORATION_LEVELS, GAMES, MODE_GAMES
from srwm_rl.envs.procgen.published import PROCGEN_NORMALIZATION
from srwm_rl.envs.procgen.simulator import installed_distribution
from srwm_rl.errors import UserError
from tests.envs.steps import steps_equal


@pytest.fixture
def raw_procgen():
    """Make raw ProcGen environments and close them: an open one can hang the garbage collector."""
    procgen = pytest.importorskip("procgen", reason="procgen-gym is compared in test_simulator.py")
    envs = []

    def make(**kwargs):
        envs.append(procgen.ProcgenGym3Env(num_threads=0, **kwargs))
        return envs[-1]

    yield make
    for env in envs:
        env.close()


def random_actions(steps, n, seed=0):
    return np.random.default_rng(seed).integers(0, 15, (steps, n))


def play(env, actions):
    return [env.step(action) for action in actions]


def test_game_tables_equal_those_of_the_installed_procgen():
    procgen = importlib.import_module(f"{installed_distribution().module}.env")
    assert list(GAMES) == procgen.ENV_NAMES
    assert EXPLORATION_LEVELS == procgen.EXPLORATION_LEVEL_SEEDS


def test_reset_and_steps_equal_raw_procgen(raw_procgen):
    env = ProcgenBatch("coinrun,maze", 4, "3:20", seed=11, n_threads=0)
    raw = raw_procgen(
        num=4, env_name="coinrun,maze", num_levels=17, start_level=3, distribution_mode="easy", rand_seed=11
    )
    assert np.array_equal(env.reset(), raw.observe()[1]["rgb"])
    for action in random_actions(120, 4):
        step = env.step(action)
        raw.act(action)
        rewards, obs, first = raw.observe()
        assert np.array_equal(step.obs, obs["rgb"])
        assert np.array_equal(step.rewards, rewards)
        assert np.array_equal(step.terminated, first)
        assert [info["level_seed"] for info in raw.get_info()] == step.info["level_seed"].tolist()


def test_the_seed_determines_the_steps():
    actions = random_actions(150, 4)
    envs = [ProcgenBatch("bigfish", 4, "0:50", seed=seed) for seed in (1, 1, 2)]
    for env in envs:
        env.reset()
    first, same_seed, other_seed = (play(env, actions) for env in envs)
    assert steps_equal(first, same_seed)
    assert not steps_equal(first, other_seed)
    envs[1].reseed(2)
    envs[2].reseed(2)
    assert np.array_equal(envs[1].reset(), envs[2].reset())


def test_a_full_reset_in_mid_episode_starts_new_episodes_in_the_level_range():
    env = ProcgenBatch("heist", 6, "100:400", seed=0)
    first = env.reset()
    assert np.array_equal(first, env.observe())
    play(env, random_actions(20, 6))
    before = env.level_seed()
    obs = env.reset()
    assert not np.array_equal(before, env.level_seed())
    assert all(100 <= level < 400 for level in env.level_seed())
    for i, level in enumerate(env.level_seed()):
        single = ProcgenBatch("heist", 1, f"{level}:{level + 1}", seed=5)
        assert np.array_equal(obs[i], single.reset()[0])


@pytest.mark.parametrize("levels", [None, [5, 6, 7, 8]])
def test_a_masked_reset_leaves_other_environments_bit_identical(levels):
    actions = random_actions(200, 4)
    masked, unmasked = (ProcgenBatch("jumper,bossfight", 4, "0:100", seed=4) for _ in range(2))
    for env in (masked, unmasked):
        env.reset()
        play(env, actions[:50])
    before = masked.observe()
    mask = np.array([False, True, True, False])
    obs = masked.reset(mask, levels)
    assert np.array_equal(obs[~mask], before[~mask])
    assert not np.array_equal(obs[1], before[1])
    assert not np.array_equal(obs[2], before[2])
    masked_steps, unmasked_steps = play(masked, actions[50:]), play(unmasked, actions[50:])
    assert steps_equal(masked_steps, unmasked_steps, ~mask)
    assert not steps_equal(masked_steps, unmasked_steps, mask)


def test_a_masked_reset_equals_a_full_reset_for_that_environment():
    actions = random_actions(80, 2)
    masked, full = (ProcgenBatch("ninja", 2, "0:1000", seed=4) for _ in range(2))
    for env in (masked, full):
        env.reset()
        play(env, actions[:10])
    masked.reset(np.array([True, False]))
    full.reset()
    assert steps_equal(play(masked, actions[10:]), play(full, actions[10:]), np.array([True, False]))


def test_forced_levels_are_played_until_an_unforced_reset(raw_procgen):
    env = ProcgenBatch("leaper", 3, "0:10", seed=0)
    env.reset()
    play(env, random_actions(5, 3))
    obs = env.reset(levels=[1000, 2000, 2147483646])
    for i, level in enumerate((1000, 2000, 2147483646)):
        single = raw_procgen(
            num=1, env_name="leaper", num_levels=1, start_level=level, distribution_mode="easy", rand_seed=9
        )
        assert np.array_equal(obs[i], single.observe()[1]["rgb"][0])
    steps = play(env, random_actions(150, 3))
    assert sum(step.terminated.sum() for step in steps) >= 3
    assert all(step.info["level_seed"].tolist() == [1000, 2000, 2147483646] for step in steps)
    env.reset(np.array([True, False, True]))
    assert env.level_seed()[1] == 2000
    unforced = {int(level) for step in play(env, random_actions(300, 3)) for level in step.info["level_seed"][[0, 2]]}
    assert unforced <= set(range(10))
    assert len(unforced) > 3
    env.reset()
    assert all(level < 10 for level in env.level_seed())


def test_an_unforced_reset_continues_the_random_level_sequence():
    forced, unforced = (ProcgenBatch("maze", 2, "0:1000", seed=8) for _ in range(2))
    for env in (forced, unforced):
        env.reset()
    forced.reset(levels=[7, 7])
    forced.reset(levels=[8, 8])
    play(forced, random_actions(30, 2))
    forced.reset()
    unforced.reset()
    assert forced.level_seed().tolist() == unforced.level_seed().tolist()


def test_a_restored_state_continues_bit_exactly_in_an_instance_with_another_seed():
    actions = random_actions(300, 4)
    env = ProcgenBatch("starpilot,coinrun", 4, "0:30", seed=3)
    env.reset()
    play(env, actions[:60])
    env.reset(np.array([False, True, False, False]), [0, 1234, 0, 0])
    play(env, actions[60:100])
    state = copy.deepcopy(env.get_state())
    steps = play(env, actions[100:])
    restored = ProcgenBatch("starpilot,coinrun", 4, "0:30", seed=77, n_threads=0)
    restored.set_state(state)
    assert steps_equal(steps, play(restored, actions[100:]))
    assert sum(step.terminated.sum() for step in steps) > 0
    env.reset()
    restored.reset()
    assert env.level_seed().tolist() == restored.level_seed().tolist()
    assert all(level < 30 for level in env.level_seed())


def test_the_state_of_a_new_instance_restores_its_first_episode():
    env, restored = ProcgenBatch("maze", 2, "0:30", seed=3), ProcgenBatch("maze", 2, "0:30", seed=4)
    state = env.get_state()
    restored.reset()
    restored.set_state(state)
    assert np.array_equal(restored.reset(), env.reset())


def test_invalid_states_are_refused_before_they_reach_the_simulator():
    env = ProcgenBatch("coinrun", 2, "0:30", seed=3)
    env.reset()
    valid = env.get_state()
    for kwargs in ({"levels": "0:31"}, {"games": "maze"}, {"mode": "hard"}, {"n_envs": 4}, {"use_backgrounds": False}):
        settings = {"games": "coinrun", "n_envs": 2, "levels": "0:30", **kwargs}
        other = ProcgenBatch(**settings)
        with pytest.raises(UserError):
            env.set_state(other.get_state())
    blob = valid["states"][0]
    level = ProcgenBatch("coinrun", 1, "0:31").get_state()["states"][0]
    maze = ProcgenBatch("maze", 1, "0:30").get_state()["states"][0]
    hard = ProcgenBatch("coinrun", 1, "0:30", mode="hard").get_state()["states"][0]
    flipped = blob[:5000] + bytes([blob[5000] ^ 1]) + blob[5001:]
    invalid_blobs = [
        flipped,
        b"",
        blob[:-1],
        blob[:100],
        blob[:100] + blob[-4:],
        level,
        maze,
        hard,
        "text",
        b"\0" * 40 + blob[-4:],
    ]
    for invalid in invalid_blobs:
        with pytest.raises(UserError) as error:
            env.set_state({**valid, "states": [blob, invalid]})
        assert "\n" not in str(error.value)
    invalid_states = [{**valid, "states": [blob]}, {**valid, "pins": np.zeros(3)}, {**valid, "extra": 1}, {}, None]
    for invalid in invalid_states:
        with pytest.raises(UserError):
            env.set_state(invalid)
    env.set_state(valid)


@pytest.mark.parametrize(
    "invalid", [[15, 0], [-1, 0], [0], [[0, 0]], [0.0, 1.0], [float("nan"), 0], [2**40, 0], [True, False]]
)
def test_invalid_actions_are_refused_before_they_reach_the_simulator(invalid):
    env = ProcgenBatch("coinrun", 2, "0:30")
    before = env.reset()
    with pytest.raises(UserError):
        env.step(np.array(invalid))
    assert np.array_equal(before, env.observe())


def test_the_levels_played_are_those_of_the_range():
    env = ProcgenBatch("bigfish", 8, "40:45", seed=1)
    env.reset()
    played = {int(level) for step in play(env, random_actions(400, 8)) for level in step.info["level_seed"]}
    assert played == set(range(40, 45))


def test_is_success_is_true_where_the_goal_reward_is_paid():
    # In these games the only reward is the 10 for the goal.
    env = ProcgenBatch("leaper,maze,coinrun,jumper", 16, "0:200", seed=0)
    env.reset()
    outcomes = set()
    for step in play(env, random_actions(500, 16)):
        for i in np.flatnonzero(step.terminated):
            assert bool(step.info["is_success"][i]) == (step.rewards[i] == 10)
            outcomes.add(bool(step.info["is_success"][i]))
        assert not step.info["is_success"][~step.terminated].any()
    assert outcomes == {True, False}
    assert env.solvable
    assert not ProcgenBatch("maze", 1, use_sequential_levels=True).solvable


def test_timeout_can_be_reported_as_truncation():
    terminating, truncating = (ProcgenBatch("maze", 1, "6:7", timeout_as_truncation=flag) for flag in (False, True))
    for env in (terminating, truncating):
        env.reset()
    noop = np.array([4])
    for _ in range(499):
        assert not truncating.step(noop).truncated[0]
        terminating.step(noop)
    terminated, truncated = terminating.step(noop), truncating.step(noop)
    assert (terminated.terminated[0], terminated.truncated[0]) == (True, False)
    assert (truncated.terminated[0], truncated.truncated[0]) == (False, True)
    before_timeout = ProcgenBatch("leaper", 4, "0:9", timeout_as_truncation=True)
    before_timeout.reset()
    steps = play(before_timeout, random_actions(150, 4))
    assert sum(step.terminated.sum() for step in steps) > 0
    assert sum(step.truncated.sum() for step in steps) == 0


@pytest.mark.parametrize("mode", MODE_GAMES)
def test_every_game_steps_in_every_mode(mode):
    for game in MODE_GAMES[mode]:
        env = ProcgenBatch(game, 1, mode=mode)
        assert env.reset().shape == (1, 64, 64, 3)
        step = env.step(np.array([7]))
        assert step.obs.dtype == np.uint8
        assert step.rewards.dtype == np.float32
        env.set_state(env.get_state())
        assert np.array_equal(env.observe(), step.obs)
        env.close()


def test_exploration_mode_plays_its_single_level(raw_procgen):
    env = ProcgenBatch("maze", 1, mode="exploration")
    raw = raw_procgen(num=1, env_name="maze", distribution_mode="exploration", rand_seed=1)
    assert np.array_equal(env.reset(), raw.observe()[1]["rgb"])


def test_options_are_passed_to_the_game():
    default, no_backgrounds = (ProcgenBatch("coinrun", 1, "0:1", use_backgrounds=flag) for flag in (True, False))
    assert not np.array_equal(default.reset(), no_backgrounds.reset())


def test_close_does_not_wait_for_the_construction_lock():
    pytest.importorskip("procgen", reason="the lock is cffi's, which procgen-gym does without")
    env = ProcgenBatch("maze", 1)
    with env._simulator.env._ffi._lock:
        thread = threading.Thread(target=env.close)
        thread.start()
        thread.join(600)
        assert not thread.is_alive()


def test_later_steps_do_not_overwrite_returned_arrays():
    env = ProcgenBatch("bigfish", 2, "0:9", seed=0)
    env.reset()
    step = env.step(np.array([4, 4]))
    before = copy.deepcopy(step)
    play(env, random_actions(30, 2))
    assert steps_equal([step], [before])


def test_render_returns_large_frames_and_needs_its_render_mode():
    env = ProcgenBatch("maze", 1, "0:9", render_mode="rgb_array")
    env.reset()
    before = env.render()
    env.step(np.array([7]))
    assert before.shape == (1, 512, 512, 3)
    assert not np.array_equal(before, env.render())
    with pytest.raises(UserError):
        ProcgenBatch("maze", 1, "0:9").render()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"games": "coinrum"}, "'coinrun'"),
        ({"games": ""}, "no ProcGen game"),
        ({"games": []}, "at least one"),
        ({"games": "maze,maze"}, "once"),
        ({"n_envs": 0}, "n_envs"),
        ({"n_envs": 2.0}, "n_envs"),
        ({"games": "coinrun,maze,heist", "n_envs": 4}, "multiple of the 3"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"seed": None}, "seed"),
        ({"mode": "eazy"}, "'easy'"),
        ({"mode": "memory"}, "caveflyer, dodgeball, heist, jumper, maze, miner"),
        ({"mode": "extreme"}, "chaser, dodgeball, leaper, starpilot"),
        ({"mode": "exploration", "levels": "0:200"}, "1949448038"),
        ({"mode": "exploration", "games": "coinrun,maze"}, "single game"),
        ({"mode": "exploration", "games": "bigfish"}, "coinrun"),
        ({"n_threads": -1}, "n_threads"),
        ({"use_backgrounds": 1}, "True or False"),
        ({"use_background": True}, "'use_backgrounds'"),
        ({"timeout_as_truncation": "no"}, "timeout_as_truncation must be True or False"),
        ({"num_levels": 200}, "'num_levels': here it is levels, such as '0:200'"),
        ({"start_level": 5}, "here it is levels"),
        ({"distribution_mode": "hard"}, "here it is mode"),
        ({"rand_seed": 3}, "here it is seed"),
        ({"render_mode": "human"}, "rgb_array"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(kwargs, message):
    with pytest.raises(UserError, match=message) as error:
        ProcgenBatch(**{"games": "coinrun", "n_envs": 2, **kwargs})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mask", "levels"),
    [([True], None), ([1, 0], None), (None, [1]), (None, [1, -1]), (None, [1, 2**31]), (None, [0.5, 1]), (None, 3)],
)
def test_invalid_reset_arguments_are_refused(mask, levels):
    env = ProcgenBatch("coinrun", 2, "0:9")
    with pytest.raises(UserError):
        env.reset(None if mask is None else np.array(mask), levels)


def test_levels_cannot_be_forced_with_sequential_levels():
    with pytest.raises(UserError, match="use_sequential_levels"):
        ProcgenBatch("coinrun", 1, "0:9", use_sequential_levels=True).reset(levels=[1])


def test_import_reset_and_step_print_nothing():
    installed_distribution()
    code = (
        "from srwm_rl.envs import ProcgenBatch; e = ProcgenBatch('maze', 1, '0:9'); e.reset(); e.step([4]); e.reset()"
    )
    process = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=600)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_every_game_has_normalization_bounds_in_easy_and_hard_mode():
    assert set(PROCGEN_NORMALIZATION) == {"easy", "hard"}
    for table in PROCGEN_NORMALIZATION.values():
        assert set(table) == set(GAMES)
        assert all(low < high for low, high in table.values())
    assert PROCGEN_NORMALIZATION["easy"]["starpilot"] == (2.5, 64.0)
    assert PROCGEN_NORMALIZATION["hard"]["caveflyer"] == (2.0, 13.4)
