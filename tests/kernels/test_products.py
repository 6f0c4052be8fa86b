import pytest
import torch
import torch.nn.functional as F

from headway.kernels.products import linear, outer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 1, 1), (7, 0, 2), (4, 3, 0), (33, 17, 65)])
def test_products_equal_torchs_whatever_the_layout(dtype, shape):
    rows, inner, outputs = shape
    x, w, b = (torch.randn(s).to(dtype) for s in ((rows, inner), (outputs, inner), (outputs,)))
    allowed = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for a in (x, x.t().contiguous().t()):
        torch.testing.assert_close(linear(a, w, b), F.linear(x, w, b), **allowed)
        torch.testing.assert_close(linear(a, w.t().contiguous().t()), x @ w.t(), **allowed)
    y = torch.randn(rows, outputs).to(dtype)
    result = outer(x, y)
    torch.testing.assert_close(result, x.t() @ y, **allowed)
    assert result.is_contiguous() and result.shape == (inner, outputs)


def test_nan_stays_in_its_row():
    x, w = torch.randn(40, 19), torch.randn(33, 19)
    spoiled = x.clone()
    spoiled[5] = float("nan")
    result, clean = linear(spoiled, w), linear(x, w)
    assert result[5].isnan().all() and torch.equal(result[torch.arange(40) != 5], clean[torch.arange(40) != 5])
