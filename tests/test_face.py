import importlib

import pytest

import headway as hw
from headway import catalogue

ROOMS = [
    "headway",
    "headway.norms",
    "headway.optim",
    "headway.learning",
    "headway.learning.no_prop",
    "headway.learning.batchnorm_only",
    "headway.learning.cloud_edge",
    "headway.tabular",
    "headway.tabular.pfn",
    "headway.vision",
    "headway.weights",
    "headway.residual",
    "headway.functional",
    "headway.signals",
    "headway.trials",
]


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_can_be_imported(room):
    module = importlib.import_module(room)
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_every_technique_of_the_catalogue_can_be_made():
    for method in catalogue.methods():
        importlib.import_module(method.see)
        if method.technique is not None:
            assert isinstance(catalogue.technique(method.key), hw.Technique)


def test_findings_name_only_methods_of_the_catalogue():
    import re
    from pathlib import Path

    text = Path(importlib.import_module("headway.signals.findings").__file__).read_text()
    known = {method.key for method in catalogue.methods()}
    named = {key for key in re.findall(r'"([a-z]+(?:-[a-z]+)+)"', text) if not key.startswith("a-")}
    assert named <= known


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = hw.nonsense
