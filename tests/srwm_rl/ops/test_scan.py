"""`srwm_scan` against the authors' data and against the properties the paper's equations imply."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from srwm_rl import srwm_scan
from srwm_rl.ops.backends import log_fallback

GOLDEN = Path(__file__).parents[2] / "golden" / "op_srwm.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def joined(golden: dict[str, Tensor], prefix: str) -> Tensor:
    return torch.cat([golden[f"{prefix}{name}"] for name in ("W_y", "W_q", "W_k", "w_b")], dim=-1)  # [N, H, D, 3D+4]


def random_case(
    n_steps: int, batch: int, heads: int, size: int, seed: int = 0, read: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    columns = (read or size) + 2 * size + 4
    x = torch.randn(n_steps, batch, heads, size, generator=generator, dtype=torch.float64)
    weight = torch.randn(heads, size, columns, generator=generator, dtype=torch.float64) / size**0.5
    shift = 0.3 * torch.randn(batch, heads, size, columns, generator=generator, dtype=torch.float64)
    starts = torch.rand(n_steps, batch, generator=generator) < 0.3
    return x, weight, shift, starts


def test_matches_the_authors_outputs_final_weights_and_gradients(golden: dict[str, Tensor]) -> None:
    weights = joined(golden, "").requires_grad_()  # one weight per batch entry: here the shift carries it
    x = golden["x"].permute(2, 0, 1, 3).contiguous().requires_grad_()  # [T, N, H, D]
    y, final = srwm_scan(x, torch.zeros_like(weights[0]), weights)
    (y * golden["out_weight"].permute(2, 0, 1, 3)).sum().backward()
    assert x.grad is not None
    for ours, theirs in (
        (y, golden["out"].permute(2, 0, 1, 3)),
        (final, joined(golden, "final_")),
        (x.grad, golden["grad_x"].permute(2, 0, 1, 3)),
        (weights.grad, joined(golden, "grad_")),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_matches_the_authors_gradient_of_the_slow_weight(golden: dict[str, Tensor]) -> None:
    for n, slow in enumerate(joined(golden, "")):
        weight = slow.clone().requires_grad_()
        x = golden["x"][n].permute(1, 0, 2)[:, None]  # [T, 1, H, D]
        y, shift = srwm_scan(x, weight)
        (y * golden["out_weight"][n].permute(1, 0, 2)[:, None]).sum().backward()
        torch.testing.assert_close(weight.grad, joined(golden, "grad_")[n], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(slow + shift[0], joined(golden, "final_")[n], rtol=1e-10, atol=1e-10)


def written_out(
    x: Tensor, weight: Tensor, shift: Tensor, starts: Tensor, retention: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the paper's equations on single vectors, with its two separate reads."""
    n_steps, batch, heads, size = x.shape
    read_size = weight.shape[-1] - 2 * size - 4
    y = x.new_zeros(n_steps, batch, heads, read_size)
    final = torch.zeros_like(shift)
    edges = (0, read_size, read_size + size, read_size + 2 * size, read_size + 2 * size + 4)
    for b in range(batch):
        for h in range(heads):
            fast = weight[h] + shift[b, h]
            for t in range(n_steps):
                if starts[t, b]:
                    fast = weight[h].clone()
                read = x[t, b, h] @ fast
                y[t, b, h] = read[:read_size]
                query, key = read[edges[1] : edges[2]].softmax(0), read[edges[2] : edges[3]].softmax(0)
                rates = read[edges[3] :].sigmoid()
                target, present = query @ fast, key @ fast
                kept = 1.0 if retention is None else retention[t, b, h]
                edited = weight[h] + kept * (fast - weight[h])
                for g, rate in enumerate(rates):
                    group = slice(edges[g], edges[g + 1])
                    edited[:, group] += rate * torch.outer(key, target[group] - present[group])
                fast = edited
            final[b, h] = fast - weight[h]
    return y, final


@pytest.mark.parametrize("read", [1, 4, 13])
@pytest.mark.parametrize("retained", [False, True])
def test_matches_the_equations_written_out(read: int, retained: bool) -> None:
    x, weight, shift, starts = random_case(7, 3, 2, 4, read=read)
    retention = torch.rand(7, 3, 2, dtype=x.dtype) if retained else None
    ours = srwm_scan(x, weight, shift, starts, retention=retention)
    torch.testing.assert_close(ours, written_out(x, weight, shift, starts, retention))


