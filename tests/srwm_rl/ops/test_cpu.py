"""The C kernel against the float64 reference, at every instruction set this machine has."""

import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srwm_rl import srwm_scan
from srwm_rl.ops import backends, cpu
from tests.srwm_rl.ops import cases

ROOT = Path(__file__).parents[3]
KERNEL = cpu.load_kernel()
pytestmark = pytest.mark.skipif(isinstance(KERNEL, str), reason=str(KERNEL))
LEVELS = () if isinstance(KERNEL, str) else range(KERNEL.level + 1)


@pytest.fixture(params=LEVELS, ids=lambda level: cpu.LEVELS[level])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cpu, "load_kernel", lambda: KERNEL._replace(level=request.param))
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 3, 4, 7, 8, 16, 17, 32, 64, 70])
def test_every_head_size(level: int, dtype: torch.dtype, size: int) -> None:
    for n_steps in (1, 37):
        cases.check(cases.make_case(n_steps, 2, 3, size, seed=size), "cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 4, 7, 16, 33])
@pytest.mark.parametrize(("retained", "bound"), [(False, None), (True, None), (False, 1.0), (True, 0.5)])
def test_every_option(level: int, dtype: torch.dtype, size: int, retained: bool, bound: float | None) -> None:
    for read in (size, 1, 3 * size + 1):
        cases.check(cases.make_case(37, 2, 2, size, seed=size, read=read, retained=retained, bound=bound), "cpu", dtype)


@settings(max_examples=60, deadline=None)
@given(cases.cases(300, 40), st.booleans(), st.sampled_from([torch.float32, torch.float64]), st.sampled_from(LEVELS))
def test_random_cases(case: object, contiguous: bool, dtype: torch.dtype, level: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "load_kernel", lambda: KERNEL._replace(level=level))
        cases.check(case, "cpu", dtype, contiguous=contiguous)


@pytest.mark.parametrize("starts", [[0], [5], [15, 16], [16], [17, 18, 31], list(range(36))])
@pytest.mark.parametrize("constrained", [False, True])
def test_resets_around_checkpoints(level: int, starts: list[int], constrained: bool) -> None:
    case = cases.make_case(36, 2, 1, 8, retained=constrained, bound=0.8 if constrained else None)
    case.starts.zero_()
    case.starts[starts, 1] = True
    cases.check(case, "cpu", torch.float32)
    cases.check(case, "cpu", torch.float64)


# Eight or more pairs of small heads run together, one per SIMD lane: see csrc/lanes_kernel.h.
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize(("batch", "heads"), [(8, 1), (1, 9), (3, 5), (4, 4), (17, 1), (5, 7), (8, 8)])
def test_pairs_in_lanes(level: int, size: int, batch: int, heads: int) -> None:
    for n_steps, resets, with_shift in ((4, 0.3, True), (16, None, False), (17, 0.02, False), (45, 0.2, True)):
        case = cases.make_case(n_steps, batch, heads, size, seed=n_steps, resets=resets, with_shift=with_shift)
        cases.check(case, "cpu", torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        cases.make_case,
        st.integers(4, 100),
        st.integers(1, 12),
        st.integers(1, 6),
        st.sampled_from([4, 8]),
        seed=st.integers(0, 2**20),
        resets=st.sampled_from([None, 0.0, 0.02, 0.2, 1.0]),
        with_shift=st.booleans(),
        scale=st.sampled_from([0.3, 1.0, 2.0]),
    ),
    st.booleans(),
    st.sampled_from(LEVELS),
)
def test_random_pairs_in_lanes(case: object, contiguous: bool, level: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "load_kernel", lambda: KERNEL._replace(level=level))
        cases.check(case, "cpu", torch.float32, contiguous=contiguous)


@pytest.mark.parametrize("starts", [[0], [5], [15, 16], [16], [17, 18, 31], [0, 35], list(range(36))])
def test_resets_in_some_lanes(level: int, starts: list[int]) -> None:
    case = cases.make_case(36, 9, 2, 8)
    case.starts.zero_()
    case.starts[starts, 1] = True
    cases.check(case, "cpu", torch.float32)
    case.starts[starts[0], 2:5] = True
    case.starts[-1, ::2] = True
    cases.check(case, "cpu", torch.float32)


