"""Self-normalising nets as scikit-learn estimators, and the task of tables."""

import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_wine
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

import headway as hw
from headway.tabular import SNN, SNNClassifier, SNNRegressor
from headway.tasks import get
from headway.weights import SELU, AlphaDropout, check_self_normalizing

FAST = {"hidden": 32, "depth": 3, "max_epochs": 30, "random_state": 0}


@pytest.mark.parametrize("estimator", [SNNClassifier, SNNRegressor])
def test_the_estimators_are_what_scikit_learn_expects(estimator):
    small = estimator(hidden=32, depth=1, dropout=0.0, max_epochs=40, patience=40, learning_rate=0.05, random_state=0)
    # rows of weight 2 and rows twice over fall into other batches
    expected = {"check_sample_weight_equivalence_on_dense_data": "minibatches and the held-out part are drawn by row"}
    failed = [
        f"{result['check_name']}: {result['exception']}"
        for result in check_estimator(small, on_fail=None, on_skip=None, expected_failed_checks=expected)
        if result["status"] == "failed"
    ]
    assert not failed, failed


def test_a_net_has_its_shape_and_meets_the_conditions():
    torch.manual_seed(0)
    net = SNN(20, 4, hidden=256, depth=3)
    kinds = [type(layer) for layer in net]
    assert kinds == [nn.Linear, SELU, AlphaDropout] * 3 + [nn.Linear]
    assert check_self_normalizing(net, torch.randn(256, 20)).ok
    cone = [
        layer.out_features
        for layer in SNN(20, 4, hidden=256, depth=3, shape="cone", dropout=0.0)
        if hasattr(layer, "out_features")
    ]
    assert cone == [256, 64, 16, 4]
    assert SNN(3, 2, depth=0)(torch.randn(5, 3)).shape == (5, 2)
    for bad in ({"shape": "ball"}, {"hidden": 0}, {"dropout": 1.0}):
        with pytest.raises(ValueError):
            SNN(3, 2, **bad)


def test_a_classifier_learns_wine_and_can_be_repeated_copied_and_saved():
    X, y = load_wine(return_X_y=True)
    names = np.array(["a", "b", "c"])[y]
    first = SNNClassifier(**FAST).fit(X[::2], names[::2])
    assert first.score(X[1::2], names[1::2]) > 0.9
    again = clone(first).fit(X[::2], names[::2])
    proba = first.predict_proba(X)
    assert np.array_equal(again.predict_proba(X), proba) and np.allclose(proba.sum(1), 1)
    assert np.array_equal(pickle.loads(pickle.dumps(first)).predict(X), first.predict(X))
    assert (
        np.array_equal(copy.deepcopy(first).predict(X), first.predict(X)) and first.n_iter_ == len(first.history_) <= 30
    )


def test_a_regressor_learns_diabetes():
    X, y = load_diabetes(return_X_y=True)
    assert SNNRegressor(**FAST).fit(X[::2], y[::2]).score(X[1::2], y[1::2]) > 0.3


def test_categories_are_encoded_and_standardised():
    pandas = pytest.importorskip("pandas")
    random = np.random.default_rng(0)
    colour = random.choice(["red", "green", "blue"], 200)
    frame = pandas.DataFrame({"colour": colour, "size": random.normal(5, 3, 200)})
    model = SNNClassifier(**FAST).fit(frame, colour == "red")
    assert model.score(frame, colour == "red") > 0.95
    prepared = model._features(frame)
    assert prepared.shape == (200, 4) and torch.allclose(prepared.mean(0), torch.zeros(4).double(), atol=1e-5)
    unseen = frame.head(3).assign(colour="violet")
    assert model.predict(unseen).shape == (3,)


def test_class_weights_move_the_decision():
    random = np.random.default_rng(0)
    X = np.concatenate([random.normal(0, 1, (270, 2)), random.normal(1, 1, (30, 2))])
    y = np.repeat([0, 1], [270, 30])
    counts = [
        SNNClassifier(**FAST, class_weight=w).fit(X, y).predict(X).sum() for w in (None, "balanced", {0: 1, 1: 30})
    ]
    assert counts[0] < counts[1] <= counts[2]


def test_bad_settings_are_met_at_the_door():
    X, y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 2
    for setting in ({"batch_size": 0}, {"validation_fraction": 1.0}, {"shape": "ball"}):
        with pytest.raises(ValueError):
            SNNClassifier(**setting).fit(X, y)
    with pytest.raises(ValueError, match="at least two classes"):
        SNNClassifier().fit(X, np.zeros(20))


def test_a_comparison_holds_a_self_normalizing_net_and_companders_against_a_plain_one():
    task = get("table", data="wine", depth=3, width=16, samples=100, noise=0.2)
    torch.manual_seed(0)
    model = task.model(0)
    for changed in (
        model,
        hw.apply(model, hw.SelfNormalizing(), copy=True),
        hw.apply(model, hw.CompandWeights(), copy=True),
    ):
        batch = next(task.train_batches(0, 32))
        task.loss(changed, batch).backward()
        task.optimizer(changed.parameters()).step()
        with torch.no_grad():
            assert 0 <= task.evaluate(changed.eval())["accuracy"] <= 100
    x, y, _, _ = task.load()
    clean = get("table", data="wine", samples=100).load()[1]
    assert len(x) == 100 and 2 <= (y != clean).sum() <= 30
    for bad in ({"data": "poker"}, {"norm": "group"}, {"noise": 2.0}):
        with pytest.raises(ValueError):
            get("table", **bad)
