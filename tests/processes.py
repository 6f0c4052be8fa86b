"""Two gloo processes, for the tests of what is spread over several."""

import torch


def two_ranks(body, folder):
    """What ``body(rank)``, a function of a module, gives in each of two processes of one group."""
    torch.multiprocessing.spawn(_rank, (body, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _rank(rank, body, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save(body(rank), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
