"""What the three variants share: labels as vectors, the head that reads them, losses in full precision."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Embed = Literal["onehot", "learned", "prototype"]
Head = Literal["linear", "radial"]
RADIAL_VARIANCE = 0.1
"""sigma^2 of the radial head; the paper names none."""


class LabelDenoiser(nn.Module):
    """The class matrix W (num_classes, dim), the head, and the way a prediction is averaged over draws of noise.

    Args:
        embed: "onehot" (the identity, fixed), "learned" (orthogonal to begin with), or "prototype" (learned, begins with one image
            of each class; see :meth:`place_prototypes`).
        dim: width of a label's vector; num_classes unless given, and needed for "prototype" (the number of pixels).
        head: "linear", or "radial": y = softmax(linear(z)) W, scored by its squared distance to every class.
    """

    optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam
    """What the paper trains this variant with."""

    def __init__(self, num_classes: int, embed: Embed, dim: int | None, eta: float, head: Head) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is at least 1; it is {num_classes}")
        if embed not in ("onehot", "learned", "prototype") or head not in ("linear", "radial"):
            raise ValueError(
                f'embed is "onehot", "learned" or "prototype" and head "linear" or "radial", not {embed!r} and {head!r}'
            )
        if dim is not None and dim < 1:
            raise ValueError(f"dim is the width of a label's vector, at least 1; it is {dim}")
        if embed == "onehot" and dim not in (None, num_classes):
            raise ValueError(
                f'with embed="onehot" dim is num_classes, {num_classes}, not {dim}; leave it out, or choose embed="learned"'
            )
        if embed == "prototype" and dim is None:
            raise ValueError('embed="prototype" needs dim, the number of pixels of an image')
        if not eta > 0:
            raise ValueError(f"eta is the weight of the denoising loss, above 0; it is {eta}")
        self.num_classes, self.embed, self.dim = num_classes, embed, dim or num_classes
        self.eta, self.head_kind = eta, head
        if embed == "onehot":
            self.register_buffer("W", torch.eye(num_classes))
        else:
            start = torch.randn(num_classes, self.dim)
            self.W = nn.Parameter(nn.init.orthogonal_(start) if self.dim >= num_classes else start)
        self.head = nn.Linear(self.dim, num_classes)

    @property
    def learned(self) -> bool:
        """Whether W is trained."""
        return isinstance(self.W, nn.Parameter)

    @torch.no_grad()
    def place_prototypes(self, images: Tensor, labels: Tensor) -> None:
        """Sets each row of W to the class's image with the smallest median distance to the others of its class.

        Shapes:
            images: (n, ...) with ``dim`` numbers each; labels: (n,), every class among them.
        """
        self.check_labels(labels, len(images))
        flat = images.flatten(1).to(self.W)
        if not self.learned or flat.shape[1] != self.dim:
            raise ValueError(
                f"prototypes need a learned W whose dim is the {flat.shape[1]} numbers of an image; here dim is {self.dim} and "
                f"embed {self.embed!r}"
            )
        for c in range(self.num_classes):
            own = flat[labels == c]
            if not len(own):
                raise ValueError(f"no image has the label {c}, so there is no prototype of it")
            self.W[c] = own[torch.cdist(own, own).median(1).values.argmin()]

    def shared_parameters(self) -> list[nn.Parameter]:
        """What belongs to no block: the head, and W where it is learned."""
        return [*self.head.parameters(), *([self.W] if isinstance(self.W, nn.Parameter) else [])]

    def check_labels(self, y: Tensor, count: int) -> None:
        """ValueError unless y is (count,) of integers from 0 to num_classes - 1."""
        if y.dim() != 1 or len(y) != count or y.is_floating_point() or y.is_complex():
            raise ValueError(
                f"labels are {count} integers, one a sample; they have shape {tuple(y.shape)} and {y.dtype}"
            )
        if not torch.compiler.is_compiling() and count and not 0 <= int(y.min()) <= int(y.max()) < self.num_classes:
            raise ValueError(
                f"labels go from 0 to {self.num_classes - 1}; these go from {int(y.min())} to {int(y.max())}"
            )

    def nothing(self, *parts: nn.Module) -> Tensor:
        """The loss of an empty batch: 0, with a gradient of 0 for all that would have been trained."""
        trained = [p for part in parts for p in part.parameters() if p.requires_grad] + self.shared_parameters()
        return torch.stack([p.flatten()[:0].sum() for p in trained]).sum()

    def full(self) -> Any:
        """The schedule, the noise and the losses are computed in full precision, also under autocast."""
        return torch.autocast(self.W.device.type, enabled=False)

    def real(self, out: Tensor) -> Tensor:
        """In float32, or float64 where the model is."""
        return out.to(torch.promote_types(self.W.dtype, torch.float32))

    def noise(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        return self.real(torch.randn(rows, self.dim, generator=generator, device=self.W.device, dtype=self.W.dtype))

    def scores(self, z: Tensor) -> Tensor:
        """Logits (B, num_classes) of the head on z (B, dim)."""
        with self.full():
            logits = F.linear(z, self.real(self.head.weight), self.real(self.head.bias))
            if self.head_kind == "linear":
                return logits
            return -self.distances(logits.softmax(1) @ self.real(self.W)) / (2 * RADIAL_VARIANCE)

    def distances(self, z: Tensor) -> Tensor:
        """Squared distances (B, num_classes) of z (B, dim) to the class vectors."""
        return (z[:, None, :] - self.real(self.W)).square().sum(2)

    def label(self, logits: Tensor) -> Tensor:
        """u_hat: a convex combination of the class vectors."""
        return self.real(logits).softmax(1) @ self.real(self.W)

    def prior(self, abar_0: Tensor, u: Tensor) -> Tensor:
        """KL(q(z_0 | y) || N(0, I)), (B,)."""
        return 0.5 * (abar_0 * u.square().sum(1) - self.dim * abar_0 - self.dim * torch.log1p(-abar_0))

    def forward(
        self,
        x: Tensor,
        steps: int | None = None,
        samples: int = 1,
        generator: torch.Generator | None = None,
        allow_train: bool = False,
        shared_noise: bool = False,
        **how: Any,
    ) -> Tensor:
        """Logits (B, num_classes): the chain from pure noise to a label, through no label at all.

        Args:
            x: what the blocks take, (B, ...). steps: of the chain; NoPropDT has T and no other.
            samples: draws of the noise; the answer is the logarithm of their mean probabilities.
            allow_train: run in training mode all the same (dropout on, batch statistics).
            shared_noise: every row meets the same noise, so that its prediction does not depend on the rows beside it.

        Raises:
            RuntimeError: in training mode without ``allow_train``. ValueError: fewer than one sample or step.
        """
        if self.training and not allow_train:
            raise RuntimeError(
                "forward predicts, and the model is in training mode, where only local_loss has a meaning; call model.eval(), or "
                "pass allow_train=True"
            )
        if samples < 1 or (steps is not None and steps < 1):
            raise ValueError(f"samples and steps are at least 1; they are {samples} and {steps}")

        def draw() -> Tensor:
            noise = self.noise(1 if shared_noise else len(x), generator)
            return noise.expand(len(x), -1)

        total: Tensor | None = None
        for _ in range(samples):
            logits = self.read(self.chain(x, steps, draw, **how))
            if samples == 1:
                return logits
            total = logits.log_softmax(1) if total is None else torch.logaddexp(total, logits.log_softmax(1))
        assert total is not None
        return total - torch.log(total.new_tensor(float(samples)))

    def chain(self, x: Tensor, steps: int | None, draw: Any, **how: Any) -> Tensor:
        """z (B, dim) at the end of the chain."""
        raise NotImplementedError

    def read(self, z: Tensor) -> Tensor:
        """The class scores at the end of the chain."""
        return self.scores(z)
