"""Builds P2Rec's stage 1 from a configuration: checks the settings and clusters the teacher's embeddings into categories."""

from rec_dist.config.schema import RunConfig
from rec_dist.data.artifacts.teacher import read_teacher
from rec_dist.data.dataset.prepared_data import open_data
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.language_model.builders import build_batch_sampler, build_builder, model_spec
from rec_dist.methods.language_model.limits import check_evaluation
from rec_dist.methods.p2rec.categories import item_categories, shuffled
from rec_dist.methods.p2rec.config import P2RecConfig
from rec_dist.methods.p2rec.reconstruct import UserExamples, reconstruct_task
from rec_dist.methods.task import Task
from rec_dist.models.shape import read_shape


def build_reconstruct_task(config: RunConfig, initial: InitialWeights, device: str) -> Task:
    """The task on the training split of data.path. Raises UserError for anything that would fail later."""
    _check_settings(config)
    data, settings = open_data(config.data), config.task.section(P2RecConfig)
    assert initial.teacher is not None
    embeddings = read_teacher(initial.teacher, data_fingerprint=data.manifest.fingerprint).embeddings
    seed, counts = config.train.seed, data.train_counts
    categories = item_categories(embeddings, counts, num_categories=settings.num_categories, seed=seed)
    if settings.shuffle_categories:
        categories = shuffled(categories, counts, seed=seed)
    split = data.split("train")
    builder = build_builder(config, initial.model, data)
    shape = read_shape(initial.model, trust_remote_code=config.model.trust_remote_code)
    examples = UserExamples(data, split, builder, categories, settings.num_categories, settings.pooling)
    sampler = build_batch_sampler(config, max(len(split), 1))
    examples.check(sampler, max_tokens=config.train.max_tokens_per_micro_batch, max_positions=shape.max_positions)
    check_evaluation(config, builder, data)
    spec = model_spec(config, initial, builder, device, trains=True)
    return reconstruct_task(spec, examples, sampler=sampler, width=shape.width, loss=settings.loss)


def _check_settings(config: RunConfig) -> None:
    kind = config.adapter.kind
    faults = {
        f"adapter.kind={kind} is not offered here; set adapter.kind=lora": kind != "lora",
        "prompt.candidates=listed has no effect, since nothing is chosen here; set prompt.candidates=none": (
            config.prompt.candidates == "listed"
        ),
        f"train.targets_per_prompt ({config.train.targets_per_prompt}) has no effect on one prompt a user; remove it": (
            config.train.targets_per_prompt != 1
        ),
    }
    for fault, found in faults.items():
        if found:
            raise UserError(f"task.kind=p2rec_reconstruct: {fault}")
