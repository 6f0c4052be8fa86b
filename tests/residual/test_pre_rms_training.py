"""Training a parametrised Pre-RMSNorm model is Pre-LN training; training a baked or compressed one is not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from model_families import IDS, build
from torch import nn

import headway as hw
from headway.norms.rms import RMSNorm
from headway.residual.pre_rms import NotPreNormError, PreRMSNorm, finalize, verify_equivalence
from headway.residual.recentring import parametrized_places
from headway.residual.transformer import TransformerDecoder

OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 3e-3, weight_decay=0.1),
    "SGD with momentum and decay": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-3),
    "Adam with L2": lambda parameters: torch.optim.Adam(parameters, 3e-3, weight_decay=1e-3),
}


def pre_ln(dropout=0.0, tied=False):
    torch.manual_seed(0)
    model = TransformerDecoder(50, 32, 2, 4, max_length=16, dropout=dropout, tied=tied).double()
    with torch.no_grad():
        # Adam turns the rounding of an exactly vanishing gradient into a full step, so nothing starts at zero
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) + 0.05)
    return model


def losses(model, make, steps=20):
    optimizer = make(model.parameters())
    torch.manual_seed(1)
    found = []
    for _ in range(steps):
        logits = model(IDS)
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), IDS[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def apart(a, b):
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_parametrised_training_follows_the_pre_ln_trajectory(optimizer, tied):
    model = pre_ln(tied=tied)
    converted = hw.apply(model, PreRMSNorm(mode="parametrized"), copy=True)
    assert not any(isinstance(module, nn.LayerNorm) for module in converted.modules())
    plain, ours = losses(model, OPTIMIZERS[optimizer]), losses(converted, OPTIMIZERS[optimizer])
    assert apart(plain, ours) < 1e-12 and plain[0] - plain[-1] > 0.05
    if tied:
        assert converted.head.weight is converted.embedding.weight


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_a_baked_or_compressed_model_leaves_the_pre_ln_trajectory(optimizer):
    model = pre_ln()
    baked = hw.apply(model, PreRMSNorm(fold_affine=False), copy=True)
    compressed = hw.apply(model, PreRMSNorm(compress=True), copy=True)
    plain = losses(model, OPTIMIZERS[optimizer])
    for other in (losses(baked, OPTIMIZERS[optimizer]), losses(compressed, OPTIMIZERS[optimizer])):
        assert abs(other[0] - plain[0]) < 1e-12 and apart(other, plain) > 1e-3


@pytest.mark.parametrize("traced", [False, True], ids=["described", "traced"])
def test_dropout_on_a_branch_is_recentred_after_it_drops(traced):
    model = pre_ln(dropout=0.2)
    given = {"example_inputs": (IDS,)} if traced else {}
    converted = hw.apply(model, PreRMSNorm(mode="parametrized", **given), copy=True)
    make = OPTIMIZERS["AdamW"]
    assert apart(losses(model, make), losses(converted, make)) < 1e-12
    finalize(converted)
    assert not any(m._forward_hooks for m in converted.modules())
    assert verify_equivalence(model, converted, IDS) < 1e-10


def test_dropout_that_is_no_module_is_refused_by_name_in_training():
    model = build("opt")
    with pytest.raises(NotPreNormError, match=r"layers\.0\.dropout is the rate"):
        hw.apply(model, PreRMSNorm(mode="parametrized"))
    for layer in model.model.decoder.layers:
        layer.dropout = 0.0
    hw.apply(model, PreRMSNorm(mode="parametrized"))


def test_layer_scale_is_recentred_after_the_gain():
    from model_families import TimmViT

    torch.manual_seed(0)
    model = TimmViT(depth=2, scale=True).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) + 0.05)
    converted = hw.apply(model, PreRMSNorm(mode="parametrized"), copy=True)
    images, labels = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    runs = []
    for trained in (model, converted):
        optimizer = torch.optim.AdamW(trained.parameters(), 3e-3)
        runs.append([])
        for _ in range(20):
            loss = F.cross_entropy(trained(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            runs[-1].append(loss.item())
    assert apart(*runs) < 1e-12 and runs[0][0] - runs[0][-1] > 0.1
    finalize(converted)
    assert verify_equivalence(model, converted, images) < 1e-10
    assert torch.equal(converted.blocks[0].ls1.gamma, torch.ones(32, dtype=torch.float64))


@pytest.mark.parametrize("name", ["gpt2", "torch pre", "vit"])
def test_a_step_of_the_parametrised_model_is_the_step_of_the_original(name):
    model = build(name).double()
    converted = hw.apply(model, PreRMSNorm(mode="parametrized"), copy=True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    torch.manual_seed(0)
    if name == "vit":
        given = {"pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64)}
    else:
        given = {"input_ids": IDS} if name == "gpt2" else {"src": 1 + torch.randn(2, 9, 32, dtype=torch.float64)}
    for trained in (model, converted):
        out = trained(**given)
        out = out if isinstance(out, torch.Tensor) else out.logits
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        torch.optim.SGD(trained.parameters(), 1e-3).step()
    raw = {
        name.replace("parametrizations.", "").replace(".original", ""): p for name, p in converted.named_parameters()
    }
    for (key, parameter), old in zip(model.named_parameters(), before, strict=True):
        torch.testing.assert_close(raw[key], parameter, rtol=1e-9, atol=1e-11)
        assert not torch.equal(parameter, old) or parameter.grad is None or not parameter.grad.any()


def test_finalize_leaves_plain_tensors_and_is_undone():
    model = hw.apply(pre_ln(), PreRMSNorm(mode="parametrized"))
    original = copy.deepcopy(model)
    assert len(parametrized_places(model)) == 8
    assert finalize(model) is model
    assert not parametrized_places(model) and verify_equivalence(original, model, IDS) < 1e-12
    assert model.blocks[0].mlp.down.weight.mean(0).abs().max() < 1e-15
    assert type(model.blocks[0].mlp.down) is nn.Linear
    with pytest.raises(hw.NothingToChange):
        finalize(model)
    hw.undo(model)
    assert len(parametrized_places(model)) == 8
    hw.undo(model)
    assert not any(isinstance(module, RMSNorm) for module in model.modules())


def test_copies_and_state_dicts_of_a_parametrised_model_train_on():
    model = hw.apply(pre_ln(dropout=0.1), PreRMSNorm(mode="parametrized"))
    other = hw.apply(pre_ln(dropout=0.1), PreRMSNorm(mode="parametrized"))
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    make = OPTIMIZERS["AdamW"]
    expected = losses(model, make, 3)
    assert losses(other, make, 3) == expected and losses(twin, make, 3) == expected
    assert verify_equivalence(twin, finalize(copy.deepcopy(twin)), IDS) < 1e-12


def test_the_optimizer_keeps_its_parameters_and_state():
    model = pre_ln()
    optimizer = torch.optim.AdamW(model.parameters())
    model(IDS).sum().backward()
    optimizer.step()
    held = list(optimizer.state)
    hw.apply(model, PreRMSNorm(mode="parametrized"), optimizer=optimizer)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert all(any(p is q for q in model.parameters()) for p in held) and len(held) == len(optimizer.state)
    finalize(model)


def test_autocast_recentres_in_full_precision():
    model = hw.apply(pre_ln().float(), PreRMSNorm(mode="parametrized"))
    seen = []
    model.blocks[0].mlp.down.parametrizations.weight[0].register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS).sum().backward()
    assert seen[0].dtype == torch.float32 and seen[0].mean(0).abs().max() < 1e-6


def test_the_parametrised_model_compiles_to_one_graph():
    from torch._dynamo.testing import CompileCounter

    model = hw.apply(pre_ln().float(), PreRMSNorm(mode="parametrized"))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(IDS), model(IDS), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_a_parametrised_model_refuses_what_would_change_what_is_trained():
    for setting in ({"compress": True}, {"fold_affine": True}):
        with pytest.raises(ValueError, match="finalize"):
            PreRMSNorm(mode="parametrized", **setting)
    with pytest.raises(ValueError, match="mode is"):
        PreRMSNorm(mode="trained")
