"""Builds the CPU kernel of csrc/ with the package where there is a C++ compiler and torch; pyproject.toml has the rest.

Without them the package installs all the same and runs through its reference; the build says so. In a checkout,
`make kernel` builds it anew, or fails.
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
from setuptools.errors import CompileError

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
    "csrc/dispatch.cpp": [],
    "csrc/mask.cpp": [],
    "csrc/isa_scalar.cpp": ["-fno-tree-vectorize"],  # the honest baseline
}
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS["csrc/isa_avx2.cpp"] = AVX2
    FLAGS["csrc/linear_avx2.cpp"] = [*AVX2, *QUIET]
    FLAGS["csrc/linear_avx512.cpp"] = [*AVX2, *AVX512_CORE, *QUIET]
    # g++ 12 warns about its own headers: GCC bug 105593.
    FLAGS["csrc/isa_avx512vnni.cpp"] = [*AVX2, *AVX512, "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    FLAGS["csrc/isa_amx.cpp"] = [*FLAGS["csrc/isa_avx512vnni.cpp"], *AMX]


class BuildKernel(build_ext):
    """Compiles each source with flags of its own, and links against the torch that is installed."""

    def build_extension(self, ext: Extension) -> None:
        """Build, or say once why the package goes without."""
        try:
            self._build(ext)
        except Exception as error:
            print(
                f"attnpress: built without its CPU kernel ({error}); it will run through the reference", file=sys.stderr
            )

    def _build(self, ext: Extension) -> None:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            raise RuntimeError("torch is not installed where the build runs; try pip install --no-build-isolation")
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


setup(
    ext_modules=[
        Extension(
            "attnpress.kernels._attention",
            sources=list(FLAGS),
            depends=[str(path) for path in sorted(Path("csrc").glob("*.h"))],
            py_limited_api=True,
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildKernel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
