"""Builds the C++ kernels while headway is installed. Without a compiler or without PyTorch the install still succeeds."""

import importlib.util
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithKernels(build_py):
    def run(self) -> None:
        spec = importlib.util.spec_from_file_location("headway_build", ROOT / "src/headway/kernels/build.py")
        kernels = importlib.util.module_from_spec(spec)
        sys.modules["headway_build"] = kernels
        spec.loader.exec_module(kernels)
        try:
            for operation, word in kernels.build().items():
                print(f"headway kernel {operation}: {word}")
        except kernels.BuildError as error:
            print(f"headway: kernels not built, plain PyTorch is used instead: {error}", file=sys.stderr)
        super().run()


setup(cmdclass={"build_py": BuildWithKernels})
