# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""The translation of digits: domains, measures, and that a comparison can run it."""

import pytest
import torch

import headway as hw
from headway.norms import GDWCT
from headway.tasks.task import get
from headway.tasks.translation import coloured, covariance_error

SMALL = {"base_dim": 4, "blocks": 1, "size": 16}


@pytest.fixture(scope="module")
def task():
    return get("digits-translation", **SMALL)


def test_digits_of_both_domains_are_recognised_whatever_their_colours(task):
    (_, _), (plain, styled) = task.data()
    labels = task._labels[1]
    assert task.recognised(plain, labels) > 95 and task.recognised(styled, labels) > 90
    mixed = torch.einsum(
        "cd,bdhw->bchw", torch.randn(3, 3, generator=torch.Generator().manual_seed(0)), plain + 0.1 * styled
    )
    assert task.recognised(mixed, labels) > 90
    assert task.recognised(plain.flip(0), labels) < 30


def test_every_exemplar_has_a_covariance_of_its_own(task):
    styled = task.data()[1][1]
    assert styled.abs().max() <= 1 and covariance_error(styled, styled) == 0
    assert covariance_error(styled, styled.roll(1, 0)) > 0.7
    twice = [coloured(torch.zeros(2, 1, 8, 8), 16, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*twice)


def test_the_baseline_and_the_method_train_on_it(task):
    for techniques in ([], [hw.ReplaceAdaIN(groups=4, mlp_dim=8)]):
        torch.manual_seed(0)
        model = task.model(0)
        if techniques:
            hw.apply(model, *techniques)
        assert any(isinstance(m, GDWCT) for m in model.modules()) == bool(techniques)
        optimizer, batches = task.optimizer(model.parameters()), task.train_batches(0, 4)
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = task.loss(model, next(batches))
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        with torch.no_grad():
            found = task.evaluate(model.eval())
        assert found["covariance_error"] > 0 and 0 <= found["accuracy"] <= 100


def test_batches_of_the_domains_are_unpaired(task):
    a, b = next(task.train_batches(0, 8))
    assert a.shape == b.shape == (8, 3, 16, 16)
    (plain, styled), _ = task.data()
    place = [int((images == x).flatten(1).all(1).nonzero()[0]) for images, x in ((plain, a[0]), (styled, b[0]))]
    assert place[0] != place[1]


def test_settings_out_of_range_are_met_with_a_sentence():
    with pytest.raises(ValueError, match="multiple of 4"):
        get("digits-translation", base_dim=6)


def test_a_comparison_runs_it_against_its_baseline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = hw.compare(
        get("digits-translation", **SMALL),
        ["baseline", "gdwct(groups=4, mlp_dim=8)"],
        seeds=1,
        budget="2 steps",
        progress=False,
    )
    assert "gdwct" in str(table)
