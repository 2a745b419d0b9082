"""Joining and leaving the process group of the workers, through DeepSpeed. Collectives are in runtime/collectives.py."""

import logging
import os
import socket

import torch
import torch.distributed as dist

from rec_dist.runtime.world import World


def join(world: World) -> None:
    """Makes this process a member of the group; a group that a launcher has formed already is taken over.

    Must come before a model is loaded: transformers otherwise takes the world for one process and asserts.
    """
    on_gpu = world.device.startswith("cuda")
    os.environ["DS_ACCELERATOR"] = "cuda" if on_gpu else "cpu"  # else it takes any GPU it sees, also for a run on CPUs
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # The shared-memory collective for CPUs is compiled at first use: 70 s and a compiler on every node, for a few percent of a step.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized() and world.size == 1:  # alone: whatever address is set belongs to another group
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    os.environ.update(
        RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=world.device.partition(":")[2] or str(world.local_rank)
    )
    backend = "nccl" if on_gpu else "gloo"
    if on_gpu:
        torch.cuda.set_device(world.device)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def leave() -> None:
    """Ends the membership. DeepSpeed's own call also drops the groups that it has cached, which a second run must not meet."""
    from deepspeed import comm

    if dist.is_initialized():
        comm.destroy_process_group()
