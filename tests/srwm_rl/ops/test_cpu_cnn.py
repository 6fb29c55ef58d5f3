"""The CNN in C, on matrix tiles and on vectors, against twins in plain PyTorch: outputs and gradients.

In bfloat16 the twin rounds in the same places, and weights, frames and gradients are small integers, whose sums are
exact in any order: the bits must be the same. In float32 it computes in double precision.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from srwm_rl.nn.cnns import IN_C, Conv, ImpalaCNN, NatureCNN, PatchCNN, ResidualBlock
from srwm_rl.ops import cpu, cpu_cnn
from tests.srwm_rl.ops.defaults import other_default, other_defaults

KERNEL = cpu.load_kernel()
LEVELS = () if isinstance(KERNEL, str) else range(KERNEL.level + 1)
with_tiles = pytest.mark.skipif(not cpu_cnn.has_tiles(), reason="no matrix tiles (AMX)")
with_vectors = pytest.mark.skipif(isinstance(KERNEL, str), reason=str(KERNEL))
in_c = pytest.mark.parametrize(
    "precision", [pytest.param("bfloat16", marks=with_tiles), pytest.param("float32", marks=with_vectors)]
)
NETWORKS = {
    "published": (ImpalaCNN, (64, 64, 3), {}),
    "four grey frames": (ImpalaCNN, (44, 44, 4), {"channels": (16, 32)}),
    "odd": (ImpalaCNN, (21, 35, 1), {"channels": (48, 16, 64)}),
    "down to a pixel": (ImpalaCNN, (5, 3, 3), {"channels": (32, 16, 16)}),
    "one pixel": (ImpalaCNN, (1, 1, 5), {"channels": (16,)}),
    "large": (ImpalaCNN, (210, 160, 3), {"channels": (16, 16)}),
    "wide": (ImpalaCNN, (12, 12, 2), {"channels": (80, 96)}),
    "patches": (PatchCNN, (64, 64, 3), {}),
    "patches that leave pixels out": (PatchCNN, (50, 61, 1), {"channels": (16, 48), "patch": 5}),
    "patches of a frame": (PatchCNN, (8, 8, 2), {"channels": (32,), "patch": 8}),
}
OF_VECTORS = NETWORKS | {
    "narrow": (ImpalaCNN, (32, 24, 3), {"channels": (8, 24, 40)}),  # vectors alone and in pairs, direct and by tiles
    "seven channels": (ImpalaCNN, (26, 30, 7), {"channels": (8, 16)}),
    "patches of many numbers": (PatchCNN, (64, 48, 4), {"channels": (24, 8), "patch": 8}),
}


class Rounded(torch.autograd.Function):
    """Rounds to bfloat16 what goes forward and, backward, its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.bfloat16().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.bfloat16().to(grad.dtype)


def rounded(x: Tensor) -> Tensor:
    result: Tensor = Rounded.apply(x)
    return result


def convolved(conv: Conv, x: Tensor, scale: float = 1.0) -> Tensor:
    weight = conv.weight * scale
    weight = weight + (weight.bfloat16() - weight).detach()  # its gradient is not rounded
    assert conv.bias is not None
    return F.conv2d(x, weight.double(), conv.bias.double(), conv.stride, conv.padding)


def twin(cnn: ImpalaCNN, frames: Tensor) -> Tensor:
    x = (frames if cnn.channels_first else frames.permute(0, 3, 1, 2)).double()
    for module in cnn.stages:
        if isinstance(module, ResidualBlock):
            inner = torch.relu(rounded(convolved(module.first, torch.relu(x))))
            x = rounded(x + convolved(module.second, inner))
        elif isinstance(module, Conv):
            x = rounded(convolved(module, x, cnn.scale if module is cnn.stages[0] else 1.0))
        else:
            x = rounded(F.max_pool2d(x, 3, stride=2, padding=1))
    return torch.relu(x).flatten(1)


def make(name: str, precision: str = "bfloat16", **settings: Any) -> ImpalaCNN:
    kind, shape, more = OF_VECTORS[name]
    torch.manual_seed(0)
    cnn: ImpalaCNN = kind(shape, False, precision=precision, **more, **settings)
    cnn.kernels = IN_C[precision]
    return cnn


