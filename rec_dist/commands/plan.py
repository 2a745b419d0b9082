"""`rec-dist plan`: memory, time and cost of a configuration on a described cluster. Nothing runs, and no weights are read."""

from pathlib import Path

from rec_dist.config.schema import RunConfig
from rec_dist.plan.report import make_plan
from rec_dist.plan.table import text_table
from rec_dist.runtime.messages import say
from rec_dist.storage.files import write_json
from rec_dist.storage.outputs import check_output


def plan(config: RunConfig, *, output: Path | None) -> int:
    """Prints the plan, and writes its numbers to `output`, which must not exist. Returns 0, or 1 if the run does not fit."""
    if output is not None:
        check_output(output, "--json")
    report = make_plan(config)
    if output is not None:
        write_json(output, report)
    say("\n".join(text_table(report)))
    return 0 if report["memory"]["fits"] else 1
