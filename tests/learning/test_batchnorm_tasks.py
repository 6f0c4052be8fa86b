# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
"""Task files, several tasks on one network, and what can go once gains are zero."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import headway as hw
from headway.learning import (
    BatchNormOnly,
    CIFARResNet,
    NormBank,
    PruneDisabled,
    RandomFeatureCNNClassifier,
    gamma_report,
    load_norm_state_dict,
    load_norms,
    norm_state_dict,
    prune_disabled,
    save_norms,
    without_disabled,
)


def net(blocks=1, width=4, seed=0):
    torch.manual_seed(seed)
    return CIFARResNet(blocks, width, 3, 5).double()


def images(n=6, seed=1):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wander(model, seed):
    """A task of its own: every gain, shift, statistic and head is another, all else stays."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                for t in (m.weight, m.bias, m.running_mean, m.running_var):
                    t.copy_(torch.rand(t.shape, generator=draw, dtype=t.dtype) + 0.1)
            elif isinstance(m, nn.Linear):
                m.weight.copy_(torch.randn(m.weight.shape, generator=draw, dtype=m.weight.dtype))


@pytest.mark.parametrize("head", [False, True])
def test_oracle_5_tasks_come_and_go_bitwise_and_by_row_as_one_by_one(head):
    model, x = net().eval(), images()
    bank, wanted = NormBank(model, include_output=head), {}
    for seed, task in enumerate(("a", "b", "c")):
        if not head:
            fc = copy.deepcopy(model.fc.state_dict())
        wander(model, seed)
        if not head:
            model.fc.load_state_dict(fc)
        bank.add(task)
        wanted[task] = model(x)
    assert not torch.equal(wanted["a"], wanted["b"])
    for task in ("a", "b", "a", "c"):
        bank.use(task)
        assert torch.equal(model(x), wanted[task])
    tasks = ["b", "a", "c", "a", "b", "c"]
    with bank.rows(tasks):
        mixed = model(x)
    loop = torch.stack([wanted[task][i] for i, task in enumerate(tasks)])
    torch.testing.assert_close(mixed, loop, rtol=1e-10, atol=1e-12)
    assert torch.equal(model(x), wanted["c"])


def test_what_the_task_in_use_learns_is_kept_when_told_and_everything_else_is_shared(tmp_path):
    model, x = net().eval(), images()
    bank = NormBank(model)
    wander(model, 0)
    bank.add("a")
    bank.add("b", norm_state_dict(model))
    with torch.no_grad():
        model.bn.weight.add_(1)
    learned = model(x)
    bank.update()
    bank.use("b")
    assert not torch.equal(model(x), learned)
    bank.use("a")
    assert torch.equal(model(x), learned)
    model.conv.weight.data.mul_(2)
    files = bank.save(tmp_path / "tasks")
    assert [file.name for file in files] == ["a.safetensors", "b.safetensors"]
    fresh = NormBank(copy.deepcopy(model))
    assert fresh.load(tmp_path / "tasks") == ["a", "b"]
    fresh.use("a")
    assert torch.equal(fresh.model(x), model(x))
    bank.remove("a")
    assert bank.tasks == ["b"] and bank.active is None
    with pytest.raises(ValueError, match="no task a"):
        bank.use("a")
    with pytest.raises(ValueError, match="already"):
        bank.add("b")
    with pytest.raises(ValueError, match="does not fit"):
        bank.add("c", {"bn.weight": torch.ones(4)})
    with pytest.raises(ValueError, match="sees 6 samples"), bank.rows(["b"] * 3):
        model(x)
    with pytest.raises(ValueError, match="for evaluation"), bank.rows(["b"] * 6):
        model.train()(x)
    model.train()
    with pytest.raises(ValueError, match=r"model\.eval"), bank.rows(["b"]):
        pass


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 8), nn.InstanceNorm1d(8, affine=True)]
)
def test_tasks_by_row_for_other_normalisers(norm):
    model = nn.Sequential(nn.Linear(8, 8), norm).double().eval()
    x = torch.randn(4, 8, 8, dtype=torch.float64)
    bank = NormBank(model)
    for task in ("a", "b"):
        with torch.no_grad():
            for p in norm.parameters():
                p.copy_(torch.randn_like(p))
        bank.add(task)
    if isinstance(norm, nn.InstanceNorm1d):
        with pytest.raises(ValueError, match="cannot be gathered by row"), bank.rows(["a"] * 4):
            pass
        assert "forward" not in norm.__dict__
        return
    with bank.rows(["a", "b", "b", "a"]):
        mixed = model(x)
    for i, task in enumerate("abba"):
        bank.use(task)
        torch.testing.assert_close(mixed[i], model(x)[i])


