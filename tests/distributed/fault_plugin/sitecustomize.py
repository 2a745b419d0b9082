"""Injects a fault at a chosen place of a chosen rank of a real run. Python imports this at start if the folder is on PYTHONPATH.

The package has no hooks for this: in Ray's worker processes, methods of the package are wrapped as they are imported. The
faults are real: the process raises an exception there, or sends itself the signal. REC_DIST_TEST_FAULT describes the fault as
JSON. Either {"kind": "exception" | "SIGKILL" | "SIGSTOP" | "SIGTERM" | "receive" (waits for a message that no peer sends),
"phase", "rank", "call": which call, counted from 1, "marker": a file made when the fault has come}, or {"kind": "slow", "phase",
"seconds": added to each call, or to the one that "call" names, "marker"}; "importing": before the worker's module is imported.
With "driver": true the place is in the command itself, where cluster.launcher=local trains and other commands work.
"""

import importlib.machinery
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

# phase -> (module, class or None, function, whether the fault comes before or after the call)
PLACES = {
    "importing": ("rec_dist.training.worker", None, None, "before"),
    "in a step": ("rec_dist.engine.engine", "Engine", "step", "before"),
    "before commit": ("rec_dist.engine.engine", "Engine", "save_state", "after"),
    "after commit": ("rec_dist.checkpoint.manager", "CheckpointManager", "save", "after"),
    "while loading": ("rec_dist.engine.engine", "Engine", "load_state", "before"),
    "in the loader": ("rec_dist.training.loader", None, "step_work", "before"),
    "in evaluate": ("rec_dist.methods.language_model.ranking", None, "score_prompts", "before"),
    "in rank": ("rec_dist.ranking.rank", None, "rank_users", "before"),
    "in embed": ("rec_dist.methods.language_model.embedding", "Embedder", "write", "before"),
    "in prepare": ("rec_dist.data.prepare.blockwise.hash_shuffle", "HashShuffle", "__call__", "before"),
}


def strike(fault: dict[str, Any]) -> None:
    """Happens once, on the chosen rank."""
    if int(os.environ["RANK"]) != fault["rank"]:
        return
    try:
        os.close(os.open(fault["marker"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    if fault["kind"] == "exception":
        raise OSError("an injected fault")
    if fault["kind"] == "receive":
        import torch

        torch.distributed.recv(torch.zeros(1), src=1 - fault["rank"])
    os.kill(os.getpid(), getattr(signal, fault["kind"]))
    time.sleep(0.2)  # a signal to the process may arrive a little later than the call that sends it


def wrapped(function: Callable[..., Any], when: str, fault: dict[str, Any]) -> Callable[..., Any]:
    calls = 0

    def call(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        now = calls == fault.get("call")
        if fault["kind"] == "slow":
            if now or "call" not in fault:
                if "marker" in fault:
                    open(fault["marker"], "w").close()
                time.sleep(fault["seconds"])
            return function(*arguments, **keywords)
        if now and when == "before":
            strike(fault)
        result = function(*arguments, **keywords)
        if now and when == "after":
            strike(fault)
        return result

    return call


class Finder:
    """Wraps the place when its module is imported."""

    def __init__(self, fault: dict[str, Any]) -> None:
        self._fault = fault
        self._module, self._owner, self._function, self._when = PLACES[fault["phase"]]

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self._module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_wrap(module: Any) -> None:
            if self._function is None:
                time.sleep(self._fault["seconds"])
            execute(module)
            if self._function is None:
                return
            owner = getattr(module, self._owner) if self._owner else module
            setattr(owner, self._function, wrapped(getattr(owner, self._function), self._when, self._fault))

        spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


if "REC_DIST_TEST_FAULT" in os.environ:
    described = json.loads(os.environ["REC_DIST_TEST_FAULT"])
    if any(("rec_dist" if described.get("driver") else "default_worker.py") in word for word in sys.orig_argv):
        sys.meta_path.insert(0, Finder(described))
