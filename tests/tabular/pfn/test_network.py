import copy
import math

import pytest
import torch
from torch import nn

from headway.tabular import PFN, BarDistribution, BernoulliHead, CategoricalHead, GaussianHead, PFNSurrogate
from headway.tabular.pfn.network import PFNLayer, _with_own_column, attend_and_self


def model(features=2, layers=3, seed=0, head=None, **settings):
    torch.manual_seed(seed)
    made = PFN(features, head or BarDistribution(torch.linspace(-3, 3, 9)), 24, layers, 3, **settings)
    return stir(made)


def stir(made):
    # zero-initialised projections would hide every mistake in the attention
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def data(n, m, features=2, batch=2, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n + m, features, generator=g, dtype=dtype)
    return x[:, :n], torch.randn(batch, n, generator=g, dtype=dtype), x[:, n:]


def test_the_order_of_the_context_changes_nothing():
    pfn, (x, y, q) = model(), data(7, 5)
    order = torch.randperm(7)
    torch.testing.assert_close(pfn(x[:, order], y[:, order], q), pfn(x, y, q), atol=1e-5, rtol=0)


def test_queries_do_not_see_each_other():
    pfn, (x, y, q) = model().double(), data(7, 5, dtype=torch.float64)
    together = pfn(x, y, q)
    torch.testing.assert_close(pfn(x, y, q[:, 2:3]), together[:, 2:3], atol=1e-6, rtol=0)
    torch.testing.assert_close(pfn(x, y, torch.cat([q, 9 * q], 1))[:, :5], together, atol=1e-6, rtol=0)


def dense(pfn, x, y, q):
    """torch's own encoder layers over all rows at once, with the (N, N) mask."""
    n, m = x.shape[1], q.shape[1]
    h = torch.cat([pfn.enc_x(x) + pfn.enc_y(y[..., None]), pfn.enc_x(q)], 1)
    blocked = torch.ones(n + m, n + m, dtype=torch.bool)
    blocked[:, :n] = False
    blocked.fill_diagonal_(False)
    for layer in pfn.layers:
        twin = nn.TransformerEncoderLayer(24, 3, 48, 0.0, "gelu", batch_first=True, dtype=x.dtype)
        weights = {
            "self_attn.in_proj_weight": layer.qkv.weight, "self_attn.in_proj_bias": layer.qkv.bias,
            "self_attn.out_proj.weight": layer.out.weight, "self_attn.out_proj.bias": layer.out.bias,
            "linear1.weight": layer.up.weight, "linear1.bias": layer.up.bias,
            "linear2.weight": layer.down.weight, "linear2.bias": layer.down.bias,
            "norm1.weight": layer.norm1.weight, "norm1.bias": layer.norm1.bias,
            "norm2.weight": layer.norm2.weight, "norm2.bias": layer.norm2.bias,
        }  # fmt: skip
        h = torch.func.functional_call(twin, weights, (h,), {"src_mask": blocked})
    return pfn.decoder(h[:, n:])


@pytest.mark.parametrize("n", [0, 1, 4, 8])
def test_golden_transformer_outputs_and_gradients_of_the_masked_encoder(n):
    pfn, (x, y, q) = model().double(), data(n, 4, dtype=torch.float64)
    weight = torch.randn(2, 4, 8, dtype=torch.float64)
    found = []
    for f in (pfn, lambda *a: dense(pfn, *a)):
        pfn.zero_grad()
        out = f(x, y, q)
        (out * weight).sum().backward()
        found.append((out.detach(), {k: p.grad for k, p in pfn.named_parameters()}))
    (ours, mine), (theirs, wanted) = found
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
    for name, gradient in wanted.items():
        if gradient is not None and mine[name] is not None:
            torch.testing.assert_close(mine[name], gradient, atol=1e-9, rtol=1e-9, msg=name)


def test_cached_and_uncached_predictions_are_equal_and_the_cache_is_no_weight():
    pfn, (x, y, q) = model(standardize=True).double(), data(9, 6, dtype=torch.float64)
    names = set(pfn.state_dict())
    context = pfn.encode_context(x, y)
    cached = torch.cat([pfn.query(context, part) for part in q.split(1, 1)], 1)
    torch.testing.assert_close(cached, pfn(x, y, q), atol=1e-6, rtol=1e-6)
    assert set(pfn.state_dict()) == names and not any("key" in name for name in names)


