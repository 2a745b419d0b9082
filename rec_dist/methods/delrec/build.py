"""Builds DELRec's stage 1 from a configuration: checks the settings, tokenises its words, reads the teacher's lists."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from rec_dist.config.schema import RunConfig
from rec_dist.data.artifacts.teacher import read_teacher
from rec_dist.data.dataset.prepared_data import PreparedData, SequenceSplit, open_data
from rec_dist.data.dataset.ragged import offsets_of
from rec_dist.data.prompts.tokens import load_tokenizer, piece_tokens
from rec_dist.data.sampling.many_draws import SeenItems
from rec_dist.data.sampling.negatives import NegativeSampler
from rec_dist.data.sampling.targets import TargetIndex, index_targets
from rec_dist.errors import UserError
from rec_dist.methods.delrec.config import DelrecConfig
from rec_dist.methods.delrec.distill import OBJECTIVES, DistillExamples, distill_task
from rec_dist.methods.delrec.prompts import FIRST_POSITION, DistillPrompts, Headers, stream_seed
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.language_model.builders import build_batch_sampler, build_builder, model_spec
from rec_dist.methods.language_model.limits import check_evaluation
from rec_dist.methods.task import Task
from rec_dist.models.shape import read_shape
from rec_dist.runtime.arrays import I32, I64

_RANDOM_LISTS = 2  # the stream of random draws after those of the two objectives


def build_distill_task(config: RunConfig, initial: InitialWeights, device: str) -> Task:
    """The task on the training split of data.path. Raises UserError for anything that would fail later."""
    check_settings(config)
    data, settings = open_data(config.data), config.task.section(DelrecConfig)
    split = data.split("train")
    every = index_targets(split, 1)
    kept = np.flatnonzero(every.starts >= FIRST_POSITION)
    targets = TargetIndex(every.rows[kept], every.starts[kept], every.stops[kept])
    builder = build_builder(config, initial.model, data)
    shape = read_shape(initial.model, trust_remote_code=config.model.trust_remote_code)
    tokenizer = load_tokenizer(initial.model, trust_remote_code=config.model.trust_remote_code)
    texts = (settings.after_header, settings.before_header, settings.list_header, settings.first_header)
    prompts = DistillPrompts(
        builder,
        Headers(*(np.asarray(piece_tokens(tokenizer, text, after="a"), dtype=np.int32) for text in texts)),
        seed=config.train.seed,
        train_counts=data.train_counts,
        num_candidates=config.negatives.num + 1,
        vocab_size=shape.vocab_size,
        num_virtual=config.prompt.num_virtual,
    )
    if initial.teacher is None:
        lists = random_lists(split, targets, data.train_counts, seed=config.train.seed, top_h=settings.top_h)
    else:
        lists = teacher_lists(initial.teacher, data, every, split, kept, top_h=settings.top_h)
    spec = model_spec(config, initial, builder, device, trains=True)
    examples = DistillExamples(
        data,
        split,
        targets,
        builder,
        prompts,
        lists,
        OBJECTIVES[settings.objectives],
        config.negatives.num,
        config.negatives.refresh_each_epoch,
    )
    sampler = build_batch_sampler(config, max(len(targets), 1))
    max_tokens = config.train.max_tokens_per_micro_batch
    examples.check(sampler, top_h=settings.top_h, max_tokens=max_tokens, max_positions=shape.max_positions)
    check_evaluation(config, builder, data)
    return distill_task(spec, examples, sampler=sampler, width=shape.width)


def check_settings(config: RunConfig) -> None:
    """Raises UserError for settings that stage 1 cannot take, or that have no effect on it."""
    task, prompt, num = config.task.section(DelrecConfig), config.prompt, config.negatives.num
    adapter, targets = config.adapter.kind, config.train.targets_per_prompt
    faults = {
        f"adapter.kind={adapter} would train more than soft prompts; set adapter.kind=soft_prompt": adapter != "soft_prompt",
        "prompt.num_virtual is 0, so there is nothing to train; set it to 16, say": not prompt.num_virtual,
        f"prompt.style={prompt.style} has no place for the objectives' headers; set prompt.style=list": prompt.style != "list",
        f"negatives.kind={config.negatives.kind} has no effect here; set it to uniform": config.negatives.kind != "uniform",
        f"train.targets_per_prompt ({targets}) has no effect here; remove it": targets != 1,
        f"negatives.num ({num}) + 1 candidates must hold the {task.top_h} items of task.delrec.top_h; raise it": num + 1
        < task.top_h,
        f"prompt.num_candidates ({prompt.num_candidates}) must be negatives.num + 1 ({num + 1}) where the prompt lists them": (
            prompt.candidates == "listed" and prompt.num_candidates != num + 1
        ),
    }
    for fault, found in faults.items():
        if found:
            raise UserError(f"task.kind=delrec_distill: {fault}")


def random_lists(split: SequenceSplit, targets: TargetIndex, train_counts: I64, *, seed: int, top_h: int) -> Callable[[I64], I32]:
    """Lists drawn at random outside the history: a control for what the teacher adds."""
    sampler = NegativeSampler("uniform", top_h, stream_seed(seed, _RANDOM_LISTS), train_counts)

    def draw(indices: I64) -> I32:
        rows, positions = targets.rows[indices], targets.starts[indices]
        seen = SeenItems(split.take(rows, positions), offsets_of(positions), len(train_counts))
        key = {"epochs": np.zeros_like(positions), "users": split.user_ids[rows], "positions": positions}
        return sampler.draw_many(**key, seen=seen, rows=np.arange(len(rows)), counts=positions)

    return draw


def teacher_lists(
    folder: Path, data: PreparedData, every: TargetIndex, split: SequenceSplit, kept: I64, *, top_h: int
) -> Callable[[I64], I32]:
    """The lists that a trained recommender left in `folder`, for the examples `kept` of `every`.

    Raises UserError if it was trained on other data or its lists are shorter than top_h.
    """
    lists = read_teacher(folder, data_fingerprint=data.manifest.fingerprint).lists
    if lists.items.shape[1] < top_h:
        raise UserError(f"task.delrec.top_h ({top_h}) is more than the {lists.items.shape[1]} items a list of {folder}; lower it")
    assert np.array_equal(lists.user_ids, split.user_ids[every.rows]) and np.array_equal(lists.positions, every.starts), folder
    return lambda indices: lists.items[kept[indices], :top_h]
