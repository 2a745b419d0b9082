"""Scores every candidate by the log-likelihood of its title after the history, with packed batches.

All candidates of an example share its prompt. An example with more candidates than a micro-batch holds is cut into several
prompts. Prompts are made when their micro-batch comes, and scores go to a file of each rank: a few numbers of each prompt are held.

U examples, C candidates of the longest.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData, open_data
from rec_dist.data.prompts.builder import PromptBuilder, check_saved
from rec_dist.data.prompts.title_trie import catalogue_packing
from rec_dist.data.sampling.global_batches import assign_to_ranks, pack_evenly
from rec_dist.engine import process_group
from rec_dist.engine.engine import Engine, sharded_loading
from rec_dist.evaluation.examples import EvalExample
from rec_dist.methods.eval_examples import eval_examples_of
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.language_model.builders import build_builder, model_spec
from rec_dist.methods.language_model.limits import check_examples, check_listed
from rec_dist.models.assemble import ModelSpec, build_model
from rec_dist.models.scorer import Scorer, check_scorer
from rec_dist.models.shape import read_shape
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.packed_batch import PackedBatch, dummy_batch, pack_prompts
from rec_dist.runtime.heartbeat import reporting
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.world import World
from rec_dist.sizing.settle import line_on_stage, settled
from rec_dist.sizing.stage import SCORING

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EvaluateJob:
    """What the driver sends to each worker.

    saved: the model folder of a run, whose prompt must match; None for a base model. temperature: as in Objective. pooling: `mean`
    or `last`, how a worker pools the last title of a history (methods/retrieval); None where titles are scored. examples: what is
    scored, None for what the section evaluate describes, which every worker then makes itself.
    """

    config: dict[str, Any]
    output_dir: str
    initial: InitialWeights
    saved: Path | None
    temperature: float | None = None
    pooling: str | None = None
    examples: list[EvalExample] | None = None

    def asked(self, config: RunConfig, data: PreparedData) -> Sequence[EvalExample]:
        """What is scored."""
        return eval_examples_of(config, data) if self.examples is None else self.examples


def evaluate_worker(world: World, job: EvaluateJob) -> dict[str, Any]:
    """Score this rank's share and write it to a part file. Returns {"tokens": rows that the model ran over on all ranks}."""
    with process_group.joined(world):
        return _evaluate(world, job)


def _evaluate(world: World, job: EvaluateJob) -> dict[str, Any]:
    config, run = RunConfig.model_validate(job.config), RunDirectory(Path(job.output_dir))
    job = replace(job, initial=job.initial.on_this_node(code=config.model.trust_remote_code))
    data = open_data(config.data)
    builder = build_checked_builder(config, job, data)
    shape = read_shape(job.initial.model, trust_remote_code=config.model.trust_remote_code)
    prompts = EvalPrompts(builder, job.asked(config, data), config.train.max_tokens_per_micro_batch, shape.max_positions)
    spec = model_spec(config, job.initial, builder, world.device, trains=False)
    engine = scoring_engine(config, spec, lambda: Scorer(build_model(spec), no_loss, ()), world, run)
    module: Any = engine.module

    def score(batch: PackedBatch) -> Tensor:
        logps: Tensor = engine.score(batch)[2].float().cpu()
        return logps

    check_scorer(module, score, dtype=spec.dtype)

    pack = pack_prompts if job.temperature is None else catalogue_packing(builder, job.temperature)
    with reporting(run, world, "evaluate") as report:
        told = lambda done: report(done, len(prompts.places))
        scores = score_prompts(score, prompts, world, config.train.max_tokens_per_micro_batch, told, pack=pack)
        write_part(part_path(run.path, world.rank), prompts, scores)
    return {"tokens": int(prompts.lengths.sum())}


def scoring_engine(config: RunConfig, spec: ModelSpec, build: Callable[[], nn.Module], world: World, run: RunDirectory) -> Engine:
    """An engine around the module of `build`, with the model of `spec` inside, that only scores. A collective."""
    width = read_shape(spec.path, trust_remote_code=spec.trust_remote_code).width
    settings, why = settled(config, spec, world, SCORING, width=width, bf16=spec.dtype == torch.bfloat16)
    if why is not None and world.is_main:
        run.log(line_on_stage(why, world))
    with sharded_loading(settings):
        module = build()
    engine = Engine(module, settings, device=world.device, optimizer=None)
    engine.train_mode(False)
    return engine