@pytest.mark.parametrize("n", [0, 1, 8])
@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str
)
def test_a_query_mixes_itself_in_alike_with_gradients_and_without(n, dtype, near):
    torch.manual_seed(0)
    q, own_k, own_v = (torch.randn(2, 3, 5, 8) * c for c in (2, 2, 1))
    k, v = torch.randn(2, 3, n, 8), torch.randn(2, 3, n, 8)
    logits = torch.cat([q @ k.mT, (q * own_k).sum(-1, keepdim=True)], -1) / 8**0.5
    share = logits.softmax(-1)
    wanted = share[..., :-1] @ v + share[..., -1:] * own_v
    parts = [part.to(dtype) for part in (q, own_k, own_v, *_with_own_column(k, v))]
    with torch.no_grad():
        torch.testing.assert_close(attend_and_self(*parts).float(), wanted, atol=max(near, 1e-5), rtol=near)
        found = attend_and_self(*parts)
    torch.testing.assert_close(attend_and_self(*parts), found, atol=near, rtol=near)


def test_a_layer_begins_as_the_norm_of_its_input():
    layer, h = PFNLayer(16, 2, 32), torch.randn(2, 5, 16)
    out, _, _ = layer.context(h, last=False)
    torch.testing.assert_close(out, nn.functional.layer_norm(h, (16,)), atol=1e-4, rtol=1e-4)


def test_few_features_are_padded_and_scaled():
    pfn, (x, y, q) = model(features=6), data(5, 3)
    wide = [torch.nn.functional.pad(part * 3, (0, 4)) for part in (x, q)]
    torch.testing.assert_close(pfn(x, y, q), pfn(wide[0], y, wide[1]))
    with pytest.raises(ValueError, match="1 to 2 features; x has 3"):
        model()(*data(5, 3, features=3))


def test_standardising_uses_the_context_alone_and_makes_units_irrelevant():
    pfn, (x, y, q) = model(standardize=True).double(), data(9, 4, dtype=torch.float64)
    out = pfn(x, y, q)
    torch.testing.assert_close(pfn(5 + 100 * x, 3 * y - 7, 5 + 100 * q), out)
    torch.testing.assert_close(pfn(x, y, torch.cat([q, 1e6 * q], 1))[:, :4], out)
    constant = torch.cat([x[..., :1], torch.full_like(x[..., :1], 1e8)], -1)
    assert pfn(constant, torch.full_like(y, 3.0), q).isfinite().all()


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize(("batch", "n", "m"), [(0, 3, 2), (2, 0, 0), (2, 3, 0), (1, 1, 1), (2, 0, 3)])
def test_empty_and_single_sizes(standardize, batch, n, m):
    pfn, (x, y, q) = model(standardize=standardize), data(n, m, batch=batch)
    out = pfn(x, y, q)
    assert out.shape == (batch, m, 8)
    loss = pfn.loss(out, y, torch.zeros(batch, m))
    loss.backward()
    assert loss.isfinite() and (m * batch > 0 or loss == 0)


def test_missing_outcomes_and_features():
    pfn, (x, y, q) = model(), data(5, 3)
    target = torch.randn(2, 3)
    out = pfn(x, y, q)
    known = pfn.loss(out[:, :2], y, target[:, :2])
    target[:, 2] = math.nan
    torch.testing.assert_close(pfn.loss(out, y, target), known)
    holed = x.clone()
    holed[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="impute"):
        pfn(holed, y, q)
    assert model(impute="zero", standardize=True)(holed, y, q).isfinite().all()
    with pytest.raises(ValueError, match="y of the context holds NaN"):
        pfn(x, torch.full_like(y, math.nan), q)


def test_contexts_longer_than_trained_on_warn_and_twice_as_long_are_refused():
    pfn = model(n_max=4)
    with pytest.warns(UserWarning, match="has 6 rows; the model was trained on at most 4"):
        pfn(*data(6, 1))
    with pytest.raises(ValueError, match="has 9 rows"):
        pfn(*data(9, 1))


def test_bad_shapes_and_settings_are_refused():
    pfn, (x, y, q) = model(), data(5, 3)
    with pytest.raises(ValueError, match="context is x"):
        pfn(x, y[:, :2], q)
    with pytest.raises(ValueError, match="queries are"):
        pfn(x, y, q[:1])
    with pytest.raises(ValueError, match="multiple of heads"):
        PFN(1, GaussianHead(), 10, 1, 3)
    with pytest.raises(ValueError, match="impute"):
        model(impute="mean")


