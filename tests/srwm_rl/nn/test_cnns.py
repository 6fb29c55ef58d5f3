"""CNNs: image layouts, micro-batches, precision; frames are not copied."""

from typing import Any

import pytest
import torch

from srwm_rl import UserError
from srwm_rl.nn.cnns import IN_C, ImpalaCNN, NatureCNN, PatchCNN, fastest_precision
from srwm_rl.ops import cpu_cnn


def test_both_image_layouts_give_the_same_features() -> None:
    torch.manual_seed(0)
    last = ImpalaCNN((20, 24, 3), channels_first=False)
    first = ImpalaCNN((3, 20, 24), channels_first=True)
    first.load_state_dict(last.state_dict())
    frames = torch.randint(0, 256, (5, 20, 24, 3), dtype=torch.uint8)
    torch.testing.assert_close(last(frames), first(frames.permute(0, 3, 1, 2)), rtol=1e-4, atol=1e-5)


def test_micro_batches_change_neither_features_nor_gradients() -> None:
    torch.manual_seed(0)
    whole, parts = ImpalaCNN((16, 16, 3), False, micro_batch=64), ImpalaCNN((16, 16, 3), False, micro_batch=4)
    parts.load_state_dict(whole.state_dict())
    frames = torch.randint(0, 256, (11, 16, 16, 3), dtype=torch.uint8)
    a, b = whole(frames), parts(frames)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    a.square().sum().backward()
    b.square().sum().backward()
    for (name, mine), theirs in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("micro_batch", "threads", "n_frames", "sizes"),
    [
        (128, 2, 256, [128, 128]),
        (128, 2, 195, [98, 97]),
        (128, 2, 260, [130, 130]),
        (None, 2, 256, [64] * 4),
        (None, 3, 300, [50] * 6),  # equal parts for the threads
        (None, 2, 48, [24, 24]),
        (None, 2, 47, [47]),  # one part at a time, each by all threads
        (None, 9, 200, [67, 67, 66]),  # likewise, one after the other
        (4, 2, 12, [3, 3, 3, 3]),
        (4, 1, 11, [4, 4, 3]),
        (None, 2, 0, [0]),
    ],
)
def test_threads_get_parts_of_equal_size(
    micro_batch: int | None, threads: int, n_frames: int, sizes: list[int]
) -> None:
    network = ImpalaCNN((8, 8, 3), False, channels=(2,), features=4, micro_batch=micro_batch)
    own, seen = network._encode, []
    network._encode = lambda part: seen.append(len(part)) or own(part)  # type: ignore[method-assign, func-returns-value]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert network(torch.zeros(n_frames, 8, 8, 3, dtype=torch.uint8)).shape == (n_frames, 4)
    finally:
        torch.set_num_threads(before)
    assert sorted(seen, reverse=True) == sizes


def test_with_amx_tiles_micro_batches_are_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_tiles, sizes in ((True, (64, 128)), (False, (64, 64))):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_tiles)  # noqa: B023
        micro_batches = [
            ImpalaCNN((8, 8, 3), False, precision=precision).micro_batch for precision in ("float32", "bfloat16")
        ]
        assert tuple(micro_batches) == sizes


