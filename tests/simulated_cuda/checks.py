"""The errors that simulated CUDA finds, and the commands on it; run by test_simulated_cuda.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from srwm_rl.agents.engine import cuda_graphs, streams
from srwm_rl.nn.cnns import ImpalaCNN
from srwm_rl.scripts.benchmarks import encoder, operators
from srwm_rl.scripts.main import main
from tests.simulated_cuda.counts import table
from tests.simulated_cuda.plugin import GPU
from tests.simulated_cuda.test_counts import TABLE

CUDA = torch.device("cuda", 0)


def hazards() -> list[str]:
    return sorted(set(GPU.take_hazards()))


def test_it_computes_what_the_cpu_computes() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2))
    x = torch.randn(5, 3, 8, 8)
    net(x).square().sum().backward()
    on_device = torch.nn.Sequential(*net).to(CUDA)
    expected = [parameter.grad.cpu() for parameter in net.parameters() if parameter.grad is not None]
    on_device.zero_grad()
    on_device(x.to(CUDA)).square().sum().backward()
    for parameter, grad in zip(on_device.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.device == CUDA
        torch.testing.assert_close(parameter.grad.cpu(), grad)


def test_host_and_device_do_not_mix() -> None:
    tensor = torch.ones(3, device=CUDA)
    with pytest.raises(RuntimeError, match="same device"):
        tensor + torch.ones(3)
    assert (tensor + torch.tensor(2.0)).tolist() == [3, 3, 3]  # a CPU scalar mixes with any device
    assert tensor[torch.tensor([0, 2])].shape == (2,)
    with pytest.raises(TypeError, match="cpu"):
        tensor.numpy()
    on_second_gpu = torch.ones(3, device="cuda:1")
    with pytest.raises(RuntimeError, match="same device"):
        tensor + on_second_gpu
    assert (tensor + on_second_gpu.to(CUDA)).tolist() == [2, 2, 2]


def test_unordered_streams_are_a_hazard() -> None:
    zeros, side = torch.zeros(4, device=CUDA), torch.cuda.Stream()
    with torch.cuda.stream(side):
        zeros + 1
    assert any("read after a write" in hazard for hazard in hazards())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = zeros + 1
        zeros.zero_()
    assert not hazards()
    zeros.add_(result)
    assert {hazard.split(" in ")[0] for hazard in hazards()} == {"a read after a write", "a write after a write"}
    torch.cuda.current_stream().wait_stream(side)
    zeros.add_(result)
    side.wait_stream(torch.cuda.current_stream())  # where the memory of `result` may be given to others
    assert not hazards()


def test_memory_freed_too_early_is_a_hazard() -> None:
    side = torch.cuda.Stream()
    for way in ("nothing", "record_stream", "wait_stream", "synchronize"):
        tensor = torch.zeros(4, device=CUDA)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            tensor + 1
        if way == "record_stream":
            recorded: Any = tensor
            recorded.record_stream(torch.Stream(device_type=1, device_index=0, stream_id=side.stream_id))
        if way == "wait_stream":
            torch.cuda.current_stream().wait_stream(side)
        if way == "synchronize":
            side.synchronize()
        tensor = torch.zeros(1)
        assert any("let go" in hazard for hazard in hazards()) == (way == "nothing")


def test_copies_must_be_waited_for() -> None:
    host = torch.ones(4).pin_memory()
    tensor = host.to(CUDA, non_blocking=True)
    host.zero_()
    torch.cuda.synchronize()
    assert any("pinned memory changed" in hazard for hazard in hazards())
    back = torch.empty(4, pin_memory=True)
    back.copy_(tensor, non_blocking=True)
    assert back.min() > 1e38  # not copied yet
    event = torch.cuda.Event()
    event.record()
    assert not event.query()
    event.synchronize()
    assert back.tolist() == [1, 1, 1, 1]
    assert event.query()


def test_synchronizing_operations_are_reported() -> None:
    tensor = torch.ones(4, device=CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for wait in (tensor.tolist, tensor[0].item, tensor.nonzero, tensor.cpu, lambda: tensor.copy_(torch.ones(4))):
            with pytest.raises(RuntimeError, match="synchronizing"):
                wait()
        tensor.add_(1).mul_(2)
        torch.ones(4).pin_memory().to(CUDA, non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tensor.tolist() == [4, 4, 4, 4]


def test_a_graph_repeats_the_captured_operations() -> None:
    x, total = torch.ones(3, device=CUDA), torch.zeros(3, device=CUDA)
    factor, graph = 2.0, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total.add_(x * factor)
        drawn = torch.rand(3, device=CUDA)
    assert total.tolist() == [0, 0, 0]  # capturing does not execute
    assert drawn.min() > 1e38
    factor = 5.0
    graph.replay()
    first = drawn.tolist()
    x.fill_(10.0)
    graph.replay()
    assert total.tolist() == [22, 22, 22]
    assert drawn.tolist() != first
    assert max(drawn.tolist()) < 1


@pytest.mark.parametrize("what", ["item", "to the device", "to the host", "mask", "synchronize"])
def test_operations_that_cannot_be_captured_raise(what: str) -> None:
    x = torch.ones(3, device=CUDA)
    ways = {
        "item": lambda: x.sum().item(),
        "to the device": lambda: x.copy_(torch.ones(3)),
        "to the host": lambda: x.cpu(),
        "mask": lambda: x[x > 0],
        "synchronize": torch.cuda.synchronize,
    }
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            ways[what]()
    assert x.sum().item() == 3  # and later operations work


def test_a_backward_pass_in_another_thread_is_captured() -> None:
    weight = torch.ones(3, device=CUDA, requires_grad=True)
    weight.grad = torch.zeros(3, device=CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (weight * 2).sum().backward()
    assert weight.grad.tolist() == [0, 0, 0]
    graph.replay()
    graph.replay()
    assert weight.grad.tolist() == [4, 4, 4]


def train(folder: Path, *arguments: str, device: str = "cuda") -> Path:
    """Train recall on a GPU and return the run's folder."""
    assert main(["train", "--env", "recall", "--device", device, "--no-progress", "-f", str(folder), *arguments]) == 0
    return next(folder.glob("*/recall_1"))