def test_checkpoints_are_the_same_shifts_in_lanes_and_without(level: int) -> None:
    case = cases.make_case(50, 6, 3, 8)
    x, weight, shift = case.x.float(), case.weight.float(), case.shift.float()
    starts, grads = case.starts.view(torch.uint8), (case.grad_y.float(), case.grad_final.float())
    *_, in_lanes = cpu.forward(x, weight, None, shift, starts, None, True)
    entries = [slice(n, n + 1) for n in range(6)]  # three pairs each: too few for lanes
    alone = [cpu.forward(x[:, n], weight, None, shift[n], starts[:, n], None, True)[2] for n in entries]
    torch.testing.assert_close(in_lanes, torch.cat(alone, 1))
    crossed = cpu.backward(x, weight, None, shift, starts, None, torch.cat(alone, 1), *grads)
    for ours, theirs in zip(crossed, cpu.backward(x, weight, None, shift, starts, None, in_lanes, *grads), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("batch", [2, 9])
def test_gradients_that_are_missing_are_zeros(level: int, batch: int) -> None:
    case = cases.make_case(20, batch, 2, 8)
    inputs = case.x.float(), case.weight.float(), None, case.shift.float(), case.starts.view(torch.uint8), None
    checkpoints = cpu.forward(*inputs, True)[2]
    grad_y, grad_final = case.grad_y.float(), case.grad_final.float()
    for missing, zeros in (
        ((None, grad_final), (torch.zeros_like(grad_y), grad_final)),
        ((grad_y, None), (grad_y, torch.zeros_like(grad_final))),
    ):
        ours = cpu.backward(*inputs, checkpoints, *missing)
        assert all(map(torch.equal, ours, cpu.backward(*inputs, checkpoints, *zeros)))


def test_the_bits_of_a_lane_do_not_depend_on_the_others(level: int) -> None:
    """They depend neither on its position nor on the number of lanes."""
    case = cases.make_case(80, 13, 3, 8)
    whole = cases.results(case, "cpu", torch.float32)
    x, starts, shift = case.x[:, 2:9], case.starts[:, 2:9], case.shift[2:9]
    part = case._replace(x=x, starts=starts, shift=shift, grad_y=case.grad_y[:, 2:9], grad_final=case.grad_final[2:9])
    results = cases.results(part, "cpu", torch.float32)
    assert torch.equal(results["y"], whole["y"][:, 2:9])
    assert torch.equal(results["grad_x"], whole["grad_x"][:, 2:9])
    for name in ("final", "grad_shift"):
        assert torch.equal(results[name], whole[name][2:9])


@pytest.mark.parametrize("batch", [13, 8])
def test_nan_stays_in_its_lane(level: int, batch: int) -> None:
    case = cases.make_case(40, batch, 2, 8, resets=None)
    clean = cases.results(case, "cpu", torch.float32)
    case.x[20, 3, 1, 5] = float("nan")
    marred = cases.results(case, "cpu", torch.float32)
    assert marred["y"][20:, 3, 1].isnan().all()
    assert marred["final"][3, 1].isnan().all()
    assert marred["grad_x"][:, 3, 1].isnan().all()
    for name in ("y", "final", "grad_x", "grad_shift"):
        a, b = (results[name].clone() for results in (clean, marred))
        for tensor in (a, b):
            (tensor[:, 3, 1] if name in ("y", "grad_x") else tensor[3, 1]).zero_()
        assert torch.equal(a, b), name
    case = case._replace(starts=torch.zeros(40, batch, dtype=torch.bool))
    case.starts[21, 3] = True  # a new episode forgets it
    healed = cases.results(case, "cpu", torch.float32)
    assert torch.isfinite(healed["y"][21:]).all()
    assert torch.isfinite(healed["final"]).all()
    assert torch.isfinite(healed["grad_x"][21:]).all()


def test_wide_logits_and_rates_neither_overflow_nor_vanish(level: int) -> None:
    case = cases.make_case(1, 2, 2, 16, resets=None)
    cases.check(case._replace(x=case.x * 60), "cpu", torch.float32)
    y, final = srwm_scan(case.x.float() * 1e4, case.weight.float(), backend="cpu")
    assert torch.isfinite(y).all()
    assert torch.isfinite(final).all()


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize(("batch", "size"), [(1, 16), (9, 8)])
def test_edits_too_small_for_the_weight_reach_the_shift(level: int, constrained: bool, batch: int, size: int) -> None:
    case = cases.make_case(100, batch, 1, size, resets=None, with_shift=False, retained=constrained)
    case.weight[..., -4:] -= 14  # x sums to 1, so every rate is about 1e-6
    if constrained:
        case = case._replace(retention=case.retention**0.01)
    cases.check(case, "cpu", torch.float32)


@pytest.mark.parametrize("bound", [None, 0.5])
@pytest.mark.parametrize("size", [5, 16])
def test_nan_stays_nan(level: int, bound: float | None, size: int) -> None:
    case = cases.make_case(3, 2, 1, size, resets=None)
    case.x[1, 0, 0, 3] = float("nan")
    x, weight = case.x.float().requires_grad_(), case.weight.float()
    y, final = srwm_scan(x, weight, shift_bound=bound, backend="cpu")
    assert torch.isfinite(y[0]).all()
    assert y[1:, 0].isnan().all()
    assert final[0].isnan().all()
    assert torch.isfinite(y[:, 1]).all()
    alone = srwm_scan(x[:, 1:], weight, shift_bound=bound, backend="cpu")
    torch.testing.assert_close((y[:, 1:], final[1:]), alone)
    (grad,) = torch.autograd.grad((y.sum(), final.sum()), x)
    torch.testing.assert_close(grad[:, 1:], torch.autograd.grad((alone[0].sum(), alone[1].sum()), x)[0][:, 1:])


@pytest.mark.parametrize("constrained", [False, True])
def test_gradcheck_through_chunks_and_resets(level: int, constrained: bool) -> None:
    case = cases.make_case(18, 2, 1, 2, read=5 if constrained else None, retained=constrained)
    case.starts.zero_()
    case.starts[7, 1] = True
    inputs = [tensor.requires_grad_() for tensor in (case.x, case.weight, case.shift)]
    if constrained:
        inputs.append(case.retention.requires_grad_())

    def run(x: Tensor, weight: Tensor, shift: Tensor, retention: Tensor | None = None) -> tuple[Tensor, Tensor]:
        bound = 0.4 if constrained else None
        return srwm_scan(x, weight, shift, case.starts, retention=retention, shift_bound=bound, backend="cpu")

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("batch", [2, 9])
def test_only_one_output_used(level: int, batch: int) -> None:
    case = cases.make_case(20, batch, 2, 8)
    for chosen in (0, 1):
        grads = []
        for backend in ("cpu", "reference"):
            inputs = [tensor.clone().requires_grad_() for tensor in (case.x, case.weight, case.shift)]
            out = srwm_scan(*inputs, case.starts, backend=backend)[chosen]
            grads.append(torch.autograd.grad(out.square().sum(), inputs))
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bound", [None, 1.0])
@pytest.mark.parametrize(("heads", "size"), [(2, 16), (4, 8)])
def test_split_unroll_equals_whole_unroll(level: int, bound: float | None, heads: int, size: int) -> None:
    case = cases.make_case(50, 3, heads, size)
    x, weight, shift = (tensor.float() for tensor in (case.x, case.weight, case.shift))
    y, final = srwm_scan(x, weight, shift, case.starts, shift_bound=bound, backend="cpu")
    ys, state = [], shift
    for part in (slice(0, 1), slice(1, 16), slice(16, 19), slice(19, 50)):
        piece, state = srwm_scan(x[part], weight, state, case.starts[part], shift_bound=bound, backend="cpu")
        ys.append(piece)
    torch.testing.assert_close(torch.cat(ys), y)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("size", [16, 8, 4])
def test_same_bits_with_any_number_of_threads_and_from_many_threads(constrained: bool, size: int) -> None:
    # In lanes, 60 pairs are run sixteen at a time by one or two threads, and eight at a time by eight.
    case = cases.make_case(
        100, 15, 4, size, read=49 if constrained else None, retained=constrained, bound=2.0 if constrained else None
    )
    before = torch.get_num_threads()

    def run(_: int = 0) -> list[Tensor]:
        return list(cases.results(case, "cpu", torch.float32).values())

    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(2)
        threaded = [run()]
        torch.set_num_threads(8)
        threaded += [run(), *ThreadPoolExecutor(4).map(run, range(8))]
    finally:
        torch.set_num_threads(before)
    for outputs in threaded:
        assert all(torch.equal(a, b) for a, b in zip(alone, outputs, strict=True))


@pytest.mark.parametrize("plain", [False, True])
def test_opcheck(plain: bool) -> None:
    case = cases.make_case(18, 2, 2, 4, read=None if plain else 7, retained=True)
    x, weight, *options = (tensor.requires_grad_() for tensor in (case.x, case.weight, case.retention, case.shift))
    options = [None] * 4 if plain else [*options, case.starts.view(torch.uint8), 0.5]
    torch.library.opcheck(torch.ops.srwm_rl.scan_cpu.default, (x, weight, *options, True))


@pytest.mark.parametrize("constrained", [False, True])
def test_compiles_without_a_graph_break(constrained: bool) -> None:
    case = cases.make_case(18, 2, 2, 4, read=6 if constrained else None, retained=True)
    x, weight = case.x.float().requires_grad_(), case.weight.float().requires_grad_()
    options = {"retention": case.retention.float(), "shift_bound": 0.4} if constrained else {}

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return srwm_scan(x * 2, weight, None, case.starts, **options)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), loss(x, weight))
    ours = torch.autograd.grad(compiled(x, weight), (x, weight))
    for a, b in zip(ours, torch.autograd.grad(loss(x, weight), (x, weight)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight), loss(x, weight))
        for wider in (7, 8):  # sizes that vary are symbols to the compiler
            weight = cases.make_case(1, 1, 2, 4, read=wider).weight.float()
            torch.testing.assert_close(compiled(x, weight), loss(x, weight))


