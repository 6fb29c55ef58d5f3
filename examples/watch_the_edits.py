"""How large each head's edits of its own weights are while the agent plays: `python examples/watch_the_edits.py [RUN]`.

RUN is a run folder of `srwm-rl train --env recall`; without it, an agent is trained for about a minute. On recall an
agent sees a cue, waits and must repeat the cue: in a trained agent, one head's edit is large at the cue and small
elsewhere. Each line is one step: the edit of each head, the Frobenius norm of its weights' change.
"""

import sys
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv

from srwm_rl import SRWMPolicy, load
from srwm_rl.agents import PPO
from srwm_rl.envs import make_vec_env
from srwm_rl.nn.diagnostics import introspect

BARS = " .:-=+*#%@"


def recall(n_envs: int, seed: int) -> VecEnv:
    """Return the recall task; the previous action and reward are among the observations."""
    return make_vec_env("recall", n_envs, "0:1000", seed)


def trained(total_steps: int) -> SRWMPolicy:
    """Return a policy with one layer of SRWM heads, trained on recall."""
    settings = {"core": "srwm", "core_kwargs": {"hidden_size": 32, "n_layers": 1, "n_heads": 4}}
    model = PPO("SRWMPolicy", recall(32, 0), n_steps=64, batch_size=512, learning_rate=2e-3, policy_kwargs=settings)
    model.learn(total_steps)
    return model.policy


def edits_while_playing(policy: SRWMPolicy, n_steps: int) -> np.ndarray:
    """Play one environment and return the norms of the first layer's edits by head, `[T, H]`."""
    env = recall(1, 1)
    obs: Any = env.reset()
    start, edits = np.ones(1, bool), []
    state = policy.core.initial_state(1)  # [L, B, S], W_t - W_0 of every head
    for _ in range(n_steps):
        step = introspect(policy, policy.obs_to_tensor(obs)[0], state, torch.as_tensor(start))
        edits.append(step.edit[0, 0].numpy())  # [H]
        state = step.core_state
        obs, _, start, _ = env.step(step.actions.numpy())
    env.close()
    return np.stack(edits)


def main(argv: list[str], n_steps: int = 40, total_steps: int = 150_000) -> np.ndarray:
    """Print the edits of a trained agent, step by step."""
    policy = load(argv[0]).policy if argv else trained(total_steps)
    edits = edits_while_playing(policy, n_steps)
    levels = (edits / edits.max() * (len(BARS) - 1)).round().astype(int)
    print("step  heads, from ' ' (no edit) to '@' (the largest)")
    for t, (row, norms) in enumerate(zip(levels, edits, strict=True)):
        print(f"{t:>4}  |{''.join(BARS[level] for level in row)}|  " + " ".join(f"{norm:.2f}" for norm in norms))
    return edits


if __name__ == "__main__":
    main(sys.argv[1:])