def make_integer(name: str, precision: str = "bfloat16") -> ImpalaCNN:
    """Return a network with some three weights of 1 or -1 for each output."""
    cnn = make(name, precision, scale=1.0)
    with torch.no_grad():
        for weight in cnn.stages.parameters():
            is_any = torch.rand(weight.shape) < 3 / (weight[0].numel() if weight.dim() > 1 else 9)
            weight.copy_(torch.randint(0, 2, weight.shape).mul(2).sub(1) * is_any)
    return cnn


def draw(cnn: ImpalaCNN, n: int, high: int = 256) -> Tensor:
    return torch.randint(0, high, (n, *cnn.shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def encoded(cnn: ImpalaCNN, frames: Tensor) -> Tensor:
    convs = [module for module in cnn.stages.modules() if isinstance(module, Conv)]
    biases = [conv.bias for conv in convs if conv.bias is not None]
    dtype = getattr(torch, cnn.precision)
    return cpu_cnn.encode(frames, cnn._layers(), cnn.scale, [conv.weight for conv in convs], biases, dtype)


def gradients(cnn: ImpalaCNN, y: Tensor) -> list[Tensor]:
    grad = torch.randint(-2, 3, y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return list(torch.autograd.grad(y, list(cnn.stages.parameters()), grad))


def difference(x: Tensor, expected: Tensor) -> float:
    x, expected = x.detach().double(), expected.detach().double()
    return float((x - expected).norm() / expected.norm())


@pytest.fixture
def threads() -> Iterator[None]:
    n = torch.get_num_threads()
    yield
    torch.set_num_threads(n)


@with_tiles
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("n", [1, 37])
def test_on_tiles(name: str, n: int) -> None:
    cnn = make_integer(name)
    frames = draw(cnn, n, high=4)
    y, expected = encoded(cnn, frames), twin(cnn, frames)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.double(), expected)
    pairs = list(zip(gradients(cnn, y), gradients(cnn, expected), strict=True))
    assert all(torch.equal(grad, expected_grad) for grad, expected_grad in pairs)
    if n > 1 and min(cnn.shape[:2]) > 8:
        assert 0 < (y > 0).float().mean() < 1
        assert all(grad.abs().max() > 0 for grad, _ in pairs)


@with_vectors
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: cpu.LEVELS[level])
@pytest.mark.parametrize(("name", "n"), [*((name, 1) for name in OF_VECTORS), ("published", 70), ("odd", 37)])
def test_on_vectors(name: str, n: int, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_cnn, "load_kernel", lambda: KERNEL._replace(level=level))  # type: ignore[union-attr]
    cnn = make(name, "float32")
    frames = draw(cnn, n)
    y = encoded(cnn, frames)
    grads = gradients(cnn, y)
    expected = operation_by_operation(cnn.double(), frames)
    assert y.dtype == torch.float32
    assert difference(y, expected) < 2e-6
    assert max(map(difference, grads, gradients(cnn, expected))) < 2e-5  # sums of terms of both signs
    with torch.no_grad():
        assert torch.equal(encoded(cnn.float(), frames), y)


def operation_by_operation(cnn: ImpalaCNN, frames: Tensor) -> Tensor:
    x: Tensor = cnn.stages[0](frames.permute(0, 3, 1, 2).to(torch.float64), cnn.scale)
    return torch.relu(cnn.stages[1:](x)).flatten(1)


@in_c
def test_the_cnn_is_the_same_as_operation_by_operation(precision: str) -> None:
    results = []
    for kernels in ("plain", IN_C[precision]):
        cnn = make("published", precision)
        cnn.kernels = kernels
        y = cnn(draw(cnn, 30))
        assert y.dtype == torch.float32
        y.square().sum().backward()
        assert all(weight.grad is not None for weight in cnn.parameters())
        results.append([y.detach(), torch.cat([weight.grad.flatten() for weight in cnn.parameters()])])  # type: ignore[union-attr]
    most = 0.02 if precision == "bfloat16" else 5e-6
    assert [difference(x, expected) < most for x, expected in zip(*results, strict=True)] == [True, True]


@in_c
def test_bits_depend_neither_on_threads_nor_on_other_frames(precision: str, threads: None) -> None:
    cnn = make("published", precision)
    frames, results = draw(cnn, 70), []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        y = encoded(cnn, frames)
        results.append([y.detach(), *gradients(cnn, y)])
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))
    with torch.no_grad():
        assert torch.equal(encoded(cnn, frames[50:53]), results[0][0][50:53])


