"""Times of a training step with moved norms beside the same model as it comes, in turn, in one process.

    python benchmarks/placement.py [--seconds 4] [--threads 1] [--json placement.json]

The models are that of the text task at three sizes, and two that others bring: a Llama and a torch.nn encoder. A step is forward,
backward and AdamW. Each ratio is the moved model's time divided by the plain one's: Mix-LN has the same parameters and products, so
1.00 is its limit; Peri-LN has two more norms a block. "unfused" computes the addition and the norm after it as two operations,
on both sides.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import headway as hw
from headway.measure import paired
from headway.residual import seams
from headway.residual.transformer import TransformerDecoder
from headway.surgery import Technique

TOKENS = (16, 64)
SIZES = [(6, 96), (6, 192), (6, 384)]


@dataclass
class Line:
    """One measured pair: seconds a step, and the median ratio with its quartiles."""

    what: str
    model: str
    moved: float
    plain: float
    ratio: float
    low: float
    high: float


def _text(depth: int, dim: int) -> nn.Module:
    return TransformerDecoder(256, dim, depth, 4, max_length=TOKENS[1])


def _llama(depth: int, dim: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": dim, "intermediate_size": 3 * dim, "num_hidden_layers": depth, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))


def _encoder(depth: int, dim: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, 0.0, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, depth, nn.LayerNorm(dim), enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(256, dim), stack, nn.Linear(dim, 256))


def _step(model: nn.Module, technique: Technique | None) -> Callable[[], None]:
    if technique is not None:
        hw.apply(model, technique)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    tokens = torch.randint(0, 256, (TOKENS[0], TOKENS[1] + 1), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        out = model(tokens[:, :-1])
        logits = out if isinstance(out, Tensor) else out.logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _measure(seconds: float) -> list[Line]:
    lines: list[Line] = []
    cases: list[tuple[str, Callable[[int, int], nn.Module], list[tuple[int, int]]]] = [
        ("text task", _text, SIZES),
        ("Llama", _llama, SIZES[:1]),
        ("torch.nn encoder", _encoder, SIZES[:1]),
    ]
    for name, build, sizes in cases:
        for depth, dim in sizes:
            for what, technique, fused in (
                ("Mix-LN", hw.MixLN(), True),
                ("Peri-LN", hw.PeriLN(), True),
                ("Peri-LN, unfused", hw.PeriLN(), False),
            ):
                torch.manual_seed(0)
                native, seams._NATIVE = seams._NATIVE, seams._NATIVE and fused
                pair = paired(_step(build(depth, dim), technique), _step(build(depth, dim), None), seconds)
                seams._NATIVE = native
                times = (pair.ours, pair.theirs, 1 / pair.ratio, 1 / pair.high, 1 / pair.low)
                lines.append(Line(what, f"{name}, {depth} layers, width {dim}", *times))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each pair")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = _measure(options.seconds)
    table = Table(
        title=f"a training step with moved norms, {TOKENS[0]} x {TOKENS[1]} tokens, {options.threads} thread(s)"
    )
    for column in ("norms", "model", "moved, ms", "plain, ms", "ratio", "quartiles"):
        table.add_column(column, justify="left" if column in ("norms", "model") else "right")
    for line in lines:
        row = (f"{line.moved * 1e3:.1f}", f"{line.plain * 1e3:.1f}", f"{line.ratio:.3f}")
        table.add_row(line.what, line.model, *row, f"{line.low:.3f} - {line.high:.3f}")
    Console(width=130).print(table)
    if options.json is not None:
        part = options.json.with_suffix(".part")
        part.write_text(json.dumps([asdict(line) for line in lines], indent=1))
        part.replace(options.json)


if __name__ == "__main__":
    main()