def test_an_empty_batch_and_an_unsupported_dtype() -> None:
    y, final = srwm_scan(torch.zeros(3, 0, 2, 4), torch.zeros(2, 4, 16), backend="cpu")
    assert (y.shape, final.shape) == ((3, 0, 2, 4), (0, 2, 4, 16))
    x, weight = torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 2, 10, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run: x is torch.bfloat16"):
        srwm_scan(x, weight, backend="cpu")


def test_falls_back_and_logs_the_reason_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    reason = "the C kernel is not built; build it"
    monkeypatch.setattr(cpu, "load_kernel", lambda: reason)
    backends.log_fallback.cache_clear()
    case = cases.make_case(3, 1, 1, 4)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            y, _ = srwm_scan(case.x, case.weight)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [reason]
    assert torch.equal(y, srwm_scan(case.x, case.weight, backend="reference")[0])
    with pytest.raises(ValueError, match="not built"):
        srwm_scan(case.x, case.weight, backend="cpu")


def test_a_missing_broken_or_stale_kernel_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not built" in cpu.load_kernel(tmp_path)
    built = next(Path(cpu.__file__).parent.glob("_srwm_cpu*"))
    copy = tmp_path / "stale" / built.name
    copy.parent.mkdir()
    shutil.copy(built, copy)
    monkeypatch.setattr(cpu, "VERSION", -1)
    assert "another version" in cpu.load_kernel(copy.parent)
    (tmp_path / built.name).write_bytes(b"no library")
    cpu.load_kernel.cache_clear()
    assert "cannot be loaded" in cpu.load_kernel(tmp_path)


