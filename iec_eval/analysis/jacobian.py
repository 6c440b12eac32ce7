"""Products with the Jacobian of a network's prediction; the Jacobian itself is never formed."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor
from torch.func import vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

Product = Callable[[Tensor], tuple[Tensor, ...]]


class Jacobian:
    """The Jacobian J of ``function`` at ``point [R, C, H, W]``, whose rows do not see each other.

    The function is evaluated and linearised once. ``J^T u`` is then the reverse-mode product of
    ``torch.func.vjp``. It is linear in u, and its own reverse-mode derivative with respect to u
    is ``J v``, the forward-mode product: it needs no further evaluation of the function, nor that
    every operation has a forward-mode rule.

    Fake quantization is differentiated as the quantizers define it for training: rounding passes
    derivatives straight through, values beyond the grid have derivative zero. The true derivative
    of a rounded function is zero wherever it exists, and says nothing about finite errors.

    Use it as a context: attention is computed by its plain formula within it, since the fused
    kernels cannot be differentiated twice.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], point: Tensor) -> None:
        self._function, self._point = function, point
        self._plain_attention = sdpa_kernel(SDPBackend.MATH)

    def __enter__(self) -> Jacobian:
        self._plain_attention.__enter__()
        with torch.enable_grad():
            reverse: tuple[Tensor, Product] = vjp(self._function, self._point)  # type: ignore[assignment]
            output, self._reverse = reverse
            blank = torch.zeros_like(output)
            self._forward: Product = vjp(lambda u: self._reverse(u)[0], blank)[1]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del self._reverse, self._forward  # and with them all activations
        self._plain_attention.__exit__(kind, error, trace)

    def forward(self, vectors: Tensor) -> Tensor:
        """J v for each row of ``vectors [R, n]``, in the vectors' precision."""
        return self._product(lambda v: self._forward(v)[0], vectors)

    def transpose(self, vectors: Tensor) -> Tensor:
        """J^T u for each row of ``vectors [R, n]``."""
        return self._product(lambda u: self._reverse(u)[0], vectors)

    def _product(self, product: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
        shaped = vectors.view(self._point.shape).to(self._point)
        with torch.enable_grad():
            made = product(shaped)
        return made.detach().reshape(vectors.shape).to(vectors)
