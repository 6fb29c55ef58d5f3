"""Two simulated CUDA devices for torch's CPU build: `python -m pytest -p tests.simulated_cuda.plugin ...`.

Imported before torch, this compiles and loads device.cpp (which describes the devices and the errors they find) and
replaces functions of `torch.cuda`. A test during which a hazard was found fails.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("device.cpp")


def build() -> Path:
    """Return the library, compiled from SOURCE if needed.

    Raises:
        subprocess.CalledProcessError: the compiler fails.
        FileNotFoundError: there is no g++.
    """
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch_home = Path(spec.origin).parent
    inputs = SOURCE.read_bytes() + version("torch").encode() + sys.version.encode()
    library = ROOT / "build" / "simulated_cuda" / f"{hashlib.sha256(inputs).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        temporary = library.with_suffix(f".{os.getpid()}")
        headers = [f"-isystem{torch_home / folder}" for folder in ("include", "include/torch/csrc/api/include")]
        linked = [f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_home / 'lib'}"]
        flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
        subprocess.run(["g++", *flags, *headers, str(SOURCE), "-o", str(temporary), *linked], check=True)
        temporary.rename(library)
    # Before torch: the library overrides some of its symbols.
    ctypes.CDLL(str(torch_home / "lib" / "libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return library


assert "torch" not in sys.modules, "simulated CUDA must be loaded before torch"
# One OpenMP thread for every thread of torch: products by several differ in their last bits.
os.environ["OMP_NUM_THREADS"] = "1"
build()

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  (reads torch.cuda when it is imported)

GPU = torch.ops.simulated_cuda


def index_of(device: Any) -> int:
    """Return the index of a device in any form that torch accepts; None: the current device."""
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return GPU.current_device() if index is None else index


class device:
    """As `torch.cuda.device`."""

    def __init__(self, device: Any) -> None:
        self.index = index_of(device)

    def __enter__(self) -> None:
        self._before = GPU.swap_device(self.index)

    def __exit__(self, *_: object) -> None:
        GPU.swap_device(self._before)


class Event:
    """As `torch.cuda.Event`; the first `query` returns False."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.number, self._queried = 0, False

    def record(self, stream: Stream | None = None) -> None:
        self.number, self._queried = GPU.new_event((stream or current_stream()).stream_id), False

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        if self._queried:
            self.synchronize()
        self._queried = True
        return not self.number or bool(GPU.is_done(self.number))

    def synchronize(self) -> None:
        if self.number:
            GPU.wait_for_event(self.number)

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class Stream:
    """As `torch.cuda.Stream`."""

    def __init__(self, device: Any = None, priority: int = 0, stream_id: int | None = None) -> None:
        self.device, self.priority = torch.device("cuda", index_of(device)), priority
        self.stream_id = GPU.new_stream() if stream_id is None else stream_id

    def wait_event(self, event: Event) -> None:
        if event.number:
            GPU.stream_waits(self.stream_id, event.number)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        GPU.wait_for_stream(self.stream_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)


def current_stream(device: Any = None) -> Stream:
    return Stream(device, stream_id=GPU.current_stream(index_of(device)))


@contextmanager
def stream(entered: Stream | None) -> Iterator[None]:
    if entered is None:
        yield
        return
    with device(entered.device):
        before = GPU.swap_stream(entered.device.index, entered.stream_id)
        try:
            yield
        finally:
            GPU.swap_stream(entered.device.index, before)


class CUDAGraph:
    """As `torch.cuda.CUDAGraph`."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.number = self.device = 0

    def replay(self) -> None:
        GPU.replay(self.number, self.device)

    def __del__(self) -> None:
        if self.number:
            GPU.forget(self.number)


@contextmanager
def graph(of: CUDAGraph, pool: Any = None, stream: Stream | None = None, **_: Any) -> Iterator[None]:
    GPU.wait_for_device()
    with STAND_INS["stream"](stream or Stream()):
        GPU.begin_capture()
        try:
            yield
        except BaseException:
            GPU.end_capture(True)
            raise
        of.number, of.device = GPU.end_capture(False), GPU.current_device()


class Generator:
    """As the device's `torch.Generator`; it draws the CPU's numbers."""

    def graphsafe_get_state(self) -> Generator:
        return self

    def graphsafe_set_state(self, state: Generator) -> None:
        """Ignore `state`: there is one generator."""

    def clone_state(self) -> Generator:
        return self


def cloned(storage: Any) -> Any:
    """Return a copy of a storage, which torch's CPU build cannot do for a GPU's."""
    if storage.device.type != "cuda":
        return type(storage)(storage.nbytes(), device=storage.device).copy_(storage)
    size = storage.nbytes()
    source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (size,), (1,))
    return torch.empty(size, dtype=torch.uint8, device=storage.device).copy_(source).untyped_storage()


def always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


STAND_INS: dict[str, Any] = {
    **{stand_in.__name__: stand_in for stand_in in (device, Event, Stream, CUDAGraph, current_stream, stream, graph)},
    "_lazy_init": always(None),
    "_lazy_call": lambda what, **_: what(),
    "_is_compiled": always(True),
    "_initialized": True,
    "is_available": always(True),
    "is_initialized": always(True),
    "is_bf16_supported": always(True),
    "is_current_stream_capturing": lambda: bool(GPU.is_capturing()),
    "device_count": always(2),
    "current_device": lambda: GPU.current_device(),
    "set_device": lambda device: GPU.swap_device(index_of(device)),
    "get_device_name": always("Simulated CUDA"),
    "get_device_capability": always((9, 0)),
    "get_device_properties": always(
        SimpleNamespace(name="Simulated", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30)
    ),
    "default_generators": (Generator(), Generator()),
    "default_stream": lambda device=None: Stream(device, stream_id=index_of(device)),
    "graph_pool_handle": always((0, 1)),
    "synchronize": lambda device=None: GPU.wait_for_device(),
    "manual_seed": always(None),
    "manual_seed_all": always(None),
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "get_rng_state_all": lambda: [torch.get_rng_state()] * 2,
    "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
    "empty_cache": always(None),
    "memory_allocated": lambda device=None: GPU.memory_allocated(index_of(device)),
    "max_memory_allocated": always(1 << 20),
    "reset_peak_memory_stats": always(None),
}


def install() -> None:
    for name, stand_in in STAND_INS.items():
        setattr(torch.cuda, name, stand_in)
    internals: Any = torch._C
    internals._cuda_endAllocateToPool = always(None)
    internals._cuda_set_sync_debug_mode = GPU.set_debug_mode
    torch.UntypedStorage.clone = cloned  # type: ignore[method-assign]
    from srwm_rl.ops import backends

    backends._BACKEND_OF_DEVICE["cuda"] = "reference"  # Triton compiles for real GPUs only


install()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    GPU.wait_for_device()  # hazards of earlier tests do not count
    GPU.take_hazards()
    yield
    hazards = sorted(set(GPU.take_hazards()))
    assert not hazards, hazards