def test_a_task_file_is_small_and_says_what_does_not_fit(tmp_path):
    model = CIFARResNet(2, 16)
    path = save_norms(model, tmp_path / "task.safetensors")
    whole = sum(t.nbytes for t in model.state_dict().values())
    state = norm_state_dict(model)
    assert sum(t.nbytes for t in state.values()) <= 0.015 * whole
    assert path.stat().st_size <= 0.03 * whole and not list(tmp_path.glob(".*"))
    other = CIFARResNet(2, 16)
    assert load_norms(other, path) == ([], [])
    assert all(torch.equal(other.state_dict()[name], value) for name, value in state.items())
    with pytest.raises(ValueError, match="of another shape"):
        load_norms(CIFARResNet(2, 8), path)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"missing: bn.weight.*not in the model: nonsense"):
        load_norm_state_dict(other, {"nonsense": torch.ones(1)})
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    missing, unknown = load_norm_state_dict(
        other, {"nonsense": torch.ones(1), "bn.weight": torch.ones(16)}, strict=False
    )
    assert "bn.bias" in missing and unknown == ["nonsense"] and torch.equal(other.bn.weight, torch.ones(16))
    with_head = norm_state_dict(model, include_output=True)
    assert set(with_head) - set(state) == {"fc.weight", "fc.bias"}
    load_norm_state_dict(other, with_head)
    assert torch.equal(other.fc.weight, model.fc.weight)
    (tmp_path / "broken.safetensors").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_norms(other, tmp_path / "broken.safetensors")
    with pytest.raises(FileNotFoundError, match="save_norms writes one"):
        load_norms(other, tmp_path / "none")
    with pytest.raises(ValueError, match="nothing that makes up a task"):
        norm_state_dict(nn.Linear(2, 2))


def test_the_report_counts_gains_near_zero_and_the_block_switches_them_off():
    model, x = net().eval(), images()
    with torch.no_grad():
        model.bn.weight.copy_(torch.tensor([0.0, 0.009, -0.009, 0.5]))
    report = gamma_report(model)
    others = sum(
        int((m.weight.abs() < 0.01).sum())
        for m in model.modules()
        if isinstance(m, nn.BatchNorm2d) and m is not model.bn
    )
    assert report.layers["bn"] == 0.75 and report.share == (3 + others) / sum(report.counts.values())
    assert "below 0.01" in str(report) and gamma_report(model, 0.0).share == 0
    before = model(x)
    with without_disabled(model):
        assert torch.equal(model.bn.weight, torch.tensor([0, 0, 0, 0.5])) and not torch.equal(model(x), before)
    assert torch.equal(model(x), before)
    with pytest.raises(ValueError, match="0 or above"):
        gamma_report(model, -1)
    with pytest.raises(ValueError, match="no normaliser with a gain"):
        gamma_report(nn.Linear(2, 2))


def switch_off(model, share=0.5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.weight[torch.rand(m.weight.shape, generator=draw) < share] = 0
                m.bias.copy_(torch.randn(m.bias.shape, generator=draw))
                m.running_mean.copy_(torch.randn(m.bias.shape, generator=draw))


@pytest.mark.parametrize("lean", [False, True])
def test_oracle_6_a_pruned_residual_net_computes_the_same(lean):
    model = net(2, 8)
    switch_off(model)
    model.eval()
    if lean:
        hw.apply(model, BatchNormOnly())
    x, wanted = images(), model(images())
    count = sum(p.numel() for p in model.parameters())
    plan = prune_disabled(model, 0.0)
    assert plan.parameters_after < plan.parameters_before == count and "channels" in str(plan)
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)
    assert model.blocks[0].conv1.out_channels == model.blocks[0].bn1.num_features < 8
    assert model.blocks[0].conv2.in_channels == model.blocks[0].conv1.out_channels
    assert model.blocks[0].conv2.out_channels == 8, "what is added to the stream stays whole"
    twin = copy.deepcopy(model).train()
    F.cross_entropy(twin(x), torch.zeros(6, dtype=torch.long)).backward()
    assert torch.isfinite(twin.bn.weight.grad).all()
    hw.undo(model)
    assert torch.equal(model(x), wanted) and model.blocks[0].conv1.out_channels == 8


