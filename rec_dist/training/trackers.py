"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, gauges. The only file that imports a tracker.

Nothing else needs these packages; each is an extra of its name. A tracker that fails while a run trains is dropped with a
warning, since days of training are worth more than its curves. A tracker that cannot start ends the first start of a run.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rec_dist.config.track import TrackConfig
from rec_dist.errors import UserError, one_line
from rec_dist.storage.files import read_object, write_json

Row = Mapping[str, Any]
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}  # extra of ours -> module
_IDS_NAME = "trackers.json"  # in the run directory: each service's id of this run, so that a restart continues it


class Tracker(Protocol):
    """Takes rows as metrics.jsonl has them, with `restarts` and `workers` added."""

    def log(self, row: Row) -> None: ...
    def close(self) -> None: ...


class TensorBoardTracker:
    """Writes scalars into `folder`, one for each number of a row."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer: Any = SummaryWriter(logdir=str(folder))

    def log(self, row: Row) -> None:
        """Write every number of the row under its name at its step."""
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flush to disk."""
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases. mode: offline writes into `folder`, to be sent with `wandb sync`; online sends at once."""

    def __init__(
        self, folder: Path, *, mode: str, project: str, name: str, config: Mapping[str, Any], run_id: str | None
    ) -> None:
        import wandb

        init: Any = wandb.init  # its types differ between releases
        self._run: Any = init(
            project=project,
            name=name,
            id=run_id,
            resume="allow",
            mode=mode,
            dir=str(folder),
            config=dict(config),
            # Without W&B's own record of the command line, which has the values of overrides; environment.json has it without.
            settings=wandb.Settings(console="off", silent=True, x_disable_meta=True),
        )
        # A restart logs some steps a second time, and W&B takes each of its own steps only once.
        self._run.define_metric("step")
        self._run.define_metric("train/*", step_metric="step")

    @property
    def run_id(self) -> str:
        """W&B's id of this run."""
        return str(self._run.id)

    def log(self, row: Row) -> None:
        """Send every number of the row, with its step as the axis."""
        self._run.log({**scalars(row), "step": row["step"]})

    def close(self) -> None:
        """Wait until everything is written or sent."""
        self._run.finish()


class MlflowTracker:
    """A run of MLflow at `uri`, in an experiment. run_id: of an earlier attempt, which this one continues."""

    def __init__(self, uri: str, *, experiment: str, name: str, config: Mapping[str, Any], run_id: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric: Any = Metric
        self._client: Any = MlflowClient(tracking_uri=uri)
        if run_id is None:
            known = self._client.get_experiment_by_name(experiment)
            place = known.experiment_id if known is not None else self._client.create_experiment(experiment)
            run_id = str(self._client.create_run(place, run_name=name).info.run_id)
            params = [Param(key, str(value)[:500]) for key, value in sorted(config.items())]
            for first in range(0, len(params), 100):  # a request takes so many
                self._client.log_batch(run_id, params=params[first : first + 100])
        self.run_id = run_id

    def log(self, row: Row) -> None:
        """Send every number of the row at its step."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, float(value), now, int(row["step"])) for name, value in scalars(row).items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        """Mark the run as ended; a restart can still log into it."""
        self._client.set_terminated(self.run_id)


class Trackers:
    """All trackers of a run, possibly none. One that fails is dropped, with a line to `say`."""

    def __init__(self, trackers: Sequence[Tracker], say: Callable[[str], None]) -> None:
        self._trackers, self._say = list(trackers), say

    def log(self, row: Row) -> None:
        """Log the row with each tracker."""
        self._each(lambda tracker: tracker.log(row))

    def close(self) -> None:
        """Close each tracker."""
        self._each(lambda tracker: tracker.close())

    def _each(self, verb: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                verb(tracker)
            except Exception as fault:
                self._trackers.remove(tracker)
                self._say(f"WARNING: {type(tracker).__name__} failed and is left out from here on: {_line(fault)}")


def scalars(row: Row) -> dict[str, float]:
    """The numbers of a row under the names that trackers show."""
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name not in ("step", "epoch")}
    return {f"train/{name}": value for name, value in numbers.items()}


def check_trackers(track: TrackConfig) -> None:
    """Raises UserError for a tracker whose package is not installed."""
    wanted = {"tensorboard": track.tensorboard, "wandb": track.wandb != "none", "mlflow": track.mlflow != "none"}
    for extra, module in _PACKAGES.items():
        if wanted[extra] and importlib.util.find_spec(module) is None:
            raise UserError(
                f"track.{extra} needs the package {module}, which is not installed; pip install {module}, or leave it out"
            )


def build_tracker(
    track: TrackConfig, folder: Path, config: Mapping[str, Any], say: Callable[[str], None], *, gauges: Tracker | None = None
) -> Trackers:
    """The trackers of the run in `folder`, for its rank 0. config: dotted key -> value, for those that show it.

    Raises UserError when one cannot be started at the first start of a run; later that is a warning.
    """
    check_trackers(track)
    ids_path = folder / _IDS_NAME
    ids: dict[str, str] = read_object(ids_path, "remove that file") if ids_path.is_file() else {}
    first = not ids
    common: dict[str, Any] = {"name": folder.name, "config": config}
    makers: dict[str, Callable[[], Any]] = {}
    if track.tensorboard:
        makers["tensorboard"] = lambda: TensorBoardTracker(folder / "tensorboard")
    if track.wandb != "none":
        makers["wandb"] = lambda: WandbTracker(folder, mode=track.wandb, project=track.project, run_id=ids.get("wandb"), **common)
    if track.mlflow != "none":
        if track.mlflow == "offline":  # MLflow stores files only with this switch; a database would need more packages
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = f"file:{folder / 'mlruns'}" if track.mlflow == "offline" else os.environ.get("MLFLOW_TRACKING_URI")
        makers["mlflow"] = lambda: MlflowTracker(_named(uri), experiment=track.project, run_id=ids.get("mlflow"), **common)
    built: list[Tracker] = [] if gauges is None else [gauges]
    for name, make in makers.items():
        try:
            tracker = make()
        except Exception as fault:
            if first:
                raise UserError(f"track.{name} cannot be started: {_line(fault)}; mend it or leave the key out") from fault
            say(f"WARNING: track.{name} cannot be started: {_line(fault)}; the run goes on without it")
            continue
        ids[name] = getattr(tracker, "run_id", "")
        built.append(tracker)
    if makers:
        write_json(ids_path, ids)
    return Trackers(built, say)


def _named(uri: str | None) -> str:
    if not uri:
        raise ValueError("MLFLOW_TRACKING_URI is not set where rank 0 runs")
    return uri


def _line(fault: Exception) -> str:
    return f"{type(fault).__name__}: {one_line(fault, 200)}"
