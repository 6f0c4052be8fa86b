import pytest
import torch
from torch import nn

from headway.optim import AdamP
from headway.surgery import Replace, apply
from headway.trials.arms import Arm, arm, arms
from headway.trials.budget import Budget


def test_baseline_changes_nothing():
    model = nn.Linear(2, 2)
    assert arm("baseline") == Arm("baseline")
    assert arm("baseline").build(model) is model
    assert arm("baseline").plan(model) is None


def test_a_string_carries_settings_and_composes(children):
    made = arm("peri-ln(eps=1e-5)+mix-ln(alpha=0.5)")
    assert made.label == "peri-ln(eps=1e-5)+mix-ln(alpha=0.5)"
    assert [technique.settings()[name] for technique, name in zip(made.techniques, ("eps", "alpha"), strict=True)] == [
        1e-5,
        0.5,
    ]


def test_techniques_classes_and_lists_are_arms_too(children):
    single = arm(children.WithBatchNorm())
    assert single.label == "WithBatchNorm"
    assert arm(children.WithBatchNorm).identity() == single.identity()
    assert len(arm([children.WithBatchNorm(), "mix-ln"]).techniques) == 2


def test_a_layer_class_stands_for_its_replacement():
    class Half(nn.Module):
        @classmethod
        def from_module(cls, module, *, site=None):
            return cls() if isinstance(module, nn.Tanh) else None

    (technique,) = arm(Half).techniques
    assert isinstance(technique, Replace)
    assert isinstance(arm(Half).build(nn.Sequential(nn.Tanh()))[0], Half)


def test_an_optimiser_class_or_its_python_path_trains_in_place_of_the_tasks_own():
    model = nn.Linear(3, 2)
    own = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5, "weight_decay": 0.0}], 0.1)
    for what, lr in ((AdamP, 0.1), ("adam-p(delta=0.2)", 0.1), ("headway.optim:AdamP(lr=0.3)", 0.3)):
        made = arm(what)
        assert made.plan(model) is None and made.build(model) is model
        found = made.optimize(model, own)
        assert isinstance(found, AdamP)
        assert [group["lr"] for group in found.param_groups] == ([lr, 0.5] if lr == 0.1 else [lr, lr])
        assert [group["weight_decay"] for group in found.param_groups] == [0.01, 0.0]
    assert isinstance(arm("torch.optim:SGD(momentum=0.9)").optimize(model, own), torch.optim.SGD)
    assert arm("baseline").optimize(model, own) is own
    assert arm(AdamP).identity() != arm(torch.optim.AdamW).identity()
    both = arm("headway.norms:LayerNorm+adam-p")
    assert [technique.changes_model for technique in both.techniques] == [True, False]
    with pytest.raises(TypeError, match="has no setting rate; it takes lr"):
        arm("adam-p(rate=1)")
    for wrong in (AdamP, arm(AdamP).techniques[0]):
        with pytest.raises(TypeError, match="is an optimiser and changes no model"):
            apply(model, wrong)


def test_a_run_is_trained_with_the_optimiser_of_its_arm(children, tmp_path):
    from headway.trials.compare import compare

    options = {"seeds": 1, "budget": 3, "device": "cpu", "progress": False, "probe": False}
    found = compare(children.Tiny(), ["baseline", "adam-p", "torch.optim:SGD"], store=tmp_path / "s.sqlite", **options)
    losses = [found.curves(label, 0)["loss"] for label in ("baseline", "adam-p", "torch.optim:SGD")]
    assert losses[0][0] == losses[1][0] == losses[2][0]
    assert losses[0][2] != losses[1][2] != losses[2][2]


def test_one_comma_separated_string_lists_arms():
    assert [one.label for one in arms("baseline, peri-ln(eps=1e-5, copy_gains=True),mix-ln")] == [
        "baseline", "peri-ln(eps=1e-5, copy_gains=True)", "mix-ln"]  # fmt: skip


def test_equal_labels_are_refused_and_a_mapping_names_arms_apart(children):
    with pytest.raises(ValueError, match="stands more than once"):
        arms(["baseline", "baseline"])
    named = arms({"one": "baseline", "two": [children.WithBatchNorm()]})
    assert [one.label for one in named] == ["one", "two"]


def test_an_unknown_arm_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean peri-ln"):
        arm("perry-ln")
    with pytest.raises(ValueError, match="at least one arm"):
        arms([])
    with pytest.raises(TypeError, match="a technique was expected"):
        arm(3)


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [(200, 200, "steps"), ("200", 200, "steps"), ("7 steps", 7, "steps"), ("60s", 60, "seconds"), ("1.5 min", 90, "seconds"),
     ("200 steps", 200, "steps"), ("60 seconds", 60, "seconds")],
)  # fmt: skip
def test_a_budget_is_steps_or_time(text, amount, unit):
    assert Budget.of(text) == Budget(amount, unit)
    assert Budget.of(str(Budget.of(text))) == Budget(amount, unit)


@pytest.mark.parametrize("text", [0, -3, "soon", "1.5 steps", "0s", "3 weeks"])
def test_a_budget_that_cannot_be_read_is_refused_with_examples(text):
    with pytest.raises(ValueError, match='"200 steps"'):
        Budget.of(text)
