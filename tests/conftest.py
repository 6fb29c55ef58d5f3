"""Settings of every test process, made before torch is loaded; tests of a GPU are left out where there is none."""

import os
import sys

import pytest

# torch's OpenMP threads spin while they wait; beside another busy process that costs ten times the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_configure(config: pytest.Config) -> None:
    # What "auto" means is the CPU on every machine, but where a GPU is asked for.
    if "gpu" not in config.getoption("markexpr").replace("not gpu", "") and "torch" not in sys.modules:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")
