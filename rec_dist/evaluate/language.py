"""A language model's answers: every candidate's title scored by its log-likelihood after the history, through the grouped stream.

The prompt stands once for all its candidates; a question with more candidates than a pack holds is cut into several.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rec_dist.config.schema import RunConfig
from rec_dist.data.prepared.dataset import PreparedData, open_data
from rec_dist.data.prompts.builder import PromptBuilder, check_saved
from rec_dist.data.sampling.plan import deal, pack_evenly
from rec_dist.engine import process_group
from rec_dist.engine.engine import Engine, sharded_loading
from rec_dist.engine.settings import EngineSettings
from rec_dist.evaluate.protocol import Question, ask
from rec_dist.models.assemble import build_model
from rec_dist.models.scorer import Scorer, check_forks
from rec_dist.runtime.errors import UserError
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.world import World
from rec_dist.stream.grouped import GroupedStream, pack_trunks, stand_in
from rec_dist.stream.trunk import Trunk
from rec_dist.tasks.pieces import build_builder, model_spec, read_shape
from rec_dist.tasks.start import Start

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EvaluateJob:
    """What the driver sends to each worker. saved: the model folder of a run, whose prompt must be kept; None for a base model."""

    config: dict[str, Any]
    output_dir: str
    start: Start
    saved: Path | None


def evaluate_worker(world: World, job: EvaluateJob) -> dict[str, Any]:
    """Scores this rank's share and writes it to part files. Returns {"tokens": rows of the model run over all ranks}."""
    process_group.join(world)
    result = _evaluate(world, job)
    process_group.leave()  # not after a fault: with NCCL it would wait for peers that wait for this rank
    return result


def _evaluate(world: World, job: EvaluateJob) -> dict[str, Any]:
    config, run = RunConfig.model_validate(job.config), RunDirectory(Path(job.output_dir))
    data = open_data(config.data)
    questions = questions_of(config, data)
    builder = build_checked_builder(config, job, data)
    trunks = Trunks(builder, questions, config.train.tokens_per_pack)
    spec = model_spec(config, job.start, builder, world.device, trains=False)
    width = read_shape(job.start.model).width
    settings = EngineSettings(
        zero_stage=config.cluster.zero_stage,
        bf16=spec.dtype == torch.bfloat16,
        max_grad_norm=0.0,
        hidden_size=width,
        max_live_parameters=config.cluster.max_live_parameters,
    )
    with sharded_loading(settings):
        model = build_model(spec)
        module = Scorer(model, _no_loss, (), tokens_per_pack=config.train.tokens_per_pack)
    engine = Engine(module, settings, device=world.device, optimizer=None)
    engine.train_mode(False)

    def score(stream: GroupedStream) -> Tensor:
        logps: Tensor = engine.score(stream)[2].float().cpu()
        return logps

    check_forks(score, vocab_size=model.config.vocab_size, dtype=spec.dtype)  # type: ignore[union-attr,arg-type]

    def report(done: int) -> None:
        if world.is_main:
            run.progress("evaluate", done, len(trunks.places))

    scores = score_trunks(score, trunks, world, config.train.tokens_per_pack, report)
    np.save(part_path(run.path, world.rank), scores)
    return {"tokens": int(trunks.lengths.sum())}


def _no_loss(logps: Tensor, stream: GroupedStream) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return logps.sum() * 0, logps.new_zeros(()), {}


def questions_of(config: RunConfig, data: PreparedData) -> list[Question]:
    """The questions that the section `evaluate` asks."""
    settings = config.evaluate
    return ask(
        data, split=settings.split, num_candidates=settings.num_candidates, max_users=settings.max_users, seed=settings.seed
    )


def build_checked_builder(config: RunConfig, job: EvaluateJob, data: PreparedData) -> PromptBuilder:
    """The prompt builder. UserError: a saved model was trained with another, or the list shown cannot be the one asked."""
    if config.prompt.candidates == "listed" and config.evaluate.num_candidates != config.prompt.num_candidates:
        raise UserError(
            f"evaluate.num_candidates ({config.evaluate.num_candidates}) must equal prompt.num_candidates "
            f"({config.prompt.num_candidates}) when the prompt lists the candidates"
        )
    builder = build_builder(config, job.start.model, data)
    if job.saved is not None:
        check_saved(builder, job.saved)
    return builder


