"""Statistics of one signal, computed as a stream: nothing is kept but scalars and the B x B matrix of inner products.

For a tensor A whose rows a_b are its samples, flattened, and M_ij = <a_i, a_j> / (|a_i| |a_j|):

    cos         = mean_b (sum_j M_bj - M_bb) / (B - 1)       how alike the samples are (1: all the same direction)
    stable rank = trace(M) / lambda_max(M)                   1: all the same direction, B: mutually orthogonal

"Beyond BatchNorm: Towards a Unified Understanding of Normalization in Deep Learning", 2021, arXiv 2106.05956.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# features copied at a time where the inner products need a conversion or a contiguous piece
CHUNK = 1 << 13
# features that stand side by side in a random subsample: whole runs are read without gathering
RUN = 256


def mean_cosine(x: Tensor, centered: bool = False) -> Tensor:
    """Mean cosine similarity between different samples of ``x`` (B, ...).

    Args:
        x: samples along axis 0; the other axes are flattened.
        centered: subtract the mean sample first.

    Returns:
        A float64 scalar in [-1, 1]; NaN for fewer than two samples. A sample of zeros is unlike every other (cosine 0).
    """
    return cosine_of(gram(x, max_samples=None, max_features=None, centered=centered))


def stable_rank(x: Tensor, centered: bool = False) -> Tensor:
    """trace(M) / lambda_max(M) of the cosine matrix M of the samples of ``x`` (B, ...): between 1 and B; float64 scalar."""
    return rank_of(gram(x, max_samples=None, max_features=None, centered=centered))


def gram(
    x: Tensor,
    batch_dim: int = 0,
    max_samples: int | None = 64,
    max_features: int | None = 65536,
    centered: bool = False,
    seed: int = 0,
    size: float | None = None,
) -> Tensor:
    """Inner products <a_i, a_j> of the samples of ``x``, (B, B), in float32 (float64 for float64 input).

    Args:
        x: floating tensor; axis ``batch_dim`` counts the samples.
        max_samples: at most this many samples, evenly spaced over the batch; None for all.
        max_features: longer samples are represented by random runs of features (fixed ``seed``); None for all, exactly.
        centered: subtract the mean sample first.
        size: the largest |x|, if known; it decides whether x is scaled before squares are taken, so that none overflows.
    """
    x = x.detach().movedim(batch_dim, 0)
    batch = x.shape[0]
    if max_samples is not None and batch > max_samples:
        x = x[:: batch // max_samples][:max_samples]
    work = torch.float64 if x.dtype is torch.float64 else torch.float32
    if size is None:
        size = float(x.abs().amax()) if x.numel() else 0.0
    scale = 1.0 if not 0 < size < math.inf or 1e-12 < size < 1e12 else 1.0 / size
    out = torch.zeros(x.shape[0], x.shape[0], dtype=work, device=x.device)
    if x.numel() == 0:
        return out
    plain = x.dtype is work and scale == 1.0 and not centered
    features = x[0].numel()
    with torch.autocast(x.device.type, enabled=False):
        if max_features is not None and features > max_features:
            for piece in _random_runs(x, max_features, seed):
                _add_products(out, piece, work, scale, centered, plain)
        else:
            for piece in _pieces(x, CHUNK if not plain else 4 * CHUNK):
                _add_products(out, piece, work, scale, centered, plain)
    return out


def _add_products(out: Tensor, piece: Tensor, work: torch.dtype, scale: float, centered: bool, plain: bool) -> None:
    if not plain:
        piece = piece.to(work)
        if scale != 1.0:
            piece = piece * scale
        if centered:
            piece = piece - piece.mean(0)
    out.addmm_(piece, piece.mT)


def _ordered(x: Tensor) -> Tensor:
    """The feature axes in the order in which they lie in memory, so that flattening them is a view where one exists."""
    order = sorted(range(1, x.dim()), key=lambda axis: -x.stride(axis))
    return x.permute(0, *order)


def _pieces(x: Tensor, length: int):
    """Parts of all samples, (B, at most about ``length``), views wherever the strides allow it."""
    x = _ordered(x)
    try:
        yield from x.view(x.shape[0], -1).split(length, 1)
        return
    except RuntimeError:
        pass
    if x.dim() == 2 or x[0].numel() <= length:
        yield x.reshape(x.shape[0], -1)
        return
    inner = max(1, x[0, 0].numel())
    if inner > length:
        for part in x.unbind(1):
            yield from _pieces(part, length)
        return
    for part in x.split(max(1, length // inner), 1):
        yield part.reshape(x.shape[0], -1)


def _random_runs(x: Tensor, features: int, seed: int):
    """Runs of neighbouring features at fixed random places, together ``features`` long."""
    generator = torch.Generator().manual_seed(seed)
    x = _ordered(x)
    total = x[0].numel()
    starts = (torch.randperm(total // RUN, generator=generator)[: max(1, features // RUN)] * RUN).sort().values.tolist()
    try:
        flat = x.view(x.shape[0], -1)
    except RuntimeError:
        flat = None
    if flat is not None:
        for start in starts:
            yield flat[:, start : start + RUN]
        return
    inner = max(1, x[0, 0].numel())
    for start in starts:
        first, last = start // inner, -(-(start + RUN) // inner)
        run = x[:, first:last].reshape(x.shape[0], -1)
        yield run[:, start - first * inner : start - first * inner + RUN]


def cosines(g: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine matrices (..., B, B) of inner products, in float64, and how many samples are all zero (...)."""
    g = g.double()
    norms = g.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    safe = norms.clamp(min=torch.finfo(torch.float64).tiny)
    return g / safe[..., :, None] / safe[..., None, :], (norms == 0).sum(-1)


