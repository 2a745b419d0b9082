"""The keys of a run: one frozen pydantic model for each section, one default and one line of meaning for each key.

Configuration objects stop at builders: functions below methods/ take plain values.
"""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, SerializeAsAny, create_model

from rec_dist.config.evaluate import EvaluateConfig
from rec_dist.config.plan import PlanConfig
from rec_dist.config.profile import ProfileConfig
from rec_dist.config.section import Section
from rec_dist.config.submit import SubmitConfig
from rec_dist.config.task import TaskConfig, outside_section_of, task_model, with_outside_section
from rec_dist.config.track import TrackConfig
from rec_dist.storage.files import Access

Auto = Literal["auto"]
_INT32 = 1 << 31  # larger than any count here, smaller than what overflows in numpy
if TYPE_CHECKING:
    _Task = TaskConfig
else:
    _Task = task_model()  # with the sections of the built-in methods, which a type checker cannot see
_Decay = Annotated[float, Field(ge=0, lt=1)]


def _no_bool(value: object) -> object:
    """Makes true invalid for a Literal of numbers, which would take it for 1."""
    return repr(value).lower() if isinstance(value, bool) else value


class DataConfig(Section):
    """The raw files, how `prepare` reads and splits them, and the prepared data set."""

    source: str | None = Field(
        None,
        description="Raw data: a known name (ml-100k, ml-1m, book-crossing), or a folder, file or URI. Only `prepare` reads it.",
    )
    format: Literal[
        "auto", "recbole", "movielens", "book_crossing", "amazon", "parquet", "csv", "preferences", "minionerec", "bear"
    ] = Field("auto", description="Format of the source.")
    category: str | None = Field(
        None, min_length=1, description="minionerec, bear: the category to read, where the folder holds several."
    )
    train_files: list[Literal["train", "valid"]] = Field(
        ["train"],
        min_length=1,
        description="minionerec, bear: files of the benchmark that hold the training data. Its test file is never among them.",
    )
    path: str = Field(description="The prepared data set, which `prepare` writes: a folder, or an s3://, gs:// or hdfs:// URI.")
    cache_dir: str | None = Field(None, description="Folder on each node for fetched files. None: ~/.cache/rec-dist/data.")
    cache_bytes: int = Field(
        64 << 30, ge=1, lt=1 << 62, description="Bytes of fetched shards that a node keeps. The least recently used go first."
    )
    split: Literal["leave_one_out", "global_temporal", "user_ratio"] = Field(
        "global_temporal",
        description="leave_one_out: the last item of each user is the test. global_temporal: one cut in time for "
        "all users. user_ratio: whole "
        "users are held out.",
    )
    valid_fraction: float = Field(
        0.1, ge=0, lt=1, description="Share of interactions (temporal) or users (user_ratio) for validation."
    )
    test_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of interactions (temporal) or users (user_ratio) for the test. 0, for user_ratio and benchmark files: "
        "no test split, for evaluate.questions.",
    )
    min_rating: float | None = Field(
        None, ge=-1e38, le=1e38, description="Interactions rated below this are explicit negatives. None: all are positives."
    )
    min_user_interactions: int = Field(5, ge=1, description="k-core: users with fewer positives are dropped.")
    min_item_interactions: int = Field(1, ge=1, description="k-core: items with fewer positives are dropped.")
    cold_items_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of items, drawn by hash, that the train and valid splits leave out: nobody has met them before the test.",
    )
    merge_equal_titles: bool = Field(
        True, description="Items with equal titles and years become one item. false: each keeps its identity."
    )
    clean_text: bool = Field(
        True,
        description="Titles and texts: decode HTML entities, drop zero-width characters, compose letters (NFC). Each is counted.",
    )
    max_bad_rows: int = Field(0, ge=0, description="`prepare` fails if more rows than this cannot be read.")
    num_shards: int = Field(2, ge=1, description="Arrow shards of each split.")
    prepare_on: Literal["auto", "memory", "disk", "ray"] = Field(
        "auto",
        description="memory: takes 0.3 GB for a million rows. disk, ray: bounded memory. auto: ray for sources "
        "from 128 MiB, else memory.",
    )
    access: Access = Field("owner", description="Who may enter the prepared folder: 0700, 0750 or 0755, whatever the umask is.")
    max_train_users: int | None = Field(
        None, ge=1, description="Few-shot: train on this many users, drawn by hash. None: all users."
    )
    columns: dict[str, str] = Field(default_factory=dict, description="csv, parquet, recbole: the column of each role.")


