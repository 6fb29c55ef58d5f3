"""`srwm_scan` against the authors' data and against the properties the paper's equations imply."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from srwm_rl import srwm_scan
from srwm_rl.ops import cpu
from tests.srwm_rl.ops.defaults import other_default, other_defaults

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


def random_retention(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # [T, B, H]


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
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    starts: Tensor,
    retention: Tensor | None = None,
    bound: float | None = None,
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
                length = (edited - weight[h]).square().sum().sqrt()
                too_long = bound is not None and length > bound
                fast = weight[h] + (edited - weight[h]) * (bound / length if too_long else 1.0)
            final[b, h] = fast - weight[h]
    return y, final


@pytest.mark.parametrize("read", [1, 4, 13])
@pytest.mark.parametrize("retained", [False, True])
@pytest.mark.parametrize("bound", [None, 1.0])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_matches_the_equations_written_out(read: int, retained: bool, bound: float | None, backend: str) -> None:
    x, weight, shift, starts = random_case(7, 3, 2, 4, read=read)
    retention = random_retention(7, 3, 2) if retained else None
    ours = srwm_scan(x, weight, shift, starts, retention=retention, shift_bound=bound, backend=backend)
    torch.testing.assert_close(ours, written_out(x, weight, shift, starts, retention, bound))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("bound", [None, 0.3])
def test_gradcheck_with_a_wide_output_retention_and_a_bound(backend: str, bound: float | None) -> None:
    x, weight, shift, starts = random_case(4, 2, 1, 2, read=7)
    retention = random_retention(4, 2, 1)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, shift, retention)]

    def run(x: Tensor, w: Tensor, s: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return srwm_scan(x, w, s, starts, retention=r, shift_bound=bound, backend=backend)

    assert torch.autograd.gradcheck(run, inputs)
    if bound is not None:  # or nothing was tested
        assert float(run(*inputs)[1].detach().flatten(2).norm(dim=-1).max()) == pytest.approx(bound)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_bound_acts_on_each_head_alone_and_only_where_it_is_passed(backend: str) -> None:
    x, weight, shift, _ = random_case(6, 3, 2, 4)
    shift[:, 0] *= 0.1
    weight[0, :, -4:] -= 20 * x[..., 0, :].mean()  # head 0 learns less
    free = srwm_scan(x, weight, shift, backend=backend)[1].flatten(2).norm(dim=-1)  # [B, H]
    bound = float(free.min(dim=0).values.max())
    y, final = srwm_scan(x, weight, shift, shift_bound=bound, backend=backend)
    assert final.flatten(2).norm(dim=-1).max() <= bound * (1 + 1e-12)
    loose = srwm_scan(x, weight, shift, shift_bound=1e6, backend=backend)
    torch.testing.assert_close(loose, srwm_scan(x, weight, shift, backend=backend))
    alone = srwm_scan(x[:, 1:2, 1:], weight[1:], shift[1:2, 1:], shift_bound=bound, backend=backend)
    torch.testing.assert_close((y[:, 1:2, 1:], final[1:2, 1:]), alone)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("size", [1, 3])  # heads of size 1 have equal key and query: they never edit
def test_no_gradient_is_lost_at_zero_or_at_the_bound(backend: str, size: int) -> None:
    for scale in (0.0, 1.0):  # zeros, and a shift whose norm is just the bound
        x, weight, shift, _ = random_case(3, 1, 1, size)
        weight[..., size : 3 * size] = 0  # the queries are the keys: no edits
        shift[..., size:] = 0
        shift *= scale * 2 / shift.norm()
        inputs = [tensor.requires_grad_() for tensor in (x, weight, shift)]
        y, final = srwm_scan(*inputs, shift_bound=2.0, backend=backend)
        torch.testing.assert_close(final, shift)
        for grad in torch.autograd.grad((y.sum(), final.sum()), inputs):
            assert grad.isfinite().all()


@pytest.mark.parametrize("bound", [0.0, -1, float("nan"), float("inf"), 1e-20, True, "1"])
def test_a_bound_is_a_number_above_0(bound: object) -> None:
    x, weight, _, _ = random_case(1, 1, 1, 2)
    with pytest.raises(ValueError, match="shift_bound must be a number above 0"):
        srwm_scan(x, weight, shift_bound=bound)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("bound", [None, 0.5])
def test_split_unroll_equals_whole_unroll(bound: float | None) -> None:
    x, weight, shift, starts = random_case(9, 3, 2, 4)
    y, final = srwm_scan(x, weight, shift, starts, shift_bound=bound)
    y_a, middle = srwm_scan(x[:4], weight, shift, starts[:4], shift_bound=bound)
    y_b, end = srwm_scan(x[4:], weight, middle, starts[4:], shift_bound=bound)
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


@pytest.mark.skipif(isinstance(cpu.load_kernel(), str), reason=str(cpu.load_kernel()))
@other_defaults
def test_defaults_of_torch_do_not_matter(kind: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.rand(20, 2, 2, 4, requires_grad=True), torch.rand(2, 4, 16, requires_grad=True)

    def results() -> list[Tensor]:
        y, shift = srwm_scan(x, weight, backend="cpu")
        return [y, shift, *torch.autograd.grad(y.square().sum() + shift.sum(), (x, weight))]

    expected = results()
    with other_default(kind):
        assert all(map(torch.equal, results(), expected))


@pytest.mark.skipif(isinstance(cpu.load_kernel(), str), reason=str(cpu.load_kernel()))
def test_func_grad_takes_the_reference_and_vmap_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight = torch.rand(5, 2, 2, 4), torch.rand(2, 4, 16)

    def loss(weight: Tensor, backend: str = "auto") -> Tensor:
        return srwm_scan(x, weight, backend=backend)[0].square().sum()

    (expected,) = torch.autograd.grad(loss(weight.requires_grad_()), weight)
    weight = weight.detach()
    torch.testing.assert_close(torch.func.grad(loss)(weight), expected)
    _, pull_back = torch.func.vjp(loss, weight)
    torch.testing.assert_close(pull_back(torch.ones(()))[0], expected)
    per_weight = torch.func.vmap(torch.func.grad(loss))(torch.stack((weight, weight)))
    torch.testing.assert_close(per_weight, torch.stack((expected, expected)))
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run: torch.func.grad cannot differentiate it"):
        torch.func.grad(partial(loss, backend="cpu"))(weight)
    monkeypatch.setattr("srwm_rl.ops.scan.srwm_scan_reference", None)  # not called
    assert torch.func.vmap(loss)(torch.stack((weight, weight))).shape == (2,)
