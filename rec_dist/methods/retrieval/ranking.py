"""The worker's part of ranking: the state of the last title of each history, with packed batches. The driver compares them.

Cost: one prompt a history, however many candidates it has, and D floats a history from the workers to the driver.

U histories, D width of the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import open_data
from rec_dist.data.sampling.global_batches import assign_to_ranks, pack_evenly
from rec_dist.engine import process_group
from rec_dist.errors import UserError
from rec_dist.evaluation.examples import EvalExample
from rec_dist.methods.language_model.builders import model_spec
from rec_dist.methods.language_model.limits import check_positions
from rec_dist.methods.language_model.ranking import (
    EvaluateJob,
    build_checked_builder,
    part_path,
    scoring_engine,
)
from rec_dist.methods.retrieval.examples import TitlePrompts
from rec_dist.models.assemble import build_model
from rec_dist.models.encoder import Encoder, check_encoder
from rec_dist.models.shape import read_shape
from rec_dist.packing.pooled_prompts import PooledPrompts, pack_pooled_prompts
from rec_dist.runtime.arrays import F32, I64
from rec_dist.runtime.heartbeat import reporting
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.world import World


@dataclass(frozen=True)
class HistoryPrompts:
    """The history of each example as a prompt whose last title is pooled."""

    prompts: TitlePrompts
    examples: Sequence[EvalExample]

    def lengths(self, max_tokens: int, max_positions: int | None) -> I64:
        """(U,) tokens of each prompt. Raises UserError if one is longer than a micro-batch or than the model."""
        items = [self._shown(example) for example in self.examples]
        lengths = self.prompts.lengths(np.concatenate(items), np.cumsum([0, *(len(history) for history in items)]))
        if (longest := int(lengths.max())) > max_tokens:
            raise UserError(
                f"train.max_tokens_per_micro_batch ({max_tokens}) is smaller than a prompt ({longest} tokens, user "
                f"{self.examples[int(lengths.argmax())].user_id}); raise it or lower prompt.max_history"
            )
        check_positions(longest, max_positions)
        return lengths

    def batch(self, chosen: list[int]) -> PooledPrompts:
        """The prompts of these examples, with one state each."""
        shown = [self._shown(self.examples[number]) for number in chosen]
        spans = [self.prompts.spans(items)[-1] for items in shown]
        return pack_pooled_prompts([self.prompts.tokens(items) for items in shown], [int(end - begin) for begin, end in spans])

    def _shown(self, example: EvalExample) -> Any:
        return example.history[-self.prompts.builder.max_history :]


def encode_worker(world: World, job: EvaluateJob) -> dict[str, Any]:
    """Write the states of this rank's share to a part file. Returns {"tokens": rows that the model ran over on all ranks}."""
    with process_group.joined(world):
        return _encode(world, job)


def _encode(world: World, job: EvaluateJob) -> dict[str, Any]:
    config, run = RunConfig.model_validate(job.config), RunDirectory(Path(job.output_dir))
    job = replace(job, initial=job.initial.on_this_node(code=config.model.trust_remote_code))
    data = open_data(config.data)
    examples = job.asked(config, data)
    builder = build_checked_builder(config, job, data)
    assert job.pooling is not None
    spec = model_spec(config, job.initial, None, world.device, trains=False)
    engine = scoring_engine(config, spec, lambda: Encoder(build_model(spec)), world, run)

    def score(batch: PooledPrompts) -> Tensor:
        states: Tensor = engine.score(batch).float().cpu()
        return states

    module: Any = engine.module
    check_encoder(module, score, dtype=spec.dtype)

    max_tokens = config.train.max_tokens_per_micro_batch
    prompts = HistoryPrompts(TitlePrompts(builder, job.pooling), examples)
    shape = read_shape(job.initial.model, trust_remote_code=config.model.trust_remote_code)
    lengths = prompts.lengths(max_tokens, shape.max_positions)
    with reporting(run, world, "evaluate") as report:
        told = lambda done: report(done, len(examples))
        states = encode_histories(score, prompts, lengths, world, max_tokens, shape.width, told)
    np.save(part_path(run.path, world.rank), states)
    return {"tokens": int(lengths.sum())}


def encode_histories(
    score: Callable[[PooledPrompts], Tensor],
    prompts: HistoryPrompts,
    lengths: I64,
    world: World,
    max_tokens: int,
    width: int,
    report: Callable[[int], None],
) -> F32:
    """(U, D) states, NaN where another rank has them. Every rank gets the same number of micro-batches."""
    states = np.full((len(lengths), width), np.nan, dtype=np.float32)
    micro_batches = assign_to_ranks(pack_evenly(lengths, max_tokens, world.size), lengths, world.size)
    done = 0
    for number in range(len(micro_batches[0])):
        own = list(micro_batches[world.rank][number])
        found = score(prompts.batch(own or [0])).numpy()
        states[own] = found[: len(own)]
        done += sum(len(micro_batches[rank][number]) for rank in range(world.size))
        report(done)
    return states