def test_backward_keeps_no_more_than_inputs_and_checkpoints() -> None:
    case = cases.make_case(4096, 1, 2, 8, resets=0.01)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    x = case.x.float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        srwm_scan(x, case.weight.float(), case.shift.float(), case.starts, backend="cpu")
    checkpoints = 4096 // 16 * case.shift.numel() * 4
    assert sum(kept.values()) <= 2 * checkpoints


@pytest.mark.slow
@pytest.mark.parametrize(("size", "batch"), [(4, 1), (16, 1), (64, 1), (4, 9), (8, 9)])
@pytest.mark.parametrize("bound", [None, 2.0])
def test_4096_steps(level: int, size: int, batch: int, bound: float | None) -> None:
    cases.check(cases.make_case(4096, batch, 1, size, resets=0.01, bound=bound), "cpu", torch.float32)


needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    program, here = tmp_path / "sanitize", Path(__file__).parent
    flags = ["-std=gnu11", "-O1", "-g", "-fno-math-errno", "-fno-sanitize-recover=all", "-DALWAYS_INLINE="]
    sources = [f"-I{ROOT / 'srwm_rl/ops/csrc'}", here / "sanitize.c"]
    subprocess.run(["gcc", *flags, f"-fsanitize={sanitizer}", *sources, "-o", program, "-lm", "-lpthread"], check=True)
    # Without address randomisation, which older thread sanitizers cannot map under recent kernels.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    result = subprocess.run([*fixed, program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith("clean")


@pytest.mark.slow
def test_installs_without_a_compiler_and_ships_the_source(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".venv", ".git", "build", "*.so", "*.egg-info", "__pycache__", ".*_cache", "logs")
    shutil.copytree(ROOT, tree, ignore=ignored)
    code = "from setuptools import build_meta as b; import sys; print(b.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=tree, check=True, capture_output=True)
    sdist = next(tmp_path.glob("*.tar.gz"))
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    source = next((tmp_path / "unpacked").iterdir())
    assert (source / "srwm_rl/ops/csrc/srwm_kernel.h").exists()
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet", source]
    for compiler, built in (("/bin/false", 0), ("cc", 1)):
        if built and shutil.which("cc") is None:
            continue
        target = tmp_path / f"site{built}"
        env = os.environ | {"CC": compiler}
        subprocess.run([*pip, "--target", target], check=True, env=env, capture_output=True)
        assert len(list(target.glob("srwm_rl/ops/_srwm_cpu*"))) == built
        shutil.rmtree(source / "build", ignore_errors=True)
