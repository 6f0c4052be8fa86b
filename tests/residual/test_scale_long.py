"""One call on a network that has long skips: which are found, how they are numbered, and that all the rest stays as it was."""

import copy
import importlib.util
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import headway as hw
from headway.residual import FoldLongSkips, LongSkips, ScaleLong
from headway.residual.long_skip_hosts import ScaledHost
from headway.residual.scale_long import fold
from headway.surgery import NothingToChange
from headway.tasks.unets import UNet, UViT


def double_conv(inside: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, out, 3, padding=1), nn.ReLU()
    )  # fmt: skip


class Up(nn.Module):
    def __init__(self, inside: int, skip: int, out: int) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2)
        self.conv = double_conv(inside + skip, out)

    def forward(self, x1, x2):
        x1 = self.up(x1)
        x1 = F.pad(x1, [0, x2.size(3) - x1.size(3), 0, x2.size(2) - x1.size(2)])
        return self.conv(torch.cat([x2, x1], dim=1))


class ClassicUNet(nn.Module):
    """The UNet of segmentation: skips are cropped or padded and concatenated inside blocks of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = double_conv(1, 4)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), double_conv(4, 6))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), double_conv(6, 8))
        self.up1, self.up2 = Up(8, 6, 6), Up(6, 4, 4)
        self.head = nn.Conv2d(4, 1, 1)
        self.drop = 0.5

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.up2(self.up1(x3, x2), x1)
        return self.head(F.dropout(x, self.drop, self.training))


class AddingNet(nn.Module):
    """An hourglass of residual blocks whose long skips are added in its own forward."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(8, 8), nn.Tanh())))

        def forward(self, x):
            return x + self.body(x)

    def __init__(self, n: int = 2) -> None:
        super().__init__()
        self.down, self.up = (nn.ModuleList(self.Block() for _ in range(n)) for _ in range(2))
        self.middle = self.Block()

    def forward(self, x):
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
        x = self.middle(x)
        for block in self.up:
            x = block(x + kept.pop())
        return x


class UpBlock2D(nn.Module):
    """Laid out as diffusers' block: residuals come as a tuple and are taken from its end."""

    def __init__(self, sizes) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(inside, out) for inside, out in sizes)

    def forward(self, hidden_states, res_hidden_states_tuple, temb=None):
        for resnet in self.resnets:
            hidden_states = resnet(torch.cat([hidden_states, res_hidden_states_tuple[-1]], dim=1))
            res_hidden_states_tuple = res_hidden_states_tuple[:-1]
        return hidden_states


class Resnet(nn.Module):
    def __init__(self, inside, out) -> None:
        super().__init__()
        self.in_channels, self.out_channels = inside, out
        self.conv = nn.Conv2d(inside, out, 3, padding=1)

    def forward(self, x):
        return torch.tanh(self.conv(x))


class DownBlock2D(nn.Module):
    def __init__(self, sizes, last) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(inside, out) for inside, out in sizes)
        self.downsamplers = None if last else nn.ModuleList([nn.AvgPool2d(1)])

    def forward(self, x):
        kept = ()
        for resnet in self.resnets:
            x = resnet(x)
            kept += (x,)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            kept += (x,)
        return x, kept


class LikeDiffusers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(1, 4, 3, padding=1)
        self.down_blocks = nn.ModuleList([DownBlock2D([(4, 4)], False), DownBlock2D([(4, 6)], True)])
        self.mid_block = nn.Module()
        self.mid_block.resnets = nn.ModuleList([Resnet(6, 6)])
        self.up_blocks = nn.ModuleList([UpBlock2D([(6 + 6, 6), (6 + 4, 6)]), UpBlock2D([(6 + 4, 4), (4 + 4, 4)])])
        self.conv_out = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, sample):
        x = self.conv_in(sample)
        kept = (x,)
        for block in self.down_blocks:
            x, more = block(x)
            kept += more
        x = self.mid_block.resnets[0](x)
        for block in self.up_blocks:
            kept, given = kept[: -len(block.resnets)], kept[-len(block.resnets) :]
            x = block(x, given)
        return self.conv_out(x)


