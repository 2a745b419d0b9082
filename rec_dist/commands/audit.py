"""`rec-dist audit`: leak and bias checks of a data set and its questions, or of a finished run on them.

Everything runs in this process. A data set takes seconds; a run takes its model two passes over the questions.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rec_dist.auditing.audit import Audit, check_names, run_checks
from rec_dist.auditing.questions import AuditedModel, Subject, questions_of_examples, questions_of_preferences
from rec_dist.commands.ranked_model import ranked_model
from rec_dist.config.load import load_config, load_saved
from rec_dist.config.overrides import Overrides
from rec_dist.config.paths import pinned
from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.manifest import PREFERENCES, Manifest
from rec_dist.data.dataset.preferences import open_preferences
from rec_dist.data.dataset.prepared_data import PreparedData, open_data
from rec_dist.data.dataset.schema import MANIFEST_NAME
from rec_dist.errors import UserError
from rec_dist.methods.eval_examples import eval_examples_of
from rec_dist.methods.registry import method_of
from rec_dist.models.pretrained import resolve_model
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.location import Location
from rec_dist.storage.outputs import check_output

logger = logging.getLogger(__name__)

SLOW_USERS = 200  # asked of a model that scores titles, unless evaluate.max_users says how many: minutes on a CPU


def audit(target: str, overrides: Overrides = (), *, skip: Sequence[str] = (), page: Path | None = None) -> Audit:
    """Runs the checks, and writes the page if there is a place for it.

    target: a prepared data set (a folder or a URI) or the directory of a finished run. overrides: the section `evaluate` says which
    questions are looked at. skip: names of checks. page: an HTML file, which must not exist. Raises UserError, before anything is
    computed, for what it cannot read or write.
    """
    check_names(skip)
    if page is not None:
        check_output(page, "--html")
    location = Location(target)
    with ExitStack() as stack:
        if location.is_remote or (location.folder / MANIFEST_NAME).is_file():
            subject = _of_data(location, overrides)
        elif RunDirectory(location.folder).config_path.is_file():
            subject = _of_run(location.folder, overrides, stack)
        else:
            raise UserError(f"{location} is neither a prepared data set nor a run directory; give data.path or train.run_dir")
        done = run_checks(target, subject, skip)
    if page is not None:
        done.write_page(page)
    return done


def _of_data(location: Location, overrides: Overrides) -> Subject:
    config = pinned(load_config({"data": {"path": str(location)}, "train": {"run_dir": "none"}}, overrides))
    if Manifest.load(location).kind == PREFERENCES:
        rows = open_preferences(config.data)
        if not len(rows):
            raise UserError(f"{location} holds no preference row; prepare data with some")
        return Subject(questions_of_preferences(rows), seed=config.evaluate.seed)
    return _subject(config, open_data(config.data), None)


def _of_run(target: Path, overrides: Overrides, stack: ExitStack) -> Subject:
    data = load_saved(RunDirectory(target).config_path, overrides).data.path
    if Manifest.load(data).kind == PREFERENCES:
        raise UserError(
            f"{target} is a run on preference rows, which have no items to rank; audit the rows with `rec-dist audit {data}`"
        )
    model = ranked_model(target, overrides)
    config = model.config
    if model.slow and config.evaluate.max_users is None:
        evaluate = config.evaluate.model_copy(update={"max_users": SLOW_USERS})
        config = config.model_copy(update={"evaluate": evaluate})
        logger.info(f"{SLOW_USERS} users are asked, because this model scores title by title; evaluate.max_users changes that")
    base = None
    if config.evaluate.ranker == "model" and method_of(config).ranker.language_model:
        base = resolve_model(config.model.path, config.model.revision, trust_remote_code=config.model.trust_remote_code)
    scorer = stack.enter_context(model.scorer())
    audited = AuditedModel(scorer, model.slow, config.prompt.max_history, base, config.model.trust_remote_code)
    return _subject(config, model.data, audited)


def _subject(config: RunConfig, data: PreparedData, model: AuditedModel | None) -> Subject:
    settings = config.evaluate
    examples = list(eval_examples_of(config, data))  # every check reads them
    split = None if settings.questions is not None else settings.split
    source = f"the {split} split of {data.location}" if settings.questions is None else settings.questions
    ranks_all = settings.num_candidates == "all" and not examples[0].given
    questions = questions_of_examples(examples, source=source, ranks_all=ranks_all)
    return Subject(questions, data, examples, split, model, settings.seed)
