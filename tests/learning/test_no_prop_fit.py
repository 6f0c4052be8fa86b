"""NoProp in use: training in one process and in two, encoders that exist, scikit-learn, and the stack of a comparison."""

import contextlib
import copy
from unittest import SkipTest

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.utils.estimator_checks import estimator_checks_generator
from torch import nn

import headway as hw
from headway.claims.no_prop_costs import compared_memory
from headway.learning import (
    BackpropStack,
    ConditionalBlock,
    NoPropClassifier,
    NoPropDT,
    NoPropFM,
    dense_encoder,
    fit_noprop,
    noprop_from,
)
from headway.learning.no_prop.fit import _Default, _Worker
from headway.signals.saved import SavedBytes


def block(t=0, classes=3):
    return ConditionalBlock(*dense_encoder(5, 8), classes, 8)


def batches():
    x = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    return [(x[i : i + 8], torch.arange(8) % 3) for i in (0, 8, 16)]


def same(first, second):
    return [name for name, value in first.state_dict().items() if not torch.equal(value, second.state_dict()[name])]


@pytest.mark.slow
@pytest.mark.parametrize(("embed", "order"), [("onehot", "sampled"), ("learned", "sequential")])
def test_two_processes_train_what_one_does(embed, order):
    torch.manual_seed(0)
    model = NoPropDT(block, 3, T=3, embed=embed)
    start, twin = copy.deepcopy(model), copy.deepcopy(model)
    alone = fit_noprop(model, batches(), 2, order=order)
    together = fit_noprop(twin, batches(), 2, workers=2, order=order)
    assert len(alone.losses) == len(together.losses) == 2 and together.seconds > 0
    if embed == "onehot":
        # bitwise: blocks, their batch statistics, and the head
        assert same(model, twin) == []
        assert together.losses == pytest.approx(alone.losses, rel=1e-5)
    moved = set(same(start, twin))
    trained = {name for name, _ in twin.named_parameters()}
    assert {n for n in trained if not n.endswith(".bias")} <= moved


def test_each_block_is_moved_by_its_own_optimiser_alone():
    model = NoPropDT(block, 3, T=2)
    seen = []

    def make(params):
        seen.append(list(params))
        return torch.optim.AdamW(seen[-1], lr=1e-3, weight_decay=0.1)

    fit_noprop(model, batches(), 1, make)
    assert [{id(p) for p in group} for group in seen] == [
        {id(p) for p in part.parameters()} for part in (*model.blocks, model.head)
    ]


@pytest.mark.parametrize("order", ["sampled", "sequential"])
def test_in_an_epoch_every_block_sees_every_batch_once(order):
    model = NoPropDT(block, 3, T=4)
    counts = []
    for i, one in enumerate(model.blocks):
        counts.append(0)
        one.register_forward_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
    fit_noprop(model, batches(), 2, order=order)
    assert counts == [6] * 4


def test_training_can_be_repeated_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    first = NoPropDT(block, 3, T=2)
    second = copy.deepcopy(first)
    before = torch.get_rng_state()
    losses = fit_noprop(first, batches(), 3, seed=1).losses
    assert torch.equal(before, torch.get_rng_state()) and first.training
    assert losses == fit_noprop(second, batches(), 3, seed=1).losses and same(first, second) == []


def test_what_training_keeps_for_backward_does_not_grow_with_the_blocks():
    saved = {}
    for T in (2, 8):
        model = NoPropDT(block, 3, T=T)
        count = SavedBytes()
        count.start(model)
        x, y = batches()[0]
        model.local_loss(x, y, 2)
        count.stop()
        saved[T] = count.total
    assert saved[2] > 0 and saved[8] == saved[2]


def test_the_peak_of_memory_in_training_does_not_grow_with_the_blocks():
    torch.manual_seed(0)
    x, y = torch.randn(2048, 64), torch.randint(10, (2048,))
    (few, few_by_backprop), (many, many_by_backprop) = (compared_memory(T, 64, x, y) for T in (2, 8))
    # all blocks are trained, one after the other, and what one step needed serves the next
    assert many["saved"] == few["saved"] and many_by_backprop["saved"] > 3 * few_by_backprop["saved"]
    assert many["peak"] < 1.5 * few["peak"] + 4e6
    assert many_by_backprop["peak"] > 2 * many["peak"]


@pytest.mark.parametrize("order", ["sampled", "sequential"])
def test_a_worker_trains_its_own_blocks_as_one_of_all_would_and_the_last_one_the_head(order):
    torch.manual_seed(0)
    alone = NoPropDT(block, 3, T=3)
    parts = [copy.deepcopy(alone) for _ in range(2)]
    make = _Default(torch.optim.AdamW)
    sums = [_Worker(alone, batches(), 2, make, order, 0)().sums]
    sums += [_Worker(part, batches(), 2, make, order, 0, rank, 2)().sums for rank, part in enumerate(parts)]
    for name, value in alone.state_dict().items():
        owner = int(name.split(".")[1]) % 2 if name.startswith("blocks") else 1
        assert torch.equal(value, parts[owner].state_dict()[name]), name
    for whole, first, last in zip(*sums, strict=True):
        assert first[3] == 0 and first[1] + last[1] == whole[1] == last[3] == 9
        assert first[0] + last[0] == pytest.approx(whole[0]) and last[2] == pytest.approx(whole[2])


