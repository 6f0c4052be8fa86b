"""What this machine offers and what it loses: CPU features, kernels, threads, the page-fault trap, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "avx512_vpopcntdq", "amx_bf16")


def cpu_features() -> dict[str, bool]:
    """Which of the instruction sets that matter here the processor has (empty where the system does not tell)."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return {}
    flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "").split()
    return {feature: feature in flags for feature in FEATURES}


def page_faults(megabytes: int = 64) -> dict[str, float]:
    """How much slower an operation is when its large result comes fresh from the allocator instead of memory in use.

    glibc hands blocks over its mmap threshold (32 MiB at most) back to the kernel at once, so every new large tensor costs a
    page fault for each 4 KiB.
    """
    import torch

    from headway.measure import paired

    x = torch.ones(megabytes * 2**18)
    out = torch.empty_like(x)
    pair = paired(lambda: torch.mul(x, 2.0, out=out), lambda: torch.mul(x, 2.0), seconds=1.0)
    return {"reused_ms": 1e3 * pair.ours, "fresh_ms": 1e3 * pair.theirs, "slowdown": pair.ratio}


def examine() -> dict[str, Any]:
    """Everything ``headway doctor`` reports, as plain data; ``advice`` holds one sentence for each thing to mend."""
    import torch

    from headway.kernels.build import compiler
    from headway.kernels.library import status

    versions = {}
    for name in (
        "headway",
        "torch",
        "transformers",
        "accelerate",
        "torch_geometric",
        "ray",
        "numpy",
        "pillow",
        "scikit-learn",
    ):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    kernels, faults = status(), page_faults()
    advice = []
    if not all(kernels.values()):
        missing = ", ".join(name for name, built in kernels.items() if not built)
        how = "run `python -m headway.kernels.build`" if compiler() else "install a C++ compiler (g++ or clang++) first"
        if os.environ.get("HEADWAY_KERNELS") == "reference":
            how = "unset HEADWAY_KERNELS, which is set to reference"
        advice.append(f"these operations run in plain PyTorch, slower: {missing}; {how}")
    if faults["slowdown"] > 1.5:
        advice.append(
            f"large tensors cost {faults['slowdown']:.1f}x because of page faults; set MALLOC_MMAP_THRESHOLD_=1073741824 and "
            "MALLOC_TRIM_THRESHOLD_=4294967296 in the environment of training"
        )
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": cpu_features(),
        "cuda": torch.cuda.is_available(),
        "compiler": compiler(),
        "kernels": kernels,
        "page_faults": faults,
        "versions": versions,
        "python": platform.python_version(),
        "advice": advice,
    }
