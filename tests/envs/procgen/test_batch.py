import copy
import subprocess
import sys
import threading

import numpy as np
import pytest
from procgen import ProcgenGym3Env
from procgen.env import ENV_NAMES, EXPLORATION_LEVEL_SEEDS

from srwm_rl.envs.procgen.batch import ProcgenBatch
from srwm_rl.envs.procgen.games import EXPLORATION_LEVELS, GAMES, MODE_GAMES
from srwm_rl.envs.procgen.scores import PROCGEN_NORMALIZATION
from srwm_rl.errors import UserError


@pytest.fixture
def raw_procgen():
    """Make raw ProcGen environments and close them: an open one can hang the garbage collector."""
    made = []

    def make(**kwargs):
        made.append(ProcgenGym3Env(num_threads=0, **kwargs))
        return made[-1]

    yield make
    for env in made:
        env.close()


def actions(steps, n, seed=0):
    return np.random.default_rng(seed).integers(0, 15, (steps, n))


def play(env, acts):
    return [env.step(a) for a in acts]


def same(one, two, keep=slice(None)):
    return all(
        np.array_equal(a.obs[keep], b.obs[keep])
        and np.array_equal(a.rewards[keep], b.rewards[keep])
        and np.array_equal(a.terminated[keep], b.terminated[keep])
        and all(np.array_equal(a.info[key][keep], b.info[key][keep]) for key in a.info)
        for a, b in zip(one, two, strict=True)
    )


def test_tables_are_those_of_the_installed_package():
    assert list(GAMES) == ENV_NAMES
    assert EXPLORATION_LEVELS == EXPLORATION_LEVEL_SEEDS


def test_first_reset_and_steps_are_raw_procgen(raw_procgen):
    env = ProcgenBatch("coinrun,maze", 4, "3:20", seed=11, n_threads=0)
    raw = raw_procgen(
        num=4, env_name="coinrun,maze", num_levels=17, start_level=3, distribution_mode="easy", rand_seed=11
    )
    assert np.array_equal(env.reset(), raw.observe()[1]["rgb"])
    for a in actions(120, 4):
        step = env.step(a)
        raw.act(a)
        rewards, obs, first = raw.observe()
        assert np.array_equal(step.obs, obs["rgb"])
        assert np.array_equal(step.rewards, rewards)
        assert np.array_equal(step.terminated, first)
        assert [i["level_seed"] for i in raw.get_info()] == step.info["level_seed"].tolist()


def test_seed_decides_the_trajectory():
    acts = actions(150, 4)
    one, again, other = (ProcgenBatch("bigfish", 4, "0:50", seed=s) for s in (1, 1, 2))
    for env in (one, again, other):
        env.reset()
    steps = play(one, acts)
    assert same(steps, play(again, acts))
    assert not same(steps, play(other, acts))
    again.reseed(2)
    other.reseed(2)
    assert np.array_equal(again.reset(), other.reset())


def test_full_reset_in_mid_episode_starts_new_episodes_in_the_range():
    env = ProcgenBatch("heist", 6, "100:400", seed=0)
    first = env.reset()
    assert np.array_equal(first, env.observe())
    play(env, actions(20, 6))
    before = env.level_seed()
    obs = env.reset()
    assert not np.array_equal(before, env.level_seed())
    assert all(100 <= level < 400 for level in env.level_seed())
    for i, level in enumerate(env.level_seed()):
        fresh = ProcgenBatch("heist", 1, f"{level}:{level + 1}", seed=5)
        assert np.array_equal(obs[i], fresh.reset()[0])


@pytest.mark.parametrize("levels", [None, [5, 6, 7, 8]])
def test_masked_reset_leaves_the_others_bit_identical(levels):
    acts = actions(200, 4)
    touched, untouched = (ProcgenBatch("jumper,bossfight", 4, "0:100", seed=4) for _ in range(2))
    for env in (touched, untouched):
        env.reset()
        play(env, acts[:50])
    before = touched.observe()
    mask = np.array([False, True, True, False])
    obs = touched.reset(mask, levels)
    assert np.array_equal(obs[~mask], before[~mask])
    assert not np.array_equal(obs[1], before[1])
    assert not np.array_equal(obs[2], before[2])
    one, two = play(touched, acts[50:]), play(untouched, acts[50:])
    assert same(one, two, ~mask)
    assert not same(one, two, mask)


def test_masked_reset_is_the_full_reset_of_that_environment():
    acts = actions(80, 2)
    masked, full = (ProcgenBatch("ninja", 2, "0:1000", seed=4) for _ in range(2))
    for env in (masked, full):
        env.reset()
        play(env, acts[:10])
    masked.reset(np.array([True, False]))
    full.reset()
    assert same(play(masked, acts[10:]), play(full, acts[10:]), np.array([True, False]))


