"""rec-dist: fine-tunes language models to rank items for users, on GPU clusters. The command line is `rec-dist`.

The names below are imported when they are first asked for: the batch, the scorer and the kernels then need torch alone, and no
configuration library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rec_dist.config.load import load_config
    from rec_dist.config.schema import RunConfig
    from rec_dist.errors import StopRequested, UserError
    from rec_dist.methods.registry import register_method

__version__ = "0.1.0"
__all__ = ["RunConfig", "StopRequested", "UserError", "load_config", "register_method"]


def __getattr__(name: str) -> Any:
    homes = {"load_config": "config.load", "RunConfig": "config.schema", "register_method": "methods.registry"}
    if name in __all__:
        return getattr(import_module(f"rec_dist.{homes.get(name, 'errors')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
