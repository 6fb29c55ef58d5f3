"""PPO with an SRWM memory on ProcGen, in one file to copy: `python examples/train_srwm.py --game coinrun`.

The policy is a small CNN, a memory core and two linear heads. The core runs over whole unrolls with the episode resets
inside, so training back-propagates through the network's edits of its own weights. Tensors are time-major, `[T, B]`.
The package's own PPO (`srwm_rl.agents.PPO`) is much faster and adds resuming, evaluation and logging.
"""

from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn
from torch.distributions import Categorical

from srwm_rl import make_core
from srwm_rl.envs import ProcgenVecEnv


@dataclass
class Args:
    """Settings of a run."""

    game: str = "coinrun"
    core: str = "srwm"
    total_steps: int = 1_000_000
    n_envs: int = 64
    n_steps: int = 64
    n_epochs: int = 3
    n_minibatches: int = 4
    learning_rate: float = 5e-4
    gamma: float = 0.999
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    seed: int = 0


class Policy(nn.Module):
    """CNN -> core -> logits and value."""

    def __init__(self, core: str, n_actions: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 8, stride=4), nn.ReLU(),  # 64 -> 15
            nn.Conv2d(16, 32, 4, stride=2), nn.ReLU(),  # 15 -> 6
            nn.Flatten(), nn.Linear(32 * 6 * 6, 256), nn.ReLU(),
        )  # fmt: skip
        self.core = make_core(core, 256)
        self.actor, self.critic = nn.Linear(self.core.output_size, n_actions), nn.Linear(self.core.output_size, 1)

    def forward(self, obs: Tensor, state: Tensor, starts: Tensor) -> tuple[Categorical, Tensor, Tensor]:
        """Run over an unroll: obs `[T, B, 64, 64, 3]`, state `[L, B, S]`, starts `[T, B]`."""
        features = self.encoder(obs.flatten(0, 1).movedim(-1, 1) / 255).unflatten(0, obs.shape[:2])  # [T, B, 256]
        y, state = self.core(features, state, starts)  # [T, B, O]
        return Categorical(logits=self.actor(y)), self.critic(y)[..., 0], state


def advantages_of(rewards: Tensor, values: Tensor, starts: Tensor, args: Args) -> Tensor:
    """Return GAE `[T, B]`; values and starts are `[T + 1, B]`."""
    advantages, last = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        discount = args.gamma * (1 - starts[t + 1])
        delta = rewards[t] + discount * values[t + 1] - values[t]
        advantages[t] = last = delta + discount * args.gae_lambda * last
    return advantages


def main(args: Args) -> float:
    """Train, print the mean return of each rollout's episodes, and return the last one."""
    torch.manual_seed(args.seed)
    env = ProcgenVecEnv(args.game, args.n_envs, levels="0:200", seed=args.seed)
    policy = Policy(args.core, 15)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.learning_rate, eps=1e-5)
    T, B = args.n_steps, args.n_envs
    obs = torch.zeros(T + 1, B, 64, 64, 3, dtype=torch.uint8)
    actions, log_probs = torch.zeros(T, B, dtype=torch.long), torch.zeros(T, B)
    rewards, values, starts = torch.zeros(T, B), torch.zeros(T + 1, B), torch.ones(T + 1, B)
    obs[0], state, mean_return = torch.as_tensor(env.reset()), policy.core.initial_state(B), float("nan")

    for n_steps in range(T * B, args.total_steps + 1, T * B):
        first_state, returns = state, []  # a new rollout begins with the memory of the last one
        with torch.no_grad():
            for t in range(T):
                distribution, value, state = policy(obs[t : t + 1], state, starts[t : t + 1])
                actions[t], values[t] = distribution.sample()[0], value[0]
                log_probs[t] = distribution.log_prob(actions[t : t + 1])[0]
                next_obs, reward, done, infos = env.step(actions[t].numpy())
                obs[t + 1], rewards[t], starts[t + 1] = map(torch.as_tensor, (next_obs, reward, done))
                returns += [info["episode"]["r"] for info in infos if "episode" in info]
            values[T] = policy(obs[T:], state, starts[T:])[1][0]
        advantages = advantages_of(rewards, values, starts, args)
        targets = advantages + values[:T]

        for _ in range(args.n_epochs):
            for envs in torch.randperm(B).chunk(args.n_minibatches):  # whole sequences: their memory is unrolled anew
                distribution, value, _ = policy(obs[:T, envs], first_state[:, envs], starts[:T, envs])
                ratio = (distribution.log_prob(actions[:, envs]) - log_probs[:, envs]).exp()
                advantage = advantages[:, envs]
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                clipped = ratio.clamp(1 - args.clip_range, 1 + args.clip_range)
                policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
                value_loss = (value - targets[:, envs]).square().mean()
                loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * distribution.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
                optimizer.step()

        obs[0], starts[0] = obs[T].clone(), starts[T].clone()
        mean_return = sum(returns) / len(returns) if returns else mean_return
        print(f"{n_steps:>9,} steps  return {mean_return:.2f}  loss {loss.item():.3f}")
    env.close()
    return mean_return


if __name__ == "__main__":
    main(tyro.cli(Args))
