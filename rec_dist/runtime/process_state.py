"""What a call from Python changes in your process and gives back: environment, warnings, signal handlers, random numbers,
loggers, the excepthook.

What cannot be given back is not set in your process at all: the allocator (runtime/allocator.py), and variables that libraries
read at their import. Training in this process runs in a thread of its own (launch/local.py), so that settings of a thread end
with it.
"""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_LOGGERS = ("DeepSpeed", "ray._private.authentication", "ray.data", "transformers")  # whose level is lowered in a run
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def restored() -> Iterator[None]:
    """Inside, process-wide settings may be changed; at the end, also after an exception, they are as before."""
    import torch

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(_environment())
        stack.enter_context(_levels())
        stack.enter_context(_signals())
        stack.enter_context(_transformers())
        stack.callback(setattr, sys, "excepthook", sys.excepthook)  # torch.distributed sets its own
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        stack.enter_context(torch.random.fork_rng(devices=devices))
        yield


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


@contextmanager
def _levels() -> Iterator[None]:
    before = {name: logging.getLogger(name).level for name in _LOGGERS}
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _signals() -> Iterator[None]:
    """Handlers of Python: only the main thread may set them, so a call from another thread changes none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:  # None: set outside of Python
                signal.signal(number, handler)


@contextmanager
def _transformers() -> Iterator[None]:
    """Its progress bars, which have no other switch; the level of its logger is among _LOGGERS."""
    shown = _bars() if "transformers" in sys.modules else True
    try:
        yield
    finally:
        if "transformers" in sys.modules and _bars() != shown:
            from transformers.utils import logging as of_transformers

            with warnings.catch_warnings(action="ignore"):  # huggingface_hub warns if HF_HUB_DISABLE_PROGRESS_BARS is set
                of_transformers.enable_progress_bar() if shown else of_transformers.disable_progress_bar()


def _bars() -> bool:
    from transformers.utils import logging as of_transformers

    return bool(of_transformers.is_progress_bar_enabled())
