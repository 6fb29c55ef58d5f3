"""Other defaults of torch, on which no number may depend."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def other_default(kind: str) -> Iterator[None]:
    """Change torch's default dtype to float64, or its default device to one without memory."""
    if kind == "device":
        with torch.device("meta"):
            yield
        return
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


other_defaults = pytest.mark.parametrize("kind", ["dtype", "device"])
