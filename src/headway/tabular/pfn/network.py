"""The set transformer: context rows see the context, a query sees the context and itself.

    token = enc_x(x) + enc_y(y) for a context row, enc_x(x) for a query; no positions
    h = norm(h + attention(h));  h = norm(h + ff(h))                             (post-norm, GELU, layers times)
    out = decoder(h of the queries)

("Transformers Can Do Bayesian Inference", 2022, arXiv 2112.10510.) The (N, N) mask is never built. Keys and values come from the context
alone, so that they are computed once (:meth:`PFN.encode_context`) and kept; a query's own key is one more column whose logit rides in
extra channels of the query, and whose weight comes back in an extra channel of the value: one plain attention call, exact. Where that
call also gives its sum of exponentials (inference on a CPU), the own key is mixed in afterwards and no channel is added.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.tabular.pfn.bars import BarDistribution
from headway.tabular.pfn.heads import BernoulliHead, CategoricalHead, GaussianHead

_HEADS = {kind.__name__: kind for kind in (BarDistribution, GaussianHead, BernoulliHead, CategoricalHead)}


@dataclass(frozen=True)
class Context:
    """What queries need of a context, per layer: keys and values (B, H, n + 1, d + extra), the last column standing for the query
    itself; and the context's statistics (B, 1, F) and (B, 1)."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    num_features: int
    x_shift: Tensor
    x_scale: Tensor
    y_shift: Tensor
    y_scale: Tensor


