"""Scaled networks on disk: transformers' and diffusers' models come back through ``load_pretrained``."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

import headway as hw
from headway.residual import FoldLongSkips, ScaleLong
from headway.tasks.unets import UNet, UViT

X, T = torch.linspace(-1, 1, 2 * 16).reshape(2, 1, 4, 4), torch.tensor([3.0, 700.0])


class TinyConfig(PretrainedConfig):
    model_type = "headway_test_uvit"


class TinyUViT(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config) -> None:
        super().__init__(config)
        self.net = UViT(4, 1, 2, 8, 2, 3)
        self.post_init()

    def _init_weights(self, module) -> None:
        pass

    def forward(self, x, t):
        return self.net(x, t)


AutoConfig.register("headway_test_uvit", TinyConfig)


@pytest.mark.parametrize(
    "techniques",
    [
        (ScaleLong("cs", 0.5),),
        (ScaleLong("ls", init="one", share=False),),
        (ScaleLong([0.9, 0.5, 0.1]),),
        (ScaleLong("sqrt2"), FoldLongSkips()),
    ],
)
def test_a_model_of_transformers_comes_back_as_it_was(techniques, tmp_path):
    torch.manual_seed(0)
    model = TinyUViT(TinyConfig()).eval()
    before = model(X, T)
    hw.apply(model, *techniques)
    out = model(X, T)
    model.save_pretrained(tmp_path)
    again = hw.load_pretrained(tmp_path, TinyUViT)
    assert torch.equal(again(X, T), out) and again.config.headway == model.config.headway
    hw.undo(model)
    assert torch.equal(model(X, T), before) and not hasattr(model.config, "headway")


class FrozenDict(dict):
    """As diffusers keeps a configuration."""


class LikeDiffusers(nn.Module):
    """A network with diffusers' configuration: frozen, and rebuilt by ``from_config``."""

    def __init__(self, width=4) -> None:
        super().__init__()
        self._internal_dict = FrozenDict(width=width, _class_name="LikeDiffusers", _diffusers_version="0.42.1")
        self.net = UNet(1, (width, width), 1)

    def register_to_config(self, **kwargs):
        raise NotImplementedError

    @classmethod
    def from_config(cls, config):
        return cls(config["width"])

    def forward(self, x, t):
        return self.net(x, t)

    def save_pretrained(self, folder):
        (folder / "config.json").write_text(json.dumps(self._internal_dict))
        save_file(self.state_dict(), folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("mode", ["cs", "ls"])
def test_a_model_with_diffusers_configuration_comes_back_as_it_was(mode, tmp_path):
    torch.manual_seed(0)
    model = LikeDiffusers().eval()
    plain = model._internal_dict
    # the channels that were measured on the inputs are noted, so that loading needs none
    hw.apply(model, ScaleLong(mode, 0.5, example_inputs=(X, T)))
    assert "headway = " in hw.history(model)[0].rows[-1].after
    out = model(X, T)
    model.save_pretrained(tmp_path)
    assert torch.equal(hw.load_pretrained(tmp_path, LikeDiffusers)(X, T), out)
    hw.undo(model)
    assert model._internal_dict is plain


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")
def test_a_model_of_diffusers_comes_back_as_it_was(tmp_path):
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    hw.apply(model, ScaleLong("ls"))
    x = torch.randn(2, 1, 8, 8)
    model.save_pretrained(tmp_path)
    assert torch.equal(hw.load_pretrained(tmp_path)(x, 3).sample, model(x, 3).sample)