@in_c
def test_channels_first(precision: str) -> None:
    torch.manual_seed(0)
    cnn = ImpalaCNN((3, 20, 24), True, channels=(16, 16), precision=precision)
    frames = torch.randint(0, 256, (3, 3, 20, 24), dtype=torch.uint8)
    cnn.kernels = IN_C[precision]
    with torch.no_grad():
        y = cnn(frames)
        cnn.kernels = "plain"
        assert difference(y, cnn(frames)) < 0.02


@with_tiles
def test_torch_and_tiles_take_turns() -> None:
    """Torch's own kernels set up the tiles in their way, and may rely on it later."""
    cnn, frames = make("published"), draw(make("published"), 8)
    with torch.no_grad():
        results = []
        for kernels in ("plain", IN_C[cnn.precision]) * 3:
            cnn.kernels = kernels
            results.append(cnn(frames))
    assert all(torch.equal(a, b) for a, b in zip(results, results[2:], strict=False))


@in_c
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_seen(precision: str, number: float) -> None:
    cnn = make("published", precision)
    with torch.no_grad():
        cnn.stages[0].weight[:, 0, 1, 1] = number  # type: ignore[index,union-attr]
        assert not encoded(cnn, draw(cnn, 2)).isfinite().all()


@in_c
def test_a_subset_of_the_weights_can_be_learned(precision: str) -> None:
    cnn = make("four grey frames", precision)
    for weight in cnn.stages[0].parameters():
        weight.requires_grad_(False)
    cnn(draw(cnn, 3)).sum().backward()
    assert [weight.grad is None for weight in cnn.stages.parameters()] == [True] * 2 + [False] * 18


@in_c
def test_what_cannot_run_in_c_runs_operation_by_operation(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Tensor:
        raise AssertionError("it ran in C")

    cnn = make("published", precision)
    frames = draw(cnn, 2)
    monkeypatch.setattr(cpu_cnn, "encode", refuse)
    with pytest.raises(AssertionError):
        cnn(frames)
    assert cnn(frames.float()).shape == (2, 256)
    assert cnn(frames[:0]).shape == (0, 256)
    cnn.stages[1].register_forward_hook(lambda *_: None)
    assert cnn(frames).shape == (2, 256)
    any_number = ({0: torch.export.Dim("n")},)
    exported = torch.export.export(make("published", precision), (frames,), dynamic_shapes=any_number).module()
    assert exported(draw(cnn, 5)).shape == (5, 256)


@in_c
@pytest.mark.parametrize("shape", [(64, 64, 1), (64, 64, 4), (32, 32, 3), (63, 63, 3), (1, 1, 3)])
def test_frames_of_another_shape_are_never_read_as_ours(precision: str, shape: tuple[int, ...]) -> None:
    cnn, frames = make("published", precision), torch.zeros(40, *shape, dtype=torch.uint8)
    convs = [module for module in cnn.stages.modules() if isinstance(module, Conv)]
    with pytest.raises(ValueError, match=r"frames must be uint8 \[N, 64, 64, 3\] on the CPU"):
        cpu_cnn.encode(frames, cnn._layers(), 1.0, [conv.weight for conv in convs], [], torch.float32)
    results = []
    for kernels in (IN_C[precision], "plain"):
        cnn.kernels = kernels
        try:
            results.append(cnn(frames).tolist())
        except RuntimeError as error:
            results.append(str(error))
    assert results[0] == results[1]


@in_c
def test_wrong_weights_are_refused(precision: str) -> None:
    cnn = make("published", precision)
    frames, layers = draw(cnn, 2), cnn._layers()
    convs = [module for module in cnn.stages.modules() if isinstance(module, Conv)]
    weights, biases = [conv.weight for conv in convs], [conv.bias for conv in convs if conv.bias is not None]
    for wrong in (weights[:-1], [weights[0].transpose(2, 3)[:8], *weights[1:]]):
        with pytest.raises(ValueError, match="must be of the layers' shapes"):
            cpu_cnn.encode(frames, layers, 1.0, wrong, biases, torch.float32)
    with pytest.raises(ValueError, match="must be of the layers' shapes"):
        cpu_cnn.encode(frames, layers, 1.0, weights, biases[1:], torch.float32)
    with pytest.raises(ValueError, match="must be float32 on the CPU"):
        cpu_cnn.encode(frames, layers, 1.0, weights, [bias.double() for bias in biases], torch.float32)


@in_c
def test_weights_and_biases_in_any_layout(precision: str) -> None:
    cnn = make_integer("four grey frames", precision)
    frames = draw(cnn, 3)
    expected = encoded(cnn, frames)
    for conv in [module for module in cnn.stages.modules() if isinstance(module, Conv)]:
        assert conv.bias is not None
        conv.bias = nn.Parameter(conv.bias.detach()[:, None].repeat(1, 7)[:, 2])
        conv.weight = nn.Parameter(conv.weight.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0))
        assert (conv.bias.stride(), conv.weight.stride()[0]) == ((7,), 1)
    assert torch.equal(encoded(cnn, frames), expected)


