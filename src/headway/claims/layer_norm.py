"""What "Layer Normalization" (2016, arXiv 1607.06450) claims, measured here: recurrent nets, small batches, speed, memory."""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.claims.evidence import Evidence, Verdict
from headway.measure import copy_bandwidth, paired
from headway.norms.layer import LayerNorm
from headway.norms.recurrent import LayerNormGRU, LayerNormLSTM

KEY = "layer-norm"
SIZES = [(60, 32, 128), (60, 8, 64), (30, 32, 256)]


def measure(quick: bool) -> list[Evidence]:
    """Every claim; ``quick`` takes under half a minute, otherwise a few minutes."""
    return [_convergence(quick), _batch_size(quick), *_speed(quick), _memory(), *_feed_forward(quick)]


class _Characters(nn.Module):
    def __init__(self, layer: type[nn.Module], size: int) -> None:
        super().__init__()
        self.embedding, self.net, self.head = nn.Embedding(128, 32), layer(32, size), nn.Linear(size, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.net(self.embedding(tokens))[0])


def _text() -> Tensor:
    from headway.tasks.text import split_files, stdlib_files

    return (
        torch.frombuffer(bytearray(split_files(stdlib_files())[0][:1_000_000]), dtype=torch.uint8).long().clamp(max=127)
    )


