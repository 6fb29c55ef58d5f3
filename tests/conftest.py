"""Settings of every test process, made before torch is loaded; tests of a GPU are left out where there is none."""

import os

import pytest

# torch's OpenMP threads spin while they wait; beside another busy process that costs ten times the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")