@in_c
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_in_another_type_is_computed_by_torch(precision: str, dtype: torch.dtype) -> None:
    cnn = make("published", precision).to(dtype)
    assert not cnn.can_run_in_c()
    y = cnn(draw(cnn, 2))
    cnn.kernels = "plain"
    assert torch.equal(y, cnn(draw(cnn, 2)))


@in_c
def test_frames_of_inference_mode(precision: str) -> None:
    cnn = make("four grey frames", precision)
    with torch.inference_mode():
        frames = draw(cnn, 2)
    cnn(frames).sum().backward()
    assert all(weight.grad is not None for weight in cnn.parameters())


@in_c
def test_forward_derivatives_are_those_of_torch(precision: str) -> None:
    cnn = make("four grey frames", precision)
    weight = cnn.stages[0].weight
    tangents = []
    for kernels in (IN_C[precision], "plain"):
        cnn.kernels = kernels
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(weight.detach(), torch.ones_like(weight))  # type: ignore[arg-type]
            y = torch.func.functional_call(cnn, {"stages.0.weight": dual}, (draw(cnn, 2),))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    assert tangents[0] is not None
    assert torch.equal(tangents[0], tangents[1])


@with_tiles
@pytest.mark.parametrize(
    ("cnn", "can"),
    [
        (ImpalaCNN((64, 64, 3), False, precision="bfloat16"), True),
        (ImpalaCNN((64, 64, 3), False), False),  # float32
        (ImpalaCNN((64, 64, 3), False, channels=(8, 16), precision="bfloat16"), False),
        (ImpalaCNN((64, 64, 6), False, precision="bfloat16"), False),
        (ImpalaCNN((64, 64, 3), False, channels=(32, 64, 64), precision="bfloat16"), True),
        (ImpalaCNN((64, 64, 3), False, channels=(64, 128, 128), precision="bfloat16"), False),
        (NatureCNN((64, 64, 3), False, channels=(16, 32, 32), precision="bfloat16"), False),
        (ImpalaCNN((210, 160, 3), False, precision="bfloat16"), True),
        (ImpalaCNN((400, 300, 3), False, precision="bfloat16"), False),
        (PatchCNN((64, 64, 3), False, precision="bfloat16"), True),
        (PatchCNN((64, 64, 3), False, patch=8, precision="bfloat16"), False),
    ],
)
def test_which_networks_can(cnn: ImpalaCNN, can: bool) -> None:
    assert cnn.can_run_in_c() is can


@with_vectors
@pytest.mark.parametrize(
    ("cnn", "can"),
    [
        (ImpalaCNN((64, 64, 3), False), True),
        (ImpalaCNN((64, 64, 3), False, channels=(8, 16, 16)), True),
        (ImpalaCNN((64, 64, 12), False), True),
        (ImpalaCNN((64, 64, 3), False, channels=(6, 12)), False),
        (ImpalaCNN((64, 64, 3), False, channels=(64, 128, 128)), False),  # so many weights
        (ImpalaCNN((400, 300, 3), False), True),
        (NatureCNN((64, 64, 3), False), False),
        (PatchCNN((64, 64, 3), False, patch=8), True),
    ],
)
def test_which_networks_can_on_vectors(cnn: ImpalaCNN, can: bool) -> None:
    assert cnn.can_run_in_c() is can


