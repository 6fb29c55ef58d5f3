"""What all fused kernels of the delta rule hold: C at every instruction set this machine has, Triton interpreted."""

import os

import pytest
import torch

from srwm_rl import delta_scan
from srwm_rl.ops import cpu
from tests.srwm_rl.ops.delta_cases import check, make_case, results

# Read when triton is imported, so it stays set for this process; not beside a GPU, whose tests need the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
KERNEL = cpu.load_kernel()
LEVELS = () if isinstance(KERNEL, str) else cpu.LEVELS[: KERNEL.level + 1]


@pytest.fixture(params=[*LEVELS, "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed (it has wheels for Linux only)")
        from srwm_rl.ops import triton_launch

        if not triton_launch.INTERPRETED:
            pytest.skip("imported without Triton's interpreter")
        return "triton"
    level = cpu.LEVELS.index(request.param)
    monkeypatch.setattr(cpu, "load_kernel", lambda: KERNEL._replace(level=level))  # type: ignore[union-attr]
    return "cpu"


@pytest.mark.parametrize("starts", [[0], [5], [15, 16], [16], [17, 18, 31], list(range(36))])
def test_resets_beside_checkpoints(backend: str, starts: list[int]) -> None:
    case = make_case(36, 2, 1, 8)
    assert case.starts is not None
    case.starts.zero_()
    case.starts[starts, 1] = True
    check(case, backend, torch.float32)
    if backend == "cpu":  # Triton's has no float64
        check(case, backend, torch.float64)


def test_an_episode_that_blew_up_leaves_nothing_behind(backend: str) -> None:
    case = make_case(36, 2, 2, 5, resets=None)
    case.inputs["rate"][3, 0] = torch.nan  # the padding of its matrices is then NaN, too
    starts = torch.zeros(36, 2)
    starts[20] = 1
    ours = results(case._replace(starts=starts), backend, torch.float32)
    assert ours["y"][3:20, 0].isnan().all()
    for name in ("y", "key", "value", "query", "rate"):
        assert torch.isfinite(ours[name][20:]).all(), name
        assert torch.isfinite(ours[name][:, 1]).all(), name
    assert torch.isfinite(ours["final"]).all()


@pytest.mark.parametrize("chosen", [0, 1])
def test_only_one_output_used(backend: str, chosen: int) -> None:
    case = make_case(20, 2, 2, 8)

    def gradients(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        inputs = {key: tensor.to(dtype).requires_grad_() for key, tensor in case.inputs.items()}
        out = delta_scan(**inputs, episode_starts=case.starts, backend=name)[chosen]
        return torch.autograd.grad(out.square().sum(), [inputs[key] for key in inputs if chosen == 0 or key != "query"])

    torch.testing.assert_close(
        gradients(backend, torch.float32), gradients("reference", torch.float32), rtol=1e-4, atol=1e-5
    )
    if backend == "cpu":
        torch.testing.assert_close(gradients(backend, torch.float64), gradients("reference", torch.float64))
