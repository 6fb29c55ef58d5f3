"""Compare a policy's fused kernels with the reference before they are timed."""

from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.errors import UserError
from srwm_rl.nn.encoders import MAIN_KEY
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.ops.backends import prefer
from srwm_rl.scripts.benchmarks.upper_bound import make_batch


def check_same(fused: RecurrentAlgorithm, reference: RecurrentAlgorithm) -> None:
    """Compare values, log-probabilities and gradients for one unroll of random steps with episode starts.

    The reference gets the weights of the fused trainer.

    Raises:
        UserError: they differ.
    """
    reference.policy.load_state_dict(fused.policy.state_dict())
    policy, (n_steps, n) = fused.policy, (min(fused.n_steps, 50), 4)
    parts = {key: _sample(space, n_steps, n) for key, space in policy.obs_spaces.items()}
    obs = fused.obs_tensor(parts if isinstance(policy.observation_space, spaces.Dict) else parts[MAIN_KEY])
    actions = torch.as_tensor(_sample(policy.action_space, n_steps, n), device=fused.device)
    starts = torch.as_tensor(np.random.default_rng(0).random((n_steps, n)) < 0.1, device=fused.device)
    results = []
    for model, backend in ((fused, "auto"), (reference, "reference")):
        with prefer(backend):
            state = model.policy.initial_state(n)
            evaluation = model.engine.evaluate_sequence(obs, actions, state, starts, None)
            (evaluation.values.square().sum() + evaluation.log_probs.sum()).backward()
            gradient = _pop_gradient(model.policy)
            batch, scalars = make_batch(model, obs, actions, state, starts)
            model.engine.backward([batch], *scalars)
            results.append((evaluation.values, evaluation.log_probs, gradient, _pop_gradient(model.policy)))
    for name, ours, expected in zip(("values", "log-probabilities", "gradients", "updates"), *results, strict=True):
        if (ours - expected).norm() > 1e-3 * expected.norm():
            raise UserError(f"the fused kernel's {name} differ from the reference's; not timed")


def _pop_gradient(policy: SRWMPolicy) -> Tensor:
    """Return the parameters' gradients as one vector, and reset them."""
    gradient = torch.cat([weight.grad.flatten() for weight in policy.parameters() if weight.grad is not None])
    policy.zero_grad()
    return gradient


def _sample(space: spaces.Space, n_steps: int, n: int) -> np.ndarray:
    """Return samples `[T, B, ...]` of a space, the same at each call."""
    space.seed(0)
    samples: np.ndarray = np.stack([space.sample() for _ in range(n_steps * n)])
    return samples.reshape(n_steps, n, *samples.shape[1:])
