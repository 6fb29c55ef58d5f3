"""Build the CPU kernel where a C compiler is at hand, and give the README absolute links; else see pyproject.toml."""

import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

ROOT = Path(__file__).parent
UNIX = sys.platform != "win32"

kernel = Extension(
    "srwm_rl.ops._srwm_cpu",
    ["srwm_rl/ops/csrc/srwm_cpu.c"],
    depends=[str(header) for header in Path("srwm_rl/ops/csrc").glob("*.h")],
    extra_compile_args=["-std=gnu11", "-O3", "-fno-math-errno", "-fvisibility=hidden", "-g0"] if UNIX else ["/O2"],
    extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],  # without symbols: a quarter of the size
    libraries=["m"] if UNIX else [],
    optional=True,  # without it, srwm_scan and delta_scan run their reference in plain PyTorch
    py_limited_api=True,  # it is called through ctypes: one build serves every Python
)


class BuildKernel(build_ext):
    """Compiles the kernel on all cores, and links it without a path to the libraries of the Python that builds it."""

    def build_extensions(self) -> None:
        """See `build_ext`."""
        for name in ("linker_so", "linker_so_cxx"):
            words = getattr(self.compiler, name, None)
            if words:
                setattr(self.compiler, name, [word for word in words if not word.startswith("-Wl,-rpath")])
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """Leave optimizing to the linker, which GCC does on all cores; without that where it fails."""
        options = ext.extra_compile_args, ext.extra_link_args
        if UNIX:
            ext.extra_compile_args, ext.extra_link_args = ([*some, "-flto=auto"] for some in options)
            try:
                super().build_extension(ext)
                return
            except CCompilerError:
                ext.extra_compile_args, ext.extra_link_args = options
        super().build_extension(ext)


def readme() -> str:
    """Return the README with links that work wherever it is shown."""
    source = re.search(r'^Source = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert source is not None

    def absolute(link: re.Match[str]) -> str:
        folder = "raw" if link["image"] else "blob"
        return f"{link['image']}[{link['text']}]({source[1]}/{folder}/main/{link['path']})"

    relative = r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!https?:|mailto:|#)(?P<path>[^)]+)\)"
    return re.sub(relative, absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    ext_modules=[kernel],
    cmdclass={"build_ext": BuildKernel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
