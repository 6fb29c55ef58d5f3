"""The SRWM policy in sb3-contrib's RecurrentPPO, unmodified: `python examples/sb3_contrib_recurrent_ppo.py`.

For code or results that depend on RecurrentPPO. It keeps four copies of the memory for every step: see
docs/stable-baselines3.md for what that costs beside `srwm_rl.agents.PPO`.
"""

import sys

import numpy as np
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from srwm_rl import SRWMPolicy


def main(total_steps: int, n_eval_episodes: int = 10) -> float:
    """Train on CartPole and return the mean return of some episodes."""
    settings = {"core": "srwm", "core_kwargs": {"hidden_size": 32, "n_layers": 1}}
    model = RecurrentPPO(SRWMPolicy, "CartPole-v1", n_steps=128, batch_size=128, policy_kwargs=settings, verbose=1)
    model.learn(total_steps)
    returns, _ = evaluate_policy(model, make_vec_env("CartPole-v1"), n_eval_episodes, return_episode_rewards=True)
    assert isinstance(returns, list)
    print(f"mean return {np.mean(returns):.1f}")
    return float(np.mean(returns))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50_000)
