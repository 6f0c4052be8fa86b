"""Layer-normalised LSTM, GRU and plain recurrent networks with the interface of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``.

Normalising the summed inputs of every step within each sequence keeps their scale, whatever the batch and however long the
sequence (equations in :mod:`headway.norms.recurrent_cells`). "Layer Normalization", 2016, arXiv 1607.06450 (Ba, Kiros,
Hinton). For recurrent networks that train slowly or on small batches; not for speed where nothing needs normalising.

A direction of a layer is one operator: one matrix product for all inputs, then a compiled time loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from headway.kernels.recurrent.reference import GRU, LSTM, RNN
from headway.norms.recurrent_cells import (
    LayerNormGRUCell,
    LayerNormLSTMCell,
    LayerNormRNNCell,
    RecurrentBase,
)
from headway.surgery import Site, Technique

__all__ = [
    "LayerNormGRU",
    "LayerNormGRUCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "LayerNormRNN",
    "LayerNormRNNCell",
    "LayerNormRecurrent",
]


class _Layer(RecurrentBase):
    """Layers and directions over sequences; the subclasses name the kind of network."""

    replaces: type[nn.RNNBase]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        eps: float = 1e-5,
        cell_norm: str = "output",
        gate_norm: str = "joint",
        forget_bias: float = 0.0,
        gain: float = 1.0,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, eps, gate_norm, cell_norm, forget_bias, gain, nonlinearity)
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, not {num_layers}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability between 0 and 1, not {dropout}")
        self.num_layers, self.batch_first, self.dropout = num_layers, batch_first, dropout
        self.bidirectional = bidirectional
        for layer in range(num_layers):
            size = input_size if layer == 0 else hidden_size * self.num_directions
            for suffix in self._suffixes(layer):
                self._create(suffix, size, device, dtype)
        self.reset_parameters()

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"][: self.num_directions]

    def forward(self, x: Any, state: Any = None, lengths: Tensor | Sequence[int] | None = None) -> tuple[Any, Any]:
        """The output of every step and the last state, as ``nn.LSTM`` / ``nn.GRU`` / ``nn.RNN`` return them.

        Args:
            x: (T, B, input_size), (B, T, input_size) with batch_first, (T, input_size), or a ``PackedSequence``.
            state: h (num_layers * directions, B, hidden_size), for the LSTM (h, c); zeros by default.
            lengths: (B,) valid steps of every sequence, in any order; what stands behind them has no effect and the output
                there is zero.

        Raises:
            ValueError: T = 0, a shape, type or length that does not fit, or lengths beside a ``PackedSequence``.
        """
        if isinstance(x, PackedSequence):
            return self._packed(x, state, lengths)
        self._check_input(x)
        if x.dim() not in (2, 3):
            raise ValueError(
                f"the input must have 2 or 3 axes (time, batch, input_size); its shape is {tuple(x.shape)}"
            )
        batched = x.dim() == 3
        sequence = x[:, None] if not batched else x.transpose(0, 1) if self.batch_first else x
        if sequence.shape[0] == 0:
            raise ValueError(f"a sequence needs at least one step; the input has the shape {tuple(x.shape)}")
        h, c = self._initial(sequence, state, batched)
        output, h, c = self._run(sequence, h, c, self._lengths(lengths, sequence))
        if not batched:
            output, h, c = output[:, 0], h[:, 0], c[:, 0] if self.kind == LSTM else c
        elif self.batch_first:
            output = output.transpose(0, 1)
        return output, ((h, c) if self.kind == LSTM else h)

    def _packed(self, x: PackedSequence, state: Any, lengths: Any) -> tuple[PackedSequence, Any]:
        if lengths is not None:
            raise ValueError("a PackedSequence brings its own lengths; leave lengths out")
        padded, counts = pad_packed_sequence(x)
        self._check_input(padded)
        h, c = self._initial(padded, state, True)
        output, h, c = self._run(padded, h, c, counts.to(padded.device))
        if x.sorted_indices is not None:
            output, counts = output.index_select(1, x.sorted_indices), counts[x.sorted_indices.cpu()]
        data = pack_padded_sequence(output, counts).data
        packed = PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
        return packed, ((h, c) if self.kind == LSTM else h)

    def _lengths(self, lengths: Tensor | Sequence[int] | None, x: Tensor) -> Tensor | None:
        if lengths is None:
            return None
        steps, batch = x.shape[:2]
        counts = torch.as_tensor(lengths, device=x.device)
        if counts.is_floating_point() or tuple(counts.shape) != (batch,):
            raise ValueError(f"lengths must be {batch} whole numbers; they are {tuple(counts.shape)} of {counts.dtype}")
        if not torch.compiler.is_compiling() and batch and not 0 < int(counts.min()) <= int(counts.max()) <= steps:
            raise ValueError(
                f"lengths must lie between 1 and the {steps} steps of the input; "
                f"they go from {int(counts.min())} to {int(counts.max())}"
            )
        return counts.to(torch.int64).contiguous()

    def _initial(self, x: Tensor, state: Any, batched: bool) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        count = self.num_layers * self.num_directions
        zeros = torch.zeros(count, x.shape[1], self.hidden_size, dtype=wide, device=x.device)
        if state is None:
            return zeros, zeros
        if self.kind == LSTM and (not isinstance(state, tuple | list) or len(state) != 2):
            raise ValueError("the state of an LSTM is the pair (h, c)")
        if self.kind != LSTM and not isinstance(state, Tensor):
            raise ValueError(f"the state of a {self.replaces.__name__} is one tensor h, not {type(state).__name__}")
        shape = (count, x.shape[1], self.hidden_size) if batched else (count, self.hidden_size)
        given: Any = state if self.kind == LSTM else [state]
        for name, tensor in zip(("h", "c"), given, strict=False):
            self._check_state(name, tensor, shape, x)
        h, *c = (tensor.to(wide) if batched else tensor[:, None].to(wide) for tensor in given)
        return h, c[0] if c else zeros

    def _run(self, x: Tensor, h0: Tensor, c0: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        dtype, outside = x.dtype, None
        if lengths is not None:
            outside = (torch.arange(x.shape[0], device=x.device)[:, None] >= lengths)[..., None]
            x = x.masked_fill(outside, 0)
        last_h, last_c = [], []
        for layer in range(self.num_layers):
            outputs = []
            for reverse, suffix in enumerate(self._suffixes(layer)):
                place = layer * self.num_directions + reverse
                h, c = self._direction(x, h0[place], c0[place], suffix, lengths, bool(reverse))
                last_h.append(h[0] if reverse else h[-1])
                last_c.append(c)
                outputs.append(h)
            x = (outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)).to(dtype)
            if outside is not None:
                x = x.masked_fill(outside, 0)
            if self.dropout and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        return x, torch.stack(last_h).to(dtype), torch.stack(last_c).to(dtype)

    @classmethod
    def from_module(
        cls, module: nn.Module, *, site: Site | None = None, init: Literal["keep", "fresh"] = "keep", **settings: Any
    ) -> _Layer | None:
        """The layer-normalised counterpart of torch's layer; None for any other module.

        ``init="keep"`` takes over the very weight matrices and the sum of the two biases, ``"fresh"`` draws anew.

        Raises:
            NotImplementedError: the layer projects its output (``proj_size > 0``).
            ValueError: an unknown ``init``.
        """
        if init not in ("keep", "fresh"):
            raise ValueError(f"init must be 'keep' or 'fresh', not {init!r}")
        if not isinstance(module, cls.replaces):
            return None
        if module.proj_size > 0:
            name = site.name if site is not None and site.name else type(module).__name__
            raise NotImplementedError(
                f"{name} projects its output (proj_size={module.proj_size}), and layer-normalised layers do not; "
                "use proj_size=0 and a Linear behind it, or leave it out with where="
            )
        if isinstance(module, nn.RNN):
            settings.setdefault("nonlinearity", module.nonlinearity)
        weight = module.weight_ih_l0
        new = cls(
            module.input_size,
            module.hidden_size,
            module.num_layers,
            module.bias,
            module.batch_first,
            module.dropout,
            module.bidirectional,
            device=weight.device,
            dtype=weight.dtype,
            **settings,
        )
        if init == "keep":
            new._take_over(module)
        return new.train(module.training)

    def _take_over(self, module: nn.RNNBase) -> None:
        size = self.hidden_size
        for layer in range(self.num_layers):
            for suffix in self._suffixes(layer):
                for name in (f"weight_ih{suffix}", f"weight_hh{suffix}"):
                    self.register_parameter(name, getattr(module, name))
                if not self.bias:
                    continue
                inner, outer = (getattr(module, f"bias_{side}{suffix}").detach() for side in ("ih", "hh"))
                bias = getattr(self, f"bias{suffix}")
                with torch.no_grad():
                    if self.kind != GRU:
                        bias += inner + outer
                    elif self.gate_norm == "none":
                        bias.copy_(inner)
                        getattr(self, f"bias_hh{suffix}").copy_(outer)
                    else:
                        # the candidate's recurrent bias is multiplied by the reset gate, so it stays on that side
                        bias.copy_(inner)
                        bias[: 2 * size] += outer[: 2 * size]
                        getattr(self, f"ln_hh{suffix}").bias[2 * size :] = outer[2 * size :]

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name, default in (("num_layers", 1), ("batch_first", False), ("dropout", 0.0), ("bidirectional", False)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text


class LayerNormLSTM(_Layer):
    """A layer-normalised LSTM, called as ``nn.LSTM``: ``output, (h, c) = layer(x, (h0, c0), lengths=...)``.

    Parameters are named ``weight_ih_l0``, ``weight_hh_l0``, ``bias_l0``, ``ln_ih_l0.weight``, ``ln_ih_l0.bias``, ``ln_hh_l0``,
    ``ln_c_l0``, with ``_reverse`` behind them for the other direction.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as in ``nn.LSTM``.
        eps, cell_norm, gate_norm, forget_bias, gain: as in :class:`LayerNormLSTMCell`.

    Shapes:
        input: (T, B, input_size), (B, T, input_size) with ``batch_first``, (T, input_size), or a ``PackedSequence``;
        output: the same with directions * hidden_size; h and c: (num_layers * directions, B, hidden_size).

    Raises:
        ValueError: a setting out of its range; an input, state or length that does not fit.
    """

    kind = LSTM
    replaces = nn.LSTM
    looks_for = "nn.LSTM"


class LayerNormGRU(_Layer):
    """A layer-normalised GRU, called as ``nn.GRU``: ``output, h = layer(x, h0, lengths=...)``.

    Arguments, shapes and errors as :class:`LayerNormLSTM`, of which cell_norm and forget_bias have no meaning here;
    ``gate_norm="none"`` is ``nn.GRU`` itself, with a second bias ``bias_hh_l0``.
    """

    kind = GRU
    replaces = nn.GRU
    looks_for = "nn.GRU"


class LayerNormRNN(_Layer):
    """A layer-normalised plain recurrent network, called as ``nn.RNN``: ``output, h = layer(x, h0, lengths=...)``.

    There is one norm a layer, of the sum of both products: ``ln_hh_l0.weight``. Arguments, shapes and errors as
    :class:`LayerNormLSTM`; ``nonlinearity`` is "tanh" or "relu", and what concerns gates has no meaning here.
    """

    kind = RNN
    replaces = nn.RNN
    looks_for = "nn.RNN"


@dataclass(frozen=True)
class LayerNormRecurrent(Technique):
    """Replaces every ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` of a model by its layer-normalised counterpart.

    Args:
        init: "keep" takes over the weights, "fresh" draws them anew.
        gate_norm: "joint" (paper), "per_gate" or "none".
        cell_norm: of LSTMs: "output" (paper), "recurrent" or "none".
        forget_bias: added to the forget gate's bias of LSTMs.

    Raises:
        NotImplementedError: an LSTM with ``proj_size > 0``.
    """

    init: Literal["keep", "fresh"] = "keep"
    gate_norm: str = "joint"
    cell_norm: str = "output"
    forget_bias: float = 0.0
    looks_for = "nn.LSTM, nn.GRU or nn.RNN"

    def change(self, site: Site) -> nn.Module | None:
        settings: dict[str, Any] = {"init": self.init, "gate_norm": self.gate_norm}
        lstm = {"cell_norm": self.cell_norm, "forget_bias": self.forget_bias}
        for layer in (LayerNormLSTM, LayerNormGRU, LayerNormRNN):
            if isinstance(site.module, layer.replaces):
                return layer.from_module(site.module, site=site, **settings, **(lstm if layer is LayerNormLSTM else {}))
        return None
