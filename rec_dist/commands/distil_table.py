"""What a student keeps of its teacher: both on the same questions with their paired difference, and what a list takes of each.

Cost: an evaluation of each, unless it is there already, and the time of at most 50 lists of each, 20 s of the teacher.
"""

import math
import statistics
import time
from pathlib import Path
from typing import Any

from rec_dist.commands.distil import searchable, whole_catalogue
from rec_dist.commands.evaluate import evaluate
from rec_dist.commands.ranked_model import ranked_model
from rec_dist.config.load import ALL_SECTIONS, load_saved
from rec_dist.config.pipeline_schema import TABLE_METRICS
from rec_dist.config.yaml_text import escaped
from rec_dist.evaluation.baselines import PopularityScorer
from rec_dist.ranking.rank import rank_users
from rec_dist.ranking.users import PreparedUsers
from rec_dist.report.compare import compare
from rec_dist.report.text_table import text_table
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.uri import expanded

_TOP_K, _USERS, _SECONDS = 10, 50, 20.0


def distil_table(run_dir: Path, student: RunDirectory, *, progress: bool = True) -> str:
    """The table of the run `run_dir` and its student, on the questions of the student's section `evaluate`.

    The teacher's answers go into its own folder if its section asks the same, else beside the student. Raises UserError if one of
    them cannot be evaluated.
    """
    teacher = RunDirectory(expanded(run_dir).absolute())
    settings, own = (load_saved(run.config_path, unread=ALL_SECTIONS) for run in (student, teacher))
    data = {"data.path": escaped(settings.data.path)}
    changes = {f"evaluate.{key}": value for key, value in escaped(settings.evaluate.asked).items()}
    changes |= {**data, "evaluate.ranker": "model"}
    if settings.evaluate.num_candidates != "all":
        changes["evaluate.search"] = "all"
    beside = None if own.evaluate.asked == settings.evaluate.asked else f"{student.path}-teacher"
    names = [f"{role} ({run.path.name})" for role, run in (("teacher", teacher), ("student", student))]
    folders, measured = dict[str, list[Path]](), []
    for name, run, folder in zip(names, (teacher, student), (beside, None), strict=True):
        row = evaluate(run.path, {**changes, "evaluate.output_dir": escaped(folder)}, progress=progress)
        measured.append(row["metrics"])
        folders[name] = [run.path if folder is None else Path(folder)]
    metrics = [metric for metric in TABLE_METRICS if all(metric in of for of in measured)]
    compared = compare(folders, [(names[1], names[0])], metrics)
    lists = _lists_note(teacher.path, student.path, data, exclude_seen=settings.evaluate.exclude_seen)
    return f"{compared.summary}\n\n{text_table(compared.rows, compared.differences)}\n{lists}"


def _lists_note(teacher: Path, student: Path, data: dict[str, Any], *, exclude_seen: bool) -> str:
    """How long a list takes of both, and how many items of the teacher's lists the student has too."""
    of_teacher, first = _one_by_one(teacher, data, exclude_seen, most=_USERS, limit=_SECONDS)
    of_student, second = _one_by_one(student, data, exclude_seen, most=len(first), limit=math.inf)
    both, all_items = sum(len(a & b) for a, b in zip(first, second, strict=True)), sum(map(len, first))
    shared = f"; {both / all_items:.0%} of the teacher's items are the student's too" if all_items else ""
    return (
        f"a list of {_TOP_K} of the whole catalogue, median of {len(first)} users one by one: teacher {of_teacher * 1000:.3g} ms, "
        f"student {of_student * 1000:.3g} ms{shared}"
    )


def _one_by_one(run: Path, data: dict[str, Any], exclude_seen: bool, *, most: int, limit: float) -> tuple[float, list[set[int]]]:
    """The median seconds of a list, and the items of each, for the first users of the data set, in this process.

    limit: seconds after which no further list begins. The first is made twice: what a model loads then is not counted.
    """
    model = ranked_model(run, data)
    users, popularity = PreparedUsers(model.data, None), PopularityScorer(model.data.train_counts)
    seconds, lists, began = [], list[set[int]](), time.perf_counter()
    with model.scorer() as scorer:
        wanted = searchable(whole_catalogue(model, _TOP_K, exclude_seen), scorer)
        next(rank_users(users, scorer, popularity, wanted, size=1))
        ranked = rank_users(users, scorer, popularity, wanted, size=1)
        while len(lists) < min(most, users.total) and not (lists and time.perf_counter() - began > limit):
            started = time.perf_counter()
            lists.append(set(next(ranked).item.tolist()))
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), lists
