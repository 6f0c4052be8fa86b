"""Times the layer-normalised layers against torch's fused ones and a naive loop: ``python benchmarks/recurrent.py``."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from headway.measure import paired
from headway.norms.recurrent import LayerNormGRU, LayerNormLSTM

SIZES = [(60, 32, 128), (60, 8, 64), (30, 32, 256)]


def naive(net: LayerNormLSTM, x: Tensor) -> Tensor:
    """The paper's LSTM as a Python loop over plain torch operations."""
    size, outputs = net.hidden_size, []
    h = c = x.new_zeros(x.shape[1], size)
    ln_ih, ln_hh, ln_c = net.ln_ih_l0, net.ln_hh_l0, net.ln_c_l0
    for step in x:
        a = nn.functional.layer_norm(h @ net.weight_hh_l0.t(), (4 * size,), ln_hh.weight, ln_hh.bias) + net.bias_l0
        a = a + nn.functional.layer_norm(step @ net.weight_ih_l0.t(), (4 * size,), ln_ih.weight, ln_ih.bias)
        i, f, g, o = a.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * nn.functional.layer_norm(c, (size,), ln_c.weight, ln_c.bias).tanh()
        outputs.append(h)
    return torch.stack(outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each comparison")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print("(T, B, H)  pass  ours ms  other ms  ours/other  other")
    for steps, batch, size in SIZES:
        x = torch.randn(steps, batch, size)
        lstm, gru = LayerNormLSTM(size, size), LayerNormGRU(size, size)
        plain_lstm, plain_gru = nn.LSTM(size, size), nn.GRU(size, size)
        sides = [
            ("nn.LSTM", lambda a=lstm, x=x: a(x)[0], lambda a=plain_lstm, x=x: a(x)[0]),
            ("nn.GRU", lambda a=gru, x=x: a(x)[0], lambda a=plain_gru, x=x: a(x)[0]),
            ("naive LN-LSTM loop", lambda a=lstm, x=x: a(x)[0], lambda a=lstm, x=x: naive(a, x)),
        ]
        for name, ours, other in sides:
            with torch.no_grad():
                forward = paired(ours, other, given.seconds)
            both = paired(lambda: ours().sum().backward(), lambda: other().sum().backward(), given.seconds)  # noqa: B023
            for label, r in (("forward", forward), ("with backward", both)):
                print(
                    (steps, batch, size),
                    label,
                    f"{r.ours * 1e3:.2f}",
                    f"{r.theirs * 1e3:.2f}",
                    f"{1 / r.ratio:.2f}",
                    name,
                )


if __name__ == "__main__":
    main()
