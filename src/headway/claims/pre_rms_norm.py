"""Pre-RMSNorm, measured: the same function and the same training, the time of the norm alone, its share of a whole model's time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from headway.claims.evidence import Evidence, Verdict
from headway.claims.native import natively
from headway.kernels.norms import crms_norm, rms_norm
from headway.measure import paired
from headway.residual.equivalence import output_of
from headway.residual.pre_rms import PreRMSNorm, rms_like, verify_equivalence
from headway.residual.transformer import TransformerDecoder
from headway.surgery import apply

KEY = "pre-rms-norm"
SHAPES = ((8, 197, 192), (8, 197, 768), (4, 512, 1024))
# (width, tokens in a sequence, sequences, type): long and short batches, one token at a time, ViT-Tiny's width in bfloat16
SIZES = (
    (64, 128, 4, torch.float32),
    (192, 128, 4, torch.float32),
    (384, 128, 4, torch.float32),
    (192, 197, 2, torch.bfloat16),
    (64, 1, 1, torch.float32),
    (384, 1, 1, torch.float32),
)
# one percent is less than what repeated runs differ by
NOISE = 0.01


class _NoNorm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _native(dim: int) -> nn.Module:
    """Layer norm as users run it before the conversion: torch's own, with gain and bias."""
    return nn.LayerNorm(dim)


