from collections import Counter

import numpy as np
import pytest

from srwm_rl.envs import BatchVecEnv, GymnasiumBatch, LevelRange, LevelsVecEnv, ProcgenBatch, RecallBatch
from srwm_rl.errors import UserError


def run(env, act, most=20000):
    """Play `act(step of the episode [n]) -> [n]` until nothing remains; return the infos of finished episodes."""
    obs = env.reset()
    infos, clock = [], np.zeros(env.num_envs, int)
    for _ in range(most):
        if not env.remaining:
            return infos, obs
        obs, _, dones, step_infos = env.step(act(clock))
        infos += [info for info in step_infos if info]
        clock = np.where(dones, 0, clock + 1)
    raise AssertionError("episodes are left over")


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
def test_every_level_is_played_exactly_so_often_and_as_if_alone(name, n, repeats):
    make, act, games = makers[name]
    levels = [1000, 1001, 1003, 1007, 5]
    env = LevelsVecEnv(make(n), levels, repeats)
    assert env.remaining == len(games) * 5 * repeats
    infos, _ = run(env, act)
    assert Counter((i["game"], i["level"]) for i in infos) == {(g, k): repeats for g in games for k in levels}
    assert all(i["level"] == i["prev_level_seed"] for i in infos)
    alone = {}
    for k in levels:
        for info in run(LevelsVecEnv(make(len(games)), [k]), act)[0]:
            alone[info["game"], k] = (info["episode"]["r"], info["episode"]["l"])
    assert len(set(alone.values())) > 1
    for info in infos:
        assert (info["episode"]["r"], info["episode"]["l"]) == alone[info["game"], info["level"]]


def test_first_frames_and_next_levels_are_those_handed_out():
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


def test_environments_without_work_stay_silent():
    env = LevelsVecEnv(RecallBatch(5, "0:9"), [3, 4])
    run(env, lambda clock: clock % 4)
    assert env.remaining == 0
    for _ in range(50):
        *_, infos = env.step(np.zeros(5, int))
        assert not any(infos)
    assert env.remaining == 0


def test_reset_starts_the_evaluation_again():
    env = LevelsVecEnv(RecallBatch(2, "0:9"), [3, 4, 5])
    first, _ = run(env, lambda clock: clock % 4)
    second, _ = run(env, lambda clock: clock % 4)
    assert sorted(i["level"] for i in first) == sorted(i["level"] for i in second) == [3, 4, 5]


def test_wrong_use_is_refused():
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
