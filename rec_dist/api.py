"""The Python API: the functions that the command line calls, as functions of your process.

They return values, print nothing, and leave the process as it was: environment, signal handlers, warning filters, loggers, random
numbers, process group and a Ray cluster that they started. They work repeatedly, from any thread, and in a notebook. Calls from
several threads wait for one another. Messages go through `logging` (loggers named rec_dist.*).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, overload

from rec_dist.auditing.audit import Audit
from rec_dist.commands import audit as audit_command
from rec_dist.commands import distil as distil_command
from rec_dist.commands import evaluate as evaluate_command
from rec_dist.commands import prepare as prepare_command
from rec_dist.commands import rank as rank_command
from rec_dist.commands import train as train_command
from rec_dist.commands.api_call import api_call
from rec_dist.commands.distil import TOP_K, DistilOptions
from rec_dist.commands.rank_request import MAX_CATALOGUE, RankOptions, SearchKind
from rec_dist.config.load import ConfigLike, load_config
from rec_dist.config.overrides import Overrides
from rec_dist.data.artifacts.recommendations import RecordBatch, table_of
from rec_dist.data.dataset.manifest import PREFERENCES
from rec_dist.data.dataset.preferences import PreferenceData, open_preferences
from rec_dist.data.dataset.prepared_data import PreparedData, open_data
from rec_dist.ranking.search import Score
from rec_dist.storage.uri import expanded
from rec_dist.training_run import Run


class Metric(TypedDict):
    """The mean over n users, and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    n: int


@overload
def prepare(config: ConfigLike, overrides: Overrides = ..., *, interactions: object, items: object = ...) -> PreparedData: ...
@overload
def prepare(config: ConfigLike, overrides: Overrides = ...) -> PreparedData | PreferenceData: ...
def prepare(
    config: ConfigLike, overrides: Overrides = (), *, interactions: object = None, items: object = None
) -> PreparedData | PreferenceData:
    """Prepares the data set of a configuration at data.path, keeps it when it is there already, and opens it.

    Args:
        config: A YAML file, a mapping of sections, or a RunConfig.
        overrides: Words "section.key=value" as on the command line, or a mapping of keys to values.
        interactions: A pandas or Arrow table in place of the files of data.source, which may then be absent. Each row is an
            interaction, with the columns user and item, and optionally rating, timestamp (in any unit; larger is later), title,
            categories and year. data.columns maps these roles to columns of other names. The order of rows decides between equal
            timestamps.
        items: A second table with a row an item: item, title, categories (a list, or text separated by "|") and year. Without
            titles, the names of items are their titles.

    Returns:
        PreparedData, with titles, raw_items and categories of all items, train_counts (items,) and split(name) for "train",
        "valid" and "test"; or PreferenceData for preference rows.

    Raises:
        UserError: The configuration is faulty, the data cannot be read (the message names file and line, or the row of a
            table), or data.path holds another data set.
        DiskError: The disk is full or not writable.

    >>> data = prepare("config.yaml", ["data.path=prepared"], interactions=frame)  # doctest: +SKIP
    >>> data.num_items, data.titles[0]  # doctest: +SKIP
    (1434, 'Toy Story')
    """
    with api_call():
        loaded = load_config(config, overrides)
        manifest = prepare_command.prepare(loaded, interactions=interactions, items=items)
        return open_preferences(loaded.data) if manifest.kind == PREFERENCES else open_data(loaded.data)


