import pytest

from headway import catalogue


def test_every_method_has_its_paper_and_a_use():
    keys = [row.key for row in catalogue.methods()]
    assert len(keys) == len(set(keys))
    for row in catalogue.methods():
        assert row.paper and row.use and row.takes and 2010 < row.year < 2100


def test_an_unknown_key_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean peri-ln"):
        catalogue.method("perri-ln")


def test_a_tool_is_no_technique():
    with pytest.raises(ValueError, match="is a tool"):
        catalogue.technique("beyond-batchnorm")


def test_a_key_carries_its_settings_as_python_literals():
    assert catalogue.parse("peri-ln(eps=1e-5, norm='rmsnorm')") == ("peri-ln", {"eps": 1e-5, "norm": "rmsnorm"})
    assert catalogue.parse(" mix-ln ") == ("mix-ln", {})


@pytest.mark.parametrize("text", ["peri-ln(1)", "peri-ln(eps=", "peri-ln(eps=open('x'))", "peri-ln(**{})"])
def test_settings_that_are_no_literals_are_refused(text):
    with pytest.raises(ValueError, match="was not understood"):
        catalogue.parse(text)
