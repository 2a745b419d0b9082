"""`rec-dist merge`: a finished run as a folder that any server of language models loads: weights, tokenizer, prompt, catalogue."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rec_dist.config.load import load_config
from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.schema import ITEMS_NAME
from rec_dist.data.prompts.builder import PROMPT_NAME
from rec_dist.errors import TRAIN_AGAIN, UserError
from rec_dist.methods.initial_weights import trained
from rec_dist.methods.language_model.builders import read_shape
from rec_dist.methods.language_model.preference_rows import FORMAT_NAME
from rec_dist.models.merge import token_names, write_merged_model
from rec_dist.models.pretrained import resolve_model
from rec_dist.models.soft_prompt import load_soft_prompt
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.files import read_object, readable, write_json
from rec_dist.storage.outputs import check_output


def merge(run_dir: Path, output: Path, *, log: Callable[[str], None]) -> None:
    """Writes the folder `output` whole or not at all. UserError: no finished run, nothing to merge, or `output` is there already."""
    run = RunDirectory(run_dir.absolute())
    if not run.config_path.is_file() or run.finished() is None or not run.model.is_dir():
        raise UserError(f"{run_dir} is no finished run; give the run directory of a `rec-dist train` that came to its end")
    check_output(output, "FOLDER", folder=True)
    config = load_config(run.config_path, [])
    if config.task.kind == "sequential" or config.adapter.kind == "none":
        what = "a recommender without a language model" if config.task.kind == "sequential" else "a whole model already"
        raise UserError(f"{run.model} is {what}; merge takes a run that trained an adapter or soft prompts")
    initial = trained(run.model, resolve_model(config.model.path, config.model.revision))
    initial.check_model()
    vectors = load_soft_prompt(initial.soft_prompt) if initial.soft_prompt is not None else None
    of_text = (run.model / FORMAT_NAME).is_file()
    prompt = {} if of_text else read_object(run.model / PROMPT_NAME, TRAIN_AGAIN)
    with _made_whole(output) as partial:
        ids = write_merged_model(initial.model, initial.adapter, vectors, partial)
        if of_text:
            shutil.copyfile(run.model / FORMAT_NAME, partial / FORMAT_NAME)
        else:
            _write_prompt(config, prompt, read_shape(initial.model).vocab_size, ids, partial)
            shutil.copyfile(run.model / ITEMS_NAME, partial / ITEMS_NAME)
        readable(partial)
    log(f"{output}: {'a plain model' if not ids else f'a plain model with {len(ids)} soft prompt tokens'}")


@contextmanager
def _made_whole(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output`, of this process alone; renamed to it at the end, removed after a fault."""
    partial = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process that had this number
    partial.mkdir(parents=True)
    try:
        yield partial
        check_output(output, "FOLDER", folder=True)  # made by another process since this began
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_prompt(config: RunConfig, value: dict[str, Any], vocab_size: int, ids: list[int], folder: Path) -> None:
    """The saved prompt.json `value` with the tokenizer's ids for the vectors, and the text that a prompt begins with."""
    value["begin"] = [ids[token - vocab_size] if token >= vocab_size else token for token in value["begin"]]
    value["soft_prompt_text"] = "".join(token_names(len(ids)))
    value["instruction"] = config.prompt.instruction
    write_json(folder / PROMPT_NAME, value)