class OwnLayer(nn.Module):
    """A network written with headway's own layer."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = (nn.ModuleList(nn.Linear(8, 8) for _ in range(3)) for _ in range(2))
        self.skips = LongSkips(3, "none", features=5)

    def forward(self, x):
        for block in self.down:
            x = self.skips.push(block(x).tanh())
        for block in self.up:
            x = block(x) + self.skips.pop()
        return x


def uvit(skips: int = 3) -> UViT:
    return UViT(4, 1, 2, 8, 2, skips)


IMAGE = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
SMALL = torch.linspace(-1, 1, 2 * 16).reshape(2, 1, 4, 4)
TIME = torch.tensor([3.0, 700.0])
NETS = {
    "u-vit": (uvit, (SMALL, TIME), 3),
    "unet": (lambda: UNet(1, (4, 6), 1), (IMAGE, TIME), 2),
    "classic": (ClassicUNet, (IMAGE,), 2),
    "sums": (AddingNet, (torch.linspace(-1, 1, 24).reshape(3, 8),), 2),
    "diffusers": (LikeDiffusers, (IMAGE,), 4),
    "own": (OwnLayer, (torch.linspace(-1, 1, 80).reshape(2, 5, 8),), 3),
}


def make(name: str):
    build, inputs, n = NETS[name]
    torch.manual_seed(0)
    return build().eval(), inputs, n


@pytest.mark.parametrize("name", NETS)
def test_every_long_skip_is_found_and_scaled_and_undone(name):
    model, inputs, n = make(name)
    before, state = model(*inputs), {key: value.clone() for key, value in model.state_dict().items()}
    assert torch.equal(hw.apply(model, ScaleLong(kappa=1.0))(*inputs), before)
    hw.undo(model)
    assert torch.equal(hw.apply(model, ScaleLong([1.0] * n))(*inputs), before)
    hw.undo(model)
    model = hw.apply(model, ScaleLong("cs", 0.5))
    assert isinstance(model, NETS[name][0]) if isinstance(NETS[name][0], type) else True
    assert not torch.allclose(model(*inputs), before)
    model = hw.undo(model)
    assert torch.equal(model(*inputs), before)
    assert model.state_dict().keys() == state.keys()
    assert not any(isinstance(m, ScaledHost) for m in model.modules())


def test_the_plan_numbers_the_skips_from_the_outermost_and_names_both_ends():
    rows = hw.plan(make("u-vit")[0], ScaleLong("cs", 0.5)).rows
    assert [(row.name, row.before, row.after) for row in rows[:3]] == [
        ("out_blocks.0", "skip 3 of 3 from in_blocks.2", "times 0.25"),
        ("out_blocks.1", "skip 2 of 3 from in_blocks.1", "times 0.5"),
        ("out_blocks.2", "skip 1 of 3 from in_blocks.0", "times 1"),
    ]
    rows = hw.plan(make("diffusers")[0], ScaleLong("cs", 0.5)).rows
    assert [(row.name, row.before) for row in rows[:4]] == [
        ("up_blocks.0", "skip 4 of 4 from down_blocks.1.resnets.0"),
        ("up_blocks.0", "skip 3 of 4 from down_blocks.0.downsamplers.0"),
        ("up_blocks.1", "skip 2 of 4 from down_blocks.0.resnets.0"),
        ("up_blocks.1", "skip 1 of 4 from conv_in"),
    ]
    rows = hw.plan(make("classic")[0], ScaleLong("cs", 0.5)).rows
    assert [(row.name, row.before) for row in rows[:2]] == [
        ("up1", "skip 2 of 2 from down1.1.4"),
        ("up2", "skip 1 of 2 from inc.4"),
    ]
    rows = hw.plan(make("sums")[0], ScaleLong("cs", 0.5)).rows
    assert [(row.name, row.before) for row in rows[:2]] == [
        ("", "skip 2 of 2 from down.1"),
        ("", "skip 1 of 2 from down.0"),
    ]


def test_scaled_networks_compute_what_the_equation_says():
    scales = [0.9, 0.3]
    model, (x,), _ = make("classic")
    x1 = model.inc(x)
    x2 = model.down1(x1)
    expected = model.head(model.up2(model.up1(model.down2(x2), scales[1] * x2), scales[0] * x1))
    torch.testing.assert_close(hw.apply(model, ScaleLong(scales))(x), expected)

    model, (x,), _ = make("sums")
    a = model.down[0](x)
    b = model.down[1](a)
    expected = model.up[1](model.up[0](model.middle(b) + scales[1] * b) + scales[0] * a)
    torch.testing.assert_close(hw.apply(model, ScaleLong(scales))(x), expected)

    model, (x,), _ = make("diffusers")
    seen = []
    for block in model.up_blocks:
        block.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    model(x)
    hw.apply(model, ScaleLong([2.0, 3.0, 5.0, 7.0]))
    given = []
    for resnet in (layer for block in model.up_blocks for layer in block.resnets):
        resnet.register_forward_pre_hook(lambda m, args: given.append(args[0]))
    model(x)
    # the innermost skip comes first; what a block is given is not scaled before it
    torch.testing.assert_close(given[0][:, -6:], 7 * seen[0][1])
    assert torch.equal(seen[2][1], seen[0][1])


@pytest.mark.parametrize("name", NETS)
def test_gates_learn_in_every_network(name):
    model, inputs, n = make(name)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    features = {"sums": 8, "own": 5}.get(name)
    if name == "sums":
        inputs = (torch.linspace(-1, 1, 2 * 40).reshape(2, 5, 8),)
        features = 5
    given = {"features": features} if features else {"example_inputs": inputs} if name in ("unet", "classic") else {}
    for share in (True, False):
        model = hw.apply(model, ScaleLong("ls", share=share, **given), optimizer=optimizer)
        gates = [m for m in model.modules() if type(m).__name__ == "SkipGate"]
        assert len(gates) <= n if share else len(gates) == n
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert all(id(p) in held for gate in gates for p in gate.parameters())
        model(*inputs).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for gate in gates for p in [gate.layer2.bias])
        optimizer.step()
        model = hw.undo(model, optimizer=optimizer)
        assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
        optimizer.zero_grad()


@pytest.mark.parametrize("name", NETS)
def test_copies_and_pickles_and_states_keep_the_scaling(name):
    model, inputs, _ = make(name)
    plain = copy.deepcopy(model)
    model = hw.apply(model, ScaleLong("cs", 0.5))
    out = model(*inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(*inputs), out)
    if name in ("u-vit", "unet"):
        assert torch.equal(pickle.loads(pickle.dumps(model))(*inputs), out)
    other = hw.apply(copy.deepcopy(plain), ScaleLong("cs", 0.5))
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(*inputs), out)
    with pytest.raises(ValueError, match="trained with long skips scaled by"):
        hw.apply(copy.deepcopy(plain), ScaleLong("cs", 0.7)).load_state_dict(model.state_dict())
    if name != "own":
        with pytest.raises(RuntimeError, match="long_skips"):
            plain.load_state_dict(model.state_dict())
    # a copy's gates are its own
    gated = hw.apply(make("u-vit")[0], ScaleLong("ls"))
    twin = copy.deepcopy(gated)
    assert twin.out_blocks[0].long_skip_layer is twin.long_skips is not gated.long_skips


@pytest.mark.parametrize("name", NETS)
def test_compiled_networks_agree_without_a_break(name):
    model, inputs, _ = make(name)
    given = {"example_inputs": inputs} if name in ("unet", "classic") else {}
    for mode in ("cs",) if name == "sums" else ("cs", "ls"):
        changed = hw.apply(copy.deepcopy(model), ScaleLong(mode, 0.5, **given))
        torch._dynamo.reset()
        compiled = torch.compile(changed, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), changed(*inputs))


def test_autocast_and_batches_of_none_and_one():
    for name in ("u-vit", "unet", "diffusers"):
        model, inputs, _ = make(name)
        model = hw.apply(model, ScaleLong("ls", example_inputs=inputs))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(*inputs).float(), model(*inputs).float())
            assert torch.isfinite(model(*inputs)).all()
        whole = model(*inputs)
        torch.testing.assert_close(model(*(part[:1] for part in inputs)), whole[:1], rtol=1e-4, atol=1e-5)
        assert model(*(part[:0] for part in inputs)).shape == whole[:0].shape


def test_a_forward_that_depends_on_the_mode_keeps_to_it():
    model, (x,), _ = make("classic")
    hw.apply(model, ScaleLong("cs", 0.5))
    model.train()
    model.drop = 0.5
    torch.manual_seed(0)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    # the network whose own forward adds is written anew, once for either mode
    net = hw.apply(DropoutSums(), ScaleLong("cs", 0.5))
    y = torch.randn(4, 8)
    assert torch.equal(net.eval()(y), net(y)) and not torch.equal(net.train()(y), net(y))


class DropoutSums(AddingNet):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


def test_the_gate_is_computed_again_inside_a_checkpointed_block():
    torch.manual_seed(0)
    plain = hw.apply(uvit(), ScaleLong("ls"))
    again = copy.deepcopy(plain)
    again.out_blocks[0].forward = lambda x, skip, f=again.out_blocks[0].forward: checkpoint(
        f, x, skip, use_reentrant=False
    )
    for model in (plain, again):
        model(SMALL, TIME).square().mean().backward()
    for a, b in zip(plain.long_skips.parameters(), again.long_skips.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_gates_shared_by_all_skips_train_under_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        alone = hw.apply(uvit(), ScaleLong("ls"))
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
        for net in (alone, model):
            for _ in range(2):
                net(SMALL, TIME).square().mean().backward()
        for a, b in zip(alone.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_where_leaves_blocks_out_and_the_others_keep_their_numbers():
    rows = hw.plan(make("u-vit")[0], ScaleLong("cs", 0.5), where=["", "out_blocks.1"]).rows
    assert [row.before for row in rows[:-1]] == ["skip 2 of 3 from in_blocks.1"]


@pytest.mark.parametrize("name", ["u-vit", "classic"])
@pytest.mark.parametrize("mode", ["sqrt2", "cs"])
def test_constants_fold_into_the_columns_that_read_the_skip(name, mode):
    model, inputs, _ = make(name)
    model, inputs = model.double(), tuple(part.double() for part in inputs)
    plain_keys = model.state_dict().keys()
    changed = hw.apply(model, ScaleLong(mode, 0.5))
    before = changed(*inputs)
    hw.apply(changed, FoldLongSkips(inputs if name == "classic" else None))
    torch.testing.assert_close(changed(*inputs), before, rtol=1e-12, atol=1e-12)
    assert changed.state_dict().keys() == plain_keys and not any(isinstance(m, ScaledHost) for m in changed.modules())
    hw.undo(changed)
    assert torch.equal(changed(*inputs), before)
    fold(changed, inputs)
    torch.testing.assert_close(changed(*inputs), before, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_folded_says_why():
    for name, mode, said in (
        ("u-vit", "ls", "gates depend on the input"),
        ("sums", "cs", "added and not concatenated"),
        ("classic", "cs", "how many inputs of"),
        ("unet", "sqrt2", "GroupNorm|operations"),
        ("diffusers", "cs", "not read by one concatenation"),
    ):
        model = hw.apply(make(name)[0], ScaleLong(mode))
        with pytest.raises(ValueError, match=said):
            fold(model)
    with pytest.raises(NothingToChange):
        fold(uvit())


def test_bad_settings_and_networks_without_long_skips_are_refused():
    for wrong, said in (
        ({"kappa": 0.0}, "kappa lies in"),
        ({"kappa": 1.5}, "kappa lies in"),
        ({"mode": "half"}, "mode is one of none, sqrt2, cs, ls"),
        ({"axis": "time"}, "axis is one of"),
        ({"init": "two"}, "init one of"),
    ):
        with pytest.raises(ValueError, match=said):
            ScaleLong(**wrong)
    with pytest.raises(NothingToChange, match=r"long skips.*the model holds.*Linear"):
        hw.apply(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), ScaleLong())
    with pytest.raises(NothingToChange):
        hw.apply(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3, enable_nested_tensor=False), ScaleLong()
        )
    with pytest.raises(NothingToChange):
        hw.apply(nn.Sequential(*(AddingNet.Block() for _ in range(4))), ScaleLong())
    with pytest.raises(ValueError, match="need 3 finite numbers"):
        hw.apply(uvit(), ScaleLong([1.0, 0.5]))
    with pytest.raises(ValueError, match="scaled already"):
        hw.apply(hw.apply(uvit(), ScaleLong()), ScaleLong())
    with pytest.raises(ValueError, match="give example_inputs"):
        hw.apply(ClassicUNet(), ScaleLong("ls"))
    model = hw.apply(uvit(), ScaleLong("ls"))
    with pytest.raises(ValueError, match="made for 5 tokens"):
        model.out_blocks[0](torch.randn(1, 7, 8), torch.randn(1, 7, 8))


class SharedUp(nn.Module):
    """One block for both decoder stages."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))) for _ in range(2))
        self.up = SharedBlock()

    def forward(self, x):
        a = self.down[0](x)
        b = self.down[1](a)
        return self.up(self.up(self.down[1](b), b), a)


class SharedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 8)

    def forward(self, x, kept):
        return self.mix(torch.cat([x, kept], -1))


def test_a_decoder_block_that_runs_twice_has_no_one_number():
    with pytest.raises(ValueError, match="up runs several times"):
        hw.apply(SharedUp(), ScaleLong())


def test_the_probe_sees_the_features_grow_less():
    torch.manual_seed(0)
    model = AddingNet(6)
    for block in (*model.down, *model.up):
        nn.init.zeros_(block.body[-2].weight)
    x = torch.randn(16, 8)
    rms = {}
    for mode in ("none", "cs"):
        with hw.surgery.applying(model, ScaleLong(mode, 0.5)) as changed:
            flow = hw.probe(changed, x, layers="up.*")
            rms[mode] = [row.rms for row in flow.rows if row.name.count(".") == 1][-1]
    assert rms["cs"] < 0.7 * rms["none"]


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")
def test_the_real_networks_of_diffusers():
    from diffusers import UNet2DConditionModel, UNet2DModel

    small = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (4, 8), "layers_per_block": 1}
    small["norm_num_groups"] = 2
    plain = UNet2DModel(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), **small
    )
    cross = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        **small,
    )
    for model, inputs in ((plain, (IMAGE, 3)), (cross, (IMAGE, 3, torch.randn(2, 3, 8)))):
        model.eval()
        before = model(*inputs).sample
        assert torch.equal(hw.apply(model, ScaleLong(kappa=1.0))(*inputs).sample, before)
        hw.undo(model)
        measured = hw.plan(model, ScaleLong("ls", example_inputs=inputs)).rows
        hw.apply(model, ScaleLong("ls"))
        assert hw.history(model)[0].rows == measured and len(measured) == 6
        assert not torch.allclose(model(*inputs).sample, before)
        hw.undo(model)
        assert torch.equal(model(*inputs).sample, before)
