import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.utils.estimator_checks import estimator_checks_generator

from headway.tabular import PFN, BarDistribution, BernoulliHead, CategoricalHead, PFNClassifier, PFNRegressor


def network(head=None, features=24, **settings):
    torch.manual_seed(0)
    pfn = PFN(features, head or BarDistribution(torch.linspace(-4, 4, 41)), 16, 2, 2, standardize=True, **settings)
    with torch.no_grad():
        for parameter in pfn.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return pfn


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "head"), [(PFNRegressor, None), (PFNClassifier, CategoricalHead(5))])
def test_scikit_learns_own_checks_pass(tmp_path, kind, head):
    network(head).save_pretrained(tmp_path)
    for estimator, check in estimator_checks_generator(kind(str(tmp_path))):
        check(estimator)


@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_own_checks_pass_for_two_classes_and_a_model_in_memory():
    for estimator, check in estimator_checks_generator(PFNClassifier(network(BernoulliHead()))):
        # it compares hashes by joblib, which differ between a torch module and its own copy
        if "check_estimators_overwrite_params" not in str(check):
            check(estimator)


def data(n=30, seed=0):
    draw = np.random.default_rng(seed)
    X = draw.normal(size=(n, 3))
    return X, X @ [10.0, 20.0, -5.0] + 1000


def test_prediction_is_in_the_units_of_y_and_follows_the_networks_own_forward():
    pfn, (X, y) = network(), data()
    model = PFNRegressor(pfn).fit(X[:20], y[:20])
    mean, std, quantiles = model.predict(X[20:], return_std=True, quantiles=[0.1, 0.9])
    x, t = torch.tensor(X, dtype=torch.float32)[None], torch.tensor(y, dtype=torch.float32)[None]
    out = pfn(x[:, :20], t[:, :20], x[:, 20:])
    shift, scale = t[0, :20].mean(), t[0, :20].std()
    np.testing.assert_allclose(mean, (shift + scale * pfn.head.mean(out)[0]).detach(), rtol=1e-4)
    np.testing.assert_allclose(std, (scale * pfn.head.variance(out).sqrt()[0]).detach(), rtol=1e-4)
    assert quantiles.shape == (2, 10) and (quantiles[0] < quantiles[1]).all()
    np.testing.assert_allclose(PFNRegressor(pfn).fit(X[:20], 3 * y[:20] - 7).predict(X[20:]), 3 * mean - 7, rtol=1e-4)
    answer = model.predict_dist(X[20:])
    np.testing.assert_allclose(answer.cdf(answer.icdf(0.3)), 0.3, atol=1e-4)


def test_the_context_is_encoded_once():
    calls = []
    pfn = network()
    encode = pfn.encode_context
    pfn.encode_context = lambda *a: calls.append(1) or encode(*a)
    X, y = data()
    model = PFNRegressor(pfn).fit(X, y)
    assert np.allclose(model.predict(X[:5]), model.predict(X[:9])[:5]) and len(calls) == 1


def test_more_queries_than_fit_in_one_piece(monkeypatch):
    X, y = data()
    model = PFNRegressor(network()).fit(X, y)
    whole = model.predict(X)
    monkeypatch.setattr("headway.tabular.pfn.estimators._ROWS", 7)
    np.testing.assert_allclose(model.predict(X), whole, rtol=1e-5)


def test_classes_keep_their_names_and_unseen_ones_get_nothing():
    X, y = data()
    labels = np.where(y > np.median(y), "high", "low")
    model = PFNClassifier(network(CategoricalHead(5))).fit(X, labels)
    p = model.predict_proba(X)
    assert p.shape == (30, 2) and list(model.classes_) == ["high", "low"] and set(model.predict(X)) <= {"high", "low"}
    np.testing.assert_allclose(p.sum(1), 1)


def test_a_folder_is_a_model_and_fitted_ones_can_be_pickled(tmp_path):
    X, y = data()
    network().save_pretrained(tmp_path)
    here, there = PFNRegressor(network()).fit(X, y), PFNRegressor(str(tmp_path)).fit(X, y)
    np.testing.assert_array_equal(here.predict(X), there.predict(X))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(there)).predict(X), there.predict(X))
    assert clone(there).model == str(tmp_path)


def test_holes_are_filled_where_the_model_says_so():
    X, y = data()
    X[3, 1] = np.nan
    assert np.isfinite(PFNRegressor(network(impute="zero")).fit(X, y).predict(X)).all()
    with pytest.raises(ValueError, match="NaN"):
        PFNRegressor(network()).fit(X, y)


def test_what_does_not_fit_is_refused():
    X, y = data()
    with pytest.raises(ValueError, match="a trained PFN or the folder"):
        PFNRegressor().fit(X, y)
    with pytest.raises(ValueError, match="use PFNClassifier"):
        PFNRegressor(network(BernoulliHead())).fit(X, y)
    with pytest.raises(ValueError, match="use PFNRegressor"):
        PFNClassifier(network()).fit(X, y > 1000)
    with pytest.raises(ValueError, match="knows 2 classes"):
        PFNClassifier(network(BernoulliHead())).fit(X, np.arange(30) % 3)
    with pytest.raises(ValueError, match="1 to 2 features"):
        PFNRegressor(network(features=2)).fit(X, y)
    with pytest.raises(ValueError, match="refuses twice"):
        PFNRegressor(network(n_max=10)).fit(X, y)
