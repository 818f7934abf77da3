"""What pyproject.toml can't say: the compiled CPU kernel, and packages that lie outside offload/."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class PlainLibrary(Extension):
    """A shared library with a C ABI, loaded through ctypes: it needs neither Python's headers nor torch's."""


class BuildLibrary(build_ext):
    """Builds offload/_cpu_adam.so, or says loudly that it couldn't: the package works without, only slower."""

    failed = False

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no tag: the library fits every Python

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # no PyInit_ function

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:  # no compiler, an old one, a platform nobody has tried
            if os.environ.get("OFFLOAD_REQUIRE_CPP") == "1":
                raise
            self.failed = True
            print(
                f"\n*** The compiled CPU optimizer kernel was NOT built ({type(error).__name__}: {error}).\n"
                "*** The package installs all the same and uses the numba kernel. With a C++17 compiler, install\n"
                "*** again; with OFFLOAD_REQUIRE_CPP=1 a failed build is an error.\n",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self) -> None:
        if not self.failed:
            super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return [] if self.failed else super().get_outputs()


class PlatformWheel(bdist_wheel):
    """Tagged py3-none-<platform>: one wheel for every Python and every torch."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


cpu_adam = PlainLibrary(
    "offload._cpu_adam",
    ["csrc/cpu_adam/adam.cpp"],
    depends=sorted(str(path) for path in Path("csrc/cpu_adam").glob("*") if path.suffix in (".h", ".inl")),
    # No -march: instruction sets are chosen at run time. -ffp-contract=off: the bits depend on it.
    extra_compile_args=[
        *("-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno"),
        *("-fvisibility=hidden", "-pthread"),
        *("-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),  # GCC 12 warns of its own AVX-512 header
    ],
    extra_link_args=["-pthread"],
    language="c++",
)

# integrations/ must not be a top-level package: on sys.path it would shadow deepspeed. The emulated device travels as
# source, offload/csrc_sim in an installed package, and is built where it is first used.
integrations = [f"offload.{name}" for name in find_packages(include=["integrations", "integrations.*"])]

setup(
    py_modules=["pytest_offload"],
    packages=[*find_packages(include=["offload", "offload.*"]), *integrations, "offload.csrc_sim"],
    package_dir={"offload.integrations": "integrations", "offload.csrc_sim": "csrc/sim"},
    package_data={"offload": ["py.typed", "profiles/*.json"], "offload.csrc_sim": ["*.cpp", "*.h", "*.inl"]},
    ext_modules=[cpu_adam],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
