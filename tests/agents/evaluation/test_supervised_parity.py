"""Supervised parity: streams, truncation and resets; the SRWM learns it, the truncated one does not."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from srwm_rl.agents.evaluation.supervised_parity import (
    ParityModel,
    ParitySettings,
    accuracy_by_step,
    parity_streams,
    train_parity,
)
from srwm_rl.errors import UserError

SMALL = {"hidden_size": 8, "n_layers": 1, "n_heads": 2}
USUAL = {"hidden_size": 32, "n_layers": 1, "n_heads": 4}


def test_parity_counts_the_ones_so_far() -> None:
    bits, parity = parity_streams(9, 20, torch.Generator().manual_seed(0))
    assert bits.shape == parity.shape == (9, 20)
    for t in range(9):
        assert parity[t].tolist() == [sum(bits[: t + 1, i].tolist()) % 2 for i in range(20)]
    assert not torch.equal(bits[0], bits[1])


def gradient(bptt: int | None) -> torch.Tensor:
    """Return the gradient of an SRWM's slow weight, `[H, D, 3D+4]`."""
    torch.manual_seed(0)
    model = ParityModel("srwm", **SMALL)
    bits, parity = parity_streams(6, 4, torch.Generator().manual_seed(0))
    torch.nn.functional.binary_cross_entropy_with_logits(model(bits, bptt), parity.float()).backward()
    weight = next(p for name, p in model.core.named_parameters() if name.endswith("layers.0.weight"))
    assert weight.grad is not None
    return weight.grad


def test_the_optimizer_scales_the_steps_of_edit_columns() -> None:
    weights = []
    for factor in (0.0, 1.0, 3.0):
        settings = ParitySettings(core_kwargs={**SMALL, "edit_lr_multiplier": factor}, n_updates=1, batch=4)
        weights.append(train_parity(settings).core.layers[0].weight.detach())  # type: ignore[index,union-attr]
    still, plain, scaled = (weight[..., 4:] for weight in weights)
    assert not torch.equal(plain, still)
    torch.testing.assert_close(scaled - still, 3 * (plain - still), rtol=1e-3, atol=1e-6)
    assert torch.equal(weights[1][..., :4], weights[2][..., :4])


def test_truncation_at_every_step_leaves_the_self_modification_without_gradient() -> None:
    size = 4
    whole, cut = gradient(None), gradient(1)
    assert (whole[..., :size].abs().sum(), cut[..., :size].abs().sum()) > (0, 0)
    assert whole[..., size:].abs().sum() > 0
    assert cut[..., size:].abs().sum() == 0


def test_with_forget_each_answer_depends_on_its_bit_alone() -> None:
    torch.manual_seed(0)
    model = ParityModel("srwm", **SMALL)
    bits = torch.randint(0, 2, (7, 5))
    alone = torch.cat([model(bits[t : t + 1]) for t in range(7)])
    assert torch.allclose(model(bits, forget=True), alone, atol=1e-6)
    assert not torch.allclose(model(bits), alone, atol=1e-3)


def test_training_is_reproducible_and_does_not_use_the_global_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = cross_entropy(logits, target)
        losses[-1].append(loss.item())
        return loss

    cross_entropy = functional.binary_cross_entropy_with_logits
    monkeypatch.setattr(functional, "binary_cross_entropy_with_logits", record)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    losses: list[list[float]] = []
    for seed in (1, 1, 2):
        losses.append([])
        settings = ParitySettings(core_kwargs=SMALL, n_updates=3, batch=4, seed=seed)
        train_parity(settings)
    assert torch.equal(torch.rand(1), expected)
    assert len(losses[0]) == 3
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("setting", ["n_updates", "batch", "longest"])
def test_counts_below_one_are_refused(setting: str) -> None:
    with pytest.raises(UserError, match=setting):
        ParitySettings(**{setting: 0})


def test_accuracy_is_that_of_the_answers() -> None:
    class Last(ParityModel):
        """Predict the bit itself: right at the first step, and half of the time later."""

        def forward(self, bits: torch.Tensor, bptt: int | None = None, forget: bool = False) -> torch.Tensor:
            return bits - 0.5

    right = accuracy_by_step(Last("feedforward", hidden_size=1, n_layers=1), 20, 2000).numpy()
    assert right[0] == 1
    assert np.abs(right[1:] - 0.5).max() < 0.06


@pytest.mark.slow
def test_the_srwm_learns_parity_beyond_its_training_length_and_the_truncated_one_does_not() -> None:
    tails = {}
    for bptt in (None, 1):
        model = train_parity(ParitySettings(core_kwargs=USUAL, bptt=bptt))
        tails[bptt] = accuracy_by_step(model, 160)[120:].mean().item()
        held = accuracy_by_step(model, 160, forget=True)[120:].mean().item()
        assert abs(held - 0.5) < 0.05  # the slow weight alone knows nothing
    assert tails[None] >= 0.99
    assert abs(tails[1] - 0.5) < 0.05
