"""Environment variables and settings that keep libraries quiet and fast: no banners, progress bars and deprecation notes, in
which our own messages would drown, and threads that sleep while they wait.

A worker and the command line own their process: `quieten` sets everything, for good. A call from Python runs in your process:
`quieten_call` sets only what can be taken back (runtime/process_state.py takes it back).
"""

import gc
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rec_dist.runtime import allocator

# Read when they are used, or by the workers that a call starts.
_OF_A_CALL = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # OpenMP's threads spin at barriers by default: with one busy neighbour on 2 cores, 18x slower element-wise operations.
    "OMP_WAIT_POLICY": "PASSIVE",
}
# Read once, when a library is imported: they would outlive the call.
_OF_A_PROCESS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "KINETO_LOG_LEVEL": "6",  # two lines of torch.profiler's in every profile; it calls them more important than errors
}


def quieten() -> None:
    """Quietens this process for good. Keeps every variable that you have set. Call it before the libraries are imported."""
    _set(_OF_A_PROCESS)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of a home folder that is missing, and works without
    quieten_call()
    flush_denormals()


def quieten_call() -> None:
    """Quietens what a call from Python uses, and the workers that it starts. Keeps every variable that you have set."""
    import torch

    _set(_OF_A_CALL)
    # The libraries call each other's deprecated functions; you can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers|deepspeed|peft)(\.|$)")
    if not torch.cuda.is_available():
        _set({"DS_ACCELERATOR": "cpu"})  # else DeepSpeed warns that it had to guess
        _set({name: str(setting) for name, setting in allocator.SETTINGS.items()})  # for workers; this process runs already
        # oneDNN keeps what it compiles for the latest 1,024 shapes, and a length of a micro-batch has some 40. With 128 a worker
        # holds 0.35 GB less after micro-batches of 48 lengths, and is as fast.
        _set({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"})


def _set(defaults: Mapping[str, str]) -> None:
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def flush_denormals() -> None:
    """On CPUs, numbers below 1e-38 become zero, for this thread and those that it starts.

    The coefficient of a negative that is 90 nats behind is such a number, and products of them take x86 so long that a step of
    S-DPO was three times slower (docs/LOG.md).
    """
    import torch

    if not torch.cuda.is_available():
        torch.set_flush_denormal(True)


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python does not look for cycles: for a command that is nearly all imports, whose objects stay.

    `rec-dist plan` of an 8B model: 4.7 CPU seconds in place of 5.6 (medians of three in turn, busy cores, 2026-11-22).
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def quieten_loaded() -> None:
    """Quietens libraries that read no variable. Call it where they are imported anyway."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
