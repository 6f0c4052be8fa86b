"""Exemplar-guided translation between two domains of unpaired images: the content of one image in the style of another.

    x_ab = decoder_b(content_a(x_a), style_b(x_b))             the features pass through N + 1 style blocks between N residual ones
    loss = LSGAN + 10 (reconstruction + cycle) + content code + style code + 0.001 R_w + 10 R_c

The network of "Image-to-Image Translation via Group-wise Deep Whitening-and-Coloring Transformation" (Cho et al., 2019, arXiv
1812.09912) around :class:`headway.norms.GDWCT`:

    net = GDWCTTranslator()
    optimizers = net.optimizers()
    for x_a, x_b in batches:                                   # (B, 3, H, W) between -1 and 1, of both domains, unpaired
        losses = net.training_step(x_a, x_b, *optimizers)
    y = net.eval().translate(content, exemplar)                # from a to b; direction="ba" for the other way

In training the content encoders' instance norms use each image's statistics, in evaluation running ones; with ``stats="batch"`` a
translation depends on the other images of its batch. The output is a function of its inputs: there is no noise. On photographs of
yours, from folders to a picture on disk: ``examples/translate_photos.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.norms.adain import Terms
from headway.norms.whitening import GDWCT, ColoringTarget, Stats, project_alpha
from headway.vision.translation_networks import (
    ContentEncoder,
    Discriminator,
    Generator,
    MultiHopDecoder,
    StyleEncoder,
    StyleLayer,
)

__all__ = [
    "ContentEncoder",
    "Discriminator",
    "GDWCTTranslator",
    "Generator",
    "LossWeights",
    "MultiHopDecoder",
    "StyleEncoder",
    "TranslationLosses",
    "lsgan",
]


def lsgan(maps: list[Tensor], wanted: float) -> Tensor:
    """The squared distance of a discriminator's maps from the wanted value, averaged over each map and summed over scales."""
    return torch.stack([(each - wanted).square().mean() for each in maps]).sum()


@dataclass(frozen=True)
class LossWeights:
    """The weights of the generators' losses; the defaults are the paper's."""

    adversarial: float = 1.0
    reconstruction: float = 10.0
    cycle: float = 10.0
    content: float = 1.0
    style: float = 1.0
    whitening: float = 1e-3
    coloring: float = 10.0


class TranslationLosses(NamedTuple):
    """Losses of one step, scalars: ``generator`` is the weighted sum of the seven that follow; ``discriminator`` stands apart.

    No gradient of ``generator`` reaches the discriminators, and none of ``discriminator`` the generators: the backward pass of their sum
    is that of both.
    """

    generator: Tensor
    adversarial: Tensor
    reconstruction: Tensor
    cycle: Tensor
    content: Tensor
    style: Tensor
    whitening: Tensor
    coloring: Tensor
    discriminator: Tensor


class _Pass(NamedTuple):
    """Codes and translations of both domains, with the terms of the style blocks."""

    c_a: Tensor
    c_b: Tensor
    s_a: Tensor
    s_b: Tensor
    x_ab: Tensor
    x_ba: Tensor
    terms: tuple[Terms, Terms]