def test_forced_levels_are_played_until_an_unforced_reset(raw_procgen):
    env = ProcgenBatch("leaper", 3, "0:10", seed=0)
    env.reset()
    play(env, actions(5, 3))
    obs = env.reset(levels=[1000, 2000, 2147483646])
    for i, level in enumerate((1000, 2000, 2147483646)):
        alone = raw_procgen(
            num=1, env_name="leaper", num_levels=1, start_level=level, distribution_mode="easy", rand_seed=9
        )
        assert np.array_equal(obs[i], alone.observe()[1]["rgb"][0])
    steps = play(env, actions(150, 3))
    assert sum(s.terminated.sum() for s in steps) >= 3
    assert all(s.info["level_seed"].tolist() == [1000, 2000, 2147483646] for s in steps)
    env.reset(np.array([True, False, True]))
    assert env.level_seed()[1] == 2000
    seen = {int(level) for s in play(env, actions(300, 3)) for level in s.info["level_seed"][[0, 2]]}
    assert seen <= set(range(10))
    assert len(seen) > 3
    env.reset()
    assert all(level < 10 for level in env.level_seed())


def test_an_unforced_reset_goes_back_to_the_own_random_sequence():
    pinned, plain = (ProcgenBatch("maze", 2, "0:1000", seed=8) for _ in range(2))
    for env in (pinned, plain):
        env.reset()
    pinned.reset(levels=[7, 7])
    pinned.reset(levels=[8, 8])
    play(pinned, actions(30, 2))
    pinned.reset()
    plain.reset()
    assert pinned.level_seed().tolist() == plain.level_seed().tolist()


def test_state_continues_bit_exactly_in_an_instance_with_another_seed():
    acts = actions(300, 4)
    env = ProcgenBatch("starpilot,coinrun", 4, "0:30", seed=3)
    env.reset()
    play(env, acts[:60])
    env.reset(np.array([False, True, False, False]), [0, 1234, 0, 0])
    play(env, acts[60:100])
    state = copy.deepcopy(env.get_state())
    rest = play(env, acts[100:])
    other = ProcgenBatch("starpilot,coinrun", 4, "0:30", seed=77, n_threads=0)
    other.set_state(state)
    assert same(rest, play(other, acts[100:]))
    assert sum(s.terminated.sum() for s in rest) > 0
    for each in (env, other):
        each.reset()
    assert env.level_seed().tolist() == other.level_seed().tolist()
    assert all(level < 30 for level in env.level_seed())


def test_state_of_a_fresh_instance_keeps_the_first_episode():
    env, other = ProcgenBatch("maze", 2, "0:30", seed=3), ProcgenBatch("maze", 2, "0:30", seed=4)
    state = env.get_state()
    other.reset()
    other.set_state(state)
    assert np.array_equal(other.reset(), env.reset())


def flip(state, **changes):
    return {**state, **changes}


