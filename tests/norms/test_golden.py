# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
"""EvoNorm, Batch-Channel Normalization, weight standardisation and AdaB2N against arrays that 40-digit arithmetic wrote.

The released code (timm's EvoNorm and StdConv2d, the repositories of BCN, weight standardisation and AdaB2N) gives these numbers too.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from golden_norms import CASES, FILE, plain

from headway import norms
from headway.norms.balanced import AdaB2N2d
from headway.norms.balancing import balance_penalty, start_task, task_batch
from headway.norms.batch_channel import BatchChannelNorm2d, EstBatchNorm2d
from headway.weights.standardised import WSConv2d, standardize

GOLDEN: dict[str, Any] = json.loads(FILE.read_text())


def array(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(got: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, array(wanted), rtol=tolerance, atol=tolerance)


def filled(layer: torch.nn.Module, parameters: dict[str, Any]) -> Any:
    """The layer in double precision with the parameters of these names."""
    layer = layer.double()
    with torch.no_grad():
        for name, values in parameters.items():
            layer.get_parameter(name).copy_(array(values))
    return layer


@pytest.mark.parametrize("name", ["estbn", "ws", "ada-b2n 0.4"])
def test_the_arrays_are_what_their_generator_writes(name):
    assert plain(CASES[name]()) == GOLDEN[name]


# evo-norm, oracle 1
@pytest.mark.parametrize("name", GOLDEN["evo"]["cases"])
def test_evonorm_gives_the_golden_outputs_gradients_and_running_variance(name):
    case, given = GOLDEN["evo"]["cases"][name], GOLDEN["evo"]["given"]
    settings = {"groups": case["groups"]} if case["groups"] else {"unbiased_running": True}
    layer = getattr(norms, f"EvoNorm2d{case['kind']}")(4, **settings)
    layer = filled(layer, {key: values for key, values in given.items() if key in dict(layer.named_parameters())})
    x = array(given["x"]).requires_grad_()
    y = layer(x)
    close(y, case["y"])
    y.backward(array(GOLDEN["evo"]["gy"]))
    for key, slope in case["grads"].items():
        close(x.grad if key == "x" else layer.get_parameter(key).grad, slope)
    if not case["groups"]:
        close(layer.running_var, case["running_var"])
        close(layer.eval()(x), case["evaluation"])


# evo-norm, oracle 1
@pytest.mark.parametrize("kind", ["B0", "B1", "B2", "S0", "S1", "S2"])
def test_evonorm_without_activation_is_the_golden_affine_map(kind):
    given = GOLDEN["evo"]["given"]
    layer = filled(getattr(norms, f"EvoNorm2d{kind}")(4, apply_act=False), {k: given[k] for k in ("weight", "bias")})
    gamma, beta, x = (array(given[key]) for key in ("weight", "bias", "x"))
    close(layer(x), (gamma[:, None, None] * x + beta[:, None, None]).tolist())


LAYERS = {
    "estbn": lambda speed: EstBatchNorm2d(4, speed),
    "bcn batch": lambda _: BatchChannelNorm2d(4, 2),
    "bcn micro": lambda speed: BatchChannelNorm2d(4, 2, True, speed),
}


# batch-channel-norm, oracle 1
@pytest.mark.parametrize("name", LAYERS)
def test_every_step_of_the_batch_channel_norms_gives_the_golden_arrays(name):
    golden = GOLDEN[name]
    layer = LAYERS[name](golden["moving_speed"])
    inner = "batch." if hasattr(layer, "batch") else ""
    names = {key: key if key.startswith("group") else inner + key for key in golden["given"]}
    layer = filled(layer, {names[key]: values for key, values in golden["given"].items()})
    for step in golden["steps"]:
        x = array(step["x"]).requires_grad_()
        layer.zero_grad()
        y = layer(x)
        close(y, step["y"])
        y.backward(array(step["gy"]))
        for key, slope in step["grads"].items():
            close(x.grad if key == "x" else layer.get_parameter(names[key]).grad, slope)
        for buffer in ("running_mean", "running_var"):
            close(layer.get_buffer(inner + buffer), step[buffer])


# batch-channel-norm, oracle 1
@pytest.mark.parametrize("name", GOLDEN["ws"]["cases"])
def test_each_form_of_weight_standardisation_gives_the_golden_weight_and_gradient(name):
    case, v = GOLDEN["ws"]["cases"][name], array(GOLDEN["ws"]["v"]).requires_grad_()
    w = standardize(v, **case["settings"])
    close(w, case["w"])
    w.backward(array(GOLDEN["ws"]["g"]))
    close(v.grad, case["grad"], 1e-8)
    settings = {"ws_eps" if key == "eps" else key: value for key, value in case["settings"].items()}
    conv = filled(WSConv2d(2, 3, 2, **settings), {"weight": GOLDEN["ws"]["v"]})
    close(conv.standardised_weight(), case["w"])


# ada-b2n, oracle 1
@pytest.mark.parametrize("kappa", ["1", "0.4", "0"])
def test_every_batch_of_a_stream_gives_the_golden_arrays_of_adab2n(kappa):
    golden = GOLDEN[f"ada-b2n {kappa}"]
    layer = filled(AdaB2N2d(2, 3, golden["kappa"]), golden["given"])
    for step in golden["steps"]:
        x = array(step["x"]).requires_grad_()
        start_task(layer, step["cur"])
        layer.zero_grad()
        with task_batch(layer, torch.tensor(step["ids"])):
            y = layer(x)
        close(y, step["y"])
        penalty = balance_penalty(layer, 0)
        close(penalty, step["penalty"])
        ((y * array(step["gy"])).sum() + golden["strength"] * penalty).backward()
        for key, slope in step["grads"].items():
            grad = x.grad if key == "x" else layer.get_parameter(key).grad
            close(torch.zeros(3).double() if grad is None else grad, slope)
        for buffer in ("running_mean", "running_var", "eta"):
            close(layer.get_buffer(buffer), step[buffer])
