import copy
import gc
import io
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import headway as hw
from headway.surgery import Edit, SetAttribute, SetParameter, Site, Swap, Technique, applied, applying, history


class Scale(nn.Module):
    """A stand-in layer that reuses the weight of the norm it replaces."""

    looks_for = "nn.LayerNorm"

    def __init__(self, weight: nn.Parameter, factor: float = 1.0):
        super().__init__()
        self.weight = weight
        self.factor = factor

    def forward(self, x):
        return x * self.weight * self.factor

    @classmethod
    def from_module(cls, module, *, site=None, factor: float = 1.0):
        return cls(module.weight, factor) if isinstance(module, nn.LayerNorm) else None


@dataclass(frozen=True)
class Widen(Technique):
    """Replaces every linear layer by one with fresh parameters and a gain more."""

    looks_for = "nn.Linear"

    def change(self, site: Site) -> nn.Module | None:
        if not isinstance(site.module, nn.Linear):
            return None
        new = nn.Linear(site.module.in_features, site.module.out_features)
        with torch.no_grad():
            new.weight.copy_(site.module.weight)
            new.bias.copy_(site.module.bias)
        new.gain = nn.Parameter(torch.ones(1))
        return new


@dataclass(frozen=True)
class Fails(Technique):
    def edits(self, model, sites) -> list[Edit]:
        raise RuntimeError("boom")


@dataclass(frozen=True)
class GivesShift(Technique):
    """Gives every linear layer one more parameter."""

    def edits(self, model, sites) -> list[Edit]:
        linear = [site.module for site in sites if isinstance(site.module, nn.Linear)]
        return [SetParameter(m, "shift", nn.Parameter(torch.zeros(m.out_features))) for m in linear]


@dataclass(frozen=True)
class GivesNote(Technique):
    def edits(self, model, sites) -> list[Edit]:
        return [SetAttribute(model, "note", 1)]