def test_frames_reach_the_first_convolution_channels_last() -> None:
    network = ImpalaCNN((16, 16, 3), False)
    seen = []
    network.stages[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    frames = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    network(frames)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(seen[0], frames.permute(0, 3, 1, 2).float())


def test_pixels_are_scaled_in_the_first_convolution() -> None:
    torch.manual_seed(0)
    network, plain = ImpalaCNN((16, 16, 3), False, scale=0.25), ImpalaCNN((16, 16, 3), False, scale=1.0)
    plain.load_state_dict(network.state_dict())
    frames = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    torch.testing.assert_close(network(frames), plain(frames * 0.25), rtol=1e-4, atol=1e-4)


def test_bfloat16_computes_what_float32_does_and_learns_in_float32() -> None:
    frames = torch.randint(0, 256, (9, 32, 32, 3), dtype=torch.uint8)
    seen, gradients, features = [], [], []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        network = ImpalaCNN((32, 32, 3), False, precision=precision)
        network.stages[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        features.append(network(frames))
        features[-1].square().sum().backward()
        gradients.append(
            torch.cat([weight.grad.flatten() for weight in network.parameters() if weight.grad is not None])
        )
    assert torch.equal(seen[0], seen[1].float())  # frames are exact in bfloat16
    assert seen[1].dtype == torch.bfloat16
    for pair in (features, gradients):
        assert pair[1].dtype == torch.float32
        assert (pair[1] - pair[0]).norm() < 0.02 * pair[0].norm()
        assert not torch.equal(pair[0], pair[1])


@pytest.mark.gpu
def test_weights_converted_together_equal_weights_converted_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    network = ImpalaCNN((16, 16, 3), False, precision="bfloat16").to("cuda")
    frames = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8, device="cuda")
    copy, copied = torch._foreach_copy_, []
    monkeypatch.setattr(
        torch, "_foreach_copy_", lambda into, sources: copied.append(len(sources)) or copy(into, sources)
    )
    learning = network(frames).detach()
    assert copied == []
    with torch.no_grad():
        acting = network(frames)
    assert copied == [28]  # of 14 convolutions
    assert acting.dtype == torch.float32
    assert torch.equal(acting, learning)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


def features_and_gradients(network: ImpalaCNN, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    features = network(frames)
    generator = torch.Generator().manual_seed(1)
    network.zero_grad()
    features.backward(torch.randn(features.shape, generator=generator).to(features.device))
    return features.detach(), torch.cat([weight.grad.flatten() for weight in network.parameters()])  # type: ignore[union-attr]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.dtype == b.dtype == torch.float32
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kernels", ["fused", "fused4", "fused8"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("kind", "shape", "channels_first"),
    [
        (ImpalaCNN, (36, 41, 3), False),
        (ImpalaCNN, (12, 20, 16), True),
        (NatureCNN, (40, 44, 3), False),
        (PatchCNN, (36, 41, 3), False),
    ],
)
def test_fused_operations_give_the_features_and_gradients_of_plain_ones(
    kind: type[ImpalaCNN], shape: tuple[int, ...], channels_first: bool, device: str, kernels: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    frames = torch.randint(0, 256, (5, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    of_precision = {}
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        network = kind(shape, channels_first, (8, 16, 16), features=12, precision=precision).to(device)
        plain = features_and_gradients(network, frames.to(device))
        network.kernels = kernels
        if device == "cpu":  # on which only the plain ones run, unless forced
            monkeypatch.setattr(network, "_encode", network._encode_fused)
        fused = features_and_gradients(network, frames.to(device))
        with torch.no_grad():
            assert torch.equal(network(frames.to(device)), fused[0])  # weights converted together
        of_precision[precision] = plain, fused
    exact, fused = of_precision["float32"]
    tolerance = 1e-5 if device == "cpu" else 5e-3  # GPUs compute float32 convolutions with ten bits of mantissa
    assert max(map(difference, fused, exact)) < tolerance
    plain, fused = of_precision["bfloat16"]
    for ours, theirs, truth in zip(fused, plain, exact, strict=True):
        assert difference(ours, truth) < 1.5 * difference(theirs, truth) + tolerance < 0.1


def test_fused_operations_are_for_gpus_only() -> None:
    network = ImpalaCNN((16, 16, 3), False)
    network.kernels = "plain"
    frames = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    expected = network(frames)
    network.kernels = "fused8"
    assert torch.equal(network(frames), expected)


@pytest.mark.parametrize("precision", IN_C)
@pytest.mark.parametrize("is_faster", [True, False])
def test_on_a_cpu_a_cnn_runs_in_c_where_that_is_faster(
    precision: str, is_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: Any) -> torch.Tensor:
        raise AssertionError("it runs in C")

    network, frames = ImpalaCNN((16, 16, 3), False, precision=precision), torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    monkeypatch.setattr(cpu_cnn, "is_faster", lambda of: is_faster and of == precision)
    monkeypatch.setattr(cpu_cnn, "can_run", lambda *_: True)
    monkeypatch.setattr(cpu_cnn, "encode", encode)
    if is_faster:
        with pytest.raises(AssertionError, match="it runs in C"):
            network(frames)
    network.kernels = "plain"
    assert network(frames).shape == (2, 256)


@pytest.mark.gpu
@pytest.mark.parametrize("change", ["none", "hook", "module"])
def test_hooks_and_modules_of_users_are_called_beside_fused_operations(change: str) -> None:
    network, called = ImpalaCNN((16, 16, 3), False, channels=(4,)).to("cuda"), []

    class OwnPool(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            called.append("module")
            return x[:, :, ::2, ::2]

    network.kernels = "fused8"
    if change == "hook":
        network.stages[2].first.register_forward_hook(lambda *_: called.append("hook"))  # type: ignore[union-attr]
    elif change == "module":
        network.stages[1] = OwnPool()
    network(torch.zeros(2, 16, 16, 3, dtype=torch.uint8, device="cuda"))
    assert called == [change] * (change != "none")


def test_float64_stays_float64() -> None:
    network = ImpalaCNN((16, 16, 3), False).double()
    assert network(torch.zeros(2, 16, 16, 3, dtype=torch.uint8)).dtype == torch.float64


def test_the_fastest_precision_is_one_of_ours_and_a_wrong_one_is_named() -> None:
    assert fastest_precision("cpu") in ("float32", "bfloat16")
    with pytest.raises(UserError, match="precision must be one of float32, bfloat16, not 'float16'"):
        ImpalaCNN((16, 16, 3), False, precision="float16")


def test_published_cnn_has_the_published_size() -> None:
    # 626,272 parameters in the authors' feed-forward agent: this CNN, and heads over 257 features for 15 actions.
    network = ImpalaCNN((64, 64, 3), False)
    heads = (257 + 1) * 15 + (257 + 1)
    assert sum(parameter.numel() for parameter in network.parameters()) + heads == 626_272


def test_the_nature_cnn_is_three_convolutions_with_relus_between() -> None:
    torch.manual_seed(0)
    network = NatureCNN((64, 48, 3), False, (4, 6, 8), features=5)
    frames = torch.randint(0, 256, (3, 64, 48, 3), dtype=torch.uint8)
    first, second, third = (stage for stage in network.stages if isinstance(stage, torch.nn.Conv2d))
    x = torch.relu(torch.conv2d(frames.permute(0, 3, 1, 2) / 255, first.weight, first.bias, stride=4))
    x = torch.relu(torch.conv2d(x, second.weight, second.bias, stride=2))
    x = torch.relu(torch.conv2d(x, third.weight, third.bias)).flatten(1)
    torch.testing.assert_close(network(frames), torch.relu(network.head(x)), rtol=1e-4, atol=1e-5)
    assert [conv.weight.shape[2] for conv in (first, second, third)] == [8, 4, 3]


def test_what_the_nature_cnn_cannot_read_is_named_alone() -> None:
    with pytest.raises(UserError, match=r"channels must be three widths, not 2$"):
        NatureCNN((64, 64, 3), False, (4, 6))
    with pytest.raises(UserError, match=r"at least 36 x 36 pixels, not 24 x 64: give the kind impala$"):
        NatureCNN((24, 64, 3), False, (4, 6, 8))


def test_a_patch_cnn_is_a_convolution_of_patches_and_one_residual_block_per_stage() -> None:
    torch.manual_seed(0)
    network = PatchCNN((26, 19, 3), False, (4, 6), patch=5, features=7)
    frames = torch.randint(0, 256, (3, 26, 19, 3), dtype=torch.uint8)
    pixels = frames.permute(0, 3, 1, 2) / 255
    weights = dict(network.named_parameters())

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)

    def block(x: torch.Tensor, name: str) -> torch.Tensor:
        return x + conv(torch.relu(conv(torch.relu(x), f"{name}.first")), f"{name}.second")

    # Patches beside each other, what is left over at the edges not at all.
    patches = pixels[:, :, :25, :15].unfold(2, 5, 5).unfold(3, 5, 5)  # [N, C, 5, 3, 5, 5]
    x = torch.einsum("nchwij,ocij->nohw", patches, weights["stages.0.weight"]) + weights["stages.0.bias"][:, None, None]
    x = block(x, "stages.1")
    x = torch.max_pool2d(conv(x, "stages.2"), 3, 2, 1)
    x = torch.relu(block(x, "stages.4")).flatten(1)
    assert x.shape == (3, 6 * 3 * 2)
    torch.testing.assert_close(network(frames), torch.relu(network.head(x)), rtol=1e-4, atol=1e-5)


def test_a_patch_larger_than_the_frame_is_refused() -> None:
    with pytest.raises(UserError, match="cnn patch must be at most 16, the frame's size"):
        PatchCNN((16, 20, 3), False, patch=17)
