"""The rows of a sparse matrix, and the few products with them that a solver needs, by scipy.

Text and one-hot features are mostly zeros; a dense copy of them would not fit in memory. ``Z @ v`` and :func:`back` read the numbers
that are there alone. Everything is float64 and on the CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class SparseRows:
    """Rows of a scipy sparse matrix, with the face of a tensor (n, d) as far as solvers look.

    Args:
        matrix: any scipy sparse matrix or array; kept as CSR in float64.
    """

    def __init__(self, matrix: Any) -> None:
        self.csr = matrix.tocsr().astype(np.float64)
        self.shape: tuple[int, int] = self.csr.shape
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return self.shape[0]

    def __matmul__(self, v: Tensor) -> Tensor:
        return torch.from_numpy(self.csr @ v.numpy())

    def __getitem__(self, rows: Tensor) -> SparseRows:
        """Some rows, by a mask or by numbers."""
        return SparseRows(self.csr[rows.numpy()])

    def times_rows(self, factors: Tensor) -> SparseRows:
        """Every row times its own factor (n,)."""
        return SparseRows(self.csr.multiply(factors.numpy()[:, None]))

    def with_column(self, value: float) -> SparseRows:
        """One more column, ``value`` in every row."""
        from scipy import sparse

        return SparseRows(sparse.hstack([self.csr, np.full((len(self), 1), value)], format="csr"))

    def norms(self, dim: int) -> Tensor:
        """Norms of rows (dim 1) or of columns (dim 0)."""
        return torch.from_numpy(np.sqrt(np.asarray(self.csr.multiply(self.csr).sum(dim)).reshape(-1)))


Rows = Tensor | SparseRows


def is_sparse(A: Any) -> bool:
    """Whether this is a sparse matrix of scipy, or a sparse tensor of torch."""
    return hasattr(A, "tocsr") or (isinstance(A, Tensor) and A.layout is not torch.strided) or isinstance(A, SparseRows)


def rows_of(A: Any) -> SparseRows:
    """A sparse matrix of scipy or torch as :class:`SparseRows`."""
    if isinstance(A, SparseRows):
        return A
    if isinstance(A, Tensor):
        from scipy import sparse

        A = A.to_sparse_csr().cpu()
        parts = (A.values().numpy(), A.col_indices().numpy(), A.crow_indices().numpy())
        A = sparse.csr_matrix(parts, shape=tuple(A.shape))
    return SparseRows(A)


def back(Z: Rows, v: Tensor) -> Tensor:
    """Z^T v."""
    return torch.from_numpy(Z.csr.T @ v.numpy()) if isinstance(Z, SparseRows) else Z.t() @ v


def row(Z: Rows, i: int) -> Tensor:
    """Row ``i``, dense (d,)."""
    return torch.from_numpy(Z.csr[i].toarray()[0]) if isinstance(Z, SparseRows) else Z[i]


def times_rows(Z: Rows, factors: Tensor) -> Rows:
    """Every row times its own factor (n,)."""
    return Z.times_rows(factors) if isinstance(Z, SparseRows) else Z * factors[:, None]


def with_column(Z: Rows, value: float) -> Rows:
    """One more column, ``value`` in every row."""
    return Z.with_column(value) if isinstance(Z, SparseRows) else torch.cat([Z, Z.new_full((len(Z), 1), value)], 1)


def norms(Z: Rows, dim: int) -> Tensor:
    """Norms of rows (dim 1) or of columns (dim 0)."""
    return Z.norms(dim) if isinstance(Z, SparseRows) else Z.norm(dim=dim)


def zero_rows(Z: Rows) -> Tensor:
    """Which rows hold nothing but zeros, (n,). Of a dense matrix only rows that end in a zero are looked at as a whole."""
    if isinstance(Z, SparseRows):
        return norms(Z, 1) == 0
    if Z.shape[1] == 0:
        return torch.ones(len(Z), dtype=torch.bool, device=Z.device)
    zero = Z[:, -1] == 0
    if zero.any():
        zero[zero.clone()] = (Z[zero] == 0).all(1)
    return zero


def all_finite(Z: Rows) -> bool:
    """Whether no number is NaN or infinite. A sum tells it in one pass, except where finite numbers overflow."""
    numbers = torch.from_numpy(Z.csr.data) if isinstance(Z, SparseRows) else Z
    return bool(numbers.sum().isfinite()) or bool(numbers.isfinite().all())


def spectral_norm(Z: Rows, steps: int = 50) -> float:
    """The largest singular value; of a sparse matrix by power iteration (from below, to a fraction of a percent)."""
    if not isinstance(Z, SparseRows):
        return float(torch.linalg.matrix_norm(Z, 2))
    v = torch.ones(Z.shape[1], dtype=torch.float64) + 0.1 * torch.arange(Z.shape[1]) / max(1, Z.shape[1])
    size = 0.0
    for _ in range(steps):
        v = back(Z, Z @ (v / v.norm().clamp(min=1e-300)))
        size = float(v.norm())
    return size**0.5
