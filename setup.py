"""Build the CPU kernel where a C compiler is at hand; everything else about the package is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup

unix = sys.platform != "win32"
kernel = Extension(
    "srwm_rl.ops._srwm_cpu",
    ["srwm_rl/ops/csrc/srwm_cpu.c"],
    depends=[str(each) for each in Path("srwm_rl/ops/csrc").glob("*.h")],
    extra_compile_args=["-std=gnu11", "-O3", "-fno-math-errno", "-fvisibility=hidden"] if unix else ["/O2"],
    libraries=["m"] if unix else [],
    optional=True,  # without it, srwm_scan and delta_scan run their reference in plain PyTorch
    py_limited_api=True,  # it is called through ctypes: one build serves every Python
)
setup(ext_modules=[kernel], options={"bdist_wheel": {"py_limited_api": "cp310"}})
