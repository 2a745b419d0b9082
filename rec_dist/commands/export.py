"""`rec-dist export`: a finished run as a folder that others can load without rec-dist, and that is ready for the Hub.

    hf       as the run trained it: an adapter stays one, a whole model stays one; soft prompts are merged, since nothing else has them
    peft     the adapter, for PEFT and for servers that load adapters
    merged   one plain model, with soft prompts as tokens of the vocabulary
    vllm     the same, with a client for vLLM and SGLang that scores candidates by the log-probs of prompt tokens

Each holds weights, tokenizer, prompt.json, catalogue.jsonl, score.py, a model card, and files.json with the SHA-256 of each. Merging
needs memory for the whole model.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rec_dist.commands.card_facts import Publication, facts_of
from rec_dist.commands.model_card import CARD_NAME, card_of
from rec_dist.config.load import load_saved
from rec_dist.config.overrides import Overrides
from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.manifest import read_arrow
from rec_dist.data.dataset.schema import ITEMS_NAME
from rec_dist.data.prompts.builder import PROMPT_NAME, build_prompt_builder, check_saved
from rec_dist.data.prompts.tokens import load_tokenizer
from rec_dist.errors import TRAIN_AGAIN, UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.language_model.preference_rows import FORMAT_NAME
from rec_dist.methods.registry import method_of
from rec_dist.models.hub import snapshot_of
from rec_dist.models.hub_push import check_push, push
from rec_dist.models.language import ADAPTER_WEIGHTS
from rec_dist.models.merge import token_names, write_merged_model
from rec_dist.models.shape import read_shape
from rec_dist.models.soft_prompt import load_soft_prompt
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.checksums import write_checksums
from rec_dist.storage.files import beside, make_folder, put_in_place, read_object, readable, write_json, write_text
from rec_dist.storage.outputs import check_output

logger = logging.getLogger(__name__)

Format = Literal["hf", "peft", "merged", "vllm"]
CATALOGUE_NAME = "catalogue.jsonl"
_SERVED = Path(__file__).parents[1] / "models" / "served"
_ADAPTER_FILES = (ADAPTER_WEIGHTS, "adapter_config.json")


def export(
    run_dir: Path, output: Path, overrides: Overrides = (), *, kind: Format = "hf", publication: Publication | None = None
) -> None:
    """Writes the folder `output`, whole or not at all, and sends it to the Hub if asked. overrides: of the saved configuration.

    Raises UserError, before anything is written, if the run has not finished, has nothing of this format, or `output` exists; and
    if the Hub refuses the folder, which then stays.
    """
    publication = publication or Publication()
    run = RunDirectory(run_dir.absolute())
    if not run.config_path.is_file() or run.finished() is None or not run.model.is_dir():
        raise UserError(f"{run_dir} is not a finished run; give the run directory of a `rec-dist train` that has ended")
    check_output(output, "--out", folder=True)
    if publication.push is not None:
        check_push(publication.push)
    elif publication.public:
        raise UserError("--public is of the repository that --push makes; add --push ORG/NAME, or leave it out")
    config = load_saved(run.config_path, overrides, unread=("data", "evaluate", "cluster", "train"))
    if method_of(config).name != (trained := run.config()["task"]["kind"]):
        raise UserError(
            f"task.kind={config.task.kind} is no change that export can make: {run_dir} was trained with {trained}; leave it out"
        )
    initial = method_of(config).ranker.exported(config, run.model)
    initial.check_model()
    as_adapter, prompts = _as_adapter(initial, kind, run_dir), _prompts(config, run, initial)
    if kind == "vllm" and prompts is None:
        raise UserError(f"--format vllm adds a client that scores a catalogue, and {run_dir} has none; use --format merged")
    facts = facts_of(
        config,
        run,
        initial,
        publication,
        num_items=None if prompts is None else len(prompts.catalogue),
        as_adapter=as_adapter,
        for_servers=kind == "vllm",
    )
    with _made_whole(output) as partial:
        ids = _write_weights(config, initial, partial, as_adapter=as_adapter)
        if prompts is None:
            shutil.copyfile(run.model / FORMAT_NAME, partial / FORMAT_NAME)
        else:
            prompts.write(partial, ids, config.prompt.instruction)
            for script in ("score.py", "score_on_server.py") if kind == "vllm" else ("score.py",):
                shutil.copyfile(_SERVED / script, partial / script)
        write_text(partial / CARD_NAME, card_of(facts))
        readable(partial)
        write_checksums(partial)
    logger.info(f"{output}: {facts.weights}{f', {len(ids)} soft prompt tokens' if ids else ''}")
    if publication.push is not None:
        logger.info(f"uploaded: {push(output, publication.push, private=not publication.public)}")


def _as_adapter(initial: InitialWeights, kind: Format, run_dir: Path) -> bool:
    """Whether the folder holds an adapter. Raises UserError for an adapter that a run does not have."""
    has_one = initial.adapter is not None and initial.soft_prompt is None
    if kind == "peft" and not has_one:
        what = "soft prompts, which PEFT cannot load" if initial.soft_prompt is not None else "a whole model"
        raise UserError(f"--format peft takes a run with an adapter, and {run_dir} trained {what}; use --format merged")
    return has_one and kind in ("hf", "peft")


def _write_weights(config: RunConfig, initial: InitialWeights, folder: Path, *, as_adapter: bool) -> list[int]:
    """Writes weights and tokenizer; returns the token ids of soft prompts."""
    trusted = config.model.trust_remote_code
    if not as_adapter:
        vectors = load_soft_prompt(initial.soft_prompt) if initial.soft_prompt is not None else None
        return write_merged_model(initial.model, initial.adapter, vectors, folder, trust_remote_code=trusted)
    assert initial.adapter is not None
    for name in _ADAPTER_FILES:
        shutil.copyfile(initial.adapter / name, folder / name)
    load_tokenizer(initial.model, trust_remote_code=trusted).save_pretrained(str(folder))
    if snapshot_of(initial.model) is None:
        logger.warning(
            f"the adapter names its base model by a folder of this machine ({initial.model}); elsewhere, edit {_ADAPTER_FILES[1]}"
        )
    return []


@dataclass(frozen=True)
class _Prompts:
    """prompt.json as the run saved it, and the lines of catalogue.jsonl, one an item. Ids from vocab_size on are soft prompts."""

    saved: dict[str, Any]
    catalogue: list[str]
    vocab_size: int

    def write(self, folder: Path, ids: list[int], instruction: str) -> None:
        """Writes both files. ids: the tokens that stand for the soft prompts."""
        begin = [ids[token - self.vocab_size] if token >= self.vocab_size else token for token in self.saved["begin"]]
        text = "".join(token_names(len(ids)))
        write_json(folder / PROMPT_NAME, {**self.saved, "begin": begin, "soft_prompt_text": text, "instruction": instruction})
        write_text(folder / CATALOGUE_NAME, "".join(self.catalogue))


def _prompts(config: RunConfig, run: RunDirectory, initial: InitialWeights) -> _Prompts | None:
    """None for a run on preference rows, which has no catalogue. Raises UserError for damaged files of the run."""
    if (run.model / FORMAT_NAME).is_file():
        return None
    items, trusted = read_arrow(run.model / ITEMS_NAME), config.model.trust_remote_code
    titles, names = items["title"].to_pylist(), items["raw_item"].to_pylist()
    vocab_size = read_shape(initial.model, trust_remote_code=trusted).vocab_size
    tokenizer = load_tokenizer(initial.model, trust_remote_code=trusted)
    builder = build_prompt_builder(config.prompt, tokenizer, titles, vocab_size=vocab_size)
    check_saved(builder, run.model)
    rows = (
        {"item_id": name, "title": title, "tokens": builder.titles[item].tolist()}
        for item, (name, title) in enumerate(zip(names, titles, strict=True))
    )
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    return _Prompts(read_object(run.model / PROMPT_NAME, TRAIN_AGAIN), lines, vocab_size)


@contextmanager
def _made_whole(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that only this process uses; renamed at the end, removed after a fault."""
    partial = beside(output)
    make_folder(output.parent)
    partial.mkdir()
    try:
        yield partial
        check_output(output, "--out", folder=True)  # another process may have made it since this began
        try:
            put_in_place(partial, output, replace=False)
        except OSError:
            check_output(output, "--out", folder=True)  # or in this very moment
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
