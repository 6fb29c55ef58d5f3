"""`SampledLevelsEnv`: which level each environment plays next."""

import numpy as np

from srwm_rl.envs import BanditBatch


def test_sampled_levels_are_uniform_within_the_range():
    env = BanditBatch(1000, "10:15", seed=3)
    levels = np.concatenate([(env.reset(), env.level_seed())[1] for _ in range(20)])
    counts = np.bincount(levels, minlength=15)
    assert counts[:10].sum() == 0
    assert len(counts) == 15
    assert np.all(np.abs(counts[10:] / len(levels) - 0.2) < 0.02)  # 7 standard errors


def test_a_level_drawn_for_one_environment_does_not_advance_the_others():
    env, masked = (BanditBatch(3, "0:1000000", seed=1) for _ in range(2))
    env.reset()
    masked.reset()
    first = env.level_seed()
    env.reset()
    second = env.level_seed()
    masked.reset(np.array([False, True, False]))
    assert masked.level_seed().tolist() == [first[0], second[1], first[2]]
    env.reset()
    masked.reset()
    assert masked.level_seed().tolist() == [second[0], env.level_seed()[1], second[2]]


def test_chosen_levels_do_not_advance_the_random_sequence():
    env, chosen = (BanditBatch(3, "0:1000000", seed=1) for _ in range(2))
    chosen.reset(levels=[1, 2, 3])
    env.reset()
    for _ in range(2):
        env.reset()
        chosen.reset()
        assert chosen.level_seed().tolist() == env.level_seed().tolist()