def train(config: ConfigLike, overrides: Overrides = (), *, progress: bool = False) -> Run:
    """Trains to the end. Resumes the run that is in train.run_dir; returns at once when it is finished.

    With cluster.launcher=local it trains in a thread of this process, with ray on the workers of a cluster. Without one it starts
    Ray on this machine, which takes 20-30 s, and ends it after the call. Call ray.init() first to keep Ray over several calls.

    Args:
        config: A YAML file, a mapping of sections, or a RunConfig.
        overrides: Words "section.key=value" as on the command line, or a mapping of keys to values.
        progress: Shows a bar, or lines, on standard error, with the lines of the run's log; otherwise those go to `logging`.

    Raises:
        UserError: The run cannot work. Nothing has been written.
        StopRequested: SIGINT, SIGTERM or the run's stop file asked it to stop. Its checkpoint is saved; the same call resumes it.
        WorkerFailedError: Workers failed more often than cluster.max_restarts, twice at one step, or made no progress for
            cluster.hang_seconds. After that with the local launcher, start a new process.
        OutOfMemoryError, NotFiniteError, DiskError, UnreachableError: As they say.

    >>> run = train("config.yaml", {"train.max_steps": 10})  # doctest: +SKIP
    >>> run.model_path, len(run.metrics("step"))  # doctest: +SKIP
    (PosixPath('/home/me/runs/sdpo/model'), 10)
    """
    with api_call():
        done = train_command.train(load_config(config, overrides), progress=progress, owns_process=False)
        return Run.open(done.path)


def evaluate(run: Run | ConfigLike, overrides: Overrides = (), *, progress: bool = False) -> dict[str, Metric]:
    """Ranks the candidates of each user of a split. Writes predictions.arrow, and keeps an evaluation that is there already.

    Args:
        run: A Run or its directory, for the trained model; or a configuration (a YAML file, a mapping, a RunConfig) for its base
            model, or with evaluate.ranker=popularity for that baseline.
        overrides: Words "section.key=value" as on the command line, or a mapping of keys to values. Results go into the run
            directory, or to evaluate.output_dir.
        progress: As in train.

    Returns:
        hr@K and ndcg@K for K = 1, 5, 10, mrr and auc, all between 0 and 1: each {"value": mean over users, "low" and "high": its
        95 % bootstrap interval, "n": users}.

    Raises:
        UserError: The run is not finished, or was trained on other data.

    >>> evaluate(run, ["evaluate.split=valid"])["hr@1"]  # doctest: +SKIP
    {'value': 0.31, 'low': 0.28, 'high': 0.34, 'n': 943}
    """
    target: ConfigLike = run.path if isinstance(run, Run) else run
    with api_call():
        row = evaluate_command.evaluate(target, overrides, progress=progress, owns_process=False)
        metrics: Mapping[str, Metric] = row["metrics"]
        return dict(metrics)