class Trunks:
    """The questions as trunks: places[i] = (question, first candidate) of trunk i, lengths (trunks,) in rows."""

    def __init__(self, builder: PromptBuilder, questions: list[Question], tokens_per_pack: int) -> None:
        self.questions = questions
        self._builder = builder
        self._trunks: list[Trunk] = []
        self.places: list[tuple[int, int]] = []
        for number, question in enumerate(questions):
            for begin, stop in self._cuts(question, tokens_per_pack):
                self.places.append((number, begin))
                self._trunks.append(self._trunk(question, begin, stop, key=len(self._trunks)))
        self.lengths = np.asarray([trunk.num_tokens for trunk in self._trunks], dtype=np.int64)

    def __getitem__(self, index: int) -> Trunk:
        return self._trunks[index]

    def _trunk(self, question: Question, begin: int, stop: int, *, key: int) -> Trunk:
        history = question.history[-self._builder.max_history :]
        listed = question.candidates if self._builder.listed else None
        return self._builder.trunk(history, [question.candidates[begin:stop]], [key], listed=listed)

    def _cuts(self, question: Question, tokens_per_pack: int) -> list[tuple[int, int]]:
        """Runs of candidates that fit a pack together with the prompt."""
        prompt = len(self._trunk(question, 0, 1, key=0).tokens)
        end = len(self._builder.pieces.end) - 1
        costs = self._builder.titles.lengths[question.candidates] + end
        if prompt + int(costs.max()) > tokens_per_pack:
            raise UserError(
                f"train.tokens_per_pack ({tokens_per_pack}) is smaller than a prompt with one candidate "
                f"({prompt + int(costs.max())} tokens, user {question.user_id}); raise it or lower prompt.max_history"
            )
        cuts, begin, used = [], 0, prompt
        for place, cost in enumerate(costs.tolist()):
            if used + cost > tokens_per_pack:
                cuts.append((begin, place))
                begin, used = place, prompt
            used += cost
        return [*cuts, (begin, len(costs))]


def score_trunks(
    score: Callable[[GroupedStream], Tensor], trunks: Trunks, world: World, tokens_per_pack: int, report: Callable[[int], None]
) -> F32:
    """(U, C) scores with NaN where another rank scores: packs are dealt to the ranks, the same number to each."""
    width = max(len(question.candidates) for question in trunks.questions)
    scores = np.full((len(trunks.questions), width), np.nan, dtype=np.float32)
    packs = deal(pack_evenly(trunks.lengths, tokens_per_pack, world.size), trunks.lengths, world.size)
    done = 0
    for number in range(len(packs[0])):
        pack = packs[world.rank][number]
        stream = pack_trunks([trunks[i] for i in pack]) if pack else stand_in(1)
        logps = score(stream).numpy()
        offsets = stream.group_offsets.tolist()
        for place, trunk in enumerate(pack):
            question, begin = trunks.places[trunk]
            values = logps[offsets[place] : offsets[place + 1]]
            scores[question, begin : begin + len(values)] = values
        done += sum(len(packs[rank][number]) for rank in range(world.size))
        report(done)
    return scores


def part_path(folder: Path, rank: int) -> Path:
    """Where a rank leaves its scores for the driver."""
    return folder / f".scores-{rank:05d}.npy"


def clear_parts(folder: Path) -> None:
    """Removes what an evaluation that was cut short has left."""
    for path in folder.glob(".scores-*.npy"):
        path.unlink()


def gather_parts(folder: Path) -> F32:
    """Merges and removes the parts of all ranks: (U, C)."""
    paths = sorted(folder.glob(".scores-*.npy"))
    merged = np.load(paths[0])
    for path in paths[1:]:
        part = np.load(path)
        merged = np.where(np.isnan(merged), part, merged)
    for path in paths:
        path.unlink()
    result: F32 = merged
    return result