def test_gradcheck_with_a_wide_output_and_retention() -> None:
    x, weight, shift, starts = random_case(4, 2, 1, 2, read=7)
    retention = torch.rand(4, 2, 1, dtype=x.dtype)
    inputs = [each.requires_grad_() for each in (x, weight, shift, retention)]
    assert torch.autograd.gradcheck(lambda x, w, s, r: srwm_scan(x, w, s, starts, retention=r), inputs)


def test_what_no_fused_kernel_takes_runs_in_the_reference_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    log_fallback.cache_clear()
    x, weight, shift, _ = random_case(2, 1, 2, 4)
    for _ in range(2):
        srwm_scan(x, weight, shift, retention=torch.ones(2, 1, 2, dtype=x.dtype))
    assert [record.getMessage().count("retention is given") for record in caplog.records] == [1]
    with pytest.raises(ValueError, match="backend 'cpu' cannot run"):
        srwm_scan(x, random_case(2, 1, 2, 4, read=5)[1], backend="cpu")


def test_a_reset_forgets_an_episode_that_blew_up() -> None:
    x, weight, shift, starts = random_case(4, 2, 1, 3)
    starts[:] = torch.tensor([[True, False], *[[False, False]] * 3])
    shift[0] = torch.nan
    y, final = srwm_scan(x, weight, shift, starts, backend="reference")
    assert torch.isfinite(y).all()
    assert torch.isfinite(final).all()


def test_gradcheck_through_resets() -> None:
    x, weight, shift, starts = random_case(4, 2, 2, 3)
    starts[2] = torch.tensor([True, False])
    inputs = (x.requires_grad_(), weight.requires_grad_(), shift.requires_grad_())
    assert torch.autograd.gradcheck(lambda *args: srwm_scan(*args, starts), inputs)


def test_every_column_group_of_the_weight_gets_a_gradient() -> None:
    x, weight, _, _ = random_case(5, 2, 2, 4)
    y, _ = srwm_scan(x, weight.requires_grad_())
    y[-1].sum().backward()
    assert weight.grad is not None
    for columns in (slice(0, 4), slice(4, 8), slice(8, 12), *(slice(12 + i, 13 + i) for i in range(4))):
        assert weight.grad[..., columns].abs().max() > 1e-6


def test_split_unroll_equals_whole_unroll() -> None:
    x, weight, shift, starts = random_case(9, 3, 2, 4)
    y, final = srwm_scan(x, weight, shift, starts)
    y_a, middle = srwm_scan(x[:4], weight, shift, starts[:4])
    y_b, end = srwm_scan(x[4:], weight, middle, starts[4:])
    torch.testing.assert_close(torch.cat((y_a, y_b)), y)
    torch.testing.assert_close(end, final)


def test_a_reset_is_a_fresh_episode_for_that_environment_alone() -> None:
    x, weight, shift, _ = random_case(6, 3, 2, 4)
    starts = torch.zeros(6, 3)
    starts[3, 1] = 1
    y, final = srwm_scan(x, weight, shift, starts)
    plain, plain_final = srwm_scan(x, weight, shift)
    fresh, fresh_final = srwm_scan(x[3:, 1:2], weight)
    torch.testing.assert_close(y[3:, 1:2], fresh)
    torch.testing.assert_close(final[1:2], fresh_final)
    torch.testing.assert_close(y[:, ::2], plain[:, ::2])
    torch.testing.assert_close(final[::2], plain_final[::2])
    assert not torch.allclose(y[3:, 1], plain[3:, 1])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda a: a | {"x": a["x"][0]}),
        ("x", lambda a: a | {"x": a["x"].long()}),
        ("weight", lambda a: a | {"weight": a["weight"][..., :12]}),
        ("weight", lambda a: a | {"weight": a["weight"].float()}),
        ("shift", lambda a: a | {"shift": a["shift"][:1]}),
        ("retention", lambda a: a | {"retention": torch.ones(3, 2)}),
        ("weight", lambda a: a | {"weight": torch.tensor(1.0)}),
        ("episode_starts", lambda a: a | {"episode_starts": a["episode_starts"][:-1]}),
        ("backend", lambda a: a | {"backend": "cuda"}),
    ],
)
def test_wrong_arguments_are_named(name: str, change: object) -> None:
    x, weight, shift, starts = random_case(3, 2, 2, 4)
    arguments = {"x": x, "weight": weight, "shift": shift, "episode_starts": starts}
    with pytest.raises(ValueError, match=name):
        srwm_scan(**change(arguments))  # type: ignore[operator]