def test_states_of_other_environments_never_reach_the_simulator():
    env = ProcgenBatch("coinrun", 2, "0:30", seed=3)
    env.reset()
    good = env.get_state()
    for kwargs in ({"levels": "0:31"}, {"games": "maze"}, {"mode": "hard"}, {"n_envs": 4}, {"use_backgrounds": False}):
        settings = {"games": "coinrun", "n_envs": 2, "levels": "0:30", **kwargs}
        other = ProcgenBatch(**settings)
        with pytest.raises(UserError):
            env.set_state(other.get_state())
    blob = good["states"][0]
    level = ProcgenBatch("coinrun", 1, "0:31").get_state()["states"][0]
    maze = ProcgenBatch("maze", 1, "0:30").get_state()["states"][0]
    hard = ProcgenBatch("coinrun", 1, "0:30", mode="hard").get_state()["states"][0]
    flipped = blob[:5000] + bytes([blob[5000] ^ 1]) + blob[5001:]
    wrong = [
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
    for bad in wrong:
        with pytest.raises(UserError) as caught:
            env.set_state(flip(good, states=[blob, bad]))
        assert "\n" not in str(caught.value)
    for bad in (flip(good, states=[blob]), flip(good, pins=np.zeros(3)), flip(good, extra=1), {}, None):
        with pytest.raises(UserError):
            env.set_state(bad)
    env.set_state(good)


@pytest.mark.parametrize(
    "bad", [[15, 0], [-1, 0], [0], [[0, 0]], [0.0, 1.0], [float("nan"), 0], [2**40, 0], [True, False]]
)
def test_bad_actions_never_reach_the_simulator(bad):
    env = ProcgenBatch("coinrun", 2, "0:30")
    before = env.reset()
    with pytest.raises(UserError):
        env.step(np.array(bad))
    assert np.array_equal(before, env.observe())


def test_levels_seen_are_in_the_range():
    env = ProcgenBatch("bigfish", 8, "40:45", seed=1)
    env.reset()
    seen = {int(level) for step in play(env, actions(400, 8)) for level in step.info["level_seed"]}
    assert seen == set(range(40, 45))


def test_success_is_reported_where_the_goal_pays():
    # In these games the only reward is the 10 for the goal.
    env = ProcgenBatch("leaper,maze,coinrun,jumper", 16, "0:200", seed=0)
    env.reset()
    outcomes = set()
    for step in play(env, actions(500, 16)):
        for i in np.flatnonzero(step.terminated):
            assert bool(step.info["is_success"][i]) == (step.rewards[i] == 10)
            outcomes.add(bool(step.info["is_success"][i]))
        assert not step.info["is_success"][~step.terminated].any()
    assert outcomes == {True, False}
    assert env.solvable
    assert not ProcgenBatch("maze", 1, use_sequential_levels=True).solvable


def test_timeout_can_be_reported_as_truncation():
    plain, timed = (ProcgenBatch("maze", 1, "6:7", timeout_as_truncation=flag) for flag in (False, True))
    for env in (plain, timed):
        env.reset()
    noop = np.array([4])
    for _ in range(499):
        assert not timed.step(noop).truncated[0]
        plain.step(noop)
    last, timed_last = plain.step(noop), timed.step(noop)
    assert (last.terminated[0], last.truncated[0]) == (True, False)
    assert (timed_last.terminated[0], timed_last.truncated[0]) == (False, True)
    quick = ProcgenBatch("leaper", 4, "0:9", timeout_as_truncation=True)
    quick.reset()
    ends = play(quick, actions(150, 4))
    assert sum(s.terminated.sum() for s in ends) > 0
    assert sum(s.truncated.sum() for s in ends) == 0


@pytest.mark.parametrize("mode", MODE_GAMES)
def test_every_game_of_every_mode_steps(mode):
    for game in MODE_GAMES[mode]:
        env = ProcgenBatch(game, 1, mode=mode)
        assert env.reset().shape == (1, 64, 64, 3)
        step = env.step(np.array([7]))
        assert step.obs.dtype == np.uint8
        assert step.rewards.dtype == np.float32
        env.set_state(env.get_state())
        assert np.array_equal(env.observe(), step.obs)
        env.close()


def test_exploration_plays_its_one_level(raw_procgen):
    env = ProcgenBatch("maze", 1, mode="exploration")
    raw = raw_procgen(num=1, env_name="maze", distribution_mode="exploration", rand_seed=1)
    assert np.array_equal(env.reset(), raw.observe()[1]["rgb"])


def test_options_reach_the_game():
    plain, bare = ProcgenBatch("coinrun", 1, "0:1"), ProcgenBatch("coinrun", 1, "0:1", use_backgrounds=False)
    assert not np.array_equal(plain.reset(), bare.reset())


def test_closing_never_waits_for_the_lock_under_which_another_is_built():
    env = ProcgenBatch("maze", 1)
    with env._env._ffi._lock:
        thread = threading.Thread(target=env.close)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()


def test_returned_arrays_are_the_callers_own():
    env = ProcgenBatch("bigfish", 2, "0:9", seed=0)
    env.reset()
    step = env.step(np.array([4, 4]))
    kept = copy.deepcopy(step)
    play(env, actions(30, 2))
    assert same([step], [kept])


def test_render_draws_large_frames_only_when_asked():
    env = ProcgenBatch("maze", 1, "0:9", render_mode="rgb_array")
    env.reset()
    before = env.render()
    env.step(np.array([7]))
    assert before.shape == (1, 512, 512, 3)
    assert not np.array_equal(before, env.render())
    with pytest.raises(UserError):
        ProcgenBatch("maze", 1, "0:9").render()


@pytest.mark.parametrize(
    ("kwargs", "says"),
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
        ({"render_mode": "human"}, "rgb_array"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(kwargs, says):
    with pytest.raises(UserError, match=says) as caught:
        ProcgenBatch(**{"games": "coinrun", "n_envs": 2, **kwargs})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mask", "levels"),
    [([True], None), ([1, 0], None), (None, [1]), (None, [1, -1]), (None, [1, 2**31]), (None, [0.5, 1]), (None, 3)],
)
def test_wrong_resets_are_refused(mask, levels):
    env = ProcgenBatch("coinrun", 2, "0:9")
    with pytest.raises(UserError):
        env.reset(None if mask is None else np.array(mask), levels)


def test_levels_cannot_be_forced_where_they_run_on():
    with pytest.raises(UserError, match="use_sequential_levels"):
        ProcgenBatch("coinrun", 1, "0:9", use_sequential_levels=True).reset(levels=[1])


def test_importing_and_playing_prints_nothing():
    code = (
        "from srwm_rl.envs import ProcgenBatch; e = ProcgenBatch('maze', 1, '0:9'); e.reset(); e.step([4]); e.reset()"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_missing_procgen_is_told_with_the_command(monkeypatch):
    monkeypatch.setattr("srwm_rl.envs.procgen.games.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'srwm-rl\[procgen\]'"):
        ProcgenBatch("coinrun", 1)


def test_every_game_has_a_range_of_returns_in_the_published_modes():
    assert set(PROCGEN_NORMALIZATION) == {"easy", "hard"}
    for table in PROCGEN_NORMALIZATION.values():
        assert set(table) == set(GAMES)
        assert all(low < high for low, high in table.values())
    assert PROCGEN_NORMALIZATION["easy"]["starpilot"] == (2.5, 64.0)
    assert PROCGEN_NORMALIZATION["hard"]["caveflyer"] == (2.0, 13.4)
