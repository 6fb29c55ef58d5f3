"""One of two processes with a GPU each: process 0 captures acting anew while both learn with IMPALA.

torchrun --nproc-per-node 2 -m tests.agents.two_gpu_processes FOLDER
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from srwm_rl.agents.distributed import RankInfo, init_processes
from srwm_rl.agents.engine import cuda_graphs
from tests.agents.probe import AddHooks, small_model, weight_vector

N_UPDATES = 16
RECAPTURED = tuple(range(4, N_UPDATES, 2))  # rollouts


def main(folder: Path) -> None:
    """Learn, and write what happened."""
    info = RankInfo.of()
    device = torch.device("cuda", info.local_rank)
    model = small_model("impala", device=device, synchronous=False, seed=info.rank)
    model.join(processes := init_processes(info, device))
    captures: list[bool] = []
    capture, sum_ = cuda_graphs.capture, processes.sum_

    def counted(work: Any, stream: Any, pool: Any = None, draws: bool = True) -> Any:
        captures.append(draws)
        return capture(work, stream, pool, draws)

    def late(tensors: Any) -> None:
        time.sleep(0.1)  # the learner of process 0 is within the operation so long
        sum_(tensors)

    cuda_graphs.capture = counted
    if not processes.first:
        processes.sum_ = late  # type: ignore[method-assign]
    model.learn(2 * 32 * N_UPDATES, AddHooks(RECAPTURED if processes.first else ()))
    result = {
        "updates": model._n_updates,
        "acting graphs": captures.count(True),
        "graphs in use": not model.engine._graphed_gradient.disabled,
        "weights": weight_vector(model).tolist(),
    }
    (folder / f"{info.rank}.json").write_text(json.dumps(result))
    processes.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
