# pyright: reportArgumentType=false
"""Layer graphs give the numbers of the layers they spell, and the search rejects, repeats and resumes."""

from __future__ import annotations

import random

import pytest
import torch

from headway.norms import EvoNormB0, EvoNormS0, LayerGraph, evo_search, search_layers
from headway.norms.evo_anchors import ANCHORS, plain_anchor, residual_anchor, wide_anchor
from headway.norms.evo_graph import INITIAL
from headway.norms.evo_judge import Protocol, Training, judge, train_score
from headway.norms.evo_search import Candidate, pareto
from headway.tasks.digits import Digits

B0 = "div(x, max(std_bwh(x), add(mul(v1, x), std_wh(x))))"
S0 = "div(mul(x, sigmoid(mul(v1, x))), std_whg(x))"
BN_RELU = "max(div(add(x, neg(mean_bwh(x))), std_bwh(x)), zero)"
AS_PUBLISHED = Protocol(steps=100)  # both rejections; the score comes with the first of them


def data():
    return Digits().data()


def small(layer):
    return plain_anchor(layer, 8, 3)


def smaller(layer):
    return residual_anchor(layer, 8, 1)


# oracle 9
@pytest.mark.parametrize("formula, layer", [(B0, EvoNormB0(8)), (S0, EvoNormS0(8, groups=4))])
def test_the_graph_of_a_layer_gives_the_layers_numbers(formula, layer):
    graph = LayerGraph.from_formula(formula).to_module(8, groups=4).double()
    layer, x = layer.double(), torch.randn(4, 8, 5, 5).double() + 0.5
    torch.testing.assert_close(graph(x), layer(x), rtol=1e-6, atol=1e-6)
    graph.eval(), layer.eval()
    if formula == B0:
        for name, buffer in graph.named_buffers():  # the graph follows the deviation, the layer the variance
            assert name.startswith("running_")
            buffer.copy_((layer.running_var + 1e-5).sqrt())
    torch.testing.assert_close(graph(x), layer(x), rtol=1e-6, atol=1e-6)


# oracle 9
def test_batch_norm_with_relu_is_a_graph_that_survives_both_rejections():
    x = torch.randn(4, 8, 5, 5).double()
    ours = LayerGraph.from_formula(BN_RELU).to_module(8).double()
    torch.testing.assert_close(ours(x), torch.nn.functional.batch_norm(x, None, None, training=True).relu())
    reason, scores = judge(LayerGraph.from_formula(BN_RELU), [smaller], data(), AS_PUBLISHED)
    assert reason == "" and min(scores) > 0.25


# oracle 9
@pytest.mark.parametrize("formula", ["mul(zero, x)", "exp(exp(square(x)))", "div(x, zero)"])
def test_graphs_that_cannot_work_fall_to_the_first_rejection(formula):
    found = judge(LayerGraph.from_formula(formula), list(ANCHORS.values()), data(), Protocol(stability=None))
    assert found == ("quality", [])


def test_a_longer_training_goes_on_where_a_shorter_one_stopped():
    layer = LayerGraph.from_formula(BN_RELU).to_module
    run = Training(small, layer, data(), Protocol())
    early = run.score(10)
    assert [early, run.score(25)] == [train_score(small, layer, data(), steps, Protocol()) for steps in (10, 25)]


def test_a_layer_whose_gradient_explodes_is_unstable_by_the_published_numbers():
    graph = LayerGraph.from_formula("mul(square(x), x)")
    assert judge(graph, [smaller], data(), Protocol(quality=None, steps=1)) == ("stability", [])


def test_a_norm_of_the_gradient_that_passes_the_limit_is_unstable():
    graph = LayerGraph.from_formula(BN_RELU)
    climbing = Protocol(quality=None, stability=(3, 0.1, 1e-6), steps=1)
    assert judge(graph, [small], data(), climbing) == ("stability", [])
    hooked = Protocol(
        quality=None, stability=(3, 0.1, 1e8), steps=1, gradient_norm=lambda m, x, y, w: w[0].sum() * torch.inf
    )
    assert judge(graph, [small], data(), hooked) == ("stability", [])


def test_one_anchor_that_fails_is_enough_for_the_first_rejection():
    def deaf(layer):  # a net that hears nothing of its input
        return torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 1),
            layer(8),
            torch.nn.Flatten(),
            torch.nn.Linear(512, 10),
            torch.nn.Threshold(1e9, 0.0),
        )

    graph, quick = LayerGraph.from_formula(BN_RELU), Protocol((30, 0.2), None, 30)
    assert judge(graph, [small], data(), quick)[0] == ""
    assert judge(graph, [small, deaf], data(), quick) == ("quality", [])


