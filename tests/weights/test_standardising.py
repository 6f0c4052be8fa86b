# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
"""One call standardises the convolutions in front of norms and lists the others; another one folds them for deployment."""

from __future__ import annotations

import copy

import torch
from torch import nn

import headway as hw
from headway.weights.standardised import WSConv2d, WSConvTranspose2d, weight_standardization
from headway.weights.standardising import StandardiseWeights, fold_weight_standardization, standardize_convs


def ready():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=8), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2),
        nn.InstanceNorm2d(4), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    return model, torch.randn(2, 3, 9, 9)


# oracle 5
def test_folded_model_equals_the_model_and_its_state_fits_plain_convolutions():
    model, x = ready()
    plain = copy.deepcopy(model)
    standardize_convs(model)
    weight_standardization(model[7], unbiased=True)
    y = model.eval()(x)
    folded = fold_weight_standardization(copy.deepcopy(model))
    assert [type(m) for m in folded] == [type(m) for m in plain]
    torch.testing.assert_close(folded(x), y, rtol=1e-6, atol=1e-6)
    plain.load_state_dict(folded.state_dict())
    torch.testing.assert_close(plain.eval()(x), y, rtol=1e-6, atol=1e-6)
    lone = fold_weight_standardization(WSConv2d(3, 4, 3).eval())
    assert type(lone) is nn.Conv2d


def test_one_call_takes_the_convolutions_that_a_norm_follows_and_lists_the_others():
    model, x = ready()
    parameters = list(model.parameters())
    assert len(hw.plan(model, StandardiseWeights()).rows) == 2
    changed, left = standardize_convs(model)
    assert left == {"3": "its filters have one entry", "7": "no norm follows it", "9": "no norm follows it"}
    assert isinstance(changed[0], WSConv2d) and isinstance(changed[5], WSConvTranspose2d)
    assert all(a is b for a, b in zip(parameters, changed.parameters(), strict=True))
    assert torch.isfinite(changed(x)).all()
    hw.undo(changed)
    assert type(changed[0]) is nn.Conv2d
    _, left = standardize_convs(ready()[0], require_norm=False)
    assert left == {"3": "its filters have one entry", "9": "it is the last layer"}
    _, left = standardize_convs(ready()[0], require_norm=False, skip_last=False)
    assert left == {"3": "its filters have one entry"}


class Siblings(nn.Module):
    """Its forward cannot be traced."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.head(self.bn(self.conv(x))) if x.sum() > 0 else x


def test_where_the_forward_cannot_be_traced_the_order_of_siblings_decides():
    changed, left = standardize_convs(Siblings())
    assert isinstance(changed.conv, WSConv2d) and list(left) == ["head"]