class GDWCTTranslator(nn.Module):
    """Two generators and two discriminators that learn to translate between two domains, guided by exemplars.

    Args:
        image_channels: of the images.
        base_dim: channels of the first convolutions; the content features have base_dim 2^downs.
        downs: halvings of height and width in the content encoder.
        blocks: residual blocks of the content encoder and of the decoder.
        groups, mlp_dim, alpha_init, stats: as :class:`headway.norms.GDWCT` has them.
        scales, layers: of the discriminators.
        style_layer: "gdwct", or "adain" as the baseline.
        coloring_target: "paper", or "released" for the regulariser of the authors' training loop.
        weights: of the losses.

    Raises:
        ValueError: settings that do not fit each other, or images whose sides are too small or no multiples of 2^downs.
    """

    def __init__(
        self,
        image_channels: int = 3,
        base_dim: int = 64,
        downs: int = 2,
        blocks: int = 4,
        groups: int = 8,
        mlp_dim: int = 256,
        alpha_init: float = 0.6,
        stats: Stats = "batch",
        scales: int = 3,
        layers: int = 4,
        style_layer: StyleLayer = "gdwct",
        coloring_target: ColoringTarget = "paper",
        weights: LossWeights | None = None,
    ) -> None:
        super().__init__()
        if min(image_channels, base_dim, scales, layers) < 1 or min(downs, blocks) < 0:
            raise ValueError(
                "image_channels, base_dim, scales and layers are at least 1, downs and blocks at least 0; they are "
                f"{image_channels}, {base_dim}, {scales}, {layers}, {downs} and {blocks}"
            )
        self.image_channels, self.downs = image_channels, downs
        self.coloring_target: ColoringTarget = coloring_target
        self.weights = LossWeights() if weights is None else weights
        self._least = 2 ** max(downs + 2, scales + layers - 1, 2)
        own = {"groups": groups, "mlp_dim": mlp_dim, "alpha_init": alpha_init, "stats": stats}

        def generator() -> Generator:
            dim = base_dim * 2**downs
            settings: dict[str, Any] = own if style_layer == "gdwct" else {}
            return Generator(
                ContentEncoder(image_channels, base_dim, downs, blocks),
                StyleEncoder(image_channels, base_dim, downs, groups),
                MultiHopDecoder(blocks, dim, dim, image_channels, downs, style_layer, **settings),
            )

        self.a, self.b = generator(), generator()
        self.judge_a, self.judge_b = (Discriminator(image_channels, base_dim, layers, scales) for _ in range(2))

    def translate(self, content: Tensor, exemplar: Tensor, direction: Literal["ab", "ba"] = "ab") -> Tensor:
        """The content of the images of one domain in the style of exemplars of the other: (B, image_channels, H, W).

        Raises:
            ValueError: another direction, or images that do not fit.
        """
        if direction not in ("ab", "ba"):
            raise ValueError(f'direction is "ab" or "ba"; it is {direction!r}')
        self._check(content=content, exemplar=exemplar)
        source, target = (self.a, self.b) if direction == "ab" else (self.b, self.a)
        return target.decoder(source.content(content), target.style(exemplar))[0]

    def forward(self, x_a: Tensor, x_b: Tensor) -> TranslationLosses:
        """:meth:`training_losses`, so that a wrapper of several processes sees the pass."""
        return self.training_losses(x_a, x_b)

    def training_losses(self, x_a: Tensor, x_b: Tensor) -> TranslationLosses:
        """All losses of a batch of each domain, both (B, image_channels, H, W). The regularisers are averaged over style blocks and over
        the four translations a to b, b to a and back.

        Raises:
            ValueError: images that do not fit.
        """
        now = self._translate_both(x_a, x_b)
        return self._losses(x_a, x_b, now, self._discriminator_loss(x_a, x_b, now))

    def training_step(
        self,
        x_a: Tensor,
        x_b: Tensor,
        generators: torch.optim.Optimizer,
        discriminators: torch.optim.Optimizer,
    ) -> TranslationLosses:
        """One step of the discriminators, then one of the generators against them, then the projection of every alpha. Returns the
        losses without their graph."""
        now = self._translate_both(x_a, x_b)
        judged = self._discriminator_loss(x_a, x_b, now)
        discriminators.zero_grad()
        judged.backward()
        discriminators.step()
        losses = self._losses(x_a, x_b, now, judged)
        generators.zero_grad()
        losses.generator.backward()
        generators.step()
        if any(isinstance(module, GDWCT) for module in self.modules()):
            project_alpha(self)
        return TranslationLosses(*(each.detach() for each in losses))

    def optimizers(
        self, lr: float = 1e-4, weight_decay: float = 1e-4
    ) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        """The paper's Adam for the generators and for the discriminators."""
        parts = (self.a, self.b), (self.judge_a, self.judge_b)
        made = [
            torch.optim.Adam(
                [p for part in pair for p in part.parameters()], lr, (0.5, 0.999), weight_decay=weight_decay
            )
            for pair in parts
        ]
        return made[0], made[1]

    def _translate_both(self, x_a: Tensor, x_b: Tensor) -> _Pass:
        self._check(x_a=x_a, x_b=x_b)
        c_a, c_b, s_a, s_b = self.a.content(x_a), self.b.content(x_b), self.a.style(x_a), self.b.style(x_b)
        x_ab, terms_ab = self.b.decoder(c_a, s_b)
        x_ba, terms_ba = self.a.decoder(c_b, s_a)
        return _Pass(c_a, c_b, s_a, s_b, x_ab, x_ba, (terms_ab, terms_ba))

    def _discriminator_loss(self, x_a: Tensor, x_b: Tensor, now: _Pass) -> Tensor:
        loss = lsgan(self.judge_a(now.x_ba.detach()), 0) + lsgan(self.judge_a(x_a), 1)
        return loss + lsgan(self.judge_b(now.x_ab.detach()), 0) + lsgan(self.judge_b(x_b), 1)

    def _losses(self, x_a: Tensor, x_b: Tensor, now: _Pass, judged: Tensor) -> TranslationLosses:
        # the translations go back through the encoders of the domain they are now in
        c_ab, c_ba = self.b.content(now.x_ab), self.a.content(now.x_ba)
        s_ab, s_ba = self.b.style(now.x_ab), self.a.style(now.x_ba)
        x_aba, terms_aba = self.a.decoder(c_ab, s_ba)
        x_bab, terms_bab = self.b.decoder(c_ba, s_ab)
        x_aa, x_bb = self.a.decoder(now.c_a, now.s_a)[0], self.b.decoder(now.c_b, now.s_b)[0]
        with _constant(self.judge_a, self.judge_b):
            adversarial = lsgan(self.judge_a(now.x_ba), 1) + lsgan(self.judge_b(now.x_ab), 1)
        terms = Terms(each for part in (*now.terms, terms_aba, terms_bab) for each in part)
        found = {
            "adversarial": adversarial,
            "reconstruction": F.l1_loss(x_aa, x_a) + F.l1_loss(x_bb, x_b),
            "cycle": F.l1_loss(x_aba, x_a) + F.l1_loss(x_bab, x_b),
            "content": F.l1_loss(c_ab, now.c_a) + F.l1_loss(c_ba, now.c_b),
            "style": F.l1_loss(s_ab, now.s_b) + F.l1_loss(s_ba, now.s_a),
            "whitening": terms.whitening().to(x_a.device),
            "coloring": terms.coloring(self.coloring_target).to(x_a.device),
        }
        total = sum(getattr(self.weights, name) * loss for name, loss in found.items())
        return TranslationLosses(total, **found, discriminator=judged)  # type: ignore[arg-type]

    def _check(self, **images: Tensor) -> None:
        shapes = {name: tuple(x.shape) for name, x in images.items()}
        for name, x in images.items():
            sides = x.shape[2:] if x.dim() == 4 else ()
            if (
                not sides
                or x.shape[1] != self.image_channels
                or any(s < self._least or s % 2**self.downs for s in sides)
            ):
                raise ValueError(
                    f"{name} is (B, {self.image_channels}, H, W) with sides of at least {self._least} that are multiples of "
                    f"{2**self.downs}; its shape is {shapes[name]}"
                )
        if len({shape[0] for shape in shapes.values()}) > 1:
            raise ValueError(f"batches of both domains have the same size; the shapes are {shapes}")


@contextmanager
def _constant(*modules: nn.Module) -> Iterator[None]:
    """Passes within it give no gradient to these modules' parameters."""
    learned = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for p in learned:
            p.requires_grad_(False)
        yield
    finally:
        for p in learned:
            p.requires_grad_(True)
