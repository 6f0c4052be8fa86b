import pytest
import torch
from model_families import DESCRIBED, IDS, MOVABLE, build, run
from torch import nn

from headway.anatomy import Pattern, Sublayer, describe
from headway.anatomy.families import PATTERNS
from headway.residual.depth_measures import angular_distance, layer_grad_norms, performance_drop


class Turn(nn.Module):
    """A layer that multiplies by a matrix."""

    def __init__(self, matrix):
        super().__init__()
        self.writer = nn.Linear(2, 2, bias=False)
        self.writer.weight = nn.Parameter(matrix)

    def forward(self, x):
        return self.writer(x)


@pytest.fixture
def known_turns():
    PATTERNS["Turn"] = Pattern("turn", "pre", (Sublayer("mlp", None, None, (), "writer"),))
    yield
    del PATTERNS["Turn"]


def test_angular_distance_is_0_for_identity_half_for_orthogonal_and_1_for_negation(known_turns):
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    model = nn.Sequential(Turn(torch.eye(2)), Turn(quarter), Turn(-torch.eye(2)))
    x = torch.randn(64, 2)
    assert torch.allclose(angular_distance(model, x), torch.tensor([0.0, 0.5, 1.0], dtype=torch.double), atol=1e-6)
    assert angular_distance(model, x, n=3).shape == (1,)
    with pytest.raises(ValueError, match="between 1 and the number of layers, 3"):
        angular_distance(model, x, n=4)


@pytest.mark.parametrize("name", ["headway", "gpt2", "llama"])
def test_the_performance_drop_is_that_of_the_model_without_the_layer(name):
    model = build(name)

    def evaluate(m):
        out = m(IDS)
        return (out if isinstance(out, torch.Tensor) else out.logits).square().mean().item()

    drops = performance_drop(model, evaluate)
    assert drops.shape == (4,)
    whole = evaluate(model)
    path = describe(model).blocks[2].name.rpartition(".")[0]
    stack = model.get_submodule(path)
    layer = stack[2]
    stack[2] = nn.Identity() if name == "headway" else Skip()
    assert abs(evaluate(model) - whole - drops[2].item()) < 1e-6
    stack[2] = layer
    assert evaluate(model) == whole


class Skip(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def test_layer_grad_norms_are_those_of_the_weight_matrices():
    model = build("headway")
    norms = layer_grad_norms(model, lambda m: m(IDS).square().mean())
    assert all(p.grad is None for p in model.parameters())
    model(IDS).square().mean().backward()
    for index, block in enumerate(model.blocks):
        squares = sum(p.grad.square().sum() for p in block.parameters() if p.dim() > 1)
        assert torch.allclose(norms[index].float(), squares.sqrt(), rtol=1e-4)


def call(name, model):
    """The model as a function of nothing, so that every family can be called alike."""

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, _):
            return run(name, model)

    return Called().eval()


@pytest.mark.parametrize("name", [*MOVABLE, *DESCRIBED])
def test_the_three_measures_work_on_every_known_family(name):
    model = call(name, build(name))
    layers = len(describe(model).blocks)
    distance = angular_distance(model, None)
    assert distance.shape == (layers,) and ((distance > 0) & (distance < 1)).all()
    before = model(None)
    drops = performance_drop(model, lambda m: m(None).double().square().sum().item())
    assert drops.shape == (layers,) and drops.abs().min() > 0
    assert torch.equal(model(None), before)
    norms = layer_grad_norms(model, lambda m: m(None).square().sum())
    assert norms.shape == (layers,) and (norms > 0).all()


def test_parallel_copies_give_no_nan_at_cosines_of_plus_and_minus_one(known_turns):
    x = torch.randn(1000, 2) * 1e-3
    model = nn.Sequential(Turn(3 * torch.eye(2)), Turn(-7 * torch.eye(2)))
    distance = angular_distance(model, x)
    assert torch.allclose(distance, torch.tensor([0.0, 1.0], dtype=torch.double), atol=1e-6)
