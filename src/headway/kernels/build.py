"""Compiles csrc/*.cpp against the installed PyTorch: one shared library a file, some seconds each, side by side.

Run as ``python -m headway.kernels.build [operation ...]``. The sources use only LibTorch's stable ABI, so a library built
once serves later PyTorch versions too. Instruction sets are chosen at run time (see csrc/isa.h), never by a flag here.
This file imports nothing of headway, because setup.py runs it before headway is installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
NATIVE = HERE / "native"
# reductions may be reassociated so that they vectorise; NaN and Inf keep their meaning (no -ffinite-math-only)
FLAGS = [
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-fopenmp-simd",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]


class BuildError(RuntimeError):
    """A kernel could not be compiled; the message says why and what is lost."""


def sources() -> Path:
    """The folder of the C++ sources: ``csrc/`` of a checkout, ``headway/csrc/`` of an installed package."""
    for folder in (HERE.parents[2] / "csrc", HERE.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError("the C++ sources are not part of this installation; install headway from a checkout to build them")


def compiler() -> str | None:
    """The C++ compiler that will be used: ``$CXX``, g++, clang++ or c++; None where there is none."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++", "c++"]:
        if found := shutil.which(name):
            return found
    return None


def key(operation: str) -> str:
    """What the library of an operation is built from, as one word: its source, the headers and the flags.

    Raises BuildError where there are no sources.
    """
    folder, found = sources(), hashlib.sha256(" ".join(FLAGS).encode())
    for source in (folder / f"{operation}.cpp", *sorted(folder.glob("*.h"))):
        found.update(source.read_bytes())
    return found.hexdigest()


def is_fresh(operation: str, into: Path = NATIVE) -> bool:
    """Whether the library was built from the sources as they are; so is any where none came with the installation."""
    try:
        wanted = key(operation)
    except (BuildError, FileNotFoundError):
        return True
    written = into / f"{operation}.key"
    return written.exists() and written.read_text() == wanted


def build(operations: Iterable[str] = (), into: Path = NATIVE, force: bool = False) -> dict[str, str]:
    """Compiles the named operations (all by default) and returns {operation: "built" | "fresh" | the compiler's complaint}.

    Raises BuildError where there is no compiler or no PyTorch. A library is written beside its final name and renamed, so
    that a running process never sees half of one.
    """
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler was found (looked for $CXX, g++, clang++, c++)")
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise BuildError("PyTorch is not installed in this environment; install it first") from error
    folder = sources()
    wanted = list(operations) or sorted(source.stem for source in folder.glob("*.cpp"))
    into.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in [str(folder), *include_paths()]]
    links = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]

    def one(operation: str) -> str:
        source, target = folder / f"{operation}.cpp", into / f"{operation}.so"
        if not source.exists():
            return f"there is no {source.name}; operations: {', '.join(sorted(s.stem for s in folder.glob('*.cpp')))}"
        if not force and target.exists() and is_fresh(operation, into):
            return "fresh"
        word = key(operation)
        part = target.with_suffix(f".{os.getpid()}.part")
        done = subprocess.run(
            [cxx, *FLAGS, *includes, str(source), "-o", str(part), *links], capture_output=True, text=True
        )
        if done.returncode:
            part.unlink(missing_ok=True)
            return done.stderr.strip() or f"{cxx} ended with {done.returncode}"
        target.with_suffix(".key").unlink(missing_ok=True)
        part.replace(target)
        target.with_suffix(".key").write_text(word)
        return "built"

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(wanted, pool.map(one, wanted), strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Builds what the command line names and prints one line an operation; 1 if any failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    force = "--force" in arguments
    try:
        outcome = build([name for name in arguments if name != "--force"], force=force)
    except BuildError as error:
        print(f"headway: kernels not built, plain PyTorch is used instead: {error}", file=sys.stderr)
        return 1
    for operation, word in outcome.items():
        print(f"{operation}: {word}")
    return 0 if set(outcome.values()) <= {"built", "fresh"} else 1


if __name__ == "__main__":
    raise SystemExit(main())
