"""P2Rec's stage 1 as a method. Stage 2 is `rec-dist embed`, stage 3 a sequential recommender that starts from those vectors."""

from dataclasses import replace

from rec_dist.config.schema import RunConfig
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights, find_teacher
from rec_dist.methods.language_model.method import find_language_model
from rec_dist.methods.language_model.ranker import LanguageModelRanker
from rec_dist.methods.method import PlannedPrompts
from rec_dist.methods.p2rec.build import build_reconstruct_task
from rec_dist.methods.p2rec.config import P2RecConfig
from rec_dist.methods.task import Task


class P2RecReconstruct:
    """Implements Method."""

    name = "p2rec_reconstruct"
    section = ("p2rec", P2RecConfig)
    ranker = LanguageModelRanker()

    def initial_weights(self, config: RunConfig) -> InitialWeights:
        """The language model and the teacher."""
        run_dir = config.task.section(P2RecConfig).teacher
        teacher = find_teacher(run_dir, kind=self.name, key="task.p2rec.teacher", may_be_random=False)
        return replace(find_language_model(config), teacher=teacher)

    def build(self, config: RunConfig, initial: InitialWeights, device: str, *, split: str = "train") -> Task:
        """As Method.build, for split=train alone."""
        if split != "train":
            raise UserError(
                "checkpoint.validation_examples: what users prefer is known for their training part alone; set it to 0"
            )
        return build_reconstruct_task(config, initial, device)

    def plan(self, config: RunConfig) -> PlannedPrompts:
        """Raises UserError: nothing is scored after the prompt."""
        raise UserError(
            f"task.kind={self.name} has no completions to count; plan it with task.kind=sft and train.max_steps = epochs * users "
            "/ train.global_batch_size: the same model, adapter and prompts, and the work of the head besides"
        )


P2REC_RECONSTRUCT = P2RecReconstruct()
