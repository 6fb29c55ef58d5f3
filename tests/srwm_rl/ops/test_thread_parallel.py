"""parallel_batch: outputs and gradients are those of the serial loop, with any number of threads."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from srwm_rl.nn.cnns import ImpalaCNN
from srwm_rl.ops import thread_parallel as parts
from srwm_rl.ops.thread_parallel import parallel_batch


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """A network that records its threads, and torch's number of threads in each."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(5, 3), nn.Linear(5, 3)
        self.seen: list[tuple[str, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((threading.current_thread().name, torch.get_num_threads()))
        return self.used(x).tanh()


def net_and_parts(n: int = 4) -> tuple[Net, list[Tensor]]:
    torch.manual_seed(0)
    return Net(), list(torch.randn(3 * n - 1, 5).split(3))


def test_gradients_are_those_of_the_loop() -> None:
    net, batches = net_and_parts()
    weights = torch.randn(11, 3)
    results = []
    for function in (
        lambda: parallel_batch(net, batches, net.parameters()),
        lambda: torch.cat([net(x) for x in batches]),
    ):
        net.zero_grad()
        y = function()
        (y * weights).sum().backward()
        results.append((y.detach(), net.used.weight.grad, net.used.bias.grad))
        assert net.unused.weight.grad is None  # as an optimizer reads it
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
    threads = {name for name, _ in net.seen[:4]}
    assert all(name.startswith("srwm-part") for name in threads)
    assert {n for _, n in net.seen[:4]} == {1}
    assert torch.get_num_threads() == 2


def test_gradients_add_up_over_calls() -> None:
    net, batches = net_and_parts()
    for _ in range(2):
        parallel_batch(net, batches, net.parameters()).sum().backward()
    assert net.used.bias.grad is not None
    twice = net.used.bias.grad.clone()
    net.zero_grad()
    parallel_batch(net, batches, net.parameters()).sum().backward()
    torch.testing.assert_close(twice, 2 * net.used.bias.grad)


def test_frozen_weights_get_no_gradient_and_no_graph_is_kept_without_trainable_ones() -> None:
    net, batches = net_and_parts()
    net.used.bias.requires_grad_(False)
    parallel_batch(net, batches, net.parameters()).sum().backward()
    assert net.used.bias.grad is None
    assert net.used.weight.grad is not None
    net.requires_grad_(False)
    assert not parallel_batch(net, batches, net.parameters()).requires_grad
    net.requires_grad_(True)
    with torch.no_grad():
        assert not parallel_batch(net, batches, net.parameters()).requires_grad


@pytest.mark.parametrize("case", ["one thread", "few parts", "a gradient of the batch", "autocast", "a hook"])
def test_the_calling_thread_computes_alone(case: str) -> None:
    net, batches = net_and_parts(1 if case == "few parts" else 4)
    if case == "one thread":
        torch.set_num_threads(1)
    if case == "a gradient of the batch":
        batches[1].requires_grad_()
    seen: list[Tensor] = []
    if case == "a hook":
        net.used.bias.register_hook(seen.append)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
        parallel_batch(net, batches, net.parameters()).sum().backward()
    assert {name for name, _ in net.seen} == {threading.current_thread().name}
    assert batches[-1].grad is None
    assert (batches[1].grad is not None) if case == "a gradient of the batch" else True
    assert len(seen) == (case == "a hook")


def test_the_same_bits_with_any_number_of_threads() -> None:
    torch.manual_seed(0)
    network = ImpalaCNN((16, 16, 3), False, channels=(16, 32), precision="bfloat16")
    batches = torch.randint(0, 256, (42, 16, 16, 3), dtype=torch.uint8).split(4)
    results = []
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        network.zero_grad()
        y = parallel_batch(network, batches, network.parameters())
        y.square().sum().backward()
        with torch.no_grad():
            assert torch.equal(parallel_batch(network, batches, ()), y)
        results.append(
            [y.detach(), *(weight.grad.clone() for weight in network.parameters() if weight.grad is not None)]
        )
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def test_an_error_in_a_part_reaches_the_caller() -> None:
    net, batches = net_and_parts()
    batches[2] = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        parallel_batch(net, batches, net.parameters())
    assert parallel_batch(net, batches[:2], net.parameters()).shape == (6, 3)
    y = parallel_batch(net, batches[:2], net.parameters())
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass per output"):
        y.sum().backward()


def test_two_weights_may_share_a_gradient() -> None:
    first, second = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    batches = list(torch.randn(12, 3).split(3))
    parallel_batch(lambda x: x + (first + second), batches, [first, second]).sum().backward()
    assert first.grad is not None
    assert second.grad is not None
    assert first.grad.tolist() == second.grad.tolist() == [12, 12, 12]


def test_export_and_functional_gradients() -> None:
    torch.manual_seed(0)
    network = ImpalaCNN((8, 8, 3), False, channels=(4,), features=4, micro_batch=2)
    frames, more_frames = torch.randint(0, 256, (2, 6, 8, 8, 3), dtype=torch.uint8)
    exported = torch.export.export(network, (frames,)).module()
    torch.testing.assert_close(exported(more_frames), network(more_frames))
    weights = dict(network.named_parameters())
    grads = torch.func.grad(lambda w: torch.func.functional_call(network, w, (frames,)).sum())(weights)
    network(frames).sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


STUCK = """
import threading, torch
from srwm_rl.ops.thread_parallel import parallel_batch
torch.set_num_threads(2)
start, started = threading.Thread.start, []
def no_more(self):
    if started:
        raise RuntimeError("can't start new thread")
    started.append(self)
    start(self)
threading.Thread.start = no_more
try:
    parallel_batch(lambda x: x * 2, list(torch.ones(4, 1).split(1)), [])
except RuntimeError as error:
    print(error, torch.get_num_threads())
threading.Thread.start = start
print(parallel_batch(lambda x: x * 2, list(torch.ones(4, 1).split(1)), []).flatten().tolist())
"""


def test_a_failed_thread_start_raises_and_the_process_still_ends() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.splitlines() == ["can't start new thread 2", "[2.0, 2.0, 2.0, 2.0]"]


def test_each_calling_thread_has_its_own_workers() -> None:
    net, batches = net_and_parts()
    parallel_batch(net, batches, net.parameters())
    mine, theirs = parts._own.workers, []

    def work() -> None:
        torch.set_num_threads(2)
        parallel_batch(net, batches, net.parameters())
        theirs.append(parts._own.workers)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert mine is not None
    assert theirs[0] is not None
    assert theirs[0] is not mine
    assert parts._own.workers is mine


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_starts_its_own_workers() -> None:
    torch.set_num_threads(2)
    ends: list[float] = []
    _ = parts._map_in_threads(lambda number: ends.append(number), [1.0, 2.0])
    child = os.fork()
    if child == 0:  # no torch operation: OpenMP's threads do not survive a fork
        os._exit(0 if parts._own.n_workers == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert parts._own.n_workers == 2