@pytest.mark.parametrize("padding", [0, 1, "same"])
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.Tanh(), nn.Identity()])
def test_oracle_6_constants_meet_the_borders_as_before(padding, share, act):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), act, nn.Conv2d(6, 5, 3, padding=padding, bias=False)
    more = nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)
    model = nn.Sequential(*layers, *more).double()
    switch_off(model, share)
    x, wanted = images(), model.eval()(images())
    hw.apply(model, PruneDisabled(0.0))
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)
    assert model[0].out_channels < 6 and model[8].in_features < 5
    assert (model[3].bias is not None) == (padding == 0)
    if share == 1.0:
        assert model[0].out_channels == model[8].in_features == 1


def test_what_cannot_be_pruned_is_left_or_said():
    model = net(1, 4)
    with pytest.raises(hw.NothingToChange):
        hw.apply(model, PruneDisabled(0.0))
    with pytest.raises(ValueError, match="0 or above"):
        PruneDisabled(-1.0)
    grouped = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4)).double()
    switch_off(grouped, 1.0)
    with pytest.raises(hw.NothingToChange):
        hw.apply(grouped, PruneDisabled(0.0))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    switch_off(model)
    hw.apply(model, PruneDisabled(0.0), optimizer=optimizer)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


def test_the_classifier_learns_digits_better_by_norms_than_by_as_many_random_weights():
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    scores = {}
    for trains in ("norm", "random"):
        model = RandomFeatureCNNClassifier(1, 16, 8, trains, image_shape=(1, 8, 8), random_state=0, batch_size=64)
        scores[trains] = model.fit(X[:1200], [f"d{label}" for label in y[:1200]]).score(
            X[1200:], [f"d{label}" for label in y[1200:]]
        )
        assert len(model.losses_) == 8 and model.losses_[-1] < model.losses_[0]
    assert scores["norm"] > 0.3 and scores["norm"] > scores["random"] + 0.1
    assert model.n_trainable_ == 2 * (16 + 16 * 2 + 32 * 3)
    with pytest.raises(ValueError, match="trains is one of"):
        RandomFeatureCNNClassifier(trains="none").fit(X, y)
    with pytest.raises(ValueError, match="image_shape"):
        RandomFeatureCNNClassifier(image_shape=(1, 3, 3)).fit(X, y)
    with pytest.raises(ValueError, match="one class"):
        RandomFeatureCNNClassifier().fit(X, [0] * len(X))


def test_a_hugging_face_model_trains_by_its_norms_and_comes_back_from_disk(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    hw.apply(model, BatchNormOnly())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 5 and all("norm" in name for name in names)
    ids = torch.randint(16, (2, 6))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = hw.load_pretrained(tmp_path)
    assert [name for name, p in again.named_parameters() if p.requires_grad] == names
    hw.undo(model)
    hw.apply(model, BatchNormOnly(include_output=True))
    assert model.lm_head.weight.requires_grad
    with pytest.raises(ValueError, match=r"1 \+ weight"):
        gemma = transformers.GemmaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=4
        )
        hw.apply(transformers.GemmaForCausalLM(gemma), BatchNormOnly(gamma_init="ones"))


def test_graph_norms_train_by_gain_and_shift():
    geometric = pytest.importorskip("torch_geometric.nn")
    model = nn.ModuleList([geometric.GCNConv(4, 4), geometric.GraphNorm(4), geometric.BatchNorm(4)])
    hw.apply(model, BatchNormOnly())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "1.weight",
        "1.bias",
        "2.module.weight",
        "2.module.bias",
    ]
