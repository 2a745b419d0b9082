"""DELRec's two stages as methods: delrec_distill trains soft prompts, delrec a language model behind them."""

from dataclasses import replace

from rec_dist.config.schema import RunConfig
from rec_dist.errors import UserError
from rec_dist.methods.delrec.build import build_distill_task, check_settings
from rec_dist.methods.delrec.choice import delrec
from rec_dist.methods.delrec.config import DelrecConfig
from rec_dist.methods.delrec.distill import items_shown
from rec_dist.methods.delrec.prompts import FIRST_POSITION
from rec_dist.methods.initial_weights import InitialWeights, find_teacher
from rec_dist.methods.language_model.method import LanguageModelMethod, find_language_model
from rec_dist.methods.language_model.objective import Objective
from rec_dist.methods.language_model.ranker import LanguageModelRanker
from rec_dist.methods.method import PlannedPrompts
from rec_dist.methods.task import Task


class DelrecDistill:
    """Implements Method: stage 1."""

    name = "delrec_distill"
    section = ("delrec", DelrecConfig)
    ranker = LanguageModelRanker()

    def initial_weights(self, config: RunConfig) -> InitialWeights:
        """The language model, and the teacher unless its lists are random."""
        run_dir = config.task.section(DelrecConfig).teacher
        teacher = find_teacher(run_dir, kind=self.name, key="task.delrec.teacher", may_be_random=True)
        return replace(find_language_model(config), teacher=teacher)

    def build(self, config: RunConfig, initial: InitialWeights, device: str, *, split: str = "train") -> Task:
        """As Method.build, for split=train alone."""
        if split != "train":
            raise UserError("checkpoint.validation_examples: a teacher has no lists for validation rows; set it to 0")
        return build_distill_task(config, initial, device)

    def plan(self, config: RunConfig) -> PlannedPrompts:
        """One prompt for each objective of a group."""
        check_settings(config)
        shown = items_shown(config.task.section(DelrecConfig))
        return PlannedPrompts(
            config.negatives.num,
            needs_reference=False,
            prompts_per_group=len(shown),
            extra_items=sum(shown) / len(shown),
            first_target=FIRST_POSITION,
        )


class Delrec(LanguageModelMethod):
    """Stage 2: the true next item among negatives.num + 1 candidates."""

    name = "delrec"
    takes_preference_rows = False

    def objective(self, config: RunConfig, num_rejected: int) -> Objective:
        """The cross-entropy over the candidates."""
        return delrec(num_negatives=num_rejected)


DELREC_DISTILL, DELREC = DelrecDistill(), Delrec()
