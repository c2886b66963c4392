"""Builds gradnorm_ext. The native code is CMake's business; this file only calls it.

    pip install --no-build-isolation -e .                       everything this machine can build
    GRADNORM_NATIVE=off pip install --no-build-isolation -e .   Python only, no compiler

Where nvcc and the Python package nvidia-cutlass (its headers, at build time only) are installed, the kernel for Hopper is
built as well; without them it is left out, and `python -m gradnorm_ext` says so.

Variables: GRADNORM_NATIVE (on, off), GRADNORM_CUDA (auto, on, off), MAX_JOBS, CMAKE_ARGS.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


def variable(name: str, default: str, *allowed: str) -> str:
    value = os.environ.get(name, default).lower()
    if value not in allowed:
        raise SystemExit(f"setup.py: {name} must be one of {', '.join(allowed)}, got {value!r}; unset it for {default}")
    return value


NATIVE = variable("GRADNORM_NATIVE", "on", "on", "off") == "on"
CUDA = variable("GRADNORM_CUDA", "auto", "auto", "on", "off")


class CMakeBuild(build_ext):
    """Builds CMakeLists.txt's `_C` where setuptools wants the extension module."""

    def build_extension(self, ext: Extension) -> None:
        wanted = Path(self.get_ext_fullpath(ext.name)).resolve()
        # An editable install loads `_C` from the source tree; building it there lets `cmake --build` alone refresh it.
        output_dir = ROOT / "gradnorm_ext" if self.editable_mode else wanted.parent
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            *("cmake", "-S", ROOT, "-B", build_dir, "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output_dir}",
            f"-DGRADNORM_CUDA={CUDA.upper()}",
            "-DGRADNORM_TESTS=OFF",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        build = ["cmake", "--build", build_dir, "--target", "_C"]
        if jobs := os.environ.get("MAX_JOBS"):
            build += ["--parallel", jobs]
        subprocess.run(configure, check=True)
        subprocess.run(build, check=True)
        if self.editable_mode:  # setuptools looks for it in its own folder all the same
            wanted.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(output_dir / wanted.name, wanted)


class PythonBuild(build_py):
    """Removes the `_C` that an earlier editable install left in the source tree, where native code is switched off."""

    def run(self) -> None:
        if not NATIVE:
            for stale in (ROOT / "gradnorm_ext").glob("_C.*.so"):
                stale.unlink()
        super().run()


# triton_kernels/ is installed inside gradnorm_ext: at the top level its name belongs to Triton's own package.
PACKAGE_DIR = {"gradnorm_ext": "gradnorm_ext", "gradnorm_ext.triton_kernels": "triton_kernels"}

setup(
    packages=[p for name, path in PACKAGE_DIR.items() for p in (name, *(f"{name}.{s}" for s in find_packages(path)))],
    package_dir=PACKAGE_DIR,
    package_data={"gradnorm_ext": ["py.typed", "*.pyi"]},
    ext_modules=[Extension("gradnorm_ext._C", sources=[])] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": PythonBuild},
)