def test_bad_settings_of_training_are_refused():
    model = NoPropDT(block, 3, T=2)
    for wrong in ({"epochs": 0}, {"epochs": 1, "workers": 0}, {"epochs": 1, "order": "random"}):
        with pytest.raises(ValueError, match="epochs and workers are at least 1"):
            fit_noprop(model, batches(), **wrong)
    with pytest.raises(ValueError, match="gave no batch"):
        fit_noprop(model, [], 1)
    with pytest.raises(ValueError, match="gave no batch"):
        fit_noprop(model, iter(batches()), 1)
    flow = NoPropFM(ConditionalBlock(*dense_encoder(5, 8, "none"), 3, 8, "none", timed=True), 3)
    with pytest.raises(ValueError, match="is one network"):
        fit_noprop(flow, batches(), 1, workers=2)
    with pytest.raises(ValueError, match="must be picklable"):
        fit_noprop(model, batches(), 1, lambda p: torch.optim.SGD(p, 0.1), workers=2)
    shared = noprop_from(nn.Linear(5, 4), 3, 2, share_encoder=True, feat_dim=4)
    with pytest.raises(ValueError, match="share an encoder need one process"):
        fit_noprop(shared, batches(), 1, workers=2)


def test_an_encoder_is_copied_into_every_block_or_shared_by_all():
    encoder = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    x, y = batches()[0]
    own = noprop_from(encoder, 3, 3, example=x, hidden=8)
    assert len({id(one.encoder) for one in own.blocks} | {id(encoder)}) == 4
    assert torch.equal(own.blocks[2].encoder[0].weight, encoder[0].weight)
    shared = copy.deepcopy(noprop_from(encoder, 3, 3, share_encoder=True, feat_dim=4, hidden=8))
    trained = shared.blocks[0].encoder
    assert all(one.encoder.held[0] is trained for one in list(shared.blocks)[1:])
    statistics = trained[1].running_mean.clone()
    shared.local_loss(x, y, 2).backward()
    assert all(p.grad is None for p in trained.parameters()) and torch.equal(statistics, trained[1].running_mean)
    assert trained[1].training
    shared.local_loss(x, y, 1).backward()
    assert all(p.grad is not None for p in trained.parameters())
    with pytest.raises(ValueError, match="pass feat_dim="):
        noprop_from(encoder, 3)


def test_a_hugging_face_vision_encoder_becomes_noprop():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4, num_channels=1
    )  # fmt: skip
    model = noprop_from(transformers.ViTModel(config), 10, T=2, hidden=8)
    images, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    model.local_loss(images, labels, 2).backward()
    assert model.eval()(images).shape == (4, 10)


def test_a_stack_of_back_propagation_becomes_noprop_with_the_same_blocks():
    stack = BackpropStack([block() for _ in range(3)], 3)
    x, y = batches()[0]
    stack.local_loss(x, y).backward()
    assert all(p.grad is not None for p in stack.blocks[0].parameters())
    net = nn.Sequential(stack)
    hw.apply(net, hw.NoProp(eta=0.2))
    assert isinstance(net[0], NoPropDT) and net[0].eta == 0.2
    assert all(a is b for a, b in zip(net[0].blocks, stack.blocks, strict=True))
    hw.undo(net)
    assert net[0] is stack
    with pytest.raises(hw.NothingToChange, match="BackpropStack"):
        hw.apply(nn.Linear(2, 2), hw.NoProp())


def test_a_comparison_trains_the_same_blocks_by_both_rules(tmp_path):
    table = hw.compare(
        "digits-blocks(depth=1, width=64)",
        ["baseline", "no-prop"],
        seeds=1,
        budget="320 steps",
        store=tmp_path / "runs.sqlite",
    )
    assert table.finished and not table.failures
    first, second = table.rows
    assert [first.arm, second.arm] == ["baseline", "no-prop"]
    assert all(row.mean is not None and row.mean > 30 for row in table.rows), [row.mean for row in table.rows]


def test_digits_are_learned():
    X, y = load_digits(return_X_y=True)
    model = NoPropClassifier(T=3, hidden=32, epochs=12, learning_rate=1e-2, random_state=0).fit(X[:600], y[:600])
    assert model.losses_[-1] < 0.5 * model.losses_[0]
    assert model.score(X[1200:], y[1200:]) > 0.8


@pytest.mark.parametrize("variant", ["ct", "fm"])
def test_digits_are_learned_in_continuous_time(variant):
    X, y = load_digits(return_X_y=True)
    model = NoPropClassifier(
        variant, hidden=64, epochs=80, learning_rate=5e-3, steps=20, samples=1, random_state=0
    ).fit(X[:600], y[:600])
    assert model.score(X[1200:], y[1200:]) > 0.7


def test_images_and_prototypes_go_through_the_classifier():
    X, y = load_digits(return_X_y=True)
    images = X[:40].reshape(-1, 1, 8, 8)
    model = NoPropClassifier(T=2, hidden=8, epochs=1, batch_size=13, embed="prototype", random_state=0).fit(
        images, y[:40]
    )
    assert model.predict_proba(images).shape == (40, 10)
    # the labels are images, and pass convolutions of their own
    paths = [[m for m in part.modules() if isinstance(m, nn.Conv2d)] for part in model.model_.blocks[0].children()]
    assert [len(found) for found in paths if found] == [3, 3]
    with pytest.raises(ValueError, match="samples of shape"):
        model.predict(X[:4].reshape(-1, 1, 4, 16))
    with pytest.raises(ValueError, match='variant is "dt"'):
        NoPropClassifier("xt").fit(X[:40], y[:40])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_own_checks_pass():
    model = NoPropClassifier(T=2, hidden=16, epochs=30, batch_size=32, learning_rate=1e-2, samples=2)
    passed = 0
    for estimator, check in estimator_checks_generator(model):
        # a check skips where an optional library is missing
        with contextlib.suppress(SkipTest):
            check(estimator)
            passed += 1
    assert passed > 40
