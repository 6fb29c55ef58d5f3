"""Compile the Triton kernels ahead of time, without a GPU, and print what their machine code takes, as JSON.

`python -m tests.srwm_rl.ops.triton_compile [NAME ...]` prints the kernels of `KERNELS`, or those named. Figures:
registers per thread, bytes of stack, instructions that store or load spilled registers, bytes of shared memory per
program, shuffles (SHFL and warp reductions) in the machine code, and cycles per step by the model of triton_cycles.py,
which no GPU has confirmed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from srwm_rl.ops import triton_delta, triton_scan
from tests.srwm_rl.ops.triton_cycles import cycles_per_step

ARCHITECTURES = (80, 90, 100)
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Kernel(NamedTuple):
    """A kernel and the sizes that it is compiled with."""

    op: str  # "scan" or "delta"
    way: str  # "forward" or "backward"
    size: int  # D
    width: int | None = None  # E, if it is not D
    retention: bool = False
    bound: bool = False

    @property
    def name(self) -> str:
        """The name in tables."""
        options = [f"E{self.width}"] * (self.width is not None)
        options += ["retention"] * self.retention + ["bound"] * self.bound
        return " ".join((self.op, self.way, f"D{self.size}", *options))

    def compile(self, architecture: int) -> Any:
        """Return Triton's compiled kernel, as in training: episode starts, an initial state, all gradients."""
        if self.op == "delta":
            sizes = triton_delta.launch_sizes(self.size)
            flags = {"WEIGHT": True, "STARTS": True}
            function = {"forward": triton_delta._forward_kernel, "backward": triton_delta._backward_kernel}[self.way]
        else:
            sizes = triton_scan.launch_sizes(self.size, self.width or self.size)
            flags = {"SHIFT": True, "STARTS": True, "RETENTION": self.retention, "BOUND": self.bound}
            function = {"forward": triton_scan._forward_kernel, "backward": triton_scan._backward_kernel}[self.way]
        if self.op == "scan" and self.way == "backward":
            flags["AHEAD"] = triton_scan.loads_ahead(sizes, self.retention or self.bound)
        flags |= {"KEEP": True} if self.way == "forward" else {"GRAD_Y": True, "GRAD_FINAL": True}
        constants = {name: value for name, value in (sizes | flags).items() if name != "num_warps"}
        kinds = {"starts": "*u8", "T": "i32", "B": "i32", "H": "i32", "bound": "fp32"}
        signature = {n: "constexpr" if n in constants else kinds.get(n, "*fp32") for n in function.arg_names}
        pointers = [p for p in function.params if signature[p.name][0] == "*" and not p.do_not_specialize_on_alignment]
        aligned = {(p.num,): [["tt.divisibility", 16]] for p in pointers}  # as torch's memory is
        source = ASTSource(function, signature, constants, aligned)
        return triton.compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": sizes["num_warps"]})


KERNELS = {
    kernel.name: kernel
    for kernel in (
        *(Kernel("scan", way, size) for size in (4, 8, 16, 32, 64) for way in ("forward", "backward")),
        *(Kernel("scan", way, 16, 49) for way in ("forward", "backward")),
        *(Kernel("scan", way, 64, None, True, True) for way in ("forward", "backward")),
        *(Kernel("scan", way, 16, None, True, True) for way in ("forward", "backward")),
        *(Kernel("delta", way, size) for size in (16, 32, 64) for way in ("forward", "backward")),
    )
}


def disassemble(cubin: bytes, *options: str, tool: str = "nvdisasm") -> str:
    """Return what a disassembler of Triton's wheel prints."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(BIN / tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(built: Any) -> tuple[int, int]:
    """Return a compiled kernel's registers per thread and bytes of stack."""
    usage = disassemble(built.asm["cubin"], "--dump-resource-usage", tool="cuobjdump")
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return registers, stack


def measure(kernel: Kernel, architecture: int) -> dict[str, int]:
    """Compile a kernel and return its figures."""
    built = kernel.compile(architecture)
    registers, stack = resources(built)
    code = disassemble(built.asm["cubin"], "-hex", "-c")
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)", code, re.M)
    return {
        "registers": registers,
        "stack": stack,
        "spills": sum(name in ("STL", "LDL") for name in names),
        "shared": int(built.metadata.shared),
        "modelled_cycles_per_step": cycles_per_step(code, 1 if kernel.way == "forward" else 2),
        "shuffles": sum(name in ("SHFL", "REDUX", "CREDUX") for name in names),
    }


if __name__ == "__main__":
    table = {
        name: {f"sm_{architecture}": measure(KERNELS[name], architecture) for architecture in ARCHITECTURES}
        for name in sys.argv[1:] or KERNELS
    }
    print(json.dumps({"triton": triton.__version__, "kernels": table}, indent=1))
