"""What Ray Serve builds from the serveConfigV2 of a RayService, which `rec-dist submit` renders (docs/adr/0022-serving.md).

Each replica is the server of `rec-dist serve` with cluster.launcher=local, at the proxies of Ray Serve in place of a socket.
"""

from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from rec_dist.commands.serve import ServeOptions, loaded_app, read_token
from rec_dist.commands.target import finished_run
from rec_dist.config.section import Section
from rec_dist.config.submit import ServeConfig
from rec_dist.launch.replicas_on_ray import http_application
from rec_dist.serving.guard import Access, Guard


class ServedRun(Section):
    """The arguments of the application."""

    run: str = Field(description="A finished run directory, or a link to one, that all nodes see.")
    overrides: list[str] = Field(default_factory=list, description="Changes to its configuration: section.key=value.")
    options: ServeConfig = Field(default_factory=lambda: ServeConfig(), description="The options of the server.")


def application(served: ServedRun) -> Any:
    """A Ray Serve application of one deployment, `server`. The manifest says how many replicas it has, and their resources.

    Raises UserError if the run is not finished, before a replica starts.
    """
    finished_run(Path(served.run), served.overrides)
    given = served.options
    options = ServeOptions(queue=given.queue, deadline_seconds=given.deadline_seconds, prompt_cache_mib=given.prompt_cache_mib)
    return http_application(partial(_app, served, options), queue=options.queue, drain_seconds=options.drain_seconds)


def _app(served: ServedRun, options: ServeOptions) -> Guard:
    """In a replica: what answers. The token comes from the environment of its pod."""
    return loaded_app(Path(served.run), served.overrides, options, Access(read_token(None), only_local=False))
