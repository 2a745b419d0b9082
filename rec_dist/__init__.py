"""rec-dist fine-tunes language models to rank items for users, on GPU clusters.

From Python: prepare, train, evaluate, rank, distil, audit, score. On the command line: `rec-dist`. Each name is imported when it is
first used, so that `import rec_dist` is quick and loads no torch.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rec_dist import errors
    from rec_dist.api import Metric, audit, distil, evaluate, prepare, rank, train
    from rec_dist.config.load import load_config
    from rec_dist.config.schema import RunConfig
    from rec_dist.errors import StopRequested, UserError
    from rec_dist.methods.registry import register_method
    from rec_dist.scoring import score
    from rec_dist.training_run import Run

__version__ = "0.1.0"
__all__ = [
    "Metric",
    "Run",
    "RunConfig",
    "StopRequested",
    "UserError",
    "__version__",
    "audit",
    "distil",
    "errors",
    "evaluate",
    "load_config",
    "prepare",
    "rank",
    "register_method",
    "score",
    "train",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    homes = {
        **dict.fromkeys(("Metric", "audit", "distil", "evaluate", "prepare", "rank", "train"), "api"),
        **dict.fromkeys(("StopRequested", "UserError"), "errors"),
        "Run": "training_run",
        "RunConfig": "config.schema",
        "load_config": "config.load",
        "register_method": "methods.registry",
        "score": "scoring",
    }
    if name == "errors":
        return import_module("rec_dist.errors")
    if name in homes:
        return getattr(import_module(f"rec_dist.{homes[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
