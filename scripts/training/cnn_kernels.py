"""How a run's CNN computes, chosen when the run begins, on a GPU by a measurement; a resumed run keeps the choice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.engine.cuda_graphs import capture, first_line
from srwm_rl.agents.frames_at_once import FRAMES_AT_ONCE
from srwm_rl.errors import UserError
from srwm_rl.nn.cnns import IN_C, KERNELS, ImpalaCNN
from srwm_rl.ops.cpu_cnn import is_faster
from srwm_rl.scripts.cli import warn
from srwm_rl.scripts.config.settings import TrainConfig

ROUNDS, REPLAYS = 5, 4  # of each candidate, in alternation
MARGIN = 1.05  # by which a later candidate must be faster: two runs should not differ by noise
MAX_DIFFERENCE = 0.1  # relative, of gradients in bfloat16
logger = logging.getLogger(__name__)


def choose_kernels(config: TrainConfig, model: RecurrentAlgorithm) -> str:
    """Return the fastest kernels for the model's CNNs, "auto" where there is no choice; the same in all processes.

    On a GPU gradients of a batch, of at most 4,096 frames, are timed as CUDA graphs; what fails or gives other numbers
    than plain operations is left out. No random numbers are drawn. On a CPU the CNN runs in C where that is faster: on
    matrix tiles, and on the vectors of AVX2 (on AVX-512 it was not measured).

    Raises:
        UserError: kernels are asked for that the CNNs or the device do not have.
    """
    cnns, on_gpu, wanted = cnns_of(model), model.device.type == "cuda", config.cnn_kernels
    if wanted in IN_C.values() and not _can_run_in_c(wanted, model):
        needs = {"tiles": "bfloat16, all widths multiples of 16, on a CPU with AMX", "vectors": "float32 on a CPU"}
        raise UserError(f"--cnn-kernels {wanted} is for an IMPALA or patch CNN in {needs[wanted]}: leave it out")
    if wanted in KERNELS.keys() - {"plain"} and not (cnns and on_gpu):
        raise UserError(f"--cnn-kernels {wanted} is for an IMPALA or Nature CNN on a GPU: leave it out")
    if wanted != "auto":
        return wanted
    faster = (kernels for precision, kernels in IN_C.items() if is_faster(precision) and _can_run_in_c(kernels, model))
    choice = next(faster, "auto")
    if cnns and on_gpu:
        choice = _measured(cnns, min(config.batch_size, FRAMES_AT_ONCE["cuda"]), model.device)
    return str(model.processes.all_gather(choice)[0])


def use_kernels(kernels: str, model: RecurrentAlgorithm) -> None:
    """Let the model's CNNs run in this way; "auto" stands for plain operations, as in runs without a choice.

    A run that another machine began may have kernels that this one does not have: its CNNs run operation by operation.
    """
    if kernels in IN_C.values() and not _can_run_in_c(kernels, model):
        where = {"tiles": "on matrix tiles (AMX)", "vectors": "in C, on a CPU"}
        warn(f"the run's CNN ran {where[kernels]}, which it cannot here: it is not exactly the same run from here on")
        kernels = "plain"
    for cnn in cnns_of(model):
        cnn.kernels = "plain" if kernels == "auto" else kernels


def _can_run_in_c(kernels: str, model: RecurrentAlgorithm) -> bool:
    cnns = cnns_of(model)
    on_cpu = bool(cnns) and model.device.type == "cpu"
    return on_cpu and all(kernels == IN_C[cnn.precision] and cnn.can_run_in_c() for cnn in cnns)


def cnns_of(model: RecurrentAlgorithm) -> list[ImpalaCNN]:
    """Return the policy's CNNs that have a choice of kernels."""
    return [module for module in model.policy.modules() if isinstance(module, ImpalaCNN)]


def _measured(cnns: list[ImpalaCNN], n_frames: int, device: torch.device) -> str:
    generator = torch.Generator().manual_seed(0)
    frames = [torch.randint(0, 256, (n_frames, *cnn.shape), dtype=torch.uint8, generator=generator) for cnn in cnns]
    run = partial(_gradients, cnns, [part.to(device) for part in frames])
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    replays: dict[str, Callable[[], object]] = {}
    expected: list[Tensor] = []
    for kernels in _candidates(cnns):
        for cnn in cnns:
            cnn.kernels = kernels
        try:
            results = [part.clone() for part in run()]
            expected = expected or results
            error = max(float((a - b).norm() / b.norm()) for a, b in zip(results, expected, strict=True))
            if not error <= MAX_DIFFERENCE:
                raise ValueError(f"its results differ by {error:.2g} of their norm")
            replays[kernels] = capture(run, stream, pool, draws=False)
        except Exception as error:  # whatever compiler, driver and memory refuse: plain operations remain
            logger.warning("the CNN's %s kernels are not used: %s", kernels, first_line(error))
    times: dict[str, list[float]] = {kernels: [] for kernels in replays}
    for _ in range(ROUNDS):
        for kernels, replay in replays.items():
            times[kernels].append(_milliseconds(replay, device))
    del replays
    torch.cuda.empty_cache()
    return _fastest({kernels: median(parts) for kernels, parts in times.items()})


def _fastest(times: dict[str, float]) -> str:
    """Return the first of those that are not slower than the fastest by more than the margin."""
    limit = MARGIN * min(times.values(), default=0.0)
    return next((kernels for kernels, time in times.items() if time <= limit), "plain")


def _candidates(cnns: list[ImpalaCNN]) -> list[str]:
    """Return the kernels without those that pad as others do."""
    by_padding: dict[Any, str] = {}
    for kernels, multiple in KERNELS.items():
        padding = tuple(-cnn.depth % multiple for cnn in cnns)
        by_padding.setdefault((kernels == "plain", padding), kernels)
    return list(by_padding.values())


def _gradients(cnns: list[ImpalaCNN], frames: list[Tensor]) -> list[Tensor]:
    """Return features and the gradients of their squares' sum, each as one vector."""
    features = torch.cat([cnn(part) for cnn, part in zip(cnns, frames, strict=True)], dim=1)
    weights = [weight for cnn in cnns for weight in cnn.parameters()]
    grads = torch.autograd.grad(features.square().sum(), weights)
    return [features.detach(), torch.cat([grad.flatten() for grad in grads])]


def _milliseconds(replay: Callable[[], object], device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            replay()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end))
