# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false
"""A model with task-balanced norms on its way through a stream: converted, stored, grown, deployed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import headway as hw
from headway.norms.balanced import AdaB2N1d, AdaB2N2d
from headway.norms.balancing import (
    AdaB2N,
    balance_penalty,
    convert_adab2n,
    end_task,
    grow_tasks,
    layers,
    start_task,
    task_batch,
    to_batchnorm,
)


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6)
    )


def steps(model, optimizer, batches):
    for ids, x in batches:
        with task_batch(model, ids):
            loss = model(x).square().mean() + 0.1 * balance_penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# oracle 9
def test_saved_and_loaded_mid_stream_it_goes_on_bit_by_bit():
    torch.manual_seed(0)
    model = convert_adab2n(network(), 3, 0.4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = [(torch.tensor([1, 0, 1]), torch.randn(3, 1, 6, 6)) for _ in range(4)]
    end_task(model)
    steps(model, optimizer, batches[:2])
    state, other = copy.deepcopy(model.state_dict()), convert_adab2n(network(), 3, 0.4)
    other.load_state_dict(state)
    twin = copy.deepcopy(model)  # a graph behind the penalty does not stand in the way
    for again in (other, twin):
        steps(again, torch.optim.SGD(again.parameters(), 0.1), batches[2:])
    steps(model, optimizer, batches[2:])
    for again in (other, twin):
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
        )
    wanted = model.eval()(batches[0][1])
    plain = to_batchnorm(model)
    assert [type(m) for m in plain] == [type(m) for m in network()]
    torch.testing.assert_close(plain(batches[0][1]), wanted, rtol=1e-6, atol=1e-6)
    network().load_state_dict(plain.state_dict())


def test_one_call_replaces_batch_norms_and_undo_takes_it_back():
    torch.manual_seed(0)
    model, x = network(), torch.randn(3, 1, 6, 6)
    model(x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wanted = model.eval()(x)
    assert len(hw.plan(model, AdaB2N(4)).rows) == 2
    hw.apply(model, AdaB2N(4), optimizer=optimizer)
    assert isinstance(model[1], AdaB2N2d) and isinstance(model[5], AdaB2N1d)
    torch.testing.assert_close(model(x), wanted)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}  # omega among them
    hw.undo(model, optimizer=optimizer)
    torch.testing.assert_close(model(x), wanted)
    with pytest.raises(hw.NothingToChange, match="BatchNorm1d"):
        convert_adab2n(nn.Sequential(nn.Linear(2, 2)), 2)


def test_tasks_grow_and_the_optimiser_follows():
    torch.manual_seed(0)
    model = convert_adab2n(network(), 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    start_task(model, 1)
    steps(model, optimizer, [(torch.tensor([1, 0, 1]), torch.randn(3, 1, 6, 6))])
    kept = optimizer.state[model[1].task_weight]["momentum_buffer"].clone()
    end_task(model)
    with pytest.raises(RuntimeError, match="grow_tasks"), task_batch(model, torch.tensor([2, 0])):
        model(torch.randn(2, 1, 6, 6))
    grow_tasks(model, 2, optimizer)
    assert model[1].task_weight.shape == (4,)
    grown = optimizer.state[model[1].task_weight]["momentum_buffer"]
    assert torch.equal(grown, torch.cat([kept, torch.zeros(2)]))
    steps(model, optimizer, [(torch.tensor([2, 0, 1]), torch.randn(3, 1, 6, 6))])
    assert model[1].task_weight[2] != 0 and model[1].task_weight[3] == 0  # unseen: no gradient
    with pytest.raises(ValueError, match="one or more"):
        grow_tasks(network(), 1)


def test_a_resnet_of_transformers_is_converted_and_deployed():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=4
    )
    torch.manual_seed(0)
    model, x = transformers.ResNetForImageClassification(config), torch.randn(4, 3, 32, 32)
    count = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    convert_adab2n(model, 2)
    assert sum(type(module) is AdaB2N2d for module in model.modules()) == count > 3
    end_task(model)
    with task_batch(model, torch.tensor([1, 0, 1, 1])):
        loss = model(x).logits.square().mean() + 0.1 * balance_penalty(model)
    loss.backward()
    assert all(layer.task_weight.grad.abs().sum() > 0 for layer in layers(model))
    wanted = model.eval()(x).logits
    torch.testing.assert_close(to_batchnorm(model)(x).logits, wanted, rtol=1e-6, atol=1e-6)
    assert not layers(model)