@with_vectors
def test_gradients_of_several_calls_do_not_share_memory() -> None:
    cnn = make("published", "float32")
    batches = [draw(cnn, 5), draw(cnn, 9, high=50), draw(cnn, 2, high=9)]
    alone = [gradients(cnn, encoded(cnn, frames)) for frames in batches]
    outputs = [encoded(cnn, frames) for frames in batches]
    together = [gradients(cnn, y) for y in outputs]
    assert all(torch.equal(a, b) for pair in zip(alone, together, strict=True) for a, b in zip(*pair, strict=True))
    y = encoded(cnn, batches[0])
    first, second = (torch.autograd.grad(y.sum(), list(cnn.stages.parameters()), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    del y, outputs
    assert 0 < len(cpu_cnn._Kept.free) <= cpu_cnn._Kept.most_free


@with_vectors
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: cpu.LEVELS[level])
def test_small_integers_are_exact_without_tiles(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heights of 21 and 11 are no multiples of 4: nothing is transformed, all sums are exact."""
    monkeypatch.setattr(cpu_cnn, "load_kernel", lambda: KERNEL._replace(level=level))  # type: ignore[union-attr]
    cnn = make_integer("odd", "float32")
    frames = draw(cnn, 3, high=4)
    y = encoded(cnn, frames)
    grads = gradients(cnn, y)
    expected = operation_by_operation(cnn.double(), frames)
    assert torch.equal(y.double(), expected)
    assert all(map(torch.equal, [grad.double() for grad in grads], gradients(cnn, expected)))


def test_without_tiles_none_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_cnn, "has_tiles", lambda: False)
    cnn = ImpalaCNN((64, 64, 3), False, precision="bfloat16")
    cnn.kernels = IN_C["bfloat16"]
    assert not cnn.can_run_in_c()
    assert cnn(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).shape == (1, 256)


def test_without_the_library_nothing_runs_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_cnn, "load_kernel", lambda: "not built")
    assert not cpu_cnn.has_tiles.__wrapped__()
    assert not ImpalaCNN((64, 64, 3), False).can_run_in_c()


def test_a_network_of_other_modules_has_no_layers() -> None:
    cnn = ImpalaCNN((16, 16, 3), False, precision="bfloat16")
    cnn.stages.append(nn.ReLU())
    assert cnn._layers() == []


@in_c
@other_defaults
def test_defaults_of_torch_do_not_matter(precision: str, kind: str) -> None:
    cnn = make("four grey frames", precision)
    frames = draw(cnn, 3)

    def results() -> list[Tensor]:
        cpu_cnn._Kept.free.clear()
        y = encoded(cnn, frames)
        return [y, *torch.autograd.grad(y.sum(), list(cnn.stages.parameters()))]

    expected = results()
    with other_default(kind):
        assert all(map(torch.equal, results(), expected))


@with_vectors
def test_layers_that_contradict_each_other_cannot_run() -> None:
    layers = [
        cpu_cnn.Layer("conv and pool", 3, 15, 16, 3, 8, 8, 16),
        cpu_cnn.Layer("block", 3, 8, 8, 16, 8, 8, 16),
        cpu_cnn.Layer("conv and pool", 3, 8, 8, 16, 4, 4, 32),
    ]
    patches = cpu_cnn.Layer("patches", 4, 33, 35, 3, 8, 8, 16)
    assert cpu_cnn.can_run(layers, torch.float32)
    assert cpu_cnn.can_run([patches, *layers[1:]], torch.float32)
    for index, wrong in (
        (0, layers[0]._replace(h=400)),
        (0, layers[0]._replace(kernel=5)),
        (0, patches._replace(w=9)),
        (0, patches._replace(kernel=0)),
        (1, layers[1]._replace(c_in=32)),
        (1, layers[1]._replace(c_in=32, c=32)),
        (2, layers[2]._replace(h_in=7)),
    ):
        assert not cpu_cnn.can_run([*layers[:index], wrong, *layers[index + 1 :]], torch.float32), wrong
