"""The recurrent operator against the step by step reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels import recurrent
from headway.kernels.recurrent import recurrent_layer, reference
from headway.kernels.recurrent.reference import GATES, GRU, LSTM, RNN

NAMES = ("kind", "gate_norm", "cell_norm", "eps", "reverse", "relu")
CASES = [(LSTM, gate, cell) for gate in (0, 1, 2) for cell in (0, 1, 2)] + [
    (k, g, 0) for k in (GRU, RNN) for g in (0, 1, 2)
]
native_only = pytest.mark.skipif(not recurrent._NATIVE, reason="the C++ time loop is not built here")


def tensors(kind, steps=5, batch=4, inputs=3, hidden=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gates = GATES[kind]
    shapes = [
        (steps, batch, inputs), (batch, hidden), (batch, hidden), (gates * hidden, inputs), (gates * hidden, hidden),
        (gates * hidden,), (4, gates * hidden), (2, hidden),
    ]  # fmt: skip
    return [(torch.randn(s, generator=generator, dtype=dtype) * 0.6).requires_grad_() for s in shapes]


def compare(kind, gate, cell, lengths, reverse, relu=False, tolerance=1e-10, **sizes):
    inputs = tensors(kind, **sizes)
    setting = (kind, gate, cell, 1e-5, reverse, relu)
    ours = recurrent_layer(*inputs, lengths, **dict(zip(NAMES, setting, strict=True)))
    h, c = reference.layer(*inputs, lengths, *setting)
    truth = (h, c if kind == LSTM else c[:0])
    weights = [torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(1)) for o in truth]
    results = []
    for outputs in (ours, truth):
        loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
        results.append(torch.autograd.grad(loss, inputs, allow_unused=True))
    torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)
    for mine, other in zip(*results, strict=True):
        zero = torch.zeros(1)
        mine, other = (zero if g is None else g for g in (mine, other))
        assert (mine - other).abs().max() <= tolerance * (1 + other.abs().max())


@pytest.mark.parametrize(("kind", "gate", "cell"), CASES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, [5, 2, 1, 4]])
def test_the_sequence_operator_equals_autograd_of_the_step_by_step_reference(kind, gate, cell, reverse, lengths):
    compare(kind, gate, cell, None if lengths is None else torch.tensor(lengths), reverse)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(CASES), st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.integers(2, 70), st.booleans()
)
def test_any_shape_agrees_in_float32(case, steps, batch, inputs, hidden, reverse):
    sizes = {"steps": steps, "batch": batch, "inputs": inputs, "hidden": hidden, "dtype": torch.float32}
    compare(*case, None, reverse, tolerance=2e-3 if hidden < 4 else 2e-4, **sizes)


def test_a_relu_network_agrees():
    compare(RNN, 1, 0, None, False, relu=True)


@pytest.mark.parametrize("kind", [LSTM, GRU, RNN])
def test_gradcheck_passes_at_three_steps_two_sequences_three_units(kind):
    inputs = tensors(kind, steps=3, batch=2, inputs=2, hidden=3)
    setting = {"kind": kind, "gate_norm": 1, "cell_norm": 1 if kind == LSTM else 0}
    assert torch.autograd.gradcheck(lambda *a: recurrent_layer(*a, **setting), inputs)


@native_only
@pytest.mark.parametrize("kind", [LSTM, GRU, RNN])
def test_opcheck_passes(kind):
    args = (
        *tensors(kind, 3, 2, 2, 4, torch.float32),
        None,
        kind,
        1,
        1 if kind == LSTM else 0,
        1e-5,
        False,
        False,
        True,
    )
    torch.library.opcheck(torch.ops.headway.recurrent_layer.default, args)


@native_only
def test_the_answer_does_not_depend_on_the_number_of_threads():
    inputs = tensors(LSTM, 30, 16, 8, 64, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(recurrent_layer(*inputs, kind=LSTM, gate_norm=1, cell_norm=1)[0])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@native_only
def test_saved_for_the_backward_is_at_most_half_of_what_a_naive_loop_saves():
    steps, batch, hidden = 20, 8, 32

    def saved_bytes(call):
        seen = {}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = call()
        own = {t.untyped_storage().data_ptr() for t in inputs}
        del kept
        return sum(storage.nbytes() for pointer, storage in seen.items() if pointer not in own)

    inputs = tensors(LSTM, steps, batch, hidden, hidden, torch.float32)
    ours = saved_bytes(lambda: recurrent_layer(*inputs, kind=LSTM, gate_norm=1, cell_norm=1))
    assert ours <= 0.5 * saved_bytes(lambda: naive(*inputs))


def naive(x, h, c, weight_ih, weight_hh, bias, gains, cell):
    size = h.shape[1]
    outputs = []
    for step in x:
        a = torch.layer_norm(step @ weight_ih.t(), (4 * size,), gains[0], gains[1])
        a = a + torch.layer_norm(h @ weight_hh.t(), (4 * size,), gains[2], gains[3])
        i, f, g, o = a.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * torch.layer_norm(c, (size,), cell[0], cell[1]).tanh()
        outputs.append(h)
    return torch.stack(outputs), c