@pytest.mark.parametrize("settings", [(), ("--algo", "impala"), ("--algo", "impala", "--synchronous")])
def test_a_step_waits_for_the_gpu_once(settings: tuple[str, ...], tmp_path: Path) -> None:
    GPU.take_counts()
    train(tmp_path, *settings, "-n", "8192")
    counts = dict(GPU.take_counts())
    n_acts = 8192 // 64 * 2  # two groups of environments
    assert counts["replays"] > n_acts
    assert counts["waits for streams"] < 1.1 * n_acts  # once in a step for its actions


def test_copies_launches_and_waits_are_those_of_the_table() -> None:
    assert table() == TABLE


@pytest.mark.parametrize("algo", [("--algo", "ppo"), ("--algo", "impala", "--synchronous")])
def test_training_on_another_than_the_current_gpu_is_the_same(
    algo: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = [train(tmp_path / name, *algo, "-n", "4096", device=name) for name in ("cuda", "cuda:1")]
    assert "CUDA graph" not in caplog.text
    current, second = (load_file(run / "checkpoints" / "model-000000004096.safetensors") for run in runs)
    assert [name for name, weight in current.items() if not torch.equal(weight, second[name])] == []


def test_impala_learns_on_another_than_the_current_gpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    GPU.take_counts()
    train(tmp_path, "--algo", "impala", "-n", "4096", device="cuda:1")
    assert "CUDA graph" not in caplog.text
    assert GPU.take_counts()["replays"] > 4096 // 64 * 2


def test_a_learner_stream_without_a_wait_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams.StreamContext, "finish", lambda self: None)
    train(tmp_path, "--algo", "impala", "-n", "6144")
    assert any("a read after a write in a copy to the host" in hazard for hazard in hazards())


def test_frames_of_procgen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    settings = ["--env", "coinrun", "--device", "cuda", "--no-progress", "-f", str(tmp_path), "-n", "512"]
    # Small: processors without bfloat16 compute it element by element.
    small = ["--n-envs", "8", "--n-steps", "16", "--batch-size", "16", "--encoder-kwargs", 'cnn:{"channels":[4]}']
    assert main(["train", *settings, *small]) == 0
    assert "device    cuda, cuDNN deterministic\n" in capsys.readouterr().out
    assert torch.backends.cudnn.deterministic
    run = next(tmp_path.glob("*/coinrun_1"))
    assert main(["eval", str(run), "--device", "cuda", "--train-levels", "none", "--eval-levels", "1000:1002"]) == 0


def test_bench_encoder_times_the_algorithms_of_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modes, forward = set(), ImpalaCNN.forward

    def recorded(self: ImpalaCNN, frames: torch.Tensor) -> torch.Tensor:
        modes.add((torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark))
        return forward(self, frames)

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(ImpalaCNN, "forward", recorded)
    monkeypatch.setattr(encoder, "MATMUL_SIZE", {"cuda": 16})
    assert main(["bench", "encoder", "--device", "cuda", "--n-frames", "4", "--rounds", "1"]) == 0
    assert modes == {(True, False), (False, True)}
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
    output = capsys.readouterr().out
    assert "cuda, cuDNN deterministic," in output
    assert output.count("ours, float32, cuDNN by trial ") == 2


def test_bench_op_times_captured_graphs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("SIZES", "DELTA_SIZES"):
        monkeypatch.setattr(operators, name, ((3, 2, 1, 4),))
    monkeypatch.setattr(operators, "ACTING", ((1, 2, 1, 4),))
    monkeypatch.setattr(operators, "MATMUL_SIZE", {"cuda": 16})
    GPU.take_counts()
    assert main(["bench", "op", "--device", "cuda", "--rounds", "1"]) == 0
    assert "wall time of captured CUDA graphs" in capsys.readouterr().out
    # Of each work the matrix product, the loop and the reference; a first round is not counted.
    assert GPU.take_counts()["replays"] == 6 * 3 * 2


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_bench_times_what_the_trainer_captures(algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[Any] = []
    capture = cuda_graphs.capture

    def counted(work: Any, stream: Any, pool: Any, draws: bool) -> Any:
        result = capture(work, stream, pool, draws)
        gradients.extend([] if draws else [result])
        return result

    monkeypatch.setattr(cuda_graphs, "capture", counted)
    small = ["--n-envs", "8", "--n-steps", "8", "--batch-size", "32", "--rounds", "1", "--algo", algo]
    GPU.take_counts()
    assert main(["bench", "train", "--env", "recall", "--device", "cuda", *small]) == 0
    assert gradients
    counts = dict(GPU.take_counts())
    assert counts["waits for the device"] > counts["replays"] > 20  # whenever the clock is read