class PromptConfig(Section):
    """How a history becomes text. Each piece is tokenised on its own and only once, so training never tokenises."""

    style: Literal["list", "chat"] = Field(
        "list", description="list: a plain list that the completion continues. chat: the model's chat template."
    )
    instruction: str = Field("A user watched these movies, one after another:", description="First line of the prompt.")
    question: str = Field("Which movie does the user watch next?", description="chat only: the question after the history.")
    item_prefix: str = Field("\n-", description="Text before each title of the history and, in style list, before the answer.")
    end: str = Field("\n", description="Text that ends a completion. `<eos>` means the tokenizer's end-of-sequence token.")
    max_history: int = Field(10, ge=1, lt=_INT32, description="Number of most recent items in the prompt.")
    max_title_tokens: int = Field(
        64,
        ge=8,
        lt=_INT32,
        description="Tokens of a title, at most. Longer titles are cut on a word, counted, and stay distinct.",
    )
    special_tokens: Literal["split", "parse"] = Field(
        "split", description="Preference rows: a special token of the tokenizer in a text is text (split) or that token (parse)."
    )
    num_virtual: int = Field(
        0, ge=0, lt=_INT32, description="Number of soft prompt vectors. task.kind=delrec_distill trains them."
    )
    candidates: Literal["none", "listed"] = Field("none", description="listed: the prompt lists the candidates in random order.")
    num_candidates: int = Field(20, ge=2, lt=_INT32, description="candidates=listed: number of candidates, the answer included.")
    candidates_header: str = Field("\nThe next one is among:", description="candidates=listed: text before the list.")
    answer_header: str = Field("\nThe user's next movie:", description="candidates=listed: text after the list.")


class NegativesConfig(Section):
    """The K negatives of each target. Every draw is a pure function of (seed, epoch, user, position)."""

    kind: Literal["uniform", "popularity", "low_rated", "model"] = Field(
        "uniform",
        description="low_rated: the user's explicit negatives. If a user has too few, uniform draws fill up, and a "
        "warning counts such users. model: items that the run in negatives.model ranks high.",
    )
    model: str | None = Field(
        None, description="kind=model: finished run that ranks items for every training target, such as a recommender."
    )
    ranks: tuple[int, int] = Field(
        (10, 100),
        strict=False,
        description="kind=model: first and last rank, outside the history, of the items that negatives are drawn from. Earlier ones "
        "hold many false negatives.",
    )
    pool: int | None = Field(
        None,
        ge=1,
        description="kind=model: items drawn for each target that the run ranks. None: the whole catalogue, which a run that reads "
        "titles cannot rank.",
    )
    num: int = Field(3, ge=0, le=255, description="K, negatives for each target. SFT uses none.")
    popularity_power: float = Field(
        1.0, ge=0, description="kind=popularity: an item is drawn with probability proportional to train_count ** power."
    )
    refresh_each_epoch: bool = Field(
        False, description="Draw new negatives each epoch. With false, one cached reference serves all epochs."
    )


