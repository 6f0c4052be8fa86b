"""Models that no family knows: the streams are found in the traced graph, and what cannot be converted is named."""

import pytest
import torch
import torch.nn.functional as F
from model_families import IDS, build
from torch import nn

import headway as hw
from headway.anatomy import UnknownFamily
from headway.norms.rms import CRMSNorm, RMSNorm
from headway.residual.crms import CompletingRMSNorm
from headway.residual.foldable import foldable
from headway.residual.pre_rms import NotPreNormError, PreRMSNorm, finalize, verify_equivalence


class Mixer(nn.Module):
    """A hand-written Pre-LN layer: attention over tokens by nn.MultiheadAttention, gated MLP, a gain on each branch."""

    def __init__(self, dim, bare):
        super().__init__()
        self.before, self.between = nn.LayerNorm(dim), nn.LayerNorm(dim, bias=False)
        self.mix = nn.MultiheadAttention(dim, 4, batch_first=True, bias=not bare)
        self.gate, self.value, self.back = nn.Linear(dim, 48, bias=False), nn.Linear(dim, 48), nn.Linear(48, dim)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, dim))

    def forward(self, x):
        y = self.before(x)
        x = self.mix(y, y, y, need_weights=False)[0] * self.gain + x
        y = self.between(x)
        return x + self.back(F.silu(self.gate(y)) * self.value(y)) / 2


class HandWritten(nn.Module):
    """Patches by a convolution, a class token, a table of positions as a buffer, register tokens, a pooled head."""

    def __init__(self, dim=32, depth=2, bare=False, final=True):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, 4)
        self.token, self.registers = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(2, dim))
        self.register_buffer("places", torch.randn(dim, 7).t() * 0.3 + 1)
        self.layers = nn.ModuleList(Mixer(dim, bare) for _ in range(depth))
        self.final = nn.LayerNorm(dim) if final else nn.Identity()
        self.head = nn.Linear(dim, 5)

    def forward(self, image):
        x = self.patches(image).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.token.expand(len(x), -1, -1), x, self.registers.expand(len(x), -1, -1)], dim=1)
        x = x + self.places[: x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.final(x[:, :5].mean(1)))


IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def unsettled(model):
    """Weights with a mean, norms with a gain and a bias."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def hand_written(**settings):
    torch.manual_seed(0)
    return unsettled(HandWritten(**settings))


@pytest.mark.parametrize("bare", [False, True], ids=["biases", "no biases"])
@pytest.mark.parametrize("settings", [{}, {"fold_affine": False}, {"compress": True}], ids=str)
def test_a_hand_written_model_is_converted(bare, settings):
    model = hand_written(bare=bare)
    converted = hw.apply(model, PreRMSNorm(example_inputs=(IMAGES,), **settings), copy=True)
    assert not any(isinstance(module, nn.LayerNorm) for module in converted.modules())
    assert verify_equivalence(model, converted, IMAGES) < 1e-12
    if settings.get("compress"):
        assert converted.patches.out_channels == 31 and converted.places.shape == (7, 31)
        # an attention without biases cannot take that of a norm, which then gives the full width again
        assert type(converted.layers[0].before) is (CompletingRMSNorm if bare else CRMSNorm)
        assert converted.layers[0].mix.num_heads == 4
        assert converted.layers[0].mix.q_proj.weight.shape == (32, 32 if bare else 31)
    else:
        norm = converted.layers[0].before
        assert isinstance(norm, RMSNorm) and (norm.weight is None) == (not settings and not bare)
        assert converted.places.mean(1).abs().max() < 1e-15
    hw.undo(converted)
    assert verify_equivalence(model, converted, IMAGES) == 0


def test_the_stream_names_writers_gains_and_readers():
    stream = foldable(hand_written(), (IMAGES,))
    written = {place.name: place for place in stream.writers}
    assert written["layers.0.mix.out_proj.weight"].gate == ("layers.0", "gain")
    assert written["layers.1.back.weight"].gate is None
    assert {"patches.weight", "patches.bias", "token", "registers", "places"} <= set(written)
    norms = {norm.name: norm for norm in stream.norms}
    assert [reader.owner for reader in norms["layers.1.between"].readers] == ["layers.1.gate", "layers.1.value"]
    assert [reader.owner for reader in norms["final"].readers] == ["head"]
    assert stream.entries == () and stream.skipped == ()


def test_a_gain_that_is_no_module_is_refused_in_training():
    with pytest.raises(NotPreNormError, match=r"layers\.0\.gain scales"):
        hw.apply(hand_written(), PreRMSNorm(mode="parametrized", example_inputs=(IMAGES,)))


class Reads(nn.Module):
    """A layer whose second branch reads the stream in a way of its own."""

    def __init__(self, read, final=True):
        super().__init__()
        self.table, self.norm, self.up, self.back = (
            nn.Embedding(50, 16),
            nn.LayerNorm(16),
            nn.Linear(16, 8),
            nn.Linear(8, 16),
        )
        self.final, self.head, self.read = nn.LayerNorm(16) if final else nn.Identity(), nn.Linear(16, 3), read
        self.bare = nn.Linear(16, 16)

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.back(torch.relu(self.up(self.norm(x))))
        return self.read(self, x)


@pytest.mark.parametrize(
    ("read", "named"),
    [
        (lambda m, x: m.head(m.final(x + m.bare(x))), "bare reads the stream without a norm"),
        (lambda m, x: m.head(m.final(x + x.relu())), "relu"),
        (lambda m, x: m.head(m.final(x + 1.0)), "add in the model's own forward"),
        (lambda m, x: (m.head(m.final(x)), x), "output of the model"),
        (lambda m, x: m.head(m.final(torch.cat([x, x], -1)[..., :16])), "slice in the model's own forward"),
        (lambda m, x: m.final(x) @ m.table.weight.t(), "table.weight writes to the stream"),
        (lambda m, x: m.head(x), "head reads the stream without a norm"),
        (lambda m, x: m.head(F.layer_norm(x, (16,))), "calls a layer norm that is no module"),
    ],
    ids=[
        "unnormed branch",
        "nonlinearity",
        "shift",
        "stream given out",
        "cat of channels",
        "tied by hand",
        "no norm",
        "norm as a function",
    ],
)
def test_what_is_in_the_way_is_named(read, named):
    torch.manual_seed(0)
    model = Reads(read).double().eval()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(NotPreNormError, match=named):
        hw.apply(model, PreRMSNorm(example_inputs=(IDS,)))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_post_ln_model_is_refused():
    with pytest.raises(NotPreNormError, match=r"encoder\.layer\.0"):
        hw.apply(build("bert"), PreRMSNorm(example_inputs={"input_ids": IDS}))


def test_a_norm_that_stays_is_told_with_its_reason():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = HandWritten(), Reads(lambda m, x: m.head(x))

        def forward(self, image, ids):
            return self.good(image).sum() + self.bad(ids)

    torch.manual_seed(0)
    model = unsettled(Two())
    converted = hw.apply(model, PreRMSNorm(example_inputs=(IMAGES, IDS)), copy=True)
    kept = {row.name: row.after for row in hw.history(converted)[0].rows if row.after.startswith("kept")}
    assert set(kept) == {"bad.norm"} and "bad.head reads the stream without a norm" in kept["bad.norm"]
    assert type(converted.bad.norm) is nn.LayerNorm and isinstance(converted.good.final, RMSNorm)


@pytest.mark.parametrize("compress", [False, True])
def test_a_stream_that_comes_from_outside_is_recentred_where_it_enters(compress):
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.norm = nn.ModuleList(Mixer(32, False) for _ in range(2)), nn.LayerNorm(32)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.norm(x)

    torch.manual_seed(0)
    model = unsettled(Blocks())
    x = 2 + torch.randn(2, 5, 32, dtype=torch.float64)
    assert foldable(model, x).entries == ("layers.0",)
    converted = hw.apply(model, PreRMSNorm(example_inputs=x, compress=compress), copy=True)
    assert verify_equivalence(model, converted, x) < 1e-12


@pytest.mark.parametrize("name", ["gpt2", "whisper", "clip"])
def test_what_is_traced_agrees_with_what_is_described(name):
    from headway.residual.described import described

    model = build(name)
    given = {
        "gpt2": {"input_ids": IDS},
        "whisper": {"input_features": torch.randn(2, 8, 18), "decoder_input_ids": IDS[:, :5]},
        "clip": {"input_ids": IDS, "pixel_values": torch.randn(2, 3, 8, 8)},
    }[name]
    told, seen = described(model), foldable(model, given)
    # CLIP gives out the stream of its images too, which the trace sees and the logits do not
    stack = "text_model" if name == "clip" else ""
    names = {norm.name for norm in told.norms if norm.name.startswith(stack)}
    assert {norm.name for norm in seen.norms if norm.name.startswith(stack)} == names
    written = {place.name for place in told.writers if place.name.startswith(stack)}
    assert {place.name for place in seen.writers if place.name.startswith(stack)} == written
    entries = tuple(entry for entry in told.entries if entry.startswith(stack))
    assert tuple(entry for entry in seen.entries if entry.startswith(stack)) == entries


def test_a_hugging_face_model_of_no_known_family_is_traced_on_a_batch_made_up_for_it():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CodeGenConfig(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    model = unsettled(transformers.CodeGenForCausalLM(config))
    converted = hw.apply(model, PreRMSNorm(), copy=True)
    assert not any(isinstance(module, nn.LayerNorm) for module in converted.modules())
    assert verify_equivalence(model, converted, IDS) < 1e-12


def test_a_model_of_no_known_family_without_inputs_is_told_what_to_give():
    with pytest.raises(UnknownFamily, match="example_inputs"):
        hw.apply(hand_written(), PreRMSNorm())


def test_a_difference_beyond_atol_is_refused_and_taken_back():
    model = hand_written().float()
    images = IMAGES.float()
    before = model(images)
    with pytest.raises(ValueError, match="taken back"):
        hw.apply(model, PreRMSNorm(example_inputs=(images,), atol=1e-12))
    assert torch.equal(model(images), before) and isinstance(model.final, nn.LayerNorm)
    plan = hw.plan(model, PreRMSNorm(example_inputs=(images,)))
    assert plan.rows[-1].after.startswith("the same within")
    assert "example" not in PreRMSNorm(example_inputs=(images,)).label()


def test_an_attention_that_takes_its_head_size_from_the_stream_is_not_compressed():
    from model_families import TimmViT

    torch.manual_seed(0)
    model = TimmViT().double().eval()
    with pytest.raises(ValueError, match=r"cannot be run.*taken back"):
        hw.apply(model, PreRMSNorm(compress=True, example_inputs=(IMAGES,)))
    assert isinstance(model.norm, nn.LayerNorm)


def test_dropout_that_is_active_is_refused_by_name_and_finalize_bakes_a_traced_model():
    class Dropping(Reads):
        def __init__(self):
            super().__init__(lambda m, x: m.head(m.final(x + m.drop(m.bare(m.norm(x))))))
            self.drop = nn.Dropout(0.3)

    torch.manual_seed(0)
    model = Dropping().double().train()
    with pytest.raises(NotPreNormError, match="drop drops entries"):
        hw.apply(model, PreRMSNorm(example_inputs=(IDS,)))
    converted = hw.apply(model, PreRMSNorm(mode="parametrized", example_inputs=(IDS,)), copy=True)
    assert verify_equivalence(model, finalize(converted), IDS) < 1e-12


def test_dropout_on_the_stream_itself_is_refused_in_training():
    model = Reads(lambda m, x: m.head(m.final(m.drop(x)))).double()
    model.drop = nn.Dropout(0.3)
    with pytest.raises(NotPreNormError, match="drop acts on the stream itself"):
        hw.apply(model, PreRMSNorm(mode="parametrized", example_inputs=(IDS,)))
    hw.apply(model.eval(), PreRMSNorm(example_inputs=(IDS,)))
