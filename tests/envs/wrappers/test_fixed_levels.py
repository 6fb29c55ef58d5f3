"""`LevelsVecEnv`: a list of levels, each played a given number of times."""

from collections import Counter

import numpy as np
import pytest

from srwm_rl.envs import BatchVecEnv, GymnasiumBatch, LevelRange, LevelsVecEnv, ProcgenBatch, RecallBatch
from srwm_rl.errors import UserError


def run(env, act, max_steps=20000):
    """Play `act(step of the episode [n]) -> [n]` until no episode remains; return the infos of all episodes."""
    env.reset()
    infos, clock = [], np.zeros(env.num_envs, int)
    for _ in range(max_steps):
        if not env.remaining:
            return infos
        _, _, dones, step_infos = env.step(act(clock))
        infos += [info for info in step_infos if info]
        clock = np.where(dones, 0, clock + 1)
    raise AssertionError(f"{env.remaining} episodes remain after {max_steps} steps")


makers = {
    "procgen": (
        lambda n: ProcgenBatch("leaper,bossfight", n, "0:5"),
        lambda clock: 3 + clock % 7,
        ("leaper", "bossfight"),
    ),
    "recall": (lambda n: RecallBatch(n, "0:5"), lambda clock: clock % 4, ("recall",)),
    "cartpole": (lambda n: GymnasiumBatch("CartPole-v1", n, "0:5"), lambda clock: clock // 3 % 2, ("CartPole-v1",)),
}


@pytest.mark.parametrize("name", makers)
@pytest.mark.parametrize(("n", "repeats"), [(2, 2), (8, 1), (6, 3)])
def test_every_level_is_played_exactly_repeats_times_with_the_result_of_playing_it_alone(name, n, repeats):
    make, act, games = makers[name]
    levels = [1000, 1001, 1003, 1007, 5]
    env = LevelsVecEnv(make(n), levels, repeats)
    assert env.remaining == len(games) * 5 * repeats
    infos = run(env, act)
    counts = {(game, level): repeats for game in games for level in levels}
    assert Counter((info["game"], info["level"]) for info in infos) == counts
    assert all(info["level"] == info["prev_level_seed"] for info in infos)
    alone = {}
    for level in levels:
        for info in run(LevelsVecEnv(make(len(games)), [level]), act):
            alone[info["game"], level] = (info["episode"]["r"], info["episode"]["l"])
    assert len(set(alone.values())) > 1
    for info in infos:
        assert (info["episode"]["r"], info["episode"]["l"]) == alone[info["game"], info["level"]]


def test_first_observations_are_those_of_the_assigned_levels():
    env = LevelsVecEnv(ProcgenBatch("leaper", 2, "0:5"), LevelRange(50, 54))
    obs = env.reset()
    assert env.batch_env.level_seed().tolist() == [50, 51]
    assert np.array_equal(obs, ProcgenBatch("leaper", 2).reset(levels=[50, 51]))
    while True:
        obs, _, dones, infos = env.step(np.array([5, 4]))
        if dones.any():
            break
    ended = int(np.flatnonzero(dones)[0])
    assert infos[ended]["level_seed"] == 52 == env.batch_env.level_seed()[ended]
    assert np.array_equal(obs[ended], ProcgenBatch("leaper", 1).reset(levels=[52])[0])


def test_environments_without_a_level_left_report_no_episodes():
    env = LevelsVecEnv(RecallBatch(5, "0:9"), [3, 4])
    run(env, lambda clock: clock % 4)
    assert env.remaining == 0
    for _ in range(50):
        *_, infos = env.step(np.zeros(5, int))
        assert not any(infos)
    assert env.remaining == 0


def test_reset_restarts_the_evaluation():
    env = LevelsVecEnv(RecallBatch(2, "0:9"), [3, 4, 5])
    for _ in range(2):
        assert sorted(info["level"] for info in run(env, lambda clock: clock % 4)) == [3, 4, 5]


def test_invalid_arguments_and_calls_are_refused():
    for levels, repeats in (([], 1), ([1.5], 1), ([-1], 1), ([1], 0), ([1], 1.5), (LevelRange.parse("all"), 1)):
        with pytest.raises(UserError):
            LevelsVecEnv(RecallBatch(2), levels, repeats)
    env = LevelsVecEnv(RecallBatch(2), [1])
    with pytest.raises(UserError, match="reset"):
        env.step(np.zeros(2, int))
    env.set_options({"levels": [1, 2]})
    with pytest.raises(UserError, match="constructor"):
        env.reset()
    assert not env.supports_state
    with pytest.raises(UserError):
        env.get_state()
    with pytest.raises(UserError):
        env.set_state(BatchVecEnv(RecallBatch(2)).get_state())
