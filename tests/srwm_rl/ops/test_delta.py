"""`delta_scan` against its equations written out, and the properties they imply."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from srwm_rl import delta_scan
from srwm_rl.ops import cpu

Scan = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(params=["reference", "cpu"])
def scan(request: pytest.FixtureRequest) -> Scan:
    if request.param == "cpu" and isinstance(cpu.load_kernel(), str):
        pytest.skip(str(cpu.load_kernel()))
    return partial(delta_scan, backend=request.param)


def random_case(n_steps: int, batch: int, heads: int, size: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "key": draw(n_steps, batch, heads, size).softmax(-1),
        "value": draw(n_steps, batch, heads, size),
        "query": draw(n_steps, batch, heads, size).softmax(-1),
        "rate": draw(n_steps, batch, heads).sigmoid(),
        "weight": draw(batch, heads, size, size),
        "episode_starts": torch.rand(n_steps, batch, generator=generator) < 0.3,
    }


def written_out(case: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Run the equations on single numbers."""
    n_steps, batch, heads, size = case["key"].shape
    y, final = torch.zeros_like(case["key"]), torch.zeros_like(case["weight"])
    for b in range(batch):
        for h in range(heads):
            fast = case["weight"][b, h].tolist()
            for t in range(n_steps):
                key, value, query = (case[name][t, b, h].tolist() for name in ("key", "value", "query"))
                rate = case["rate"][t, b, h].item()
                if case["episode_starts"][t, b]:
                    fast = [[0.0] * size for _ in range(size)]
                present = [sum(key[i] * fast[i][j] for i in range(size)) for j in range(size)]
                for i in range(size):
                    for j in range(size):
                        fast[i][j] += key[i] * rate * (value[j] - present[j])
                for j in range(size):
                    y[t, b, h, j] = sum(query[i] * fast[i][j] for i in range(size))
            final[b, h] = torch.tensor(fast)
    return y, final


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 3, 2, 4), (20, 2, 1, 5)])
def test_matches_the_equations_written_out(scan: Scan, shape: tuple[int, int, int, int]) -> None:
    case = random_case(*shape)
    torch.testing.assert_close(scan(**case), written_out(case))


def test_a_value_is_read_back_under_its_key(scan: Scan) -> None:
    keys = torch.eye(3).view(3, 1, 1, 3)
    values = torch.arange(9.0).view(3, 1, 1, 3)
    ones = torch.ones(3, 1, 1)
    _, fast = scan(keys, values, keys, ones)
    read, again = scan(keys, 2 * values, keys.flip(0), ones, fast)
    torch.testing.assert_close(read[0, 0, 0], values[2, 0, 0])  # not yet overwritten
    torch.testing.assert_close(again[0, 0], 2 * values[:, 0, 0])


def test_gradcheck_through_resets(scan: Scan) -> None:
    case = random_case(4, 2, 2, 3)
    case["episode_starts"][2] = torch.tensor([True, False])
    starts = case.pop("episode_starts")
    inputs = [tensor.requires_grad_() for tensor in case.values()]
    assert torch.autograd.gradcheck(lambda *args: scan(*args, starts), inputs)


def test_split_unroll_equals_whole_unroll(scan: Scan) -> None:
    case = random_case(9, 3, 2, 4)
    y, final = scan(**case)
    carried, ys = case.pop("weight"), []
    for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
        piece, carried = scan(**{name: tensor[part] for name, tensor in case.items()}, weight=carried)
        ys.append(piece)
    torch.testing.assert_close((torch.cat(ys), carried), (y, final))


def test_a_reset_is_a_fresh_episode_for_that_environment_alone(scan: Scan) -> None:
    case = random_case(6, 3, 2, 4)
    case["episode_starts"] = torch.zeros(6, 3)
    plain, plain_final = scan(**case)
    case["episode_starts"][3, 1] = 1
    y, final = scan(**case)
    fresh, fresh_final = scan(*(case[name][3:, 1:2] for name in ("key", "value", "query", "rate")))
    torch.testing.assert_close((y[3:, 1:2], final[1:2]), (fresh, fresh_final))
    torch.testing.assert_close((y[:, ::2], final[::2]), (plain[:, ::2], plain_final[::2]))
    assert not torch.allclose(y[3:, 1], plain[3:, 1])


def test_a_reset_forgets_an_episode_that_blew_up(scan: Scan) -> None:
    case = random_case(3, 2, 1, 3)
    case["weight"][:] = torch.nan
    case["episode_starts"] = torch.tensor([[True, True], [False, False], [False, False]])
    y, final = scan(**case)
    assert torch.isfinite(y).all()
    assert torch.isfinite(final).all()


def test_memory_layout_and_dtype_do_not_matter(scan: Scan) -> None:
    case = random_case(5, 3, 2, 4)
    apart = {
        name: torch.stack((tensor, tensor), -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]
        for name, tensor in case.items()
    }
    assert not apart["key"].is_contiguous()
    torch.testing.assert_close(scan(**apart), scan(**case))
    single = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in case.items()}
    y, final = scan(**single)
    assert y.dtype == final.dtype == torch.float32
    torch.testing.assert_close(y.double(), scan(**case)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("key", lambda a: {"key": a["key"][0]}),
        ("key", lambda a: {"key": a["key"].long()}),
        ("value", lambda a: {"value": a["value"][..., :-1]}),
        ("query", lambda a: {"query": a["query"].float()}),
        ("rate", lambda a: {"rate": a["rate"][..., None]}),
        ("weight", lambda a: {"weight": a["weight"][:1]}),
        ("episode_starts", lambda a: {"episode_starts": a["episode_starts"][:-1]}),
        ("backend", lambda a: {"backend": "cuda"}),
    ],
)
def test_wrong_arguments_are_named(name: str, change: Callable[[dict[str, Tensor]], dict[str, object]]) -> None:
    case = random_case(3, 2, 2, 4)
    with pytest.raises(ValueError, match=f"^{name}"):
        delta_scan(**{**case, **change(case)})  # type: ignore[arg-type]
