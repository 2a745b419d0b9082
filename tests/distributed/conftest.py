"""Training runs for tests. Each run is made once a session, however many tests compare with it."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from worker_processes import Child, run_workers, start_workers

_TIMES = ("tokens_per_second", "step_seconds", "data_seconds", "mfu")


@dataclass(frozen=True)
class Run:
    """A run directory with the reads that tests need."""

    path: Path

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Step rows of metrics.jsonl without times."""
        rows = [row for row in self.rows if row["event"] == "step"]
        return [{key: value for key, value in row.items() if key not in _TIMES} for row in rows]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    @property
    def finished(self) -> dict[str, Any]:
        """finished.json."""
        value: dict[str, Any] = json.loads((self.path / "finished.json").read_text(encoding="utf-8"))
        return value

    @property
    def log(self) -> str:
        """log.txt."""
        return (self.path / "log.txt").read_text(encoding="utf-8")

    @property
    def weights(self) -> dict[str, Any]:
        """The saved adapter, or the whole model."""
        files = list((self.path / "model").glob("*.safetensors"))
        assert len(files) == 1
        return load_file(files[0])


class Trainer:
    """Does what `rec-dist train` does around its workers, on 1 or 2 workers, with our own gloo group instead of Ray's."""

    def __init__(self, folder: Path, tiny_config: Callable[..., dict[str, Any]]) -> None:
        self._folder, self._config = folder, tiny_config
        self._made: dict[tuple[object, ...], Run] = {}
        self._count = 0

    def new_dir(self, name: str = "run") -> Path:
        """A path for a run directory that does not exist yet."""
        self._count += 1
        return self._folder / f"{self._count:03d}-{name}"

    def config(self, run_dir: Path, *changes: Any) -> dict[str, Any]:
        """tiny_config with micro-batches that hold a whole step.

        Its epsilon is above the noise of fp32 sums, which Adam would otherwise amplify.
        """
        return self._config(run_dir, "train.max_tokens_per_micro_batch=2048", "optimizer.eps=1e-4", *changes)

    def once(self, *changes: str, workers: int = 1) -> Run:
        """The finished run of this configuration; trained at the first call."""
        key = (workers, *sorted(changes))
        if key not in self._made:
            self._made[key] = self.train(self.new_dir(), *changes, workers=workers)
        return self._made[key]

    def train(
        self,
        run_dir: Path,
        *changes: Any,
        workers: int = 1,
        stop_after: int | None = None,
        worker: Any = None,
        change_job: Callable[[Any], Any] = lambda job: job,
    ) -> Run:
        """Trains to the end, or stops after step `stop_after`. Continues from what the directory holds. All ranks must agree.

        worker: replaces train_worker and gets change_job(TrainJob).
        """
        from rec_dist.runtime.run_directory import RunDirectory
        from rec_dist.training.worker import train_worker

        job = change_job(self.claim(run_dir, changes))
        run = RunDirectory(run_dir)
        if stop_after is not None:
            (run_dir / "stop").write_text(str(stop_after), encoding="utf-8")
        results = run_workers(worker or train_worker, [job] * workers, run_dir.with_name(run_dir.name + "-workers"))
        assert len({(result["finished"], result["step"]) for result in results}) == 1
        run.clear_stop()
        assert results[0]["finished"] == (stop_after is None)
        if results[0]["finished"]:
            run.finish(results[0])
        return Run(run_dir)

    def read(self, run_dir: Path) -> Run:
        """The run in a folder, whoever made it."""
        return Run(run_dir)

    def start(self, run_dir: Path, *changes: Any, workers: int) -> list[Child]:
        """Starts the workers of a run and returns them."""
        from rec_dist.training.worker import train_worker

        return start_workers(train_worker, [self.claim(run_dir, changes)] * workers, run_dir.with_name(run_dir.name + "-workers"))

    def claim(self, run_dir: Path, changes: Any) -> Any:
        """Claims the directory for this configuration, or checks that it is claimed for it. Returns the job of its workers."""
        from rec_dist.config.paths import pinned
        from rec_dist.config.schema import RunConfig
        from rec_dist.config.yaml_text import to_yaml
        from rec_dist.methods.registry import find_initial_weights
        from rec_dist.runtime.run_directory import RunDirectory
        from rec_dist.training.worker import TrainJob

        config = pinned(RunConfig.model_validate(self.config(run_dir, *changes)))
        RunDirectory(run_dir).claim(config.model_dump(mode="json"), to_yaml(config))
        return TrainJob(config.model_dump(), config.train.run_dir, find_initial_weights(config))


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., dict[str, Any]]) -> Trainer:
    """One trainer for the session, so that tests share runs."""
    return Trainer(tmp_path_factory.mktemp("runs"), tiny_config)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Records what a test found and how it ended, for the table, in the file named by REC_DIST_FAULTS if that is set."""
    row: dict[str, Any] = {"fault": "", "where": "", "rank": "", "restarts": 0, "outcome": ""}
    began = time.monotonic()
    yield row
    place = os.environ.get("REC_DIST_FAULTS")
    if place:
        with Path(place).open("a", encoding="utf-8") as handle:
            ended = {"seconds": round(time.monotonic() - began, 1), "passed": bool(row["outcome"]), "test": request.node.name}
            handle.write(json.dumps({**row, **ended}) + "\n")
