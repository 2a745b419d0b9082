"""Membership of this process in the workers' process group, through DeepSpeed. Collectives are in runtime/collectives.py."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from rec_dist.engine.lean_import import import_deepspeed
from rec_dist.errors import UserError
from rec_dist.runtime.world import World

_VARIABLES = ("DS_ACCELERATOR", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTORCH_ALLOC_CONF")


@contextmanager
def joined(world: World) -> Iterator[None]:
    """Inside, this process is a member of the group. A group that a launcher has formed already is taken over.

    Enter before a model is loaded: transformers otherwise takes the world for one process and asserts. Afterwards the
    environment and DeepSpeed's settings are as before, so that a process may train twice. After a fault, a worker with
    peers stays in the group: with NCCL, leaving would wait for peers that wait for this rank.
    """
    before = {name: os.environ.get(name) for name in _VARIABLES}
    try:
        with _settings_for(world), _settings_of_cuda(world):
            _join(world)
            try:
                yield
            except BaseException:
                if world.size == 1:
                    _leave()
                raise
            _leave()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _settings_for(world: World) -> Iterator[None]:
    """Inside, DeepSpeed runs on the device of `world`, says little, and compiles nothing."""
    kind = "cuda" if world.device.startswith("cuda") else "cpu"
    os.environ["DS_ACCELERATOR"] = kind  # otherwise DeepSpeed takes any GPU it sees, also for a run on CPUs
    import_deepspeed()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != kind:
        used = get_accelerator().device_name()
        raise UserError(
            f"cluster.use_gpu: DeepSpeed already runs on {used} in this process and cannot change to {kind}; start another"
        )
    logger, operations = logging.getLogger("DeepSpeed"), deepspeed.ops.__compatible_ops__
    level, compiled = logger.level, operations.get("deepspeed_shm_comm")
    logger.setLevel(logging.ERROR)
    # The shared-memory collective for CPUs is compiled at first use. That takes 70 s and a compiler on every node and saves a few
    # percent of a step.
    operations["deepspeed_shm_comm"] = False
    try:
        yield
    finally:
        logger.setLevel(level)
        if compiled is None:
            del operations["deepspeed_shm_comm"]
        else:
            operations["deepspeed_shm_comm"] = compiled


@contextmanager
def _settings_of_cuda(world: World) -> Iterator[None]:
    """Inside, PyTorch is set for training on GPUs; what you have set in the environment stays.

    Micro-batches have many lengths: with segments that grow, memory does not fall into pieces that none of them fits into. A
    product that is cut along the summed dimension adds its parts in float32.
    """
    if not world.device.startswith("cuda"):
        yield
        return
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # read at the first allocation
    products = torch.backends.cuda.matmul
    before = products.allow_bf16_reduced_precision_reduction
    products.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        products.allow_bf16_reduced_precision_reduction = before


def _join(world: World) -> None:
    import deepspeed

    if not dist.is_initialized() and world.size == 1:  # alone: an address that is set belongs to another group
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    os.environ.update(
        RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=world.device.partition(":")[2] or str(world.local_rank)
    )
    on_gpu = world.device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(world.device)
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)


def _leave() -> None:
    """Destroy the group. DeepSpeed's own call also drops the groups that it has cached, which a second run must not meet."""
    from deepspeed import comm

    if dist.is_initialized():
        comm.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