class PFNLayer(nn.Module):
    """One post-norm encoder layer that handles context rows and queries apart. It begins as the norm of its input."""

    def __init__(self, width: int, heads: int, ff: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads; {width} is none of {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, ff)
        self.down = nn.Linear(ff, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.qkv.weight)
        for linear in (self.out, self.down):
            nn.init.zeros_(linear.weight)
        for linear in (self.qkv, self.out, self.down):
            nn.init.zeros_(linear.bias)

    def project(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h (B, n, E) -> queries, keys, values (B, H, n, d)."""
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def context(self, h: Tensor, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Context rows h -> their next h, and what queries will attend to. The last layer's next h is of no use to anyone."""
        q, k, v = self.project(h)
        keys, values = _with_own_column(k, v)
        return (h if last else self.rest(h, _attend(q, k, v, q.shape[-1]))), keys, values

    def query(self, h: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries h (B, m, E) -> their next h: softmax over the context's logits and the query's own."""
        return self.rest(h, attend_and_self(*self.project(h), keys, values))

    def rest(self, h: Tensor, attended: Tensor) -> Tensor:
        h = self.norm1(h + self.out(attended.transpose(1, 2).flatten(2)))
        return self.norm2(h + self.down(F.gelu(self.up(h))))


def _attend(q: Tensor, k: Tensor, v: Tensor, d: int) -> Tensor:
    if q.shape[0] * q.shape[2] == 0:
        return torch.zeros_like(q)
    return F.scaled_dot_product_attention(q, k, v, scale=d**-0.5)


def attend_and_self(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Queries q (B, H, m, d) attend to a context, ``keys`` and ``values`` with their last column free, and each to its own k and v."""
    d = q.shape[-1]
    own = (q * k).sum(-1, keepdim=True) if q.dtype.itemsize > 2 else (q.float() * k.float()).sum(-1, keepdim=True)
    if _says_its_sum(q) and keys.shape[-2] > 1:
        attended, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, keys[..., :-1, :d], values[..., :-1, :d], scale=d**-0.5
        )
        # the share of exp(own) in the sum of all exponentials
        share = torch.sigmoid(own * d**-0.5 - total[..., None]).to(q.dtype)
        return attended.lerp(v, share)
    # in half precision the logit is carried as a sum of two numbers
    high = own.to(q.dtype)
    carried = torch.cat([q, high, (own - high).to(q.dtype)], -1)
    out = _attend(F.pad(carried, (0, keys.shape[-1] - d - 2)), keys, values, d)
    return out[..., :d] + out[..., d : d + 1] * v


def _says_its_sum(q: Tensor) -> bool:
    """Whether attention gives back the logarithm of its sum of exponentials: on a CPU, where nothing is differentiated through it."""
    plain = not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    )
    return plain and q.device.type == "cpu" and q.numel() > 0


def _with_own_column(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Room for one more column: its key reads the logit from the query's extra channels, its value says how much weight it got.
    Channels are filled up to a multiple of eight, as fused kernels like it."""
    d = k.shape[-1]
    extra = 2 + -(d + 2) % 8
    column = k.new_zeros(*k.shape[:2], 1, d + extra)
    key, value = column.clone(), column
    key[..., d : d + 2] = 1
    value[..., d] = 1
    return torch.cat([F.pad(k, (0, extra)), key], 2), torch.cat([F.pad(v, (0, extra)), value], 2)


class PFN(nn.Module):
    """(x_ctx (B, n, F), y_ctx (B, n), x_q (B, m, F)) -> outputs (B, m, head.num_outputs); n = 0, m = 0 and B = 0 are fine.

    Args:
        num_features: the most features a table may have; fewer are padded with zeros and scaled by num_features / F.
        head: :class:`BarDistribution`, or :class:`GaussianHead`, :class:`BernoulliHead`, :class:`CategoricalHead`.
        width, layers, heads, ff: of the transformer; ``ff`` is 2 width if None.
        standardize: bring x, and y where it is a number, to mean 0 and deviation 1 by the context's own statistics. Outputs are
            then in those units; :class:`PFNRegressor` brings them back.
        impute: "zero" puts 0 (the mean, where standardised) for a NaN in x; None refuses them.
        n_max: the longest context trained on: longer ones warn, more than twice as long are refused. ``train_pfn`` sets it.

    Raises:
        ValueError: sizes that do not fit, more features than num_features, NaN in the context's y, NaN or infinity in x.
    """

    def __init__(
        self,
        num_features: int,
        head: nn.Module,
        width: int = 512,
        layers: int = 6,
        heads: int = 4,
        ff: int | None = None,
        standardize: bool = False,
        impute: str | None = None,
        n_max: int | None = None,
    ) -> None:
        super().__init__()
        if min(num_features, width, layers, heads) < 1:
            raise ValueError(
                f"num_features, width, layers and heads are at least 1; got {num_features, width, layers, heads}"
            )
        if impute not in (None, "zero"):
            raise ValueError(f'impute is None or "zero", not {impute!r}')
        self.num_features, self.width, self.heads = num_features, width, heads
        self.standardize, self.impute, self.n_max = standardize, impute, n_max
        self.prior_name = ""
        self.head: Any = head
        self.enc_x = nn.Linear(num_features, width)
        self.enc_y = nn.Linear(1, width)
        self.layers = nn.ModuleList(PFNLayer(width, heads, ff or 2 * width) for _ in range(layers))
        self.decoder = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, head.num_outputs))  # type: ignore

    def forward(self, x_ctx: Tensor, y_ctx: Tensor, x_q: Tensor) -> Tensor:
        return self.query(self.encode_context(x_ctx, y_ctx), x_q)

    def encode_context(self, x: Tensor, y: Tensor) -> Context:
        """The pass over the context, O(n^2 E L) once: x (B, n, F), y (B, n)."""
        if x.dim() != 3 or y.shape != x.shape[:2]:
            raise ValueError(f"a context is x (B, n, F) and y (B, n); got {tuple(x.shape)} and {tuple(y.shape)}")
        self._check_length(x.shape[1])
        if not torch.compiler.is_compiling() and not bool(y.isfinite().all()):
            raise ValueError("y of the context holds NaN or infinity; leave those rows out")
        dtype = self.enc_x.weight.dtype
        x, y = x.to(dtype), y.to(dtype)
        x_shift, x_scale = self._statistics(x)
        y_shift, y_scale = (s[..., 0] for s in self.target_statistics(y))
        h = self._encode_x(x, x_shift, x_scale) + self.enc_y(((y - y_shift) / y_scale)[..., None])
        keys, values = [], []
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, PFNLayer)
            h, k, v = layer.context(h, last=number == len(self.layers) - 1)
            keys.append(k)
            values.append(v)
        return Context(tuple(keys), tuple(values), x.shape[-1], x_shift, x_scale, y_shift, y_scale)

    def query(self, context: Context, x: Tensor) -> Tensor:
        """Outputs (B, m, out) for x (B, m, F), O(n E L) each."""
        if x.dim() != 3 or x.shape[0] != context.keys[0].shape[0] or x.shape[2] != context.num_features:
            raise ValueError(
                f"queries are (B, m, F) with the context's B = {context.keys[0].shape[0]} and F = {context.num_features}; "
                f"got {tuple(x.shape)}"
            )
        h = self._encode_x(x.to(self.enc_x.weight.dtype), context.x_shift, context.x_scale)
        for layer, k, v in zip(self.layers, context.keys, context.values, strict=True):
            assert isinstance(layer, PFNLayer)
            h = layer.query(h, k, v)
        with torch.autocast(h.device.type, enabled=False):
            return self.decoder(h.to(self.enc_x.weight.dtype))

    def loss(self, out: Tensor, y_ctx: Tensor, y_q: Tensor) -> Tensor:
        """The mean of -log q over the queries whose outcome is known, in the units of the outputs; 0 if there is none."""
        shift, scale = (s[..., 0] for s in self.target_statistics(y_ctx.to(out.dtype)))
        nll = self.head.nll(out, (y_q - shift) / scale)
        return nll.sum() / (~y_q.isnan()).sum().clamp(min=1)

    def target_statistics(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale (B, 1, 1) of a context's y (B, n); 0 and 1 where it is not standardised."""
        if self.head.is_regression:
            return self._statistics(y[..., None])
        return y.new_zeros(len(y), 1, 1), y.new_ones(len(y), 1, 1)

    def _statistics(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation over the rows (B, n, F) -> (B, 1, F), NaN left out; deviation 1 where nothing varies."""
        shape = (rows.shape[0], 1, rows.shape[2])
        if not self.standardize:
            return rows.new_zeros(shape), rows.new_ones(shape)
        seen = ~rows.isnan()
        count = seen.sum(1, keepdim=True)
        shift = torch.where(seen, rows, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
        variance = torch.where(seen, rows - shift, 0.0).square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
        flat = variance <= (1e-6 * shift).square()
        return shift, torch.where(flat, 1.0, variance).sqrt()

    def _encode_x(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        features = x.shape[-1]
        if not 1 <= features <= self.num_features:
            raise ValueError(f"this model takes 1 to {self.num_features} features; x has {features}")
        x = (x - shift) / scale
        if self.impute == "zero":
            x = torch.where(x.isnan(), 0.0, x)
        if not torch.compiler.is_compiling() and not bool(x.isfinite().all()):
            hint = "" if self.impute else '; impute="zero" fills NaN in'
            raise ValueError(f"x holds NaN or infinity{hint}")
        return self.enc_x(F.pad(x * (self.num_features / features), (0, self.num_features - features)))

    def _check_length(self, n: int) -> None:
        if self.n_max is None or n <= self.n_max:
            return
        if n > 2 * self.n_max:
            raise ValueError(
                f"the context has {n} rows; the model was trained on at most {self.n_max} and refuses twice that"
            )
        if not torch.compiler.is_compiling():
            warnings.warn(f"the context has {n} rows; the model was trained on at most {self.n_max}", stacklevel=4)

    # on disk

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``model.safetensors`` (weights and borders) and ``config.json`` (sizes, head, prior's name, n_max)."""
        from safetensors.torch import save_file

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        if type(self.head).__name__ not in _HEADS:
            raise TypeError(f"the head is one of {', '.join(_HEADS)}, not {type(self.head).__name__}")
        first = self.layers[0]
        assert isinstance(first, PFNLayer)
        config = {
            "num_features": self.num_features, "width": self.width, "layers": len(self.layers), "heads": self.heads,
            "ff": first.up.out_features, "standardize": self.standardize, "impute": self.impute, "n_max": self.n_max,
        }  # fmt: skip
        head = {"kind": type(self.head).__name__, **self.head.settings()}
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({"pfn": config, "head": head, "prior": self.prior_name}, indent=1))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PFN:
        """The model that :meth:`save_pretrained` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: one of the two files is missing.
        """
        from safetensors.torch import load_file

        path = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path} holds no {name}; it is written by PFN.save_pretrained")
        config = json.loads((path / "config.json").read_text())
        tensors = load_file(path / "model.safetensors")
        kind = _HEADS[config["head"].pop("kind")]
        if kind is BarDistribution:
            config["head"]["borders"] = tensors["head.borders"]
        model = cls(head=kind(**config["head"]), **config["pfn"])
        model.to(tensors["enc_x.weight"].dtype)
        if kind is BarDistribution:
            model.head = kind(**config["head"])
        model.load_state_dict(tensors)
        model.prior_name = config["prior"]
        return model.eval()
