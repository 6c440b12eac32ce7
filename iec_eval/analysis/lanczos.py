"""Largest singular values from products alone: Golub-Kahan-Lanczos bidiagonalisation.

After k steps ``M V_k = U_k B_k`` and ``M^T U_k = V_k B_k^T + beta_k v_(k+1) e_k^T`` with
orthonormal V_k and U_k and an upper bidiagonal B_k (Golub & Kahan 1965; Golub & Van Loan, Matrix
Computations, 10.4). If (s, p, q) is the largest singular triplet of B_k, then (s, U_k p, V_k q)
is one of M up to the residual ``beta_k |p_k|``: some singular value of M is that near to s, and s
is never above the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]

TOLERANCE = 1e-3  # of the spread of the singular values seen so far
MAX_ITERATIONS = 200
FIRST_CHECK, CHECK_EVERY = 8, 4


@dataclass(frozen=True)
class SingularValues:
    """The largest singular value of each of R matrices, all ``[R]``.

    Attributes:
        value: float64; from below.
        residual: some singular value is that near to ``value``.
        iterations: after how many ``value`` was taken; one takes a product with M and with M^T.
        converged: whether ``residual`` is within the tolerance.
    """

    value: Tensor
    residual: Tensor
    iterations: Tensor
    converged: Tensor


def largest_singular_values(
    forward: Product,
    transpose: Product,
    start: Tensor,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    rounding: float = 1e-12,
) -> SingularValues:
    """The largest singular values of R square matrices, from products ``[R, n] -> [R, n]``.

    The matrices are worked on side by side. Every new vector is orthogonalised twice against all
    before it, which takes 2 R n numbers of memory an iteration.

    Args:
        forward: M v for each row.
        transpose: M^T u for each row.
        start: ``[R, n]`` float64, no row zero; random, or a value may stay unseen.
        tolerance: of the residual, relative to the spread between the largest and the smallest
            singular value of B_k. Not relative to the norm: near the end of sampling A I + B J
            is nearly a multiple of the identity, and any vector has a residual that is a small
            part of the norm, while "above 1" hangs on the difference.
        max_iterations: at most n are needed in exact arithmetic, and no more are done.
        rounding: relative error of a product; no residual below it is asked for.
    """
    search = _Search(forward, transpose, start, tolerance, rounding)
    limit = min(max_iterations, start.shape[1])
    for count in range(1, limit + 1):
        search.extend()
        due = count >= FIRST_CHECK and (count - FIRST_CHECK) % CHECK_EVERY == 0
        if (due or count == limit) and search.settle():
            break
    return search.found


class _Search:
    """The bases so far and what has been found in them."""

    def __init__(
        self,
        forward: Product,
        transpose: Product,
        start: Tensor,
        tolerance: float,
        rounding: float,
    ) -> None:
        self._forward, self._transpose = forward, transpose
        self._tolerance, self._rounding = tolerance, rounding
        self._v, self._u = [start / _norm(start)], list[Tensor]()
        self._alpha, self._beta = list[Tensor](), list[Tensor]()
        rows = start.new_zeros(len(start))
        nothing = torch.zeros_like(rows, dtype=torch.bool)
        self.found = SingularValues(rows, rows.clone(), rows.long(), nothing)

    def extend(self) -> None:
        """One iteration: a column of U, a row of B, the next column of V."""
        v = self._v[-1]
        u = self._forward(v)
        if self._u:
            u = u - self._beta[-1] * self._u[-1]
        u, alpha = _normalised(_orthogonal(u, self._u))
        w, beta = _normalised(_orthogonal(self._transpose(u) - alpha * v, self._v))
        self._u.append(u)
        self._v.append(w)
        self._alpha.append(alpha)
        self._beta.append(beta)

    def settle(self) -> bool:
        """Take the values of this iteration where none had converged; whether all have now."""
        alpha, beta = torch.cat(self._alpha, dim=1), torch.cat(self._beta, dim=1)
        count = alpha.shape[1]
        p, s, _ = torch.linalg.svd(torch.diag_embed(alpha) + torch.diag_embed(beta[:, :-1], 1))
        residual = beta[:, -1] * p[:, -1, 0].abs()
        wanted = self._tolerance * (s[:, 0] - s[:, -1]) + self._rounding * s[:, 0]
        done, old = residual <= wanted, self.found
        keep = old.converged
        self.found = SingularValues(
            torch.where(keep, old.value, s[:, 0]),
            torch.where(keep, old.residual, residual),
            torch.where(keep, old.iterations, torch.full_like(old.iterations, count)),
            keep | done,
        )
        return bool(self.found.converged.all())


def _orthogonal(vector: Tensor, basis: list[Tensor]) -> Tensor:
    """``vector [R, n]`` without its parts along an orthonormal basis; twice is enough."""
    if not basis:
        return vector
    stacked = torch.stack(basis, dim=1)
    for _ in range(2):
        along = torch.einsum("rkn,rn->rk", stacked, vector)
        vector = vector - torch.einsum("rkn,rk->rn", stacked, along)
    return vector


def _norm(vector: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    return length


def _normalised(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Of length one, and the length; zero stays zero: then the space is exhausted."""
    length = _norm(vector)
    return vector / torch.where(length > 0, length, 1), length
