"""The run of a fitted method: its model is computed in this process and published as a trained one is."""

import time
from typing import Any

from rec_dist.config.schema import RunConfig
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.method import FittedMethod, Launch
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.training.saving import new_model


def fit_model(
    method: FittedMethod, config: RunConfig, initial: InitialWeights, run: RunDirectory, launch: Launch
) -> dict[str, Any]:
    """Writes model/, whole or not at all. Returns the summary of the run, as workers do; it has no steps. Raises DiskError."""
    began = time.perf_counter()
    with new_model(run.model) as folder:
        values = method.fit(config, initial, folder, run, launch)
    return {"finished": True, "step": 0, "seconds": time.perf_counter() - began, **values}
