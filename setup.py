"""Builds the CPU kernel of csrc/ with the package; pyproject.toml has the rest.

On Linux a build without the kernel is an error, unless ATTNPRESS_WITHOUT_KERNEL=1 asks for it. Elsewhere the package is
pure Python. In a checkout, `make kernel` builds the kernel in place.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError

WITHOUT_VARIABLE = "ATTNPRESS_WITHOUT_KERNEL"
WITH_KERNEL = sys.platform == "linux" and os.environ.get(WITHOUT_VARIABLE, "") in ("", "0")
LOWEST_PYTHON = "cp311"  # the oldest of requires-python: one binary for it and every later version

SHARED = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
]
# The headers of torch 2.10: one binary for it and every later version.
STABLE = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-Wno-unused-parameter"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
AMX = ["-mamx-tile", "-mamx-int8"]
# What every processor with AVX-512 has that servers were sold with.
AVX512_CORE = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# Comparisons may be computed where they are not needed: nobody looks at the flags of exceptions, and no value changes.
QUIET = ["-fno-trapping-math"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx512vbmi2"]

FLAGS = {
    "csrc/library.cpp": STABLE,
    "csrc/linear.cpp": STABLE,
    "csrc/linear_scalar.cpp": QUIET,
    "csrc/gradients.cpp": STABLE,
    "csrc/gradients_scalar.cpp": QUIET,
    "csrc/dispatch.cpp": [],
    "csrc/mask.cpp": [],
    "csrc/isa_scalar.cpp": ["-fno-tree-vectorize"],  # the honest baseline
}
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS["csrc/isa_avx2.cpp"] = AVX2
    for name in ("linear", "gradients"):
        FLAGS[f"csrc/{name}_avx2.cpp"] = [*AVX2, *QUIET]
        FLAGS[f"csrc/{name}_avx512.cpp"] = [*AVX2, *AVX512_CORE, *QUIET]
    # g++ 12 warns about its own headers: GCC bug 105593.
    FLAGS["csrc/isa_avx512vnni.cpp"] = [*AVX2, *AVX512, "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    FLAGS["csrc/isa_amx.cpp"] = [*FLAGS["csrc/isa_avx512vnni.cpp"], *AMX]


class BuildKernel(build_ext):
    """Compiles each source with flags of its own, and links against the torch of the build."""

    def build_extension(self, ext: Extension) -> None:
        """Build, or end with the reason and the ways out."""
        try:
            self._build(ext)
        except Exception as error:
            raise BaseError(
                f"attnpress: the CPU kernel could not be built: {error}. Install a C++17 compiler (g++ or clang++) and "
                f"try again, or set {WITHOUT_VARIABLE}=1 to install without the kernel: every backend but 'cpu' works "
                "then."
            ) from error

    def _build(self, ext: Extension) -> None:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            raise RuntimeError("torch is not installed in the build environment (pip install 'torch>=2.10')")
        torch = Path(spec.origin).parent
        include = [str(torch / "include")]
        flags = dict(FLAGS)
        if self._accepts(AMX):
            flags["csrc/dispatch.cpp"] = ["-DATTN_AMX"]
        elif flags.pop("csrc/isa_amx.cpp", None):
            print("attnpress: this compiler does not know AMX; its target is left out", file=sys.stderr)

        def compiled(source: str) -> list[str]:
            objects: list[str] = self.compiler.compile(
                [source],
                self.build_temp,
                include_dirs=include,
                extra_postargs=[*SHARED, *flags[source]],
                depends=ext.depends,
            )
            return objects

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a compiler: a process of its own
            objects = [each for found in pool.map(compiled, flags) for each in found]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), libraries=["torch_cpu"], library_dirs=[str(torch / "lib")],
            target_lang="c++", extra_postargs=["-Wl,--no-undefined"],
        )  # fmt: skip

    def _accepts(self, flags: list[str]) -> bool:
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "empty.cpp"
            source.touch()
            try:
                self.compiler.compile([str(source)], output_dir=scratch, extra_postargs=flags)
            except CompileError:
                return False
        return True


KERNEL = Extension(
    "attnpress.kernels._attention",
    sources=list(FLAGS),
    depends=[str(path) for path in sorted(Path("csrc").glob("*.h"))],
    py_limited_api=True,
    language="c++",
)

if not WITH_KERNEL:
    print("attnpress: building without the CPU kernel; the backend 'cpu' will be unavailable", file=sys.stderr)

setup(
    ext_modules=[KERNEL] if WITH_KERNEL else [],
    cmdclass={"build_ext": BuildKernel},
    options={"bdist_wheel": {"py_limited_api": LOWEST_PYTHON}} if WITH_KERNEL else {},
)
