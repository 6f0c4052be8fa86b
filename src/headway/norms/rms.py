"""RMS norm with every convention of gain in use, and its compressed form for streams with one entry left out.

    RMS0(a)  = a / sqrt(mean(a^2) + eps)                                   y = (gain_offset + weight) * RMS0(a) + bias
    CRMS0(z) = z / sqrt((sum(z^2) + sum(z)^2) / (k + 1) + eps)             z of k numbers

RMS norm: "Root Mean Square Layer Normalization" (Zhang, Sennrich), 2019, arXiv 1910.07467. CRMS norm: "Pre-RMSNorm and Pre-CRMSNorm
Transformers" (Jiang et al.), 2023, arXiv 2305.14858: CRMS0(z) is RMS0 of (z, -sum z) without its last entry. Reach for RMS norm
where the mean carries nothing; CRMS norm saves one channel and usually costs its alignment.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from headway.kernels.norms import crms_norm, rms_norm
from headway.surgery import Site


class RMSNorm(nn.Module):
    """RMS norm over the last axes.

    Args:
        normalized_shape: sizes of the last axes.
        eps: added to the mean square, inside the root; None for the machine epsilon of the input's type, as ``nn.RMSNorm``.
        elementwise_affine: whether there is a weight.
        bias: whether there is a bias as well, as a converted layer norm needs it.
        gain_offset: 0, or 1 for the Gemma family, whose weight starts at zero and is read as ``1 + weight``.
        cast_before_gain: round to the input's type before multiplying by the weight (Llama family) instead of after (Gemma
            family). It differs in half precision only, and there decides whether a checkpoint's outputs are met bit for bit.

    Shapes:
        input and output: (..., *normalized_shape).

    Raises:
        ValueError: ``gain_offset`` is neither 0 nor 1; the input does not end in ``normalized_shape``.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    looks_for = "nn.RMSNorm, or the RMSNorm classes of Hugging Face models"

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = False,
        *,
        gain_offset: int = 0,
        cast_before_gain: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if gain_offset not in (0, 1):
            raise ValueError(f"gain_offset is 0 (plain weight) or 1 (Gemma family), not {gain_offset!r}")
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.eps, self.gain_offset, self.cast_before_gain = eps, gain_offset, cast_before_gain
        self.elementwise_affine = elementwise_affine
        for name, wanted in (("weight", elementwise_affine), ("bias", bias)):
            empty = torch.empty(self.normalized_shape, device=device, dtype=dtype) if wanted else None
            self.register_parameter(name, None if empty is None else nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain one, bias zero."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1 - self.gain_offset)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        # looking parameters up as attributes of a module costs a quarter of the norm of a short row
        held = self._parameters
        weight = held["weight"] if "weight" in held else self.weight  # noqa: SIM401
        bias = held["bias"] if "bias" in held else self.bias  # noqa: SIM401
        if not self.cast_before_gain or weight is None or x.dtype in (torch.float32, torch.float64):
            return rms_norm(x, self.normalized_shape, weight, bias, eps, offset=self.gain_offset)
        y = rms_norm(x, self.normalized_shape, None, None, eps) * (
            weight + self.gain_offset if self.gain_offset else weight
        )
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        text = f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
        text += f", bias={self.bias is not None}"
        text += ", gain_offset=1" if self.gain_offset else ""
        return text + (", cast_before_gain=True" if self.cast_before_gain else "")

    @classmethod
    def from_module(cls, module: nn.Module, *, site: Site | None = None) -> RMSNorm | None:
        """The same norm with this kernel, holding the very same parameter; None for what computes something else.

        The classes of other libraries are recognised by what they compute on a small random input, in float32 and in
        bfloat16, not by their name alone: the same name means ``weight`` in one family and ``1 + weight`` in another.
        """
        if type(module) is nn.RMSNorm:
            found = {"eps": module.eps}
            shape = module.normalized_shape
        else:
            found = _conventions(module)
            if found is None:
                return None
            shape = module.weight.shape  # type: ignore[union-attr]
        new = cls(tuple(shape), elementwise_affine=False, **found)  # type: ignore[arg-type]
        new.elementwise_affine = module.weight is not None
        new.weight = module.weight  # type: ignore[assignment]
        return new.train(module.training)


def _conventions(module: nn.Module) -> dict | None:
    """Settings with which :class:`RMSNorm` computes what ``module`` computes, or None."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters(recurse=False))
    lone = set(parameters) == {"weight"} and parameters["weight"].dim() == 1 and not list(module.children())
    if isinstance(module, RMSNorm) or not isinstance(eps, float) or not lone or parameters["weight"].is_meta:
        return None
    n = parameters["weight"].numel()
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, n, generator=random), torch.rand(n, generator=random) + 0.25
    twin = copy.copy(module)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.0)):
        twin.__dict__["_parameters"] = {"weight": nn.Parameter(weight.to(dtype))}
        try:
            with torch.no_grad():
                theirs = twin.forward(x.to(dtype))
        except Exception:
            return None
        if not isinstance(theirs, Tensor):
            return None
        if dtype == torch.float32:
            plain = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
            offsets = [
                o for o in (0, 1) if torch.allclose(theirs, plain * (weight + o), rtol=tolerance, atol=tolerance)
            ]
            if not offsets:
                return None
            continue
        wide = x.to(dtype).float()
        plain = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        gain = weight.to(dtype)
        early = plain.to(dtype) * (gain + offsets[0] if offsets[0] else gain)
        late = (plain * (gain.float() + offsets[0])).to(dtype)
        far_early, far_late = (theirs.float() - early.float()).abs().sum(), (theirs.float() - late.float()).abs().sum()
        return {"eps": eps, "gain_offset": offsets[0], "cast_before_gain": bool(far_early < far_late)}
    return None


class CRMSNorm(nn.Module):
    """RMS norm of a zero-mean stream that is kept without its last channel.

    Args:
        normalized_shape: k = d - 1, the channels that are kept.
        eps: as in the norm it stands for.
        elementwise_affine: False is all there is; asking for a weight is an error.

    There is no weight: a gain on k entries cannot express that of the entry left out, so it is folded into what reads the norm.

    Shapes:
        input and output: (..., k).

    Raises:
        ValueError: more than one axis, or no channel at all; a weight asked for; an input of another width.
    """

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float = 1e-5, elementwise_affine: bool = False
    ) -> None:
        super().__init__()
        if elementwise_affine:
            raise ValueError(
                "CRMSNorm has no gain: the entry left out could not get one; fold it into the layers that read it"
            )
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if len(shape) != 1 or shape[0] < 1:
            raise ValueError(f"CRMSNorm takes one axis of at least one channel (d - 1), not {shape}")
        self.normalized_shape, self.eps = shape, eps

    def forward(self, z: Tensor) -> Tensor:
        if not z.dim() or z.shape[-1] != self.normalized_shape[0]:
            raise ValueError(
                f"the input must end in {self.normalized_shape[0]} channels; its shape is {tuple(z.shape)}"
            )
        return crms_norm(z, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}"
