"""`rec-dist export --format merged`: a finished run as a folder that any language model server loads.

The folder holds the weights with the adapter merged, the tokenizer with soft prompts as tokens, the prompt and the catalogue, and
files.json with the SHA-256 of each.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rec_dist.config.load import load_saved
from rec_dist.config.overrides import Overrides
from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.schema import ITEMS_NAME
from rec_dist.data.prompts.builder import PROMPT_NAME
from rec_dist.errors import TRAIN_AGAIN, UserError
from rec_dist.methods.language_model.preference_rows import FORMAT_NAME
from rec_dist.methods.registry import method_of
from rec_dist.models.merge import token_names, write_merged_model
from rec_dist.models.shape import read_shape
from rec_dist.models.soft_prompt import load_soft_prompt
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.checksums import write_checksums
from rec_dist.storage.files import beside, make_folder, put_in_place, read_object, readable, write_json
from rec_dist.storage.outputs import check_output

logger = logging.getLogger(__name__)


def export_merged(run_dir: Path, output: Path, overrides: Overrides = ()) -> None:
    """Writes the folder `output`, whole or not at all. overrides: of the run's saved configuration.

    Raises UserError if the run has not finished, if it has nothing to merge, or if `output` exists.
    """
    run = RunDirectory(run_dir.absolute())
    if not run.config_path.is_file() or run.finished() is None or not run.model.is_dir():
        raise UserError(f"{run_dir} is not a finished run; give the run directory of a `rec-dist train` that has ended")
    check_output(output, "FOLDER", folder=True)
    config = load_saved(run.config_path, overrides, unread=("data", "evaluate", "cluster", "train"))
    initial = method_of(config).ranker.merged(config, run.model)
    initial.check_model()
    vectors = load_soft_prompt(initial.soft_prompt) if initial.soft_prompt is not None else None
    of_text = (run.model / FORMAT_NAME).is_file()
    prompt = {} if of_text else read_object(run.model / PROMPT_NAME, TRAIN_AGAIN)
    with _made_whole(output) as partial:
        ids = write_merged_model(
            initial.model, initial.adapter, vectors, partial, trust_remote_code=config.model.trust_remote_code
        )
        if of_text:
            shutil.copyfile(run.model / FORMAT_NAME, partial / FORMAT_NAME)
        else:
            _write_prompt(
                config,
                prompt,
                read_shape(initial.model, trust_remote_code=config.model.trust_remote_code).vocab_size,
                ids,
                partial,
            )
            shutil.copyfile(run.model / ITEMS_NAME, partial / ITEMS_NAME)
        readable(partial)
        write_checksums(partial)
    logger.info(f"{output}: {'a plain model' if not ids else f'a plain model with {len(ids)} soft prompt tokens'}")


@contextmanager
def _made_whole(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that only this process uses; renamed at the end, removed after a fault."""
    partial = beside(output)
    make_folder(output.parent)
    partial.mkdir()
    try:
        yield partial
        check_output(output, "FOLDER", folder=True)  # another process may have made it since this began
        try:
            put_in_place(partial, output, replace=False)
        except OSError:
            check_output(output, "FOLDER", folder=True)  # or in this very moment
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_prompt(config: RunConfig, value: dict[str, Any], vocab_size: int, ids: list[int], folder: Path) -> None:
    """Writes prompt.json: the saved `value` with the tokenizer's ids for the vectors, and the text that a prompt begins with."""
    value["begin"] = [ids[token - vocab_size] if token >= vocab_size else token for token in value["begin"]]
    value["soft_prompt_text"] = "".join(token_names(len(ids)))
    value["instruction"] = config.prompt.instruction
    write_json(folder / PROMPT_NAME, value)
