"""Statistics of one signal, computed as a stream: nothing is kept but scalars and the B x B matrix of inner products.

For a tensor A whose rows a_b are its samples, flattened, and M_ij = <a_i, a_j> / (|a_i| |a_j|):

    cos         = mean_b (sum_j M_bj - M_bb) / (B - 1)       how alike the samples are (1: all the same direction)
    stable rank = trace(M) / lambda_max(M)                   1: all the same direction, B: mutually orthogonal

"Beyond BatchNorm: Towards a Unified Understanding of Normalization in Deep Learning", 2021, arXiv 2106.05956.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# features copied at a time where the inner products need a conversion or a contiguous piece
CHUNK = 1 << 13
# features that stand side by side in a random subsample: whole runs are read without gathering
RUN = 256
# entries of token vectors that are converted or lined up at a time
TOKENS = 1 << 20


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
    """Stable rank trace(M) / lambda_max(M) of the cosine matrix M of the samples of ``x`` (B, ...).

    Args:
        x: samples along axis 0; the other axes are flattened.
        centered: subtract the mean sample first.

    Returns:
        A float64 scalar, 1 where all samples have one direction and B where they are orthogonal; NaN for fewer than two samples.
    """
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
    x = _spaced(x.detach().movedim(batch_dim, 0), max_samples)
    work = torch.float64 if x.dtype is torch.float64 else torch.float32
    if size is None:
        size = float(x.abs().amax()) if x.numel() else 0.0
    scale = 1.0 if not 0 < size < math.inf or 1e-12 < size < 1e12 else 1.0 / size
    features = x[0].numel() if x.shape[0] else 0
    plain = x.dtype is work and scale == 1.0 and not centered
    subsampled = max_features is not None and features > max_features
    with exact(x.device):
        if plain and not subsampled and x.is_contiguous():
            pieces = (x.view(x.shape[0], features),)
        elif subsampled:
            pieces = _random_runs(x, max_features or 0, seed)
        else:
            pieces = _pieces(x, CHUNK if not plain else 4 * CHUNK)
        out = torch.zeros(x.shape[0], x.shape[0], dtype=work, device=x.device)
        for piece in pieces if x.numel() else ():
            if not plain:
                piece = piece.to(work)
                if scale != 1.0:
                    piece = piece * scale
                if centered:
                    piece = piece - piece.mean(0)
            _add_products(out, piece)
    return out if _whole(out) else out.tril() + out.tril(-1).mT


def exact(device: torch.device) -> AbstractContextManager[object]:
    """Switches autocast off, where it is on: statistics are not to be rounded."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _spaced(x: Tensor, samples: int | None) -> Tensor:
    """At most this many samples, evenly spaced over the batch."""
    return x if samples is None or x.shape[0] <= samples else x[:: x.shape[0] // samples][:samples]


def _whole(out: Tensor) -> bool:
    """Whether all of the symmetric product is computed: where it is small or launches cost, half of it gains nothing."""
    return out.shape[0] < 32 or out.device.type != "cpu"


def _add_products(out: Tensor, piece: Tensor) -> None:
    """Adds the inner products of the samples to ``out`` on and below the diagonal (above it, what comes along)."""
    samples = piece.shape[0]
    if _whole(out):
        out.addmm_(piece, piece.mT)
        return
    rows = samples // 4
    for first in range(0, samples, rows):
        last = min(samples, first + rows)
        out[first:last, :last].addmm_(piece[first:last], piece[:last].mT)


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
    return _mean_off_diagonal(cosines(g)[0])


def rank_of(g: Tensor) -> Tensor:
    """Stable rank from inner products (..., B, B); NaN where every sample is zero or something is not finite."""
    return _stable_rank(cosines(g)[0])


def likeness(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stable rank, cos and number of all-zero samples (float64) from inner products (..., B, B)."""
    m, zeros = cosines(g)
    return _stable_rank(m), _mean_off_diagonal(m), zeros.double()


def _mean_off_diagonal(m: Tensor) -> Tensor:
    samples = m.shape[-1]
    if samples < 2:
        return torch.full(m.shape[:-2], math.nan, dtype=torch.float64, device=m.device)
    return (m.sum((-2, -1)) - m.diagonal(dim1=-2, dim2=-1).sum(-1)) / (samples * (samples - 1))


def _stable_rank(m: Tensor) -> Tensor:
    if m.shape[-1] < 2:
        return torch.full(m.shape[:-2], math.nan, dtype=torch.float64, device=m.device)
    finite = m.isfinite().all(-1).all(-1)
    largest = torch.linalg.eigvalsh(torch.where(finite[..., None, None], m, 0.0))[..., -1]
    trace = m.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.where(finite & (trace > 0), trace / largest, math.nan)


def between_tokens(x: Tensor, max_samples: int | None = 64) -> Tensor:
    """Mean cosine between different tokens of one sample of ``x`` (B, T, D), averaged over samples; NaN for T < 2.

    With unit vectors u_t it is (|sum_t u_t|^2 - T) / (T (T - 1)), so no T x T matrix is needed; tokens of zeros are left out.
    """
    x = _spaced(x.detach(), max_samples)
    samples, tokens, features = x.shape
    if tokens < 2 or samples == 0:
        return torch.full((), math.nan, dtype=torch.float64, device=x.device)
    work = torch.float64 if x.dtype is torch.float64 else torch.float32
    parts = []
    with exact(x.device):
        for part in x.split(max(1, TOKENS // max(1, tokens * features))):
            part = part.to(work)
            norms = torch.linalg.vector_norm(part, dim=-1)
            # a token of zeros stays zero, whatever it is divided by
            total = norms.clamp(min=torch.finfo(work).tiny).reciprocal()[:, None] @ part
            count = torch.count_nonzero(norms, -1).double()
            square = torch.linalg.vector_norm(total, dim=(1, 2)).double().square()
            parts.append((square - count) / (count * (count - 1)))
    # a sample with fewer than two tokens that are not zero has no pairs, and is left out
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).nanmean()