def test_where_nothing_new_can_be_drawn_a_known_layer_counts_as_a_duplicate(monkeypatch):
    monkeypatch.setattr(evo_search, "_draw", lambda *_: (LayerGraph.from_formula(BN_RELU), None))
    judged = []
    monkeypatch.setattr(evo_search, "judge", lambda graph, *_: judged.append(graph) or ("", [0.5]))
    found = search_layers([small], data(), 3, **{**SETTINGS, "rerank": None})
    assert len(judged) == 1 and found.rejections == {"duplicate": 2}


def test_formulas_come_back_without_dead_nodes_and_in_one_order():
    graph = LayerGraph((("exp", (0,)), ("mul", (3, 0)), ("sigmoid", (5,)), ("mul", (6, 0))))
    assert graph.formula == LayerGraph.from_formula(graph.formula).formula == "mul(sigmoid(mul(v1, x)), x)"
    assert len(LayerGraph.from_formula(graph.formula).nodes) == 3
    assert LayerGraph.from_formula("add(exp(x), exp(x))").nodes == (("exp", (0,)), ("add", (4, 4)))
    for wrong in ("x", "sin(x)", "add(x)", "add(x, w)", "add(x", "x + x"):
        with pytest.raises(ValueError, match="formula"):
            LayerGraph.from_formula(wrong)


def test_random_graphs_and_mutations_point_backwards_and_differ_in_one_node():
    draw = random.Random(0)
    for _ in range(50):
        graph = LayerGraph.random(draw, 10, batch_free=True)
        child = graph.mutate(draw, batch_free=True)
        assert "bwh" not in graph.formula + child.formula
        assert sum(a != b for a, b in zip(graph.nodes, child.nodes, strict=True)) <= 1
        for i, (_, at) in enumerate(child.nodes):
            assert all(j < len(INITIAL) + i for j in at)


def test_the_pareto_front_keeps_what_nothing_beats():
    found = [Candidate(i, str(i), [], "", s) for i, s in enumerate([[0.9, 0.1], [0.5, 0.5], [0.4, 0.5], [0.1, 0.9]])]
    assert [c.index for c in pareto(found)] == [0, 1, 3]


SETTINGS = {
    "population": 3,
    "quality": (5, 0.1),
    "stability": None,
    "steps": 10,
    "rerank": (2, 20),
    "nodes": 4,
    "batch_size": 32,
}


@pytest.mark.parametrize("objective", ["pareto", "average"])
def test_the_same_seed_gives_the_same_history_also_after_an_interruption(tmp_path, objective):
    file = tmp_path / "search.json"
    whole = search_layers([small, smaller], data(), 16, seed=5, objective=objective, **SETTINGS)
    torch.manual_seed(99)

    def interrupted(layer, calls=[0]):  # noqa: B006
        calls[0] += 1
        if calls[0] == 8:
            raise KeyboardInterrupt
        return small(layer)

    with pytest.raises(KeyboardInterrupt):
        search_layers([interrupted, smaller], data(), 16, seed=5, objective=objective, file=file, **SETTINGS)
    resumed = search_layers([small, smaller], data(), 16, seed=5, objective=objective, file=file, **SETTINGS)
    assert resumed.history == whole.history and resumed.ranked == whole.ranked
    assert len(whole.history) == 16 and sum(whole.rejections.values()) + len(whole.ranked) == 16
    assert whole.rejections and whole.ranked
    assert len({c.formula for c in whole.history}) == 16, "what is known is drawn again"
    x = torch.randn(2, 6, 4, 4)
    assert whole.best.to_module(6)(x).shape == x.shape
    with pytest.raises(ValueError, match="other settings"):
        search_layers([small, smaller], data(), 16, seed=6, file=file, **SETTINGS)


def test_settings_out_of_range_and_a_search_without_survivors():
    with pytest.raises(ValueError, match="budget"):
        search_layers([small], data(), 0)
    none = search_layers([small], data(), 2, quality=(1, 1.1), nodes=2)
    with pytest.raises(ValueError, match="survived"):
        none.best  # noqa: B018


def test_the_anchors_take_any_layer():
    for anchor in (*ANCHORS.values(), wide_anchor):
        net = anchor(lambda c: EvoNormS0(c, groups=4))
        assert net(torch.randn(2, 1, 8, 8)).shape == (2, 10)
        assert 4 <= sum(isinstance(m, torch.nn.Conv2d) for m in net.modules()) <= 8


def test_two_processes_judge_as_one_does():
    found = search_layers([small], data(), 2, workers=2, **{**SETTINGS, "rerank": None})
    alone = Protocol(SETTINGS["quality"], None, SETTINGS["steps"], SETTINGS["batch_size"])
    assert [judge(c.graph, [small], data(), alone) for c in found.history] == [
        (c.rejected, c.scores) for c in found.history
    ]