def _model(dim: int, depth: int, norm: Any = _native, length: int = 128) -> TransformerDecoder:
    torch.manual_seed(0)
    return TransformerDecoder(256, dim, depth, max(1, dim // 64), norm=norm, max_length=length).eval()


def _unsettled(model: TransformerDecoder) -> TransformerDecoder:
    """Weights with a mean, norms with a gain and a bias, as training leaves them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter) + 0.02)
    return model


def _tokens(batch: int = 4, length: int = 128) -> torch.Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0))


def _verdict(good: list[bool]) -> Verdict:
    return "holds" if all(good) else "partly" if any(good) else "does not hold here"


def measure(quick: bool) -> list[Evidence]:
    """Every row that a CPU can measure."""
    training = _training()
    with torch.no_grad():
        return [
            _same_function(),
            _without_surgery(),
            training,
            *_whole_model(quick),
            *_norm_alone(quick),
            _compressed(quick),
        ]


def _same_function() -> Evidence:
    rows = []
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = _unsettled(_model(128, 6).to(dtype))
        spread = output_of(model, _tokens()).double().std().item()
        for form in (PreRMSNorm(), PreRMSNorm(compress=True), PreRMSNorm(mode="parametrized")):
            converted = apply(model, form, copy=True)
            difference = verify_equivalence(model, converted, _tokens()) / spread
            rows.append({"dtype": str(dtype), "form": form.label(), "difference": difference, "allowed": allowed})
    worst = {
        key: max(row["difference"] for row in rows if row["dtype"] == key)
        for key in dict.fromkeys(r["dtype"] for r in rows)
    }
    return Evidence(
        KEY,
        "the converted model computes the same function",
        "arithmetic equivalence",
        ", ".join(f"{value:.1e} ({key})" for key, value in worst.items()),
        "the Pre-LN model, 6 layers, width 128; the largest of baked, compressed and parametrised, relative to the logits' spread",
        _verdict([row["difference"] <= row["allowed"] for row in rows]),
        "largest differences allowed: 1e-12 in float64, 1e-5 in float32",
        rows=rows,
    )


def _without_surgery() -> Evidence:
    model = _unsettled(_model(128, 6))
    wrong = copy.deepcopy(model)
    for name, module in list(wrong.named_modules()):
        if isinstance(module, nn.LayerNorm):
            owner, _, key = name.rpartition(".")
            setattr(wrong.get_submodule(owner), key, rms_like(module, affine=True))
    logits = output_of(model, _tokens())
    moved = verify_equivalence(model, wrong, _tokens()) / logits.std().item()
    right = verify_equivalence(model, apply(model, PreRMSNorm(), copy=True), _tokens()) / logits.std().item()
    return Evidence(
        KEY,
        "RMS norms dropped in without recentring the weights are visibly wrong",
        "qualitative",
        f"logits move by {moved:.2f} of their spread; {right:.1e} with the surgery",
        "the same model and RMS norm, 6 layers, width 128",
        "holds" if moved > 0.05 > right else "does not hold here",
        "visibly: more than 0.05 of the logits' spread",
    )


def _losses(model: nn.Module, make: Callable[..., torch.optim.Optimizer], steps: int = 20) -> list[float]:
    tokens, optimizer = _tokens(2, 32), make(model.parameters())
    found = []
    for _ in range(steps):
        loss = F.cross_entropy(model(tokens)[:, :-1].reshape(-1, 256), tokens[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def _training() -> Evidence:
    rows = []
    for name, make in (
        ("AdamW", lambda p: torch.optim.AdamW(p, 3e-3)),
        ("SGD, momentum, decay", lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3)),
        ("Adam, L2", lambda p: torch.optim.Adam(p, 3e-3, weight_decay=1e-3)),
    ):
        model = _unsettled(_model(64, 2).double())
        forms = {
            "parametrised": PreRMSNorm(mode="parametrized"),
            "baked": PreRMSNorm(fold_affine=False),
            "compressed": PreRMSNorm(compress=True),
        }
        others = {key: _losses(apply(model, form, copy=True), make) for key, form in forms.items()}
        plain = _losses(model, make)
        rows.append(
            {"optimizer": name}
            | {key: max(abs(a - b) for a, b in zip(plain, found, strict=True)) for key, found in others.items()}
        )
    return Evidence(
        KEY,
        "recentred inside the graph, it trains as the Pre-LN model does",
        "the same trajectory (abstract)",
        "; ".join(f"{row['optimizer']}: losses within {row['parametrised']:.1e}" for row in rows),
        "Pre-LN from the same weights, 20 steps in float64; baked weights drift by "
        + ", ".join(f"{row['baked']:.1e}" for row in rows),
        _verdict([row["parametrised"] < 1e-12 for row in rows]),
        "allowed 1e-12; baked and compressed models are for inference, their losses are in the rows",
        rows=rows,
    )


def _whole_model(quick: bool) -> list[Evidence]:
    rows = []
    for dim, length, batch, dtype in SIZES:
        model = _model(dim, 4, length=max(length, 2)).to(dtype)
        converted = apply(model, PreRMSNorm(), copy=True)
        bare = copy.deepcopy(model)
        for block in bare.blocks:
            block.attention_norm, block.mlp_norm = _NoNorm(), _NoNorm()
        bare.norm = _NoNorm()
        native = natively(model)
        ours_before = _model(dim, 4, norm="layernorm", length=max(length, 2)).to(dtype)
        tokens = _tokens(batch, length)
        budget = 0.7 if quick else 9.0
        ours = paired(lambda c=converted, t=tokens: c(t), lambda m=native, t=tokens: m(t), budget)
        none = paired(lambda c=bare, t=tokens: c(t), lambda m=native, t=tokens: m(t), budget)
        fused = paired(lambda c=converted, t=tokens: c(t), lambda m=ours_before, t=tokens: m(t), budget / 2)
        saved, most = 1 - 1 / ours.ratio, 1 - 1 / none.ratio
        rows.append(
            {
                "size": f"width {dim}, {tokens.numel()} tokens" + (", bfloat16" if dtype == torch.bfloat16 else ""),
                "saved": saved,
                "saved without norms": most,
                "share recovered": saved / most if most > NOISE else None,
                "saved against headway's own layer norm": 1 - 1 / fused.ratio,
                "ratio low": ours.low,
                "ratio high": ours.high,
            }
        )
    told = ", ".join(f"{row['saved']:+.1%} at {row['size']}" for row in rows)
    # the median counts where three quarters of the pairs agree with it
    gains = [row["size"] for row in rows if row["saved"] >= NOISE and row["ratio low"] > 1]
    losses = [row["size"] for row in rows if row["saved"] <= -NOISE and row["ratio high"] < 1]
    open_ = [row["size"] for row in rows if abs(row["saved"]) >= NOISE and row["size"] not in (*gains, *losses)]
    visible = [row for row in rows if row["saved without norms"] > NOISE]
    shares = [row["share recovered"] for row in visible]
    baseline = "the same weights with native nn.LayerNorm, eager, 4 layers, median of runs taken in turn"
    return [
        Evidence(
            KEY,
            "where norms are a visible share, the converted model takes 1% to 10% less time",
            "1% to 10% of the whole model",
            told,
            f"{baseline}; upper bound: the norms left out",
            _verdict([row["size"] in gains for row in visible] or [False]),
            "left out altogether the norms would save "
            + ", ".join(f"{row['saved without norms']:.1%}" for row in rows)
            + "; of that are recovered "
            + (", ".join(f"{share:.0%}" for share in shares) or "nothing")
            + " where it is more than 1%"
            + (f"; at {', '.join(open_)} the pairs do not agree" if open_ else ""),
            rows=rows,
        ),
        Evidence(
            KEY,
            "the converted model is never slower",
            "qualitative",
            f"slower by more than 1% at {', '.join(losses) or 'no size'}; faster by more than 1% at {', '.join(gains) or 'none'}",
            baseline,
            _verdict([row["saved"] > -NOISE for row in rows]),
            "differences below 1% are within what repeated runs differ by"
            + (f", and at {', '.join(open_)} the pairs do not agree" if open_ else "")
            + ("; a call of the norm's module costs a fraction of a microsecond more than torch's" if losses else ""),
            rows=rows,
        ),
    ]


def _norm_alone(quick: bool) -> list[Evidence]:
    found = []
    for dtype, wanted in ((torch.bfloat16, 0.55), (torch.float32, 1.0)):
        rows = []
        for shape in SHAPES:
            d = shape[-1]
            x, g, b = torch.randn(shape).to(dtype), torch.ones(d, dtype=dtype), torch.zeros(d, dtype=dtype)
            affine = paired(
                lambda x=x, g=g, b=b, d=d: rms_norm(x, (d,), g, b, 1e-5),
                lambda x=x, g=g, b=b, d=d: F.layer_norm(x, (d,), g, b, 1e-5),
                0.3 if quick else 4.0,
            )
            folded = paired(
                lambda x=x, d=d: rms_norm(x, (d,), None, None, 1e-5),
                lambda x=x, g=g, b=b, d=d: F.layer_norm(x, (d,), g, b, 1e-5),
                0.3 if quick else 4.0,
            )
            native = paired(
                lambda x=x, d=d: rms_norm(x, (d,), None, None, 1e-5),
                lambda x=x, d=d: F.rms_norm(x, (d,), None, 1e-5),
                0.3 if quick else 2.0,
            )
            rows.append(
                {
                    "shape": list(shape),
                    "share of layer norm": 1 / folded.ratio,
                    "with gain and bias kept": 1 / affine.ratio,
                    "faster than F.rms_norm": native.ratio,
                }
            )
        good = [row["share of layer norm"] <= wanted for row in rows]
        found.append(
            Evidence(
                KEY,
                f"RMS norm alone is cheaper than layer norm, {str(dtype).removeprefix('torch.')}",
                "not given separately",
                ", ".join(f"{row['share of layer norm']:.2f} of its time at {tuple(row['shape'])}" for row in rows),
                "native affine F.layer_norm, eager; the RMS norm has its gain folded; kept gains and F.rms_norm in the rows",
                _verdict(good),
                f"wanted: at most {wanted} of the time of native layer norm; reached at {sum(good)} of {len(good)} shapes",
                rows=rows,
            )
        )
    return found


def _compressed(quick: bool) -> Evidence:
    rows = []
    budget = 0.4 if quick else 4.0
    for shape in SHAPES:
        d = shape[-1]
        x, z = torch.randn(shape), torch.randn(*shape[:-1], d - 1)
        alone = paired(lambda z=z: crms_norm(z, 1e-5), lambda x=x, d=d: rms_norm(x, (d,), None, None, 1e-5), budget)
        rows.append({"what": f"norm alone, {tuple(shape)}", "faster than RMS norm": alone.ratio})
    for dim in (192, 384):
        model, tokens = _model(dim, 4), _tokens()
        whole, narrow = apply(model, PreRMSNorm(), copy=True), apply(model, PreRMSNorm(compress=True), copy=True)
        times = paired(lambda c=narrow, t=tokens: c(t), lambda c=whole, t=tokens: c(t), 2 * budget)
        rows.append({"what": f"whole model, width {dim}", "faster than RMS norm": times.ratio})
    good = [row["faster than RMS norm"] > 1.0 for row in rows]
    return Evidence(
        KEY,
        "Pre-CRMSNorm on d - 1 channels is cheaper still",
        "part of the same range",
        ", ".join(f"{row['faster than RMS norm']:.2f}x ({row['what']})" for row in rows),
        "Pre-RMSNorm on d channels with the gains folded, float32",
        _verdict(good),
        "d - 1 channels break the alignment of vectors and tiles, and the norm takes a second sum over each row; "
        "where that costs more than a channel saves, keep all d",
        rows=rows,
    )