def rank(
    run: Run | ConfigLike,
    histories: str | Path | Mapping[Any, Any] | Sequence[Any] | None = None,
    overrides: Overrides = (),
    *,
    top_k: int = 10,
    split: str | None = None,
    exclude_seen: bool = True,
    allow: str | Path | Sequence[str] | None = None,
    deny: str | Path | Sequence[str] | None = None,
    candidates: str | Path | Mapping[Any, Any] | Sequence[Any] | None = None,
    items: str | Path | Mapping[Any, Any] | None = None,
    max_catalogue: int = MAX_CATALOGUE,
    search: SearchKind = "all",
    score: Score | None = None,
    beam: int | None = None,
    max_rows: int | None = None,
    launcher: Literal["local", "ray"] = "local",
    out: str | Path | None = None,
    progress: bool = False,
) -> Any:
    """The best items for each user, in blocks of users. progress: as in train.

    Args:
        run: A Run or its directory, or a configuration for its base model, or with evaluate.ranker=popularity for that order.
        histories: A file (.jsonl, .csv, .parquet; docs/ranking.md), a mapping of user ids to histories, or a list of histories,
            whose users are then "0", "1", ... A history is a list of item ids or titles, oldest first. None: the run's users,
            each with all items.
        overrides: As in evaluate.
        top_k: Items of a list, which is shorter where fewer are left.
        split: "test" or "valid": the users of that split, each with what precedes its target in evaluation.
        exclude_seen: Leaves out the items of the history.
        allow, deny: A list of item ids or titles, or a text file with one a line: only these, and none of these.
        candidates: What to rank for each user: a file as for histories, a mapping, or one list for each of a list of histories.
        items: New items for a language model: a mapping of ids to titles, or a file with the columns item_id and title.
        max_catalogue: The most items that a language model scores for each user without candidates.
        search: For a language model: "all" scores every title; "exact" finds the same list from fewer; "beam" stops early.
        score: "raw" or "trie": a title's log-probability over the vocabulary, or over what titles go on with. None: as evaluate.
        beam, max_rows: Of a search: the nodes that a step keeps (20), and after how many rows of the model it stops.
        launcher: "local": this process. "ray": the workers that the section cluster describes, with the same result.
        out: A file (.parquet, .arrow or .jsonl) to write, which must not exist. A call that was stopped continues.

    Returns:
        Without `out` a pyarrow.Table with the columns user_id, rank (from 1), item_id, title, score and fallback, and further
        ones for a search or an ensemble (docs/ranking.md). With `out` its path.

    Raises:
        UserError: An input cannot be read (the message names file, line and column), or the model cannot rank on its data.

    >>> rank(run, [["Heat", "Alien"]], top_k=3).to_pandas()  # doctest: +SKIP
    """
    files = {"histories": histories, "allow": allow, "deny": deny, "candidates": candidates, "items": items}
    limits: dict[str, Any] = {"split": split, "top_k": top_k, "exclude_seen": exclude_seen, "max_catalogue": max_catalogue}
    searching: dict[str, Any] = {"search": search, "score": score, "beam": beam, "max_rows": max_rows, "launcher": launcher}
    options = RankOptions(**{name: _path(value) for name, value in files.items()}, **limits, **searching)
    target: ConfigLike = run.path if isinstance(run, Run) else run
    output, batches = None if out is None else expanded(out).absolute(), list[RecordBatch]()
    with api_call():
        rank_command.rank(target, overrides, options=options, output=output, write=batches.append, progress=progress)
        return table_of(batches) if output is None else output


def distil(
    run: Run | str | Path,
    into: ConfigLike,
    overrides: Overrides = (),
    *,
    top_k: int = TOP_K,
    max_targets: int | None = None,
    progress: bool = False,
) -> Run:
    """Trains a sequential recommender to rank as a finished run does (docs/methods/distil.md). The same call resumes it.

    Args:
        run: The teacher: a Run of any kind, or its directory. In this process it ranks items after training histories.
        into: The recommender: a configuration of task.kind=sequential on the run's data (a YAML file, a mapping or a RunConfig), or
            "sequential" for SASRec on the data of the run, in a folder beside it.
        overrides, progress: As in train, for the recommender. Lists go into task.sequential.distil.lists, or beside train.run_dir.
        top_k, max_targets: Items of a list, and the most training targets that get one, each user's last first. None: all.

    Returns:
        The recommender's run. `evaluate` of both says what it keeps.

    Raises:
        UserError, StopRequested: As in train.
    """
    target = run.path if isinstance(run, Run) else Path(run)
    options = DistilOptions(top_k, max_targets)
    with api_call():
        done = distil_command.distil(target, into, overrides, options=options, progress=progress, owns_process=False)
        return Run.open(done.path)


def audit(
    target: Run | str | Path, overrides: Overrides = (), *, skip: Sequence[str] = (), html: str | Path | None = None
) -> Audit:
    """Leak and bias checks of a prepared data set and its questions, or of a finished run (docs/audit.md lists them).

    Args:
        target: The path or URI of a prepared data set, a Run, or its directory.
        overrides: As in evaluate, whose section says which questions are looked at.
        skip: Names of checks to leave out.
        html: A file for the page, which must not exist.

    Raises:
        UserError: The target or a file of questions cannot be read, or a name in skip is no check.

    >>> rec_dist.audit("data/ml-100k").findings.keys()  # doctest: +SKIP
    """
    place = str(target.path if isinstance(target, Run) else target)
    with api_call():
        return audit_command.audit(place, overrides, skip=skip, page=_path(html))


def _path(value: Any) -> Any:
    """Text is a path; anything else stays as it is."""
    return expanded(value).absolute() if isinstance(value, str | Path) else value
