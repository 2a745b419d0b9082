"""What every process of ours sets before it imports a library: banners, progress bars and deprecation notes off, since what we
say would drown, and threads that sleep while they wait."""

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rec_dist.runtime import allocator


def quieten() -> None:
    """Sets defaults only: a variable that the user has set is left as it is. Call before the libraries are imported."""
    defaults = {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "KINETO_LOG_LEVEL": "6",  # two lines of torch.profiler's in every profile; it calls them more important than errors
        # OpenMP's threads spin at barriers by default: with one busy neighbour on 2 cores, 18x slower element-wise operations.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # The libraries call each other's deprecated functions; the user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers|deepspeed|peft)(\.|$)")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it had to guess
        # Numbers below 1e-38 are zero. The coefficient of a negative that is 90 nats behind is such a number, and products of them
        # take x86 so long that a step of S-DPO was three times slower (docs/LOG.md). For this thread and those that it starts.
        torch.set_flush_denormal(True)
        for name, setting in allocator.SETTINGS.items():  # for workers; this process has started already
            os.environ.setdefault(name, str(setting))


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
    """The same for libraries that take no variable; call where they are imported anyway."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
