"""PPO's loss equals the sum written out step by step."""

import math

import pytest
import torch

from srwm_rl.agents.losses.ppo_loss import ppo_loss

T, B = 5, 3


def random_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("values", "log_probs", "entropy", "old_values", "old_log_probs", "advantages", "returns")
    return {name: torch.randn(T, B, generator=generator, dtype=torch.float64) for name in names}


@pytest.mark.parametrize("clip_range_vf", [None, 0.3])
def test_the_loss_equals_the_sum_written_out_step_by_step(clip_range_vf: float | None) -> None:
    x = random_inputs()
    sums = ppo_loss(**x, clip_range=0.2, clip_range_vf=clip_range_vf)
    policy = value = kl = clipped = 0.0
    for t in range(T):
        for b in range(B):
            step = {name: tensor[t, b].item() for name, tensor in x.items()}
            log_ratio = step["log_probs"] - step["old_log_probs"]
            ratio = math.exp(log_ratio)
            policy -= min(step["advantages"] * ratio, step["advantages"] * min(max(ratio, 0.8), 1.2))
            v = step["values"]
            if clip_range_vf is not None:
                v = step["old_values"] + min(max(v - step["old_values"], -clip_range_vf), clip_range_vf)
            value += (step["returns"] - v) ** 2
            kl += ratio - 1 - log_ratio
            clipped += abs(ratio - 1) > 0.2
    assert [float(term) for term in sums] == pytest.approx([policy, value, x["entropy"].sum().item(), kl, clipped])


def test_different_shapes_are_refused() -> None:
    x = random_inputs()
    with pytest.raises(ValueError, match=r"must be \[T, B\]"):
        ppo_loss(**{**x, "returns": x["returns"][:-1]}, clip_range=0.2)
