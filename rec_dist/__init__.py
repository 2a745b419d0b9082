"""rec-dist: fine-tunes language models to rank items for users, on GPU clusters. The command line is `rec-dist`."""

from rec_dist.config.load import load_config
from rec_dist.config.schema import RunConfig
from rec_dist.runtime.errors import StopRequested, UserError

__all__ = ["RunConfig", "StopRequested", "UserError", "load_config"]