def cosine_of(g: Tensor) -> Tensor:
    """cos from inner products (..., B, B)."""
    samples = g.shape[-1]
    if samples < 2:
        return torch.full(g.shape[:-2], math.nan, dtype=torch.float64, device=g.device)
    m = cosines(g)[0]
    return (m.sum((-2, -1)) - m.diagonal(dim1=-2, dim2=-1).sum(-1)) / (samples * (samples - 1))


def rank_of(g: Tensor) -> Tensor:
    """Stable rank from inner products (..., B, B); NaN where every sample is zero or something is not finite."""
    samples = g.shape[-1]
    if samples < 2:
        return torch.full(g.shape[:-2], math.nan, dtype=torch.float64, device=g.device)
    m = cosines(g)[0]
    finite = m.isfinite().all(-1).all(-1)
    m = torch.where(finite[..., None, None], m, 0.0)
    largest = torch.linalg.eigvalsh(m)[..., -1]
    trace = m.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.where(finite & (trace > 0), trace / largest, math.nan)


def between_tokens(x: Tensor, max_samples: int | None = 64) -> Tensor:
    """Mean cosine between different tokens of one sample of ``x`` (B, T, D), averaged over samples; NaN for T < 2.

    With unit vectors u_t it is (|sum_t u_t|^2 - T) / (T (T - 1)), so no T x T matrix is needed; tokens of zeros are left out.
    """
    x = x.detach()
    if max_samples is not None and x.shape[0] > max_samples:
        x = x[:: x.shape[0] // max_samples][:max_samples]
    work = torch.float64 if x.dtype is torch.float64 else torch.float32
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    if x.shape[1] < 2:
        return total / 0
    counted = torch.zeros((), dtype=torch.float64, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for sample in x:
            sample = sample.to(work)
            norms = torch.linalg.vector_norm(sample, dim=-1)
            count = (norms > 0).sum().double()
            weights = torch.where(norms > 0, 1 / norms, 0.0)
            summed = (weights @ sample).double().square().sum()
            total += torch.where(count > 1, (summed - count) / (count * (count - 1)).clamp(min=1), 0.0)
            counted += count > 1
    return total / counted
