"""The same comparison over a Ray cluster on this machine."""

import sys

import pytest

from headway.trials.compare import compare

ray = pytest.importorskip("ray", reason="Ray is not installed (headway[ray])")


@pytest.fixture(scope="module")
def cluster(children):
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": ":".join(path for path in sys.path if path)}},
    )
    yield
    ray.shutdown()


@pytest.mark.slow
def test_arms_spread_over_ray_give_the_curves_of_a_local_comparison(children, cluster, tmp_path):
    local = children.run(tmp_path / "local.sqlite")
    spread = children.run(tmp_path / "spread.sqlite", engine="ray")
    assert spread.finished
    for arm in local.arms:
        for seed in local.seeds:
            assert spread.curves(arm, seed)["loss"] == local.curves(arm, seed)["loss"]
            assert spread.curves(arm, seed)["metrics"] == local.curves(arm, seed)["metrics"]
    assert not list((tmp_path / "spread.sqlite-checkpoints").glob("*"))


@pytest.mark.slow
def test_a_run_that_fails_on_ray_is_reported_with_its_reason(children, cluster, tmp_path):
    arms = {"baseline": "baseline", "broken": children.Breaks()}
    found = compare(
        children.Tiny(), arms, seeds=1, budget=4, store=tmp_path / "x.sqlite", engine="ray", progress=False, probe=False
    )
    assert [row.failed for row in found.rows] == [0, 1]
    assert "normalized_shape" in str(found.rows[1].error)
