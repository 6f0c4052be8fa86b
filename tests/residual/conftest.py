import pytest

from headway.residual import seams


@pytest.fixture(autouse=True)
def small_streams_are_fused_too(monkeypatch):
    """The models of these tests are small; their seams are to run as those of large ones do."""
    monkeypatch.setattr(seams, "SMALL", 0)