def no_loss(logps: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The LossFunction of a model that only scores."""
    return logps.sum() * 0, logps.new_zeros(()), {}


def build_checked_builder(config: RunConfig, job: EvaluateJob, data: PreparedData) -> PromptBuilder:
    """The prompt builder.

    Raises UserError if the saved model was trained with another one, or if the prompt lists more or fewer candidates than are
    ranked.
    """
    check_listed(config)
    builder = build_builder(config, job.initial.model, data)
    if job.saved is not None:
        check_saved(builder, job.saved)
    return builder


class EvalPrompts:
    """The examples as prompts, made when asked for: places[i] = (example, first candidate, end) of prompt i, lengths (prompts,).

    Lengths are in rows. shape: (U, C).

    Raises UserError if one is longer than a micro-batch or than the model. max_positions: None without a limit.
    """

    def __init__(
        self, builder: PromptBuilder, examples: Sequence[EvalExample], max_tokens: int, max_positions: int | None
    ) -> None:
        check_examples(builder, examples, max_tokens=max_tokens, max_positions=max_positions)
        self.examples = examples
        self._builder = builder
        self.places: list[tuple[int, int, int]] = []
        lengths, longest = array("q"), 0
        for number, example in enumerate(examples):
            for begin, stop in self._cuts(example, max_tokens):
                self.places.append((number, begin, stop))
                lengths.append(self._prompt(example, begin, stop, key=0).num_tokens)
            longest = max(longest, stop)
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.shape = (len(examples), longest)

    def __getitem__(self, index: int) -> GroupedPrompt:
        number, begin, stop = self.places[index]
        return self._prompt(self.examples[number], begin, stop, key=index)

    def _prompt(self, example: EvalExample, begin: int, stop: int, *, key: int) -> GroupedPrompt:
        history = example.history[-self._builder.max_history :]
        listed = example.candidates if self._builder.listed else None
        return self._builder.grouped_prompt(history, [example.candidates[begin:stop]], [key], listed=listed)

    def _cuts(self, example: EvalExample, max_tokens: int) -> list[tuple[int, int]]:
        """Ranges of candidates that fit into a micro-batch together with the prompt."""
        prompt = len(self._prompt(example, 0, 1, key=0).tokens)
        end = len(self._builder.pieces.end) - 1
        costs = self._builder.titles.lengths[example.candidates] + end
        cuts, begin, used = [], 0, prompt
        for place, cost in enumerate(costs.tolist()):
            if used + cost > max_tokens:
                cuts.append((begin, place))
                begin, used = place, prompt
            used += cost
        return [*cuts, (begin, len(costs))]


def score_prompts(
    score: Callable[[PackedBatch], Tensor],
    prompts: EvalPrompts,
    world: World,
    max_tokens: int,
    report: Callable[[int], None],
    *,
    pack: Callable[[list[GroupedPrompt]], PackedBatch] = pack_prompts,
) -> Iterator[tuple[int, int, F32]]:
    """(example, first candidate, scores) of this rank's prompts. Every rank gets the same number of micro-batches."""
    micro_batches = assign_to_ranks(pack_evenly(prompts.lengths, max_tokens, world.size), prompts.lengths, world.size)
    done = 0
    for number in range(len(micro_batches[0])):
        micro_batch = micro_batches[world.rank][number]
        batch = pack([prompts[i] for i in micro_batch]) if micro_batch else dummy_batch(1)
        logps = score(batch).numpy()
        offsets = batch.group_offsets.tolist()
        for place, prompt in enumerate(micro_batch):
            yield *prompts.places[prompt][:2], logps[offsets[place] : offsets[place + 1]]
        done += sum(len(micro_batches[rank][number]) for rank in range(world.size))
        report(done)


def table_of(prompts: EvalPrompts, scores: Iterable[tuple[int, int, F32]]) -> F32:
    """The scores of score_prompts() as (U, C) in memory, NaN behind the last candidate, and where another rank scores."""
    table = np.full(prompts.shape, np.nan, dtype=np.float32)
    for example, begin, values in scores:
        table[example, begin : begin + len(values)] = values
    return table


def write_part(path: Path, prompts: EvalPrompts, scores: Iterable[tuple[int, int, F32]]) -> None:
    """Writes table_of() to a file, without holding it."""
    num_rows, width = prompts.shape
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": prompts.shape})
        begins_at, empty = file.tell(), np.full(width, np.nan, dtype="<f4").tobytes()
        file.writelines(empty for _ in range(num_rows))
        for example, begin, values in scores:
            file.seek(begins_at + 4 * (example * width + begin))
            file.write(values.astype("<f4").tobytes())


def part_path(folder: Path, rank: int) -> Path:
    """The file in which a rank leaves its scores for the driver."""
    return folder / f".scores-{rank:05d}.npy"


def clear_parts(folder: Path) -> None:
    """Removes the parts of an evaluation that was cut short."""
    for path in folder.glob(".scores-*.npy"):
        path.unlink()


def gather_parts(folder: Path) -> Iterator[F32]:
    """The merged rows (C,) of the parts of all ranks, U of them. The files lose their names now, and go when all rows are read."""
    paths = sorted(folder.glob(".scores-*.npy"))
    parts = [np.load(path, mmap_mode="r") for path in paths]
    for path in paths:
        path.unlink()
    return (_merged(rows) for rows in zip(*parts, strict=True))


def _merged(rows: tuple[F32, ...]) -> F32:
    merged = np.array(rows[0])
    for row in rows[1:]:
        merged = np.where(np.isnan(merged), row, merged)
    return merged
