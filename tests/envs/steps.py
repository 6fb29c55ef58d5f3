"""Comparison of recorded steps, for the environments' tests."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from srwm_rl.envs.batch import BatchStep


def steps_equal(first: Sequence[BatchStep], second: Sequence[BatchStep], envs: Any = slice(None)) -> bool:
    """Return whether two sequences of steps are bit-identical, in the environments that `envs` selects."""
    return all(
        a.info.keys() == b.info.keys()
        and all(np.array_equal(a.info[key][envs], b.info[key][envs]) for key in a.info)
        and np.array_equal(a.obs[envs], b.obs[envs])
        and np.array_equal(a.rewards[envs], b.rewards[envs])
        and np.array_equal(a.terminated[envs], b.terminated[envs])
        for a, b in zip(first, second, strict=True)
    )
