"""Which weights of known transformers a norm frees, as they come and after Normalize-and-Project: by name, and by doubling each."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import headway as hw
from headway.weights import NaP, followed_by_norm
from headway.weights.invariance import output_changes
from headway.weights.transformer_norms import HeadNorm

sys.path.insert(0, str(Path(__file__).parents[1]))
import model_families as families

AS_THEY_COME = {
    "gemma2": {"v_proj", "o_proj", "up_proj", "down_proj"},
    "gemma3": {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"},
    "olmo2": {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"},
    "qwen3": {"q_proj", "k_proj"},
    **{name: set() for name in ("gpt2", "gpt_neox", "llama", "vit", "bert", "t5", "opt", "torch post")},
}
INSERTED = {
    "gpt2": {"c_fc"},
    "gpt_neox": {"dense_h_to_4h"},
    "phi3": set(),
    "bert": {"query", "key", "intermediate.dense"},
    "vit": {"q_proj", "k_proj", "fc1"},
    "clip": {"q_proj", "k_proj", "fc1"},
    "opt": {"q_proj", "k_proj", "fc1"},
    "whisper": {"q_proj", "k_proj", "fc1"},
    "gptj": {"q_proj", "k_proj", "fc_in"},
    "phi": {"q_proj", "k_proj", "fc1"},
    "llama": {"q_proj", "k_proj", "gate_proj"},
    "mistral": {"q_proj", "k_proj", "gate_proj"},
    "qwen2": {"q_proj", "k_proj", "gate_proj"},
    "gemma": {"q_proj", "k_proj", "gate_proj"},
    "gemma2": {"q_proj", "k_proj", "gate_proj"},
    "gemma3": {"gate_proj"},
    "olmo2": {"gate_proj"},
    "qwen3": {"gate_proj"},
    "t5": {"wi"},
    "torch pre": {"linear1"},
    "torch post": {"linear1"},
    "timm": {"fc1"},
    "headway": {"up"},
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Run(nn.Module):
    """A model with its own input; norms without an eps to speak of."""

    def __init__(self, name):
        super().__init__()
        self.name, self.model = name, build(name)
        sharpen(self)

    def forward(self):
        return families.run(self.name, self.model)


def sharpen(model):
    for module in model.modules():
        for attribute in ("eps", "variance_epsilon"):
            if hasattr(module, attribute):
                setattr(module, attribute, 1e-20)


def build(name):
    if name != "qwen3":
        return families.build(name)
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(**families.SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=8)
    return transformers.Qwen3ForCausalLM(config).eval()


def free(model):
    """Names found by doubling; embeddings, patch maps and CLIP's projections, whose outputs it normalises itself, aside."""
    kinds = [(n, isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D") for n, m in model.named_modules()]
    names = [n for n, linear in kinds if linear and not n.endswith(("text_projection", "visual_projection"))]
    changes = output_changes(model, (), [f"{n}.weight" for n in names])
    return {n for n, change in changes.items() if change < 1e-6}


@pytest.mark.parametrize("name", AS_THEY_COME)
def test_weights_that_a_norm_follows_as_the_model_comes_are_those_that_doubling_finds(name):
    model = Run(name)
    found = followed_by_norm(model)
    assert {weight.split(".")[-2] for weight in found} == AS_THEY_COME[name]
    assert set(found) == free(model)


@pytest.mark.parametrize("name", INSERTED)
def test_inserted_norms_free_the_weights_before_them_and_undo_takes_them_out(name):
    model = Run(name)
    before = copy.deepcopy(model)
    if not INSERTED[name]:
        with pytest.raises(hw.NothingToChange):
            hw.apply(model, hw.NormalizeAndProject())
        return
    hw.apply(model, hw.NormalizeAndProject())
    sharpen(model)
    new = {n for n in followed_by_norm(model) if n.endswith(".linear.weight")}
    assert new and all(any(n.endswith(f"{end}.linear.weight") for end in INSERTED[name]) for n in new)
    assert {end for end in INSERTED[name] for n in new if n.endswith(f"{end}.linear.weight")} == INSERTED[name]
    assert set(followed_by_norm(model)) == free(model)
    hw.undo(model)
    assert str(model) == str(before)
    assert torch.equal(model(), before())


def test_a_transformer_is_trained_on_its_spheres_and_heads_are_normalised_by_themselves():
    model = Run("llama")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    hw.apply(model, hw.NormalizeAndProject(norm="rms"), optimizer=optimizer)
    weights = {n: dict(model.named_parameters())[n] for n in followed_by_norm(model)}
    start = {n: float(w.detach().norm()) for n, w in weights.items()}
    for _ in range(3):
        optimizer.zero_grad()
        model().square().mean().backward()
        optimizer.step()
    assert len(weights) == 12 and all(
        float(w.detach().norm()) == pytest.approx(start[n], rel=1e-12) for n, w in weights.items()
    )
    norm = next(m for m in model.modules() if isinstance(m, HeadNorm))
    q = norm(torch.randn(2, 5, 32) * 7).unflatten(-1, (4, 8))
    gain = norm.weight.detach()
    torch.testing.assert_close(
        ((q - norm.bias) / gain).square().mean(-1).detach(), torch.ones(2, 5, 4), rtol=1e-4, atol=1e-4
    )
    assert HeadNorm(8, affine=False)(torch.randn(0, 32)).shape == (0, 32)


def test_gains_that_are_read_as_one_plus_weight_decay_to_zero():
    model = Run("gemma2")
    nap = NaP(model, decay=1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    with torch.no_grad():
        for gain, _ in nap.affine.values():
            gain.fill_(0.4)
    nap.balance(optimizer)
    assert nap.affine and all((gain == 0.2).all() for gain, _ in nap.affine.values())


def test_rows_of_a_transposed_map_are_refused():
    model = Run("gpt2")
    hw.apply(model, hw.NormalizeAndProject(project=False))
    with pytest.raises(ValueError, match="keeps them last"):
        NaP(model, per="row")