def _curve(layer: type[nn.Module], seed: int, steps: int, rate: float, text: Tensor) -> list[float]:
    torch.manual_seed(seed)
    model = _Characters(layer, 96)
    optimizer, losses = torch.optim.Adam(model.parameters(), rate), []
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        start = torch.randint(len(text) - 49, (32,), generator=draw)
        window = text[start[None] + torch.arange(49)[:, None]]
        loss = F.cross_entropy(model(window[:-1]).flatten(0, 1), window[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def _smooth(losses: list[float], width: int = 20) -> list[float]:
    return [statistics.fmean(losses[max(0, i + 1 - width) : i + 1]) for i in range(len(losses))]


def _convergence(quick: bool) -> Evidence:
    steps, seeds, text, rows = (120, 1, _text(), []) if quick else (300, 3, _text(), [])
    for rate in (3e-3, 1e-2):
        for seed in range(seeds):
            plain, ours = (_smooth(_curve(layer, seed, steps, rate, text)) for layer in (nn.LSTM, LayerNormLSTM))
            reached = next((i + 1 for i, loss in enumerate(ours) if i >= 20 and loss <= plain[-1]), None)
            rows.append(
                {"rate": rate, "seed": seed, "steps": steps, "lstm": plain[-1], "ln_lstm": ours[-1],
                 "share_of_steps": None if reached is None else reached / steps}
            )  # fmt: skip
    shares = [row["share_of_steps"] for row in rows if row["share_of_steps"] is not None]
    every = len(shares) == len(rows)
    good = every and statistics.median(shares) <= 0.9
    verdict: Verdict = "holds" if good else "partly" if shares and min(shares) < 1 else "does not hold here"
    return Evidence(
        KEY,
        "recurrent nets with layer normalisation reach the same loss in fewer steps",
        "the best order-embedding model in 60 % of the time; DRAW nearly twice as fast",
        f"{statistics.median(shares):.2f} of the steps (median of {len(shares)} of {len(rows)} runs)"
        if shares
        else "never",
        f"the final training loss of nn.LSTM, character model, H=96, T=48, {steps} steps",
        verdict,
        "the norms keep the scale of every step's inputs, so the same rate learns faster"
        if good
        else f"{len(rows) - len(shares)} of {len(rows)} runs never got there or the gain was under a tenth of the steps",
        rows=rows,
    )


def _batch_size(quick: bool) -> Evidence:
    from headway.tasks.task import get

    task: Any = get("digits")
    images, labels, test_images, test_labels = task.data()
    images, test_images = images.flatten(1), test_images.flatten(1)
    norms, rows = {"batch": nn.BatchNorm1d, "layer": LayerNorm}, []
    seeds, samples = (2, 3500) if quick else (5, 16000)
    for name, norm in norms.items():
        for seed in range(seeds):
            errors = {}
            for batch in (128, 4):
                torch.manual_seed(seed)
                model = nn.Sequential(
                    nn.Linear(64, 256),
                    norm(256),
                    nn.ReLU(),
                    nn.Linear(256, 256),
                    norm(256),
                    nn.ReLU(),
                    nn.Linear(256, 10),
                )
                optimizer = torch.optim.Adam(model.parameters(), 1e-3)
                for _ in range(samples // batch):
                    index = torch.randint(len(images), (batch,))
                    loss = F.cross_entropy(model(images[index]), labels[index])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                with torch.no_grad():
                    guess = model.eval()(test_images).argmax(1)
                errors[batch] = 100 * float((guess != test_labels).double().mean())
            rows.append({"norm": name, "seed": seed, "error_128": errors[128], "error_4": errors[4]})
    gap = {
        name: abs(statistics.fmean(r["error_4"] - r["error_128"] for r in rows if r["norm"] == name)) for name in norms
    }
    at_four = {name: statistics.fmean(r["error_4"] for r in rows if r["norm"] == name) for name in norms}
    holds = gap["layer"] <= 0.5 * gap["batch"]
    verdict: Verdict = "holds" if holds else "partly" if at_four["layer"] < at_four["batch"] else "does not hold here"
    return Evidence(
        KEY,
        "the result depends less on the batch size than with batch normalisation",
        "permutation-invariant MNIST at batch 128 and 4 (curves)",
        f"error gap between batch 4 and 128: {gap['layer']:.2f} points (layer), {gap['batch']:.2f} (batch)",
        f"nn.BatchNorm1d, digits MLP 64-256-256-10, {samples} samples seen",
        verdict,
        "every sample is normalised by its own statistics"
        if holds
        else f"at equal samples the runs with batch 4 take 32 times as many steps; errors at batch 4: layer "
        f"{at_four['layer']:.2f} %, batch {at_four['batch']:.2f} %",
        rows=rows,
    )


def naive_lstm(net: Any, x: Tensor) -> Tensor:
    """The paper's LSTM as a Python loop over plain torch operations: what people write by hand."""
    size, outputs = net.hidden_size, []
    h = c = x.new_zeros(x.shape[1], size)
    ln_ih, ln_hh, ln_c = net.ln_ih_l0, net.ln_hh_l0, net.ln_c_l0
    for step in x:
        a = F.layer_norm(h @ net.weight_hh_l0.t(), (4 * size,), ln_hh.weight, ln_hh.bias) + net.bias_l0
        a = a + F.layer_norm(step @ net.weight_ih_l0.t(), (4 * size,), ln_ih.weight, ln_ih.bias)
        i, f, g, o = a.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * F.layer_norm(c, (size,), ln_c.weight, ln_c.bias).tanh()
        outputs.append(h)
    return torch.stack(outputs)


def _speed(quick: bool) -> list[Evidence]:
    budget, found = (0.25 if quick else 2.0), []
    rows: dict[str, list[dict[str, Any]]] = {"nn.LSTM": [], "nn.GRU": [], "naive loop": []}
    for steps, batch, size in SIZES:
        x = torch.randn(steps, batch, size)
        lstm, gru, plain_lstm, plain_gru = (kind(size, size) for kind in (LayerNormLSTM, LayerNormGRU, nn.LSTM, nn.GRU))
        sides = {
            "nn.LSTM": (lambda a=lstm, x=x: a(x)[0], lambda a=plain_lstm, x=x: a(x)[0]),
            "nn.GRU": (lambda a=gru, x=x: a(x)[0], lambda a=plain_gru, x=x: a(x)[0]),
            "naive loop": (lambda a=lstm, x=x: a(x)[0], lambda a=lstm, x=x: naive_lstm(a, x)),
        }
        for name, (ours, theirs) in sides.items():
            with torch.no_grad():
                forward = paired(ours, theirs, budget)
            both = paired(lambda: ours().sum().backward(), lambda: theirs().sum().backward(), budget)  # noqa: B023
            rows[name].append(
                {"T": steps, "B": batch, "H": size, "threads": torch.get_num_threads(), "forward": 1 / forward.ratio,
                 "with_backward": 1 / both.ratio, "forward_ms": forward.ours * 1e3, "with_backward_ms": both.ours * 1e3}
            )  # fmt: skip
    for name, measured in rows.items():
        allowed = 1.0 if name == "naive loop" else 2.0
        ratios = [row[key] for row in measured for key in ("forward", "with_backward")]
        good = sum(ratio <= allowed for ratio in ratios)
        verdict: Verdict = "holds" if good == len(ratios) else "partly" if good else "does not hold here"
        found.append(
            Evidence(
                KEY,
                f"layer-normalised recurrent nets run at usable speed: {'LSTM' if name == 'naive loop' else name[3:]} against {name}",
                f"no number in the paper; the aim is at most {allowed:g} times {name}",
                f"{min(ratios):.2f} to {max(ratios):.2f} times the time of {name}",
                f"{name}, forward and with backward, {torch.get_num_threads()} threads, float32",
                verdict,
                f"{good} of {len(ratios)} timings at three sizes stay within {allowed:g} times",
                "the steps follow one another: T recurrent matrix products that cannot be merged",
                measured,
            )
        )
    return found


def _saved(call: Any, own: set[int]) -> int:
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = call()
    del kept
    return sum(seen.values())


def _memory() -> Evidence:
    rows = []
    for steps, batch, size in SIZES:
        net, x = LayerNormLSTM(size, size), torch.randn(steps, batch, size)
        own = {t.untyped_storage().data_ptr() for t in [x, *net.parameters()]}
        ours, theirs = _saved(lambda: net(x), own), _saved(lambda: naive_lstm(net, x), own)  # noqa: B023
        rows.append({"T": steps, "B": batch, "H": size, "ours": ours, "naive": theirs, "ratio": ours / theirs})
    worst = max(row["ratio"] for row in rows)
    return Evidence(
        KEY,
        "training a layer-normalised LSTM saves little for its backward",
        "no number in the paper; the aim is at most half of a naive autograd loop",
        f"at most {worst:.2f} of the bytes",
        "distinct storages that a Python loop saves for its backward",
        "holds" if worst <= 0.5 else "does not hold here",
        "the input product and the gates are computed again in the backward"
        if worst <= 0.5
        else "recurrent products, states and statistics are kept for every step",
        rows=rows,
    )


def _feed_forward(quick: bool) -> list[Evidence]:
    budget, last, channels = (0.3 if quick else 1.5), [], []
    for shape in ((64, 256), (512, 768), (4096, 1024)):
        ours, theirs, x = LayerNorm(shape[-1]), nn.LayerNorm(shape[-1]), torch.randn(shape, requires_grad=True)
        last.append(_pair(shape, lambda: ours(x), lambda: theirs(x), budget))  # noqa: B023
    for shape in ((8, 32, 16, 16), (16, 64, 32, 32), (16, 128, 28, 28)):
        ours, theirs = LayerNorm(shape[1], dims=(1,)), nn.LayerNorm(shape[1])
        x = torch.randn(shape, requires_grad=True)

        def permuted(theirs: nn.Module = theirs, x: Tensor = x) -> Tensor:
            return theirs(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        channels.append(_pair(shape, lambda: ours(x), permuted, budget))  # noqa: B023
    bandwidth = f"copy bandwidth {copy_bandwidth(1 << 26) / 1e9:.0f} GB/s"
    found = []
    for what, rows, wanted, against in (
        ("over the last axis", last, 1.0, "nn.LayerNorm"),
        ("over the channels of NCHW", channels, 1.5, "permute + nn.LayerNorm + permute"),
    ):
        ratios = [row[key] for row in rows for key in ("forward", "with_backward")]
        good = sum(ratio >= wanted for ratio in ratios)
        verdict: Verdict = "holds" if good == len(ratios) else "partly" if good else "does not hold here"
        found.append(
            Evidence(
                KEY,
                f"the layer itself {what} is fast",
                f"no number in the paper; the aim is at least {wanted:g} times the speed",
                f"{min(ratios):.2f} to {max(ratios):.2f} times as fast",
                f"{against}, forward and with backward, float32",
                verdict,
                f"{good} of {len(ratios)} timings reach {wanted:g}; large tensors are bound by memory",
                bandwidth,
                rows,
            )
        )
    return found


def _pair(shape: tuple[int, ...], ours: Any, theirs: Any, budget: float) -> dict[str, Any]:
    with torch.no_grad():
        forward = paired(ours, theirs, budget)
    both = paired(lambda: ours().sum().backward(), lambda: theirs().sum().backward(), budget)
    return {
        "shape": list(shape),
        "forward": forward.ratio,
        "with_backward": both.ratio,
        "forward_us": forward.ours * 1e6,
    }
