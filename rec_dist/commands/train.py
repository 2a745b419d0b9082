"""`rec-dist train`: what binds a run to its inputs, and the run itself, from its claim to its end."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from rec_dist.checkpoint.remote_copy import RemoteCopy
from rec_dist.commands.dtype import difference, dtype_in, saved_dtype, settle_dtype
from rec_dist.commands.progress import logging_lines, watching
from rec_dist.commands.status import noting_failure
from rec_dist.config.paths import pinned
from rec_dist.config.references import recorded
from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.manifest import Manifest
from rec_dist.engine.settings import check_hpz
from rec_dist.errors import StopRequested, UserError
from rec_dist.launch.ray_metrics import RayGauges
from rec_dist.launch.workers import launch, local_device
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.method import PreparesRun
from rec_dist.methods.registry import build_task, check_workers_find, find_initial_weights, fitted_method_of, method_of
from rec_dist.models.hub import snapshot_of
from rec_dist.runtime import environment
from rec_dist.runtime.identity import differences
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.files import read_object, write_json
from rec_dist.storage.outputs import check_output
from rec_dist.training.fitting import fit_model
from rec_dist.training.trackers import check_trackers
from rec_dist.training.validation import validation_task
from rec_dist.training.worker import TrainJob, train_worker

logger = logging.getLogger(__name__)

Shown = Callable[[RunDirectory], AbstractContextManager[None]]


def check_train(config: RunConfig) -> InitialWeights:
    """Raises UserError for anything that a worker of this training run would refuse; returns what the run starts from."""
    check_workers_find(config)
    check_hpz(config, workers=None if config.cluster.num_workers == "auto" else config.cluster.num_workers)
    initial = find_initial_weights(config)
    if (fitted := fitted_method_of(config)) is not None:
        fitted.check_fit(config, initial)
        if config.cluster.launcher == "local":  # it starts no worker that would refuse a GPU that is not there
            local_device(config.cluster.model_copy(update={"num_workers": "auto"}))
        return initial
    build_task(config, initial, "cpu")
    validation_task(config, initial, "cpu")
    return initial


def train(config: RunConfig, *, progress: bool = True, owns_process: bool = True) -> RunDirectory:
    """Trains to the end, resuming what is there, and returns the run's directory.

    progress: shows the run on standard error; else the lines of its log go to `logging`. owns_process: as launch takes it.
    Raises StopRequested after a stop, and UserError before anything is written.
    """
    config = pinned(config)
    run = RunDirectory(Path(config.train.run_dir))
    check_output(run.path, "train.run_dir", folder=True, may_exist=True)
    try:
        initial = check_train(config)
    except UserError:
        if not _is_fitted(run, config):
            raise
        logger.info(f"{run.path} is finished; nothing to do")
        return run
    check_trackers(config.track)
    remote = RemoteCopy(run, config.checkpoint.remote) if config.checkpoint.remote is not None else None
    earlier = saved_dtype(run.path) or (dtype_in(remote.config()) if remote is not None else None)
    config, lines = settle_dtype(config, earlier)
    if config.train.init_from is not None:
        lines += difference(config, Path(config.train.init_from), "train.init_from")
    value, text = recorded(config)
    with run.claimed(value, text):
        if remote is not None:
            remote.fetch(value)
        inputs = bind_inputs(run, config, initial)
        with remote.kept_up() if remote is not None else nullcontext():
            # Steps have a watchdog of their own; a fitted method has none.
            limit = config.cluster.hang_seconds if fitted_method_of(config) is not None else 0.0
            shown: Shown = partial(watching, hang_seconds=limit) if progress else logging_lines
            _finish(run, config, initial, inputs, lines, shown, owns_process=owns_process)
    return run


def _is_fitted(run: RunDirectory, config: RunConfig) -> bool:
    """Whether this very run has ended with a model that needs nothing else: an ensemble keeps a copy of its members."""
    if fitted_method_of(config) is None or not (run.path / "config.json").is_file() or run.finished() is None:
        return False
    value, _ = recorded(settle_dtype(config, saved_dtype(run.path))[0])
    return not differences(run.config(), value)


def _finish(
    run: RunDirectory,
    config: RunConfig,
    initial: InitialWeights,
    inputs: dict[str, str | None],
    lines: Sequence[str],
    shown: Shown,
    *,
    owns_process: bool,
) -> None:
    """Brings a claimed run to its end. lines: what its log begins with."""
    done = run.finished()
    if done is not None:
        steps = f" ({done['step']} steps)" if done["step"] else ""
        logger.info(f"{run.path} is finished{steps}; nothing to do")
        return
    run.drop_stale_stop()
    describe(run, data=inputs["data"], model=inputs["model"], folder=initial.model)
    run.append({"event": "start", "time": time.time()})
    with shown(run), noting_failure(run):
        for line in lines:
            run.log(line)
        if (fitted := fitted_method_of(config)) is not None:
            result = fit_model(fitted, config, initial, run, partial(launch, owns_process=owns_process))
        else:
            method = method_of(config)
            if isinstance(method, PreparesRun):
                method.prepare_run(config, run, partial(launch, owns_process=owns_process))
            gauges = RayGauges if config.cluster.launcher == "ray" else None
            job = TrainJob(config.model_dump(), config.train.run_dir, initial, gauges)
            result = launch(train_worker, job, config.cluster, run, saving=config.checkpoint, owns_process=owns_process)
    if not result["finished"]:
        run.clear_stop()
        raise StopRequested(f"stopped after step {result['step']}, checkpoint saved; run the same command to go on")
    run.clear_stop()
    run.finish({**result, "time": time.time()})
    after = f"after {result['step']} steps" if result["step"] else f"in {result['seconds']:.1f} s"
    logger.info(f"finished {after}; model in {run.model}")


def bind_inputs(run: RunDirectory, config: RunConfig, initial: InitialWeights) -> dict[str, str | None]:
    """Ties a run to the contents of its inputs, not only to their paths, and returns their fingerprints.

    Raises UserError when the inputs have changed since the run began.
    """
    inputs = {
        "data": Manifest.load(config.data.path).fingerprint,
        **initial.fingerprints(),
    }
    path = run.path / "inputs.json"
    if path.is_file() and read_object(path, "remove that folder or choose another train.run_dir") != inputs:
        raise UserError(
            f"train.run_dir ({run.path}) was started from other data, model or train.init_from than lie there now; remove that "
            "folder or choose another"
        )
    write_json(path, inputs)
    return inputs


def describe(run: RunDirectory, *, data: str | None, model: str | None, folder: Path) -> None:
    """environment.json: the machine, the versions, and the inputs of the run. folder: the model, maybe a commit of a Hub model."""
    snapshot = snapshot_of(folder)
    hub = {"hub": snapshot._asdict()} if snapshot is not None else {}
    write_json(run.path / "environment.json", environment.describe(hashes={"data": data, "model": model}, **hub))