class ModelConfig(Section):
    """The language model."""

    path: str = Field(
        "smollm2-135m-instruct", description="A Hugging Face folder, a Hub id (org/name), or a known name that is fetched."
    )
    revision: str | None = Field(None, min_length=1, description="Branch, tag or commit of a Hub id. None: main.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that the model's folder or repository holds, with your rights. Read it first."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 where it is fast, else float32.")
    attention: Literal["auto", "flex", "per_prompt", "sdpa"] = Field(
        "auto",
        description="flex: FlexAttention, CUDA only. per_prompt: one prompt at a time. sdpa: SDPA with a dense mask. "
        "auto: the first of them that the model and the device support.",
    )
    fused_layers: Literal["auto", "liger", "none"] = Field(
        "auto",
        description="liger: RMSNorm, SwiGLU or GEGLU, and RoPE from liger-kernel, CUDA only. none: as transformers has them. "
        "auto: none, until liger is measured on a GPU.",
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute the layers in the backward pass: less memory, about 1/3 more work."
    )


class AdapterConfig(Section):
    """The weights that train on top of the model."""

    kind: Literal["lora", "soft_prompt", "none"] = Field(
        "lora", description="none: full fine-tuning. See task.kind for what each method needs."
    )
    rank: int = Field(8, ge=1, description="LoRA rank r.")
    alpha: float = Field(16.0, gt=0, description="LoRA scale: the update is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout. Above 0, results depend on how examples are packed.")
    target_modules: str | list[str] = Field("all-linear", description="Modules that get LoRA, in PEFT's names.")


class TrainConfig(Section):
    """The training loop."""

    run_dir: str = Field(description="Run directory. A stopped run is resumed, a finished one is kept; nothing is overwritten.")
    init_from: str | None = Field(None, description="Finished run directory whose adapter or model this run starts from.")
    epochs: int = Field(
        1, ge=1, lt=_INT32, description="Passes over the training targets. train.max_steps may end the run earlier."
    )
    max_steps: int | None = Field(None, ge=1, lt=_INT32, description="Optimizer steps. None: as many as the epochs take.")
    global_batch_size: int = Field(
        32,
        ge=1,
        lt=_INT32,
        description="Groups (kind=sequential: sequences) in one optimizer step, over all workers: an upper limit, "
        "because a user with fewer targets than targets_per_prompt gives a smaller example. A multiple of targets_per_prompt.",
    )
    targets_per_prompt: int = Field(
        1, ge=1, lt=_INT32, description="Targets of a user on one prompt; divides global_batch_size. prompt.style=list only."
    )
    max_tokens_per_micro_batch: int = Field(
        1024, ge=8, lt=_INT32, description="Tokens of one forward pass on one worker, at most."
    )
    dataloader_num_workers: int = Field(
        0, ge=0, le=64, description="Processes of each worker that draw and build batches ahead. 0: a thread, enough on CPUs."
    )
    shuffle_window: int | None = Field(
        None, ge=1, lt=_INT32, description="Examples that are shuffled together. None: the whole epoch."
    )
    seed: int = Field(0, ge=0, lt=1 << 32, description="Seed of the order, negatives, initial weights and dropout.")
    max_bad_steps: int = Field(
        3,
        ge=0,
        description="Steps in a row that may have a loss or gradient that is not finite: they are skipped. One "
        "more fails the run.",
    )
    access: Access = Field("owner", description="Who may enter a new run directory: 0700, 0750 or 0755, whatever the umask is.")
    log_every_steps: int = Field(1, ge=1, description="Steps between rows of metrics.jsonl.")


class OptimizerConfig(Section):
    """AdamW with a linear warm-up, then a constant, linear or cosine schedule. Both are a pure function of the step."""

    lr: float = Field(1e-4, gt=0, description="Peak learning rate.")
    betas: tuple[_Decay, _Decay] = Field((0.9, 0.999), strict=False, description="AdamW's decay rates.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="Schedule after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this global norm. 0: no clipping.")


class ClusterConfig(Section):
    """The workers and how they share the model."""

    launcher: Literal["ray", "local"] = Field("ray", description="ray: Ray Train workers. local: one worker, in this process.")
    num_workers: int | Auto = Field("auto", description="auto: one for each GPU; without GPUs one for each node, with all cores.")
    use_gpu: bool | Auto = Field("auto", description="auto: use GPUs if the cluster has any.")
    min_workers: int | None = Field(
        None,
        ge=1,
        description="ray, train: after nodes are lost, go on with as few workers as this, and grow back later. None: num_workers.",
    )
    cpus_per_worker: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto", description="CPU cores for each worker. auto: an equal share of the cluster's cores."
    )
    zero_stage: Annotated[Literal[0, 1, 2, 3] | Auto, BeforeValidator(_no_bool)] = Field(
        "auto", description="DeepSpeed ZeRO stage: what is sharded over the workers. auto: the smallest whose memory fits."
    )
    max_live_parameters: int = Field(
        1_000_000_000,
        ge=0,
        description="ZeRO stage 3: elements of other workers' shards that a worker may hold. Fewer take less memory and more gathers.",
    )
    hpz_partition_size: int = Field(
        1, ge=1, description="ZeRO stage 3: workers, such as a node's, that share a second copy of the weights. 1: no copy (hpZ)."
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="ray, train: restarts from the newest checkpoint after a worker fails. Two failures at one step end the run.",
    )
    hang_seconds: float = Field(
        1800.0,
        ge=0,
        le=1_000_000,  # the system's own waits take a little more than two million seconds
        description="Fail and dump stacks if a command makes no progress for this long. Choose more than starting, a model load, a "
        "step or a checkpoint takes. Also limits sbatch, kubectl and the job server. 0: never.",
    )
    node_wait_seconds: float = Field(
        60.0,
        ge=0,
        description="ray, train: after a failure, how long to wait for lost nodes before going on with fewer workers.",
    )
    address: str | None = Field(
        None, description="Address of the Ray cluster. None: RAY_ADDRESS, or, as `local`, one on this machine alone."
    )


class CheckpointConfig(Section):
    """When progress is saved, and where."""

    every_steps: int = Field(50, ge=1, description="Steps between checkpoints. The last step and a stop always save one.")
    keep: int = Field(2, ge=1, description="Number of newest checkpoints to keep.")
    asynchronous: bool = Field(
        False,
        description="Continue training while a checkpoint is written. Takes 12 bytes of host memory for each trainable weight.",
    )
    on_error: Literal["stop", "continue"] = Field(
        "stop", description="If the disk is full or fails while a checkpoint is written. stop: exit with code 1. continue: warn."
    )
    validation_examples: int = Field(
        0, ge=0, description="Validation examples (users' targets) whose loss is computed with each checkpoint. 0: none."
    )
    keep_best: Literal["none", "valid_loss"] = Field(
        "none", description="valid_loss: also keep the checkpoint with the lowest validation loss."
    )
    use_best: bool = Field(False, description="Save model/ from the best checkpoint instead of the last step.")
    remote: str | None = Field(
        None,
        description="train: place for a copy of the run directory, updated after every checkpoint: an s3://, gs:// "
        "or hdfs:// URI, or a folder. "
        "A run continues from it if train.run_dir does not exist.",
    )
    grace_seconds: float = Field(
        300.0,
        gt=0,
        description="After a stop request: how long the current step and its checkpoint may take before the run "
        "ends without them.",
    )


class RunConfig(Section):
    """One run: every key that `prepare`, `train`, `evaluate`, `profile`, `plan` and `submit` read."""

    data: DataConfig
    prompt: PromptConfig = Field(default_factory=lambda: PromptConfig())
    negatives: NegativesConfig = Field(default_factory=lambda: NegativesConfig())
    model: ModelConfig = Field(default_factory=lambda: ModelConfig())
    adapter: AdapterConfig = Field(default_factory=lambda: AdapterConfig())
    task: Annotated[_Task, BeforeValidator(with_outside_section), SerializeAsAny()] = Field(default_factory=lambda: _Task())
    train: TrainConfig
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig())
    cluster: ClusterConfig = Field(default_factory=lambda: ClusterConfig())
    checkpoint: CheckpointConfig = Field(default_factory=lambda: CheckpointConfig())
    evaluate: EvaluateConfig = Field(default_factory=lambda: EvaluateConfig())
    track: TrackConfig = Field(default_factory=lambda: TrackConfig())
    profile: ProfileConfig = Field(default_factory=lambda: ProfileConfig())
    plan: PlanConfig = Field(default_factory=lambda: PlanConfig())
    submit: SubmitConfig = Field(default_factory=lambda: SubmitConfig())

    _from_environment: dict[tuple[str, ...], Any] = PrivateAttr(default_factory=dict)

    @property
    def from_environment(self) -> dict[tuple[str, ...], Any]:
        """The keys whose text came from environment variables: key -> the text with its references (config/references.py)."""
        return self._from_environment


def schema_for(value: Mapping[str, Any]) -> type[RunConfig]:
    """RunConfig with the keys of the outside method that the mapping `value` selects, for code that walks the schema."""
    outside = outside_section_of(value.get("task"))
    return RunConfig if outside is None else _with_task(task_model(outside))


@cache
def _with_task(task: type[TaskConfig]) -> type[RunConfig]:
    return create_model("RunConfig", __base__=RunConfig, __doc__=RunConfig.__doc__, task=(task, Field(default_factory=task)))