@pytest.mark.parametrize("head", [GaussianHead(), BernoulliHead(), CategoricalHead(3)])
def test_other_heads_train(head):
    pfn, (x, y, q) = model(head=head), data(5, 3)
    out = pfn(x, y, q)
    pfn.loss(out, y, torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, math.nan]])).backward()
    assert out.shape == (2, 3, head.num_outputs) and pfn.enc_x.weight.grad.abs().max() > 0


def test_probabilities_and_labels():
    head, out = CategoricalHead(3), torch.randn(4, 3)
    torch.testing.assert_close(head.log_probabilities(out).exp().sum(-1), torch.ones(4))
    both = BernoulliHead().log_probabilities(out[:, :1]).exp()
    torch.testing.assert_close(both[:, 1], out[:, 0].sigmoid())
    for label in (3.0, -1.0, 0.5):
        with pytest.raises(ValueError, match="labels go from 0 to 2"):
            head.nll(out, torch.full((4,), label))


def test_the_gaussian_heads_closed_forms_agree_with_torchs_normal():
    head, out = GaussianHead().affine(2.0, 3.0), torch.randn(5, 2, dtype=torch.float64)
    normal = torch.distributions.Normal(head.mean(out), head.variance(out).sqrt())
    y = torch.linspace(-3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(head.nll(out, y), -normal.log_prob(y))
    torch.testing.assert_close(head.icdf(out, head.cdf(out, y)), y)
    draws = normal.sample((200_000,))
    torch.testing.assert_close(head.ei(out, 1.0), (draws - 1).clamp(min=0).mean(0), atol=0.05, rtol=0.02)


def test_bfloat16_autocast_keeps_the_head_in_float32_and_the_answer_close():
    pfn, (x, y, q) = model(), data(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        half = pfn(x, y, q)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, pfn(x, y, q), atol=0.1, rtol=0.1)


def test_it_can_be_compiled_and_copied():
    pfn, (x, y, q) = model(), data(6, 4)
    compiled = torch.compile(pfn, backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x, y, q), pfn(x, y, q))
    torch.testing.assert_close(compiled(*data(5, 3)), pfn(*data(5, 3)))
    torch.testing.assert_close(copy.deepcopy(pfn)(x, y, q), pfn(x, y, q))


def test_double_precision_gradcheck_of_the_network():
    pfn, (x, y, q) = model(layers=2).double(), data(3, 2, batch=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(pfn, tuple(part.requires_grad_() for part in (x, y, q)))


@pytest.mark.parametrize(
    "head", [BarDistribution([-1.0, 0.0, 0.3, 2.0]), CategoricalHead(3), BernoulliHead(), GaussianHead()]
)
def test_saved_and_loaded(tmp_path, head):
    pfn, (x, y, q) = model(head=head, n_max=9, standardize=True), data(6, 4)
    pfn.prior_name = "GPPrior"
    pfn.save_pretrained(tmp_path / "model")
    again = PFN.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again(x, y, q), pfn(x, y, q), atol=0, rtol=0)
    assert (again.n_max, again.prior_name, again.num_features) == (9, "GPPrior", 2)
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        PFN.from_pretrained(tmp_path)


def test_the_surrogate_answers_in_batches_and_can_be_climbed():
    pfn, (x, y, _) = model(standardize=True), data(6, 1, batch=1)
    surrogate = PFNSurrogate(pfn, x[0], y[0][:, None])
    X = torch.randn(3, 4, 2, requires_grad=True)
    posterior = surrogate.posterior(X)
    assert posterior.mean.shape == posterior.variance.shape == (3, 4, 1) and (posterior.variance > 0).all()
    assert posterior.rsample((5, 2)).shape == (5, 2, 3, 4, 1) and posterior.rsample().shape == (3, 4, 1)
    gain = surrogate.expected_improvement(X, best=0.3)
    gain.sum().backward()
    assert gain.shape == (3, 4) and (gain > 0).all() and X.grad.abs().max() > 0
    assert surrogate.expected_improvement(X[:, :1], 0.3).shape == (3,)
    with pytest.raises(ValueError, match="train_X"):
        PFNSurrogate(pfn, x[0], y[0][:2])