class Learned(nn.Module):
    """An activation with a parameter."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(1))
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        return x.clamp(min=0) * self.slope.to(x.dtype)

    @classmethod
    def from_module(cls, module, *, site=None):
        return cls() if isinstance(module, nn.ReLU) else None


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)))


def test_apply_returns_the_same_object_with_the_modules_replaced(model):
    weight = model[1].weight
    changed = hw.apply(model, Scale)
    assert changed is model
    assert isinstance(model[1], Scale) and isinstance(model[2][0], Scale)
    assert model[1].weight is weight


def test_a_copy_leaves_the_original_alone(model):
    changed = hw.apply(model, Scale, copy=True)
    assert isinstance(model[1], nn.LayerNorm) and isinstance(changed[1], Scale)


def test_undo_restores_the_very_same_modules(model):
    before = list(model.modules())
    hw.apply(model, Scale)
    hw.apply(model, Widen)
    assert hw.undo(model, steps=2) is model
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


def test_undo_without_a_change_says_so(model):
    with pytest.raises(ValueError, match="0 call"):
        hw.undo(model)


def test_a_model_that_is_itself_replaced_comes_back_by_undo():
    norm = nn.LayerNorm(4)
    changed = hw.apply(norm, Scale)
    assert isinstance(changed, Scale)
    assert hw.undo(changed) is norm


def test_plan_tells_what_apply_would_do_and_touches_nothing(model):
    before = list(model.modules())
    state = torch.random.get_rng_state()
    plan = hw.plan(model, Scale, Widen)
    assert [row.name for row in plan.rows] == ["1", "2.0", "0", "2.1"]
    assert plan.parameters_before == sum(p.numel() for p in model.parameters())
    assert plan.parameters_after == plan.parameters_before - 8 + 2
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))
    assert torch.equal(state, torch.random.get_rng_state())
    assert "LayerNorm" in str(plan) and "Scale" in str(plan)


def test_nothing_to_change_names_what_was_sought_and_what_was_seen():
    with pytest.raises(hw.NothingToChange, match=r"looks for nn.LayerNorm.*1 Linear"):
        hw.apply(nn.Sequential(nn.Linear(2, 2)), Scale)


def test_a_failing_technique_leaves_the_model_as_it_was(model):
    before = list(model.modules())
    with pytest.raises(RuntimeError, match="boom"):
        hw.apply(model, Scale, Fails())
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))
    assert applied(model) == []


def test_a_shared_module_stays_shared(model):
    shared = nn.LayerNorm(4)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
    hw.apply(model, Scale)
    assert isinstance(model["a"], Scale) and model["a"] is model["b"]["c"]


def test_tied_weights_stay_tied():
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6)})
    model["head"].weight = model["embedding"].weight
    hw.apply(model, Widen)
    assert model["head"].weight is model["embedding"].weight
    hw.undo(model)
    assert model["head"].weight is model["embedding"].weight


def test_where_restricts_the_sites_by_glob_or_predicate(model):
    hw.apply(model, Scale, where="2.*")
    assert isinstance(model[1], nn.LayerNorm) and isinstance(model[2][0], Scale)
    hw.undo(model)
    hw.apply(model, hw.Replace(Scale, where=lambda site: site.name == "1", factor=2.0))
    assert isinstance(model[1], Scale) and model[1].factor == 2.0 and isinstance(model[2][0], nn.LayerNorm)


def test_where_takes_several_globs_and_says_so_when_they_leave_nothing(model):
    assert [row.name for row in hw.plan(model, Scale, where=["1", "nowhere.*"]).rows] == ["1"]
    with pytest.raises(hw.NothingToChange, match=r"within where='9\.\*'"):
        hw.apply(model, Scale, where="9.*")


def test_replace_refuses_unknown_settings_and_layers_that_cannot_stand_in():
    with pytest.raises(TypeError, match="no setting fctor; it takes factor"):
        hw.Replace(Scale, fctor=2)
    with pytest.raises(TypeError, match="from_module"):
        hw.Replace(nn.Linear)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_training_mode_are_kept(model, dtype):
    model = model.to(dtype).eval()
    hw.apply(model, Widen)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_parameters_lie_where_the_model_lies_also_where_the_old_module_had_none(dtype):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).to("meta", dtype)
    hw.apply(model, Learned)
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"meta"} and {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("foreach", [False, True])
def test_moments_of_kept_parameters_go_on_and_new_ones_start_from_nothing(model, foreach):
    twin = copy.deepcopy(model)
    x = torch.randn(5, 4)

    def made(net):
        groups = [{"params": list(net[0].parameters()), "lr": 0.1}, {"params": list(net[2].parameters()), "lr": 0.01}]
        return torch.optim.Adam([{"params": net[1].parameters(), "weight_decay": 0.3}, *groups], foreach=foreach)

    def step(net, optimizer):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()

    pairs = [(net, made(net)) for net in (model, twin)]
    for net, optimizer in pairs:
        step(net, optimizer)
    # an equal layer in another object: training must go on as if nothing had happened
    hw.apply(model, hw.norms.LayerNorm, optimizer=pairs[0][1])
    assert isinstance(model[1], hw.norms.LayerNorm)
    for net, optimizer in pairs:
        step(net, optimizer)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert [len(group["params"]) for group in pairs[0][1].param_groups] == [2, 2, 4]


def test_momentum_of_sgd_is_kept_through_apply_and_undo(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    old = model[0].weight
    momentum = optimizer.state[old]["momentum_buffer"].clone()
    hw.apply(model, Widen, optimizer=optimizer)
    assert torch.equal(optimizer.state[model[0].weight]["momentum_buffer"], momentum)
    hw.undo(model, optimizer=optimizer)
    assert model[0].weight is old and torch.equal(optimizer.state[old]["momentum_buffer"], momentum)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_a_new_parameter_of_a_kept_module_joins_the_group_of_that_module(model):
    optimizer = torch.optim.SGD(
        [{"params": model[:2].parameters()}, {"params": model[2].parameters(), "lr": 0.5}], lr=0.1
    )
    hw.apply(model, GivesShift(), optimizer=optimizer)
    assert any(model[2][1].shift is p for p in optimizer.param_groups[1]["params"])
    assert any(model[0].shift is p for p in optimizer.param_groups[0]["params"])
    hw.undo(model, optimizer=optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 4] and not hasattr(model[0], "shift")


def test_the_optimiser_follows_with_its_state(model):
    optimizer = torch.optim.Adam(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": [*model[1].parameters(), *model[2].parameters()]}]
    )
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    old = model[0].weight
    momentum = optimizer.state[old]["exp_avg"].clone()
    hw.apply(model, Widen, optimizer=optimizer)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert old not in optimizer.state
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], momentum)
    assert any(model[0].gain is p for p in optimizer.param_groups[0]["params"])
    assert any(model[2][1].gain is p for p in optimizer.param_groups[1]["params"])
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()


def test_an_optimiser_of_another_model_is_refused(model):
    with pytest.raises(ValueError, match="no parameter of this model"):
        hw.apply(model, Widen, optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))


def test_frozen_out_parameters_are_not_given_to_the_optimiser(model):
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    hw.apply(model, Widen, optimizer=optimizer)
    assert not any(model[0].gain is p for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m), lambda m: nn.DataParallel(m)])
def test_wrapped_models_are_refused_with_what_to_do_first(model, wrap):
    with pytest.raises(TypeError, match="wrap it afterwards"):
        hw.apply(wrap(model), Scale)


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_models_wrapped_for_several_processes_are_refused_with_what_to_do_first(group, model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(TypeError, match="DistributedDataParallel; change the plain model first and wrap it afterwards"):
        hw.apply(nn.parallel.DistributedDataParallel(model), Scale)
    sharded = fully_shard(copy.deepcopy(model), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match="fully_shard; change the plain model first and wrap it afterwards"):
        hw.plan(sharded, Scale)


def test_a_model_compiled_in_place_is_refused(model):
    model.compile()
    with pytest.raises(TypeError, match="already compiled"):
        hw.apply(model, Scale)


def test_a_copy_and_an_optimiser_exclude_each_other(model):
    with pytest.raises(ValueError, match="exclude each other"):
        hw.apply(model, Scale, copy=True, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_changed_model_is_freed_like_any_other(model):
    import headway.surgery

    changed = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    gone = weakref.ref(changed)
    assert headway.surgery.apply(changed, Scale) is changed
    del changed
    gc.collect()
    assert gone() is None


def test_a_pickled_copy_carries_no_history(model):
    hw.apply(model, hw.norms.LayerNorm)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert history(loaded) == history(copy.deepcopy(model)) == [] and len(history(model)) == 1
    with pytest.raises(ValueError, match="0 call"):
        hw.undo(loaded)
    assert hw.apply(loaded, Widen) is loaded and len(history(loaded)) == 1 and len(history(model)) == 1


def test_the_history_goes_along_when_the_model_itself_is_replaced():
    norm = nn.LayerNorm(4)
    hw.apply(norm, GivesNote())
    changed = hw.apply(norm, Scale)
    assert [plan.rows[0].technique for plan in history(changed)] == ["GivesNote", "Scale"]
    assert hw.undo(changed, steps=2) is norm and not hasattr(norm, "note")


def test_what_is_no_technique_is_refused(model):
    with pytest.raises(TypeError, match="a technique was expected"):
        hw.apply(model, "peri-ln")
    with pytest.raises(TypeError, match="at least one"):
        hw.apply(model)
    with pytest.raises(TypeError, match=r"torch.nn.Module was expected, not int"):
        hw.apply(3, Scale)


def test_hooks_of_a_replaced_module_still_fire(model):
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    hw.apply(model, Scale)
    model(torch.randn(2, 4))
    assert seen == [1]


def test_applying_restores_the_model_after_the_block(model):
    with applying(model, Scale) as changed:
        assert isinstance(changed[1], Scale)
    assert isinstance(model[1], nn.LayerNorm)


def test_a_changed_model_can_be_deep_copied_and_keeps_working(model):
    hw.apply(model, Scale)
    twin = copy.deepcopy(model)
    x = torch.randn(3, 4)
    assert torch.equal(twin(x), model(x))


def test_set_parameter_and_set_attribute_are_exact_inverses():
    layer = nn.Linear(2, 2, bias=False)
    edit = SetParameter(layer, "bias", nn.Parameter(torch.ones(2)))
    edit.do()
    assert layer.bias is not None
    edit.undo()
    assert layer.bias is None
    attribute = SetAttribute(layer, "note", 3)
    attribute.do()
    assert layer.note == 3
    attribute.undo()
    assert not hasattr(layer, "note")


def test_a_swap_of_a_tied_parameter_can_untie_on_request():
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embedding"].weight
    new = nn.Embedding(6, 4)
    swap = Swap(model, "embedding", model["embedding"], new, untie=True)
    swap.do()
    assert model["head"].weight is not model["embedding"].weight
    swap.undo()
    assert model["head"].weight is model["embedding"].weight
