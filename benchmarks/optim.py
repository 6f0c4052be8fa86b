"""Times one step of AdamP and SGDP beside PyTorch's own optimisers: ``python benchmarks/optim.py [--threads 1] [--seconds 2]``.

"ratio" is our time divided by theirs. A step of fused AdamW reads p, g, m, v and writes p, m, v (7 streams of memory); deciding
whether to project before p may be written makes it 10, so that 1.43 is the floor on tensors that no cache holds. "its loop" is
the same optimiser one tensor after another in plain PyTorch.
"""

from __future__ import annotations

import argparse

import torch

from headway.claims.adam_p import MODELS, PEERS, step_times
from headway.kernels import radial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each comparison")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"C++ {'loaded' if radial.built else 'NOT loaded'}, {given.threads} thread(s)")
    print(f"{'model':20} {'what':32} ours ms  their ms  ratio  quartiles")
    for model in MODELS:
        for peer in PEERS:
            row = step_times(peer, model, given.seconds)
            print(
                f"{model:20} {peer:32} {row['ours_ms']:7.3f}  {row['theirs_ms']:8.3f}  {row['ratio']:5.2f}  "
                f"{row['low']:.2f}-{row['high']:.2f}"
            )


if __name__ == "__main__":
    main()
