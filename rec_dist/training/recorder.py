"""What a run says of each step: a row of metrics.jsonl, the tracker's, and where it stands."""

from collections.abc import Callable
from typing import Any

from rec_dist.runtime.duration import Remaining
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.world import World
from rec_dist.training.bad_steps import describe
from rec_dist.training.trackers import Tracker


def recorder(
    run: RunDirectory, tracker: Tracker, world: World, *, total: int, every_steps: int
) -> Callable[[dict[str, Any]], None]:
    """Takes the row of each step: rank 0 writes it down and says where the run stands."""
    if not world.is_main:
        return lambda row: None
    remaining = Remaining(total)
    facts = {"restarts": run.restarts(), "workers": world.size}  # the same for all steps of an attempt

    def record(row: dict[str, Any]) -> None:
        if row["event"] == "bad_step":
            run.progress("train", row["step"], total, "left out", remaining.seconds(row["step"]))
            run.append(row)
            run.log(f"WARNING: {describe(row)}")
            return
        note = f"loss {row['loss']:.4f}, {row['tokens_per_second']:.0f} tokens/s"
        remaining.step(row["step_seconds"])
        run.progress("train", row["step"], total, note, remaining.seconds(row["step"]))
        if row["step"] % every_steps == 0 or row["step"] == total:
            run.append(row)
            tracker.log({**row, **facts})

    return record
