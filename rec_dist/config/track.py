"""Where metrics go besides metrics.jsonl."""

from typing import Literal

from pydantic import Field

from rec_dist.config.section import Section

_Service = Literal["none", "offline", "online"]


class TrackConfig(Section):
    """Where metrics go besides metrics.jsonl. A tracker needs its package, for example `pip install wandb`."""

    tensorboard: bool = Field(False, description="Also write TensorBoard events into the run directory.")
    wandb: _Service = Field(
        "none",
        description="Weights & Biases. offline: write to the run directory, for `wandb sync`. online: needs WANDB_API_KEY.",
    )
    mlflow: _Service = Field(
        "none",
        description="MLflow. offline: write to `mlruns` in the run directory. online: send to MLFLOW_TRACKING_URI, "
        "which must be set.",
    )
    project: str = Field("rec-dist", min_length=1, description="Project in W&B, experiment in MLflow.")
