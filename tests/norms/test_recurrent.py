"""Layer-normalised recurrent layers and cells: the paper's identities, torch's interface, conversion."""

from __future__ import annotations

import copy
import inspect
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import headway as hw
from headway.kernels import recurrent
from headway.norms.recurrent import (
    LayerNormGRU,
    LayerNormGRUCell,
    LayerNormLSTM,
    LayerNormLSTMCell,
    LayerNormRecurrent,
    LayerNormRNN,
    LayerNormRNNCell,
)

LAYERS = [LayerNormLSTM, LayerNormGRU, LayerNormRNN]
PAIRS = [(LayerNormLSTM, LayerNormLSTMCell), (LayerNormGRU, LayerNormGRUCell), (LayerNormRNN, LayerNormRNNCell)]


def states(state):
    return state if isinstance(state, tuple) else (state,)


def shaken(module):
    """Every parameter moved away from its special starting value."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return module


def ln(a, g, b=0.0, eps=1e-5):
    mean = a.mean(-1, keepdim=True)
    return g * (a - mean) / torch.sqrt(((a - mean) ** 2).mean(-1, keepdim=True) + eps) + b


def check_gradients(one, other, module):
    weight = torch.randn(one.shape, dtype=one.dtype, generator=torch.Generator().manual_seed(5))
    mine = torch.autograd.grad((one * weight).sum(), list(module.parameters()))
    truth = torch.autograd.grad((other * weight).sum(), list(module.parameters()))
    torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("doubled", [False, True])
def test_lstm_equals_the_papers_equations_with_masks_and_initial_states(doubled):
    """With ``doubled`` the bias also stands inside the input's norm offset, as the released code has it."""
    net = shaken(LayerNormLSTM(3, 4, dtype=torch.float64))
    x, h, c = torch.randn(5, 2, 3).double(), torch.randn(2, 4).double(), torch.randn(2, 4).double()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).t()[..., None].double()
    n_in, n_rec, n_c = net.ln_ih_l0, net.ln_hh_l0, net.ln_c_l0
    inner = net.bias_l0 if doubled else 0.0
    given = copy.deepcopy(net)
    if doubled:
        with torch.no_grad():
            given.ln_ih_l0.bias += net.bias_l0
    output, (last_h, last_c) = given(x, (h[None], c[None]), lengths=[5, 3])
    expected = []
    for t in range(5):
        a = ln(h @ net.weight_hh_l0.t(), n_rec.weight, n_rec.bias)
        a = a + ln(x[t] @ net.weight_ih_l0.t(), n_in.weight, n_in.bias + inner) + net.bias_l0
        i, f, g, o = a.chunk(4, -1)
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        new_h = o.sigmoid() * ln(new_c, n_c.weight, n_c.bias).tanh()
        h, c = mask[t] * new_h + (1 - mask[t]) * h, mask[t] * new_c + (1 - mask[t]) * c
        expected.append(h * mask[t])
    torch.testing.assert_close(output, torch.stack(expected), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((last_h[0], last_c[0]), (h, c), rtol=1e-9, atol=1e-9)
    if not doubled:
        check_gradients(net(x, lengths=[5, 3])[0], net(x, (h[None] * 0, c[None] * 0), lengths=[5, 3])[0], net)


def test_lstm_gradients_equal_those_of_the_papers_equations():
    net = shaken(LayerNormLSTM(3, 4, dtype=torch.float64))
    x, h, c, expected = torch.randn(5, 2, 3).double(), torch.zeros(2, 4).double(), torch.zeros(2, 4).double(), []
    for step in x:
        a = ln(h @ net.weight_hh_l0.t(), net.ln_hh_l0.weight, net.ln_hh_l0.bias) + net.bias_l0
        a = a + ln(step @ net.weight_ih_l0.t(), net.ln_ih_l0.weight, net.ln_ih_l0.bias)
        i, f, g, o = a.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * ln(c, net.ln_c_l0.weight, net.ln_c_l0.bias).tanh()
        expected.append(h)
    check_gradients(net(x)[0], torch.stack(expected), net)


def test_gru_equals_the_released_equations():
    net = shaken(LayerNormGRU(3, 4, dtype=torch.float64))
    x, h, expected = torch.randn(5, 2, 3).double(), torch.zeros(2, 4).double(), []
    gi, bi, gh, bh = net.ln_ih_l0.weight, net.ln_ih_l0.bias, net.ln_hh_l0.weight, net.ln_hh_l0.bias
    for step in x:
        p, z = step @ net.weight_ih_l0.t() + net.bias_l0, h @ net.weight_hh_l0.t()
        both = ln(p[:, :8], gi[:8], bi[:8]) + ln(z[:, :8], gh[:8], bh[:8])
        r, u = both.sigmoid().chunk(2, -1)
        n = (ln(p[:, 8:], gi[8:], bi[8:]) + r * ln(z[:, 8:], gh[8:], bh[8:])).tanh()
        h = u * h + (1 - u) * n
        expected.append(h)
    torch.testing.assert_close(net(x)[0], torch.stack(expected), rtol=1e-9, atol=1e-9)
    check_gradients(net(x)[0], torch.stack(expected), net)


def test_plain_network_normalises_the_sum_of_both_products():
    net = shaken(LayerNormRNN(3, 4, dtype=torch.float64))
    x, h, expected = torch.randn(5, 2, 3).double(), torch.zeros(2, 4).double(), []
    for step in x:
        a = h @ net.weight_hh_l0.t() + step @ net.weight_ih_l0.t()
        h = ln(a, net.ln_hh_l0.weight, net.bias_l0).tanh()
        expected.append(h)
    torch.testing.assert_close(net(x)[0], torch.stack(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layer", LAYERS)
def test_output_is_invariant_to_rescaling_all_weights_but_not_one_row(layer):
    net = layer(6, 8, eps=1e-12, dtype=torch.float64)
    x = torch.randn(5, 3, 6).double()
    before = net(x)[0]
    scaled, shifted, row = copy.deepcopy(net), copy.deepcopy(net), copy.deepcopy(net)
    with torch.no_grad():
        scaled.weight_ih_l0 *= 3.7
        scaled.weight_hh_l0 *= 3.7
        shifted.weight_ih_l0 += torch.randn(6)
        shifted.weight_hh_l0 += torch.randn(8)
        row.weight_ih_l0[0] *= 3.7
    torch.testing.assert_close(scaled(x)[0], before, rtol=1e-5, atol=1e-5)
    if layer is not LayerNormGRU:
        torch.testing.assert_close(shifted(x)[0], before, rtol=1e-5, atol=1e-5)
    assert (row(x)[0] - before).abs().max() > 1e-3


def test_output_is_invariant_to_the_scale_of_one_sequence():
    net = LayerNormLSTM(6, 8, bias=False, eps=1e-12, dtype=torch.float64)
    x = torch.randn(5, 3, 6).double()
    louder = x.clone()
    louder[:, 1] *= 11
    torch.testing.assert_close(net(louder)[0], net(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layer", "cell"), PAIRS)
def test_sequence_equals_the_cell_in_a_loop(layer, cell):
    net, one = shaken(layer(3, 5, dtype=torch.float64)), cell(3, 5, dtype=torch.float64)
    renamed = {name.replace("_l0", ""): value for name, value in net.state_dict().items()}
    one.load_state_dict({("bias_ih" if name == "bias" else name): value for name, value in renamed.items()})
    x, state, outputs = torch.randn(6, 2, 3).double(), None, []
    for step in x:
        state = one(step, state)
        outputs.append(states(state)[0])
    torch.testing.assert_close(net(x)[0], torch.stack(outputs), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        one(x[0, 0]), tuple(s[0] for s in one(x[0])) if cell is LayerNormLSTMCell else one(x[0])[0]
    )


def test_recurrent_cell_norm_equals_pytorchs_benchmark_cell_and_differs_from_the_default():
    net = shaken(LayerNormLSTM(3, 5, cell_norm="recurrent", dtype=torch.float64))
    paper = LayerNormLSTM(3, 5, dtype=torch.float64)
    paper.load_state_dict(net.state_dict())
    x, expected = torch.randn(6, 2, 3).double(), []
    h = c = x.new_zeros(2, 5)
    for step in x:
        gates = F.layer_norm(step @ net.weight_ih_l0.t(), (20,), net.ln_ih_l0.weight, net.ln_ih_l0.bias) + net.bias_l0
        gates = gates + F.layer_norm(h @ net.weight_hh_l0.t(), (20,), net.ln_hh_l0.weight, net.ln_hh_l0.bias)
        i, f, g, o = gates.chunk(4, 1)
        c = F.layer_norm(f.sigmoid() * c + i.sigmoid() * g.tanh(), (5,), net.ln_c_l0.weight, net.ln_c_l0.bias)
        h = o.sigmoid() * c.tanh()
        expected.append(h)
    output, (_, last_c) = net(x)
    torch.testing.assert_close(output, torch.stack(expected), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last_c[0], c, rtol=1e-10, atol=1e-10)
    assert (paper(x)[0] - output).abs().max() > 1e-3


@pytest.mark.parametrize("torchs", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}]
)
def test_without_norms_it_equals_torchs_own_layer(torchs, options):
    net = torchs(3, 5, **options)
    x = torch.randn(4, 6, 3)
    expected, state = net(x)
    ours = hw.apply(net, LayerNormRecurrent(gate_norm="none", cell_norm="none"))
    output, last = ours(x)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(states(last), states(state), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_padded_and_single_sequences_agree_whatever_the_padding_holds(layer, bidirectional):
    net = shaken(layer(3, 5, 2, bidirectional=bidirectional))
    lengths = [2, 6, 4, 1]
    x = torch.randn(6, 4, 3)
    for i, n in enumerate(lengths):
        x[n:, i] = float("nan")
    output, state = net(x, lengths=lengths)
    packed, packed_state = net(pack_padded_sequence(x.nan_to_num(), torch.tensor(lengths), enforce_sorted=False))
    torch.testing.assert_close(pad_packed_sequence(packed)[0], output, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(states(packed_state), states(state), rtol=1e-6, atol=1e-6)
    for i, n in enumerate(lengths):
        alone, alone_state = net(x[:n, i : i + 1])
        torch.testing.assert_close(output[:n, i : i + 1], alone, rtol=1e-6, atol=1e-6)
        assert not output[n:, i].any()
        for whole, part in zip(states(state), states(alone_state), strict=True):
            torch.testing.assert_close(whole[:, i : i + 1], part, rtol=1e-6, atol=1e-6)
    output.sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("layer", LAYERS)
def test_a_row_does_not_depend_on_its_batch_and_nan_stays_in_its_sequence(layer):
    net = layer(3, 5)
    x = torch.randn(4, 7, 3)
    torch.testing.assert_close(net(x)[0][:, 2], net(x[:, 2:3])[0][:, 0], rtol=1e-6, atol=1e-6)
    spoiled = x.clone()
    spoiled[1, 0] = float("nan")
    output = net(spoiled)[0]
    assert output[1:, 0].isnan().all() and torch.equal(output[:, 1:], net(x)[0][:, 1:])


def train(layer, seed, low=False, noise=0.0, rate=3e-3, steps=50):
    """Loss after some steps on source text; ``noise`` changes every starting weight by that share of itself."""
    text = torch.frombuffer(bytearray(inspect.getsource(textwrap), "ascii"), dtype=torch.uint8).long()
    torch.manual_seed(seed)
    embedding, net, head = nn.Embedding(128, 16), layer(16, 32), nn.Linear(32, 128)
    parameters = [*embedding.parameters(), *net.parameters(), *head.parameters()]
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1 + noise * torch.randn(parameter.shape, generator=draw))
    optimizer = torch.optim.Adam(parameters, rate)
    for _ in range(steps):
        window = text[torch.randint(len(text) - 25, (16,))[None] + torch.arange(25)[:, None]]
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            output = net(embedding(window[:-1]))[0]
            assert not (low and layer is LayerNormLSTM) or output.dtype == torch.float32
            loss = F.cross_entropy(head(output).float().flatten(0, 1), window[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("layer", [LayerNormLSTM, LayerNormGRU])
@pytest.mark.parametrize("seed", range(3))
def test_fifty_steps_under_bfloat16_autocast_end_within_two_percent_of_float32(layer, seed):
    exact, low = train(layer, seed), train(layer, seed, low=True)
    assert exact != low and abs(low / exact - 1) < 0.02


@pytest.mark.parametrize("layer", [LayerNormLSTM, nn.LSTM])
def test_autocast_moves_a_loss_about_as_far_as_changing_the_start_by_one_rounding_of_bfloat16(layer):
    # at a high rate a layer-normalised LSTM moves by percents, nn.LSTM by tenths of one: for either change of its weights
    def apart(**change):
        return max(abs(train(layer, seed, rate=3e-2, **change) / loss - 1) for seed, loss in enumerate(exact))

    exact = [train(layer, seed, rate=3e-2) for seed in range(3)]
    assert 0 < apart(low=True) < 3 * apart(noise=2**-9)


def test_under_autocast_nothing_but_the_operands_of_products_is_rounded():
    net, x = shaken(LayerNormLSTM(6, 10)), 3 * torch.randn(40, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        output, (_, c) = net(x)
    assert output.dtype == c.dtype == torch.float32
    weight_ih, weight_hh = (w.detach().bfloat16().float() for w in (net.weight_ih_l0, net.weight_hh_l0))
    h = cell = torch.zeros(4, 10)

    def normalise(a, gain):
        return F.layer_norm(a, a.shape[-1:], gain.weight, gain.bias)

    with torch.no_grad():
        for step, seen in zip(x, output, strict=True):
            a = normalise(step.bfloat16().float() @ weight_ih.t(), net.ln_ih_l0)
            i, f, g, o = (a + normalise(h.bfloat16().float() @ weight_hh.t(), net.ln_hh_l0) + net.bias_l0).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            h = o.sigmoid() * normalise(cell, net.ln_c_l0).tanh()
            torch.testing.assert_close(seen, h, rtol=1e-4, atol=1e-4)
            h = seen  # from the same state, or a last bit that rounds the other way grows over the steps


def test_gradients_under_autocast_are_no_worse_than_those_of_a_plain_loop():
    from headway.claims.layer_norm import naive_lstm

    net, x = LayerNormLSTM(8, 32), torch.randn(12, 16, 8)
    target = torch.randn(16, 32)

    def gradients(call, low):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            output = call()
        (output[-1].float() - target).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    exact = gradients(lambda: net(x)[0], False)
    ours = (gradients(lambda: net(x)[0], True) - exact).norm()
    loop = (gradients(lambda: naive_lstm(net, x), True) - exact).norm()
    assert 0 < ours < 1.1 * loop


def test_inputs_with_a_large_mean_keep_three_digits_in_float32():
    net = shaken(LayerNormLSTM(4, 8, dtype=torch.float64))
    with torch.no_grad():
        net.weight_ih_l0.copy_(torch.randint(-2, 3, net.weight_ih_l0.shape) + 0.0)
        net.weight_ih_l0 += 4
    x = (1e4 + torch.randn(3, 2, 4)).double()
    exact, rounded = net(x)[0], copy.deepcopy(net).float()(x.float())[0]
    assert (exact - rounded).abs().max() / exact.abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_answer_in_their_own_type(dtype):
    net = LayerNormLSTM(3, 8, 2)
    x = torch.randn(4, 2, 3)
    output, (h, c) = copy.deepcopy(net).to(dtype)(x.to(dtype))
    assert output.dtype == h.dtype == c.dtype == dtype
    torch.testing.assert_close(output.float(), net(x)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("layer", LAYERS)
def test_an_empty_batch_gives_empty_outputs_and_states(layer):
    output, state = layer(3, 5, 2)(torch.randn(4, 0, 3))
    assert output.shape == (4, 0, 5) and all(s.shape == (2, 0, 5) for s in states(state))


def test_what_does_not_fit_is_refused_with_a_sentence():
    net, x = LayerNormLSTM(3, 5), torch.randn(4, 2, 3)
    zeros = torch.zeros(1, 2, 5)
    with pytest.raises(ValueError, match="at least one step"):
        net(torch.randn(0, 2, 3))
    with pytest.raises(ValueError, match="input_size=3"):
        net(torch.randn(4, 2, 7))
    for lengths in ([5, 1], [0, 2]):
        with pytest.raises(ValueError, match="between 1 and the 4 steps"):
            net(x, lengths=lengths)
    with pytest.raises(ValueError, match="2 whole numbers"):
        net(x, lengths=[1, 2, 3])
    with pytest.raises(ValueError, match="type of the input"):
        net(x, (zeros.double(), zeros.double()))
    with pytest.raises(ValueError, match="shape"):
        net(x, (zeros[:, :1], zeros))
    with pytest.raises(ValueError, match="gate_norm"):
        LayerNormLSTM(3, 5, gate_norm="each")
    with pytest.raises(ValueError, match="forget_bias"):
        LayerNormLSTM(3, 5, bias=False, forget_bias=1.0)
    with pytest.raises(NotImplementedError, match="proj_size=2"):
        hw.apply(nn.LSTM(3, 5, proj_size=2), LayerNormRecurrent())


@pytest.mark.parametrize("torchs", [nn.LSTM, nn.GRU, nn.RNN])
def test_conversion_keeps_the_weight_parameters_and_can_be_undone(torchs):
    model = nn.ModuleDict({"encoder": torchs(3, 5, 2), "head": nn.Linear(5, 2)})
    weight, old = model["encoder"].weight_hh_l1, model["encoder"]
    hw.apply(model, LayerNormRecurrent())
    assert model["encoder"].weight_hh_l1 is weight and type(model["encoder"]).__name__ == f"LayerNorm{torchs.__name__}"
    model["encoder"](torch.randn(4, 2, 3))[0].sum().backward()
    assert weight.grad is not None
    hw.undo(model)
    assert model["encoder"] is old


def test_state_dict_names_round_trip_and_deepcopy():
    net = LayerNormLSTM(3, 5, 2, bidirectional=True, forget_bias=1.0)
    names = set(net.state_dict())
    assert {"weight_ih_l0", "weight_hh_l0", "bias_l0", "ln_ih_l0.weight", "ln_c_l1_reverse.bias"} <= names
    assert torch.equal(net.bias_l0[5:10], torch.ones(5)) and not net.bias_l0[:5].any()
    other = LayerNormLSTM(3, 5, 2, bidirectional=True)
    other.load_state_dict(net.state_dict())
    x = torch.randn(4, 2, 3)
    assert torch.equal(net(x)[0], other(x)[0]) and torch.equal(net(x)[0], copy.deepcopy(net)(x)[0])


def test_recurrent_matrices_start_orthogonal_gate_by_gate():
    for block in LayerNormGRU(3, 6).weight_hh_l0.chunk(3):
        torch.testing.assert_close(block @ block.t(), torch.eye(6), rtol=0, atol=1e-5)


def test_dropout_acts_between_layers_in_training_only():
    net = LayerNormGRU(3, 5, 2, dropout=0.5)
    x = torch.randn(4, 2, 3)
    assert not torch.equal(net(x)[0], net(x)[0])
    net.eval()
    assert torch.equal(net(x)[0], net(x)[0])


def test_unbatched_and_batch_first_inputs_agree():
    net = LayerNormLSTM(3, 5)
    x = torch.randn(4, 2, 3)
    first = LayerNormLSTM(3, 5, batch_first=True)
    first.load_state_dict(net.state_dict())
    torch.testing.assert_close(first(x.transpose(0, 1))[0], net(x)[0].transpose(0, 1))
    torch.testing.assert_close(net(x[:, 0])[0], net(x)[0][:, 0])


@pytest.mark.slow
@pytest.mark.skipif(not recurrent._NATIVE, reason="the plain loop unrolls; the operator needs the C++ time loop")
def test_compiles_as_one_graph_with_one_operator_a_layer_whatever_the_length():
    net = LayerNormLSTM(3, 5)
    graphs = []

    def backend(module, _):
        graphs.append(sum("recurrent_layer" in str(node.target) for node in module.graph.nodes))
        return module.forward

    compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=True)
    for steps in (4, 9, 17):
        x = torch.randn(steps, 2, 3)
        torch.testing.assert_close(compiled(x)[0], net(x)[0])
    assert graphs and set(graphs) == {1} and len(graphs) <= 2
