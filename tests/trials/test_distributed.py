"""Several processes that share each batch train as one process does."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from headway.trials.comparison import Comparison
from headway.trials.runner import shard

LAUNCHERS = {
    "torchrun": "torch.distributed.run --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:0",
    # with --cpu, Accelerate starts several processes through MPI only
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no "
    "--dynamo_backend=no --main_process_port=0",
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_gloo_processes_give_the_loss_curve_of_one_with_the_same_global_batch(children, tmp_path, launcher):
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import trial_children as children
        from headway.trials.compare import compare
        found = compare(children.Tiny(dropout=0.0), ["baseline"], seeds=2, budget=20, batch_size=13,
                        store=sys.argv[1], device="cpu", progress=False, checkpoint_every=0.0)
        assert found.finished and found.rows[0].mean is not None
        """)
    )
    command = [sys.executable, "-m", *LAUNCHERS[launcher].split(), str(script), str(tmp_path / "two.sqlite")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = Comparison.load(tmp_path / "two.sqlite")
    assert two.facts["baseline"][0]["machine"]["processes"] == 2
    one = children_compare(children, tmp_path / "one.sqlite")
    for seed in (0, 1):
        alone, together = one.curves("baseline", seed), two.curves("baseline", seed)
        assert together["steps"] == list(range(1, 21))
        torch.testing.assert_close(torch.tensor(together["loss"]), torch.tensor(alone["loss"]), rtol=1e-4, atol=1e-6)
        a, b = (torch.tensor(curve["metrics"]["loss"]["values"]) for curve in (alone, together))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def children_compare(children, store):
    from headway.trials.compare import compare

    task = children.Tiny(dropout=0.0)
    return compare(
        task, ["baseline"], seeds=2, budget=20, batch_size=13, store=store, device="cpu", progress=False, probe=False
    )


def test_slices_of_all_processes_make_up_the_batch_and_their_shares_make_up_one():
    batch = {"x": torch.arange(10).reshape(5, 2), "pair": (torch.arange(5), "name"), "scale": torch.tensor(2.0)}
    parts = [shard(batch, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([part["x"] for part, _ in parts]), batch["x"])
    assert torch.equal(torch.cat([part["pair"][0] for part, _ in parts]), batch["pair"][0])
    assert parts[0][0]["pair"][1] == "name" and parts[1][0]["scale"] == 2
    assert sum(share for _, share in parts) == 1.0


def test_a_batch_that_cannot_be_shared_is_refused_with_a_sentence():
    with pytest.raises(ValueError, match="a batch of 1 cannot be shared among 2 processes"):
        shard(torch.zeros(1, 3), 0, 2)
    with pytest.raises(ValueError, match="one common first axis"):
        shard((torch.zeros(4), torch.zeros(3)), 0, 2)
