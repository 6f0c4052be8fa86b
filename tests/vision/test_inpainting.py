# pyright: reportArgumentType=false, reportIndexIssue=false
"""The inpainting network: valid pixels come through untouched, masks reach every layer, released state loads, norms can be exchanged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import headway as hw
from headway.norms import RegionNormB2d, RegionNormL2d
from headway.vision import InpaintingNet, inpaint, irregular_masks


def case(channels=1, size=16):
    torch.manual_seed(0)
    return torch.rand(2, channels, size, size), irregular_masks(2, size, generator=torch.Generator().manual_seed(1))


def small(**settings):
    torch.manual_seed(2)
    return InpaintingNet(1, 4, 1, **settings)


def released_names(state):
    """The state of the network as the released code names it."""
    layers = {
        "1": "encoder_conv1",
        "2": "encoder_in1",
        "4": "encoder_conv2",
        "5": "encoder_in2",
        "7": "encoder_conv3",
        "8": "encoder_in3",
    }
    inner = {"importance_conv": "sa.conv1", "gamma_conv": "sa.gamma_conv", "beta_conv": "sa.beta_conv"}
    found = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "encoder":
            parts = [layers[parts[1]], *parts[2:]]
        parts = [inner.get(part, part) for part in parts]
        found[".".join(parts).replace("hole_", "foreground_").replace("valid_", "background_")] = value
    return found


@pytest.mark.parametrize("norm", ["region", "instance", "batch"])
def test_valid_pixels_come_through_and_what_the_hole_holds_is_not_looked_at(norm):
    image, mask = case()
    model = small(norm=norm)
    model.train()
    filled = inpaint(model, image, mask)
    assert torch.equal(filled[~mask], image[~mask]) and (filled[mask] != image[mask]).all()
    assert ((filled >= 0) & (filled <= 1)).all() and model.training
    again = inpaint(model, torch.where(mask, torch.nan, image), mask.float())
    assert torch.equal(again, filled)
    assert inpaint(model, image[:0], mask[:0]).shape == (0, 1, 16, 16)


def test_the_mask_reaches_every_rn_b_at_its_size_and_every_parameter_learns():
    image, mask = case()
    model, seen = small(), {}
    for name, module in model.named_modules():
        if isinstance(module, RegionNormB2d):
            hole = module.hole
            module.hole = lambda x, m, name=name, hole=hole: seen.setdefault(name, hole(x, m))
    model(image, mask).sum().backward()
    assert {name: tuple(h.shape) for name, h in seen.items()} == {
        "encoder.2": (2, 16, 16), "encoder.5": (2, 8, 8), "encoder.8": (2, 4, 4)
    }  # fmt: skip
    assert torch.equal(seen["encoder.5"], mask[:, 0, ::2, ::2])
    assert sum(isinstance(m, RegionNormL2d) for m in model.modules()) == 4
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_released_state_loads_and_gives_the_same_image():
    image, mask = case(3)
    settings = {"stats": "batch", "eps_mode": "released", "affine_mode": "released"}
    torch.manual_seed(0)
    model = InpaintingNet(3, 4, 1, **settings)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    other = InpaintingNet(3, 4, 1, **settings)
    other.load_state_dict(released_names(model.state_dict()))
    assert torch.equal(model(image, mask), other(image, mask))


def test_region_norms_go_into_a_network_with_ordinary_ones_in_one_call():
    image, mask = case()
    plain, ours = small(norm="batch"), small()
    changed = hw.apply(plain, hw.RegionNorm())
    for name, value in ours.state_dict().items():
        assert changed.state_dict()[name].shape == value.shape
    changed.load_state_dict(ours.state_dict())
    assert torch.equal(changed(image, mask), ours(image, mask))


def test_a_model_that_takes_the_image_alone_is_filled_with_1():
    image, mask = case()
    seen = []
    model = nn.Sequential(nn.Identity(), RegionNormB2d(1))
    model[0].register_forward_hook(lambda *a: seen.append(a[2]))
    filled = inpaint(model, image, mask)
    assert torch.equal(seen[0], torch.where(mask, 1.0, image)) and torch.equal(filled[~mask], image[~mask])
    with pytest.raises(ValueError, match="the model gave"):
        inpaint(nn.AvgPool2d(2), image, mask)


def test_the_compiled_network_equals_the_eager_one_in_values_and_gradients():
    image, mask = case()
    image, model = image.double(), small().double()
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    for masks in (mask, mask.flip(-1)):
        filled = [net(image, masks) for net in (model, fast)]
        torch.testing.assert_close(*filled)
        grads = [torch.autograd.grad((y - image).square().sum(), tuple(model.parameters())) for y in filled]
        torch.testing.assert_close(*grads)


def test_bad_input_is_met_with_one_sentence():
    image, mask = case()
    model = small()
    for wrong, match in (
        (torch.rand(2, 1, 18, 16), "multiples of 4"),
        (torch.rand(2, 1, 8, 8), "from 12 on"),
        (image[:, :, 0], "must be"),
    ):
        with pytest.raises(ValueError, match=match):
            model(wrong, mask)
    for call in (model, lambda x, m: inpaint(model, x, m)):
        with pytest.raises(ValueError, match="not of the size"):
            call(image, mask[:, :, ::2])
        with pytest.raises(ValueError, match="0 or 1"):
            call(image, mask * 0.5)
    with pytest.raises(ValueError, match="norm is"):
        InpaintingNet(norm="layer")
    with pytest.raises(ValueError, match="at least 1"):
        InpaintingNet(width=0)
    for share in ((0.5, 0.2), (0.1, 1.0)):
        with pytest.raises(ValueError, match="shares"):
            irregular_masks(1, 8, share)


def test_irregular_masks_take_the_share_that_is_asked_for():
    draw = torch.Generator().manual_seed(0)
    masks = irregular_masks(12, (24, 32), (0.2, 0.3), draw)
    shares = masks.double().mean((1, 2, 3))
    assert masks.shape == (12, 1, 24, 32) and masks.dtype == torch.bool
    assert shares.min() >= 0.2 and shares.max() < 0.3 + 0.05 and shares.std() > 0
    assert torch.equal(masks, irregular_masks(12, (24, 32), (0.2, 0.3), torch.Generator().manual_seed(0)))
    assert irregular_masks(0, 8).shape == (0, 1, 8, 8) and not irregular_masks(1, 8, (0, 0)).any()
