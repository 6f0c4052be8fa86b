"""One direction of one layer-normalised recurrent layer, step by step: the truth the C++ time loop is tested against.

With ``P_t = W_ih x_t (+ bias)``, ``Z_t = W_hh h_{t-1}`` and N(a; g, b) = g (a - mean) / sqrt(var + eps) + b over every segment:

* LSTM (order i, f, candidate, o):  ``a = N(P; g_in, b_in) + N(Z; g_rec, b_rec)``; ``c = sigma(f) c + sigma(i) tanh(g)``;
  ``h = sigma(o) tanh(N(c; g_cell, b_cell))``. With cell_norm "recurrent" the normalised c is also what the next step gets.
* GRU (order r, z, n):  ``r, z = sigma(N(P) + N(Z))``; ``n = tanh(N(P) + r N(Z))``; ``h = z h + (1 - z) n``.
* plain:  ``h = f(N(P + Z; g_rec, b_rec))`` with f = tanh or relu.

Ba, Kiros, Hinton, "Layer Normalization", 2016 (arXiv 1607.06450).
"""

from __future__ import annotations

import torch
from torch import Tensor

LSTM, GRU, RNN = 0, 1, 2
NONE, JOINT, PER_GATE = 0, 1, 2
OUTPUT, RECURRENT = 1, 2
GATES = {LSTM: 4, GRU: 3, RNN: 1}


def segments(kind: int, gate_norm: int, hidden: int) -> list[int]:
    """Lengths of the runs of gates that are normalised together."""
    gates = GATES[kind]
    if gate_norm == PER_GATE:
        return [hidden] * gates
    return [2 * hidden, hidden] if kind == GRU else [gates * hidden]


def normalise(a: Tensor, sizes: list[int], gain: Tensor, offset: Tensor, eps: float, on: bool) -> Tensor:
    """N(a; gain, offset) over every segment of the last axis; ``a + offset`` where ``on`` is False."""
    if not on:
        return a + offset
    parts = []
    for part in a.split(sizes, -1):
        mean = part.mean(-1, keepdim=True)
        variance = (part - mean).square().mean(-1, keepdim=True)
        parts.append((part - mean) / torch.sqrt(variance + eps))
    return torch.cat(parts, -1) * gain + offset


def step(
    p: Tensor,
    z: Tensor,
    h: Tensor,
    c: Tensor,
    gains: Tensor,
    cell: Tensor,
    kind: int,
    gate_norm: int,
    cell_norm: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """The next (h, c) from P_t and Z_t (batch, gates * hidden) and the states (batch, hidden)."""
    hidden = h.shape[-1]
    sizes, on = segments(kind, gate_norm, hidden), gate_norm != NONE
    g_in, b_in, g_rec, b_rec = gains
    if kind == RNN:
        a = normalise(p + z, sizes, g_rec, b_rec, eps, on)
        return (torch.relu(a) if relu else torch.tanh(a)), c
    left, right = normalise(p, sizes, g_in, b_in, eps, on), normalise(z, sizes, g_rec, b_rec, eps, on)
    if kind == GRU:
        (pr, pz, pn), (zr, zz, zn) = left.chunk(3, -1), right.chunk(3, -1)
        r, u = torch.sigmoid(pr + zr), torch.sigmoid(pz + zz)
        return u * h + (1 - u) * torch.tanh(pn + r * zn), c
    i, f, g, o = (left + right).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    y = normalise(c, [hidden], cell[0], cell[1], eps, True) if cell_norm else c
    return torch.sigmoid(o) * torch.tanh(y), y if cell_norm == RECURRENT else c


def layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    gains: Tensor,
    cell: Tensor,
    lengths: Tensor | None,
    kind: int,
    gate_norm: int,
    cell_norm: int,
    eps: float,
    reverse: bool,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """All steps of x (T, B, input); returns every h (T, B, hidden) and the last c (B, hidden).

    Steps at or beyond ``lengths`` (B,) carry the state over. Products have operands in the type of x (half
    precision included); sums and everything else are in the type of h0.
    """
    wide, low = h0.dtype, x.dtype
    h, c, outputs = h0, c0, [None] * x.shape[0]
    for t in reversed(range(x.shape[0])) if reverse else range(x.shape[0]):
        p = torch.nn.functional.linear(x[t].to(wide), weight_ih.to(wide))
        p = p if bias is None else p + bias
        z = torch.nn.functional.linear(h.to(low).to(wide), weight_hh.to(wide))
        h_next, c_next = step(p, z, h, c, gains, cell, kind, gate_norm, cell_norm, eps, relu)
        if lengths is None:
            h, c = h_next, c_next
        else:
            inside = (t < lengths)[:, None]
            h, c = torch.where(inside, h_next, h), torch.where(inside, c_next, c)
        outputs[t] = h  # type: ignore[call-overload]
    return torch.stack(outputs), c  # type: ignore[arg-type]
