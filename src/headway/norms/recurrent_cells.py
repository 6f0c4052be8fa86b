"""Layer-normalised recurrent cells: one time step of an LSTM, GRU or plain recurrent network.

    LSTM:  a = LN(W_hh h; g1, b1) + LN(W_ih x; g2, b2) + b;   i, f, candidate, o = split(a)
           c = sigma(f) c + sigma(i) tanh(candidate);         h = sigma(o) tanh(LN(c; g3, b3))
    GRU:   r, z = sigma(LN(W_ih x + b) + LN(W_hh h));         n = tanh(LN(W_ih x + b) + r LN(W_hh h))
           h = z h + (1 - z) n
    RNN:   h = f(LN(W_hh h + W_ih x; g) + b)

"Layer Normalization", 2016, arXiv 1607.06450 (Ba, Kiros, Hinton). Gates lie in the order of torch's own cells. The norms of an
LSTM run over all four gates together, those of a GRU over r and z together and n apart (``gate_norm="joint"``), or over every
gate apart (``"per_gate"``), or not at all (``"none"``). The cell state that the next step gets is not normalised, as in the
paper; ``cell_norm="recurrent"`` feeds the normalised one back, as PyTorch's benchmark cell does.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from headway.kernels.recurrent import recurrent_layer
from headway.kernels.recurrent.reference import GATES, GRU, LSTM, RNN

_GATE_NORMS = {"none": 0, "joint": 1, "per_gate": 2}
_CELL_NORMS = {"none": 0, "output": 1, "recurrent": 2}


class Gain(nn.Module):
    """Gain ``weight`` and, where there is one, offset ``bias`` of a norm whose arithmetic is fused into the time loop."""

    bias: nn.Parameter | None

    def __init__(
        self, size: int, offset: bool = True, value: float = 1.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.value = value
        self.weight = nn.Parameter(torch.full((size,), value, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(size, device=device, dtype=dtype)) if offset else None

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.value)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, bias={self.bias is not None}"


class RecurrentBase(nn.Module):
    """What cells and layers share: settings, the parameters of one direction of one layer, and the call of the operator."""

    kind: ClassVar[int]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        eps: float,
        gate_norm: str,
        cell_norm: str,
        forget_bias: float,
        gain: float,
        nonlinearity: str,
    ) -> None:
        super().__init__()
        if input_size < 1 or hidden_size < 1:
            raise ValueError(f"input_size and hidden_size must be at least 1, not {input_size} and {hidden_size}")
        for name, value, known in (("gate_norm", gate_norm, _GATE_NORMS), ("cell_norm", cell_norm, _CELL_NORMS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, not {value!r}")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', not {nonlinearity!r}")
        if forget_bias and not bias:
            raise ValueError(f"forget_bias={forget_bias} is added through the bias; set bias=True or forget_bias=0.0")
        self.input_size, self.hidden_size, self.bias, self.eps = input_size, hidden_size, bias, eps
        self.gate_norm, self.cell_norm, self.forget_bias, self.gain = gate_norm, cell_norm, forget_bias, gain
        self.nonlinearity = nonlinearity

    def _create(self, suffix: str, input_size: int, device: Any, dtype: Any) -> None:
        """Registers ``weight_ih<suffix>``, ``weight_hh``, ``bias``, ``ln_ih``, ``ln_hh`` and ``ln_c`` as the settings ask."""
        rows, options = GATES[self.kind] * self.hidden_size, {"device": device, "dtype": dtype}
        bias_name = f"bias{suffix}" if suffix else "bias_ih"
        self.register_parameter(f"weight_ih{suffix}", nn.Parameter(torch.empty(rows, input_size, **options)))
        self.register_parameter(f"weight_hh{suffix}", nn.Parameter(torch.empty(rows, self.hidden_size, **options)))
        if self.bias:
            self.register_parameter(bias_name, nn.Parameter(torch.empty(rows, **options)))
            if self.kind == GRU and self.gate_norm == "none":
                self.register_parameter(f"bias_hh{suffix}", nn.Parameter(torch.empty(rows, **options)))
        if self.gate_norm != "none":
            if self.kind != RNN:
                self.add_module(f"ln_ih{suffix}", Gain(rows, self.bias, self.gain, **options))
            self.add_module(f"ln_hh{suffix}", Gain(rows, self.bias and self.kind != RNN, self.gain, **options))
        if self.kind == LSTM and self.cell_norm != "none":
            self.add_module(f"ln_c{suffix}", Gain(self.hidden_size, self.bias, self.gain, **options))

    def reset_parameters(self) -> None:
        """Orthogonal recurrent matrices gate by gate, uniform(+-1/sqrt(hidden)) input matrices, ``gain`` gains, zero offsets,
        ``forget_bias`` in the forget gate's bias."""
        bound = self.hidden_size**-0.5
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("weight_hh"):
                with torch.no_grad():
                    for block in parameter.chunk(GATES[self.kind]):
                        full = torch.empty(block.shape, dtype=torch.float32, device=block.device)
                        block.copy_(nn.init.orthogonal_(full))
            elif name.startswith("weight_ih"):
                nn.init.uniform_(parameter, -bound, bound)
            else:
                nn.init.zeros_(parameter)
                if self.kind == LSTM and self.forget_bias:
                    with torch.no_grad():
                        parameter[self.hidden_size : 2 * self.hidden_size] = self.forget_bias
        for child in self.children():
            if isinstance(child, Gain):
                child.reset_parameters()

    def _find(self, name: str) -> Any:
        return getattr(self, name, None)

    def _direction(
        self, x: Tensor, h0: Tensor, c0: Tensor, suffix: str, lengths: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Every h (T, B, hidden) and the last c (B, hidden) of one direction of one layer, in the type of h0."""
        wide, kind = h0.dtype, self.kind
        weight_ih, weight_hh = self._find(f"weight_ih{suffix}"), self._find(f"weight_hh{suffix}")
        bias = self._find(f"bias{suffix}" if suffix else "bias_ih")
        ln_ih, ln_hh, ln_c = self._find(f"ln_ih{suffix}"), self._find(f"ln_hh{suffix}"), self._find(f"ln_c{suffix}")
        rows = weight_ih.shape[0]
        one = torch.ones(rows, dtype=wide, device=x.device)
        zero = torch.zeros(rows, dtype=wide, device=x.device)
        bias = None if bias is None else bias.to(wide)
        gain_in = one if ln_ih is None else ln_ih.weight.to(wide)
        gain_rec = one if ln_hh is None else ln_hh.weight.to(wide)
        offset_in = zero if ln_ih is None or ln_ih.bias is None else ln_ih.bias.to(wide)
        offset_rec = zero if ln_hh is None or ln_hh.bias is None else ln_hh.bias.to(wide)
        inside = None
        if kind == LSTM and bias is not None:
            offset_in = offset_in + bias
        elif kind == RNN and bias is not None:
            offset_rec = bias
        elif kind == GRU and bias is not None:
            inside = bias
            outer = self._find(f"bias_hh{suffix}")
            offset_rec = offset_rec if outer is None else outer.to(wide)
        if ln_c is None:
            cell = torch.zeros(2, self.hidden_size, dtype=wide, device=x.device)
        else:
            offset = zero[: self.hidden_size] if ln_c.bias is None else ln_c.bias.to(wide)
            cell = torch.stack([ln_c.weight.to(wide), offset])
        low, device = x.dtype, x.device.type
        if torch.is_autocast_enabled(device) and low == torch.float32:
            low = torch.get_autocast_dtype(device)
        return recurrent_layer(
            x.to(low),
            h0,
            c0,
            weight_ih.to(low),
            weight_hh.to(low),
            inside,
            torch.stack([gain_in, offset_in, gain_rec, offset_rec]),
            cell,
            lengths,
            kind=kind,
            gate_norm=_GATE_NORMS[self.gate_norm],
            cell_norm=_CELL_NORMS[self.cell_norm] if kind == LSTM else 0,
            eps=self.eps,
            reverse=reverse,
            relu=self.nonlinearity == "relu",
        )

    def _check_input(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__} takes a floating tensor, not {x.dtype}; embed or convert it first")
        if x.shape[-1] != self.input_size:
            raise ValueError(
                f"the last axis of the input must have input_size={self.input_size} numbers; its shape is {tuple(x.shape)}"
            )

    def _check_state(self, name: str, state: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
        if tuple(state.shape) != shape:
            raise ValueError(f"{name} must have the shape {shape}; its shape is {tuple(state.shape)}")
        if state.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"{name} must have the type of the input, {x.dtype}, not {state.dtype}; convert one of them"
            )

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, gate_norm={self.gate_norm!r}"
        return f"{text}, cell_norm={self.cell_norm!r}" if self.kind == LSTM else text


class _Cell(RecurrentBase):
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
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
        self._create("", input_size, device, dtype)
        self.reset_parameters()

    def _step(self, x: Tensor, h: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor]:
        self._check_input(x)
        if x.dim() not in (1, 2):
            raise ValueError(
                f"a cell takes (batch, input_size) or (input_size,); the input has the shape {tuple(x.shape)}"
            )
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        shape = (*x.shape[:-1], self.hidden_size)
        states = []
        for name, state in (("h", h), ("c", c)):
            if state is None:
                states.append(torch.zeros(shape, dtype=wide, device=x.device))
            else:
                self._check_state(name, state, shape, x)
                states.append(state.to(wide))
        rows = x if x.dim() == 2 else x[None]
        h0, c0 = (state.reshape(-1, self.hidden_size) for state in states)
        new_h, new_c = self._direction(rows[None], h0, c0, "")
        new_c = new_c.reshape(shape) if self.kind == LSTM else new_c
        return new_h[0].reshape(shape).to(x.dtype), new_c.to(x.dtype)


class LayerNormLSTMCell(_Cell):
    """One step of a layer-normalised LSTM, called as ``nn.LSTMCell``: ``h, c = cell(x, (h, c))``.

    Args:
        input_size, hidden_size: as in ``nn.LSTMCell``.
        bias: whether there are a bias and the offsets of the norms.
        eps: inside the root of every norm.
        cell_norm: "output" (paper), "recurrent" (the next step gets the normalised cell) or "none".
        gate_norm: "joint" (paper), "per_gate" or "none".
        forget_bias: what the bias of the forget gate starts at.
        gain: what the gains of the norms start at.

    Raises:
        ValueError: an unknown setting, or a shape or type that does not fit.
    """

    kind = LSTM

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        h, c = state if state is not None else (None, None)
        return self._step(x, h, c)


class _OneState(_Cell):
    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        return self._step(x, state, None)[0]


class LayerNormGRUCell(_OneState):
    """One step of a layer-normalised GRU, called as ``nn.GRUCell``. Arguments as :class:`LayerNormLSTMCell`, of which
    cell_norm and forget_bias have no meaning here."""

    kind = GRU


class LayerNormRNNCell(_OneState):
    """One step of a layer-normalised plain network, called as ``nn.RNNCell`` with ``nonlinearity`` "tanh" or "relu"."""

    kind = RNN
