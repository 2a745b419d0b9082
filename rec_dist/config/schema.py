"""What a run can be told: one frozen pydantic model a section, one default and one line of meaning a field.

Config objects stop at builders: below methods/ functions take plain values. Examples stand in the names or the descriptions.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from rec_dist.config.delrec import DelrecConfig
from rec_dist.config.p2rec import P2RecConfig
from rec_dist.config.section import Section
from rec_dist.config.submit import SubmitConfig
from rec_dist.config.track import TrackConfig

Auto = Literal["auto"]
_INT32 = 1 << 31  # above all that is counted, below what overflows in numpy
_Decay = Annotated[float, Field(ge=0, lt=1)]


def _no_bool(value: object) -> object:
    """A Literal of numbers takes true for 1."""
    return repr(value).lower() if isinstance(value, bool) else value


class DataConfig(Section):
    """Raw files in, prepared data set out."""

    source: str = Field(description="Raw data: a known name (ml-100k, ml-1m, book-crossing) or the folder or file of your own.")
    format: Literal["auto", "recbole", "movielens", "book_crossing", "amazon", "parquet", "csv", "preferences"] = Field(
        "auto", description="How to read the source."
    )
    path: str = Field(description="The prepared data set, written by `prepare`: a folder, or an s3://, gs:// or hdfs:// URI.")
    cache_dir: str | None = Field(None, description="Folder on each node for fetched files; None: ~/.cache/rec-dist/data.")
    cache_bytes: int = Field(64 << 30, ge=1, lt=1 << 62, description="Fetched shards a node keeps; oldest use goes first.")
    split: Literal["leave_one_out", "global_temporal", "user_ratio"] = Field(
        "global_temporal", description="leave_one_out: last item of each user tests. global_temporal: one cut in time for all."
    )
    valid_fraction: float = Field(
        0.1, ge=0, lt=1, description="Share of interactions (temporal) or users (user_ratio) for validation."
    )
    test_fraction: float = Field(
        0.1, gt=0, lt=1, description="Share of interactions (temporal) or users (user_ratio) for the test."
    )
    min_rating: float | None = Field(
        None, ge=-1e38, le=1e38, description="Interactions rated below this are dislikes, not choices. None: all are choices."
    )
    min_user_interactions: int = Field(5, ge=1, description="k-core: users with fewer choices are dropped.")
    min_item_interactions: int = Field(1, ge=1, description="k-core: items with fewer choices are dropped.")
    max_bad_rows: int = Field(0, ge=0, description="Rows that cannot be read: more than this many is an error.")
    num_shards: int = Field(2, ge=1, description="Arrow shards a split.")
    prepare_on: Literal["auto", "memory", "disk", "ray"] = Field(
        "auto", description="memory: 0.3 GB a million rows. disk, ray: in bounded memory. auto: ray from 128 MiB of source on."
    )
    max_train_users: int | None = Field(None, ge=1, description="Few-shot: train on this many users, drawn by hash. None: all.")
    columns: dict[str, str] = Field(default_factory=dict, description="csv, parquet, recbole: which column plays which role.")


class PromptConfig(Section):
    """How a history becomes text. Every piece is tokenised alone and once, so training never tokenises."""

    style: Literal["list", "chat"] = Field(
        "list", description="list: a plain list that goes on. chat: the model's chat template."
    )
    instruction: str = Field("A user watched these movies, one after another:", description="First line of the prompt.")
    question: str = Field("Which movie does the user watch next?", description="chat only: asked after the history.")
    item_prefix: str = Field("\n-", description="Stands before each title of the history, and before the answer in style list.")
    end: str = Field("\n", description="Ends a completion; `<eos>` means the tokenizer's end-of-sequence token.")
    max_history: int = Field(10, ge=1, lt=_INT32, description="Most recent items shown.")
    num_virtual: int = Field(0, ge=0, lt=_INT32, description="Soft prompt vectors; task.kind=delrec_distill trains them.")
    candidates: Literal["none", "listed"] = Field("none", description="listed: the candidates stand, shuffled, in the prompt.")
    num_candidates: int = Field(20, ge=2, lt=_INT32, description="candidates=listed: how many are listed, the answer included.")
    candidates_header: str = Field("\nThe next one is among:", description="candidates=listed: stands before the list.")
    answer_header: str = Field("\nThe user's next movie:", description="candidates=listed: stands after the list.")


class NegativesConfig(Section):
    """The K items a user did not choose. Every draw is a pure function of (seed, epoch, user, position)."""

    kind: Literal["uniform", "popularity", "low_rated"] = Field(
        "uniform", description="low_rated: items the user disliked; uniform ones fill up, with a warning that counts the users."
    )
    num: int = Field(3, ge=0, le=255, description="K, negatives a group. SFT uses none.")
    popularity_power: float = Field(1.0, ge=0, description="kind=popularity: draws with probability ~ train_count ** power.")
    refresh_each_epoch: bool = Field(
        False, description="New negatives each epoch; false lets a cached reference serve all epochs."
    )


class ModelConfig(Section):
    """The language model."""

    path: str = Field(
        "smollm2-135m-instruct", description="A Hugging Face folder, a Hub id (org/name), or a known name that is fetched."
    )
    revision: str | None = Field(None, min_length=1, description="Branch, tag or commit of a Hub id. None: main.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on GPUs, float32 on CPUs.")
    attention: Literal["auto", "flex", "per_prompt", "sdpa"] = Field(
        "auto",
        description="flex: FlexAttention, on CUDA only. per_prompt: SDPA one prompt at a time. sdpa: a dense mask. "
        "auto: the first that model and device take.",
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute layers in the backward pass: less memory, ~1/3 more work."
    )


class AdapterConfig(Section):
    """What trains on top of the model."""

    kind: Literal["lora", "soft_prompt", "none"] = Field("lora", description="none = full fine-tuning; see task.kind.")
    rank: int = Field(8, ge=1, description="LoRA rank r.")
    alpha: float = Field(16.0, gt=0, description="LoRA scale: updates are multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout; above 0 a run depends on how groups are packed.")
    target_modules: str | list[str] = Field("all-linear", description="Modules that get LoRA, as PEFT names them.")


class SequentialConfig(Section):
    """A sequential recommender with cross-entropy over the whole catalogue. A key of another model, once changed, is refused."""

    model: Literal["sasrec", "gru4rec", "caser"] = Field("sasrec", description="Which recommender trains.")
    width: int = Field(64, ge=1, description="Item embedding width.")
    num_layers: int = Field(2, ge=1, description="sasrec: transformer blocks; gru4rec: GRU layers.")
    num_heads: int = Field(2, ge=1, description="sasrec: attention heads; divides width.")
    state_width: int = Field(128, ge=1, description="gru4rec: width of the recurrent state.")
    window: int = Field(5, ge=1, description="caser: most recent items that the convolutions read; at most max_length.")
    num_horizontal: int = Field(16, ge=1, description="caser: horizontal filters of each height from 1 to window.")
    num_vertical: int = Field(4, ge=1, description="caser: vertical filters.")
    dropout: float = Field(0.2, ge=0, lt=1, description="Dropout in layers and embeddings.")
    max_length: int = Field(100, ge=2, lt=_INT32, description="Most recent items a sequence keeps.")
    num_sampled: int = Field(
        0, ge=0, description="Items drawn a step to estimate the softmax, for large catalogues; 0, or the catalogue's size: all."
    )
    top_h: int = Field(
        0,
        ge=0,
        description="Best items a training target, saved for distillation beside the item embeddings; 0: neither is saved.",
    )
    init_embeddings: str | None = Field(
        None,
        description="Folder that `embed` wrote: its vectors, reduced by PCA, are the item embeddings to start from. None: random.",
    )


class TaskConfig(Section):
    """The method."""

    kind: Literal["sft", "dpo", "dmpo", "sdpo", "delrec_distill", "delrec", "p2rec_reconstruct", "sequential"] = Field(
        "sft",
        description="Which method trains; delrec_distill needs adapter.kind=soft_prompt, p2rec_reconstruct lora, others lora or none.",
    )
    beta: float = Field(1.0, gt=0, description="Strength of the pull to the reference (dpo, dmpo, sdpo).")
    reference: Literal["cached", "online"] = Field("cached", description="cached: log-probs computed once and stored.")
    sequential: SequentialConfig = Field(default_factory=lambda: SequentialConfig(), description="kind=sequential only.")
    delrec: DelrecConfig = Field(default_factory=lambda: DelrecConfig(), description="kind=delrec_distill only.")
    p2rec: P2RecConfig = Field(default_factory=lambda: P2RecConfig(), description="kind=p2rec_reconstruct, and `embed`.")


class TrainConfig(Section):
    """The loop."""

    run_dir: str = Field(description="Run directory; a finished or stopped one is resumed, never overwritten.")
    init_from: str | None = Field(None, description="A finished run directory whose adapter or model this run starts from.")
    epochs: int = Field(1, ge=1, lt=_INT32, description="Passes over the training targets; train.max_steps may end earlier.")
    max_steps: int | None = Field(None, ge=1, lt=_INT32, description="Optimizer steps; None: as many as the epochs need.")
    global_batch_size: int = Field(
        32,
        ge=1,
        lt=_INT32,
        description="Global batch: at most so many groups (kind=sequential: sequences) an optimizer step, over all workers; a user "
        "with fewer targets than targets_per_prompt fills a smaller example.",
    )
    targets_per_prompt: int = Field(
        1, ge=1, lt=_INT32, description="Targets of one user that share one prompt (a timeline). Style list only."
    )
    max_tokens_per_micro_batch: int = Field(1024, ge=8, lt=_INT32, description="Tokens of one forward pass on one worker.")
    shuffle_window: int | None = Field(None, ge=1, lt=_INT32, description="Examples shuffled together; None: the whole epoch.")
    seed: int = Field(0, ge=0, lt=1 << 32, description="Of order, negatives, initial weights and dropout.")
    max_bad_steps: int = Field(
        3,
        ge=0,
        description="Steps in a row with a loss or gradient that is not finite that are left out; one more fails the run.",
    )
    log_every_steps: int = Field(1, ge=1, description="Steps between rows of metrics.jsonl.")


class OptimizerConfig(Section):
    """AdamW with linear warm-up and then a constant, linear or cosine schedule, all a pure function of the step."""

    lr: float = Field(1e-4, gt=0, description="Peak learning rate.")
    betas: tuple[_Decay, _Decay] = Field((0.9, 0.999), strict=False, description="AdamW's decay rates.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="After warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping by global norm; 0: none.")


class ClusterConfig(Section):
    """Where it runs."""

    launcher: Literal["ray", "local"] = Field("ray", description="ray: Ray Train workers. local: in this process, one worker.")
    num_workers: int | Auto = Field("auto", description="auto: every GPU; without GPUs two workers (one on a single core).")
    use_gpu: bool | Auto = Field("auto", description="auto: when the cluster has any.")
    min_workers: int | None = Field(
        None, ge=1, description="ray, train: go on with this many after nodes were lost, and grow back later. None: num_workers."
    )
    cpus_per_worker: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto", description="auto: the cluster's cores shared out evenly."
    )
    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_no_bool)] = Field(
        3, description="DeepSpeed ZeRO stage: what is sharded over the workers."
    )
    max_live_parameters: int = Field(
        1_000_000_000,
        ge=0,
        description="ZeRO stage 3: elements of other workers' shards a worker may hold. Smaller: less memory, and layers are gathered "
        "once more for the backward pass.",
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="ray, train: restarts from the newest checkpoint after a worker failed; twice at one step is the end.",
    )
    hang_seconds: float = Field(
        1800.0,
        ge=0,
        description="train: no worker got on for so long is a failure, told with all stacks; longer than a model load, a step or a "
        "checkpoint takes. 0: never.",
    )
    node_wait_seconds: float = Field(
        60.0,
        ge=0,
        description="ray, train: after a failure, how long lost nodes may take to come back before fewer workers go on.",
    )
    address: str | None = Field(None, description="Ray address; None: RAY_ADDRESS or a cluster of this machine alone.")


class CheckpointConfig(Section):
    """When progress is saved."""

    every_steps: int = Field(50, ge=1, description="Steps between checkpoints; the last step and a stop are always saved.")
    keep: int = Field(2, ge=1, description="Newest checkpoints kept.")
    asynchronous: bool = Field(
        False, description="Train on while a checkpoint is written; takes 12 bytes of host memory a trainable weight."
    )
    on_error: Literal["stop", "continue"] = Field(
        "stop", description="When the disk is full or fails under a checkpoint. stop: exit code 1. continue: a warning."
    )
    validation_examples: int = Field(
        0, ge=0, description="Validation examples (users' targets) whose loss is taken with each checkpoint; 0: none."
    )
    keep_best: Literal["none", "valid_loss"] = Field(
        "none", description="valid_loss: the checkpoint of lowest validation loss is kept besides the newest."
    )
    use_best: bool = Field(False, description="model/ is saved from the best checkpoint, not from the last step.")
    remote: str | None = Field(
        None,
        description="train: a copy of the run directory, brought up to date after every checkpoint, from which a run goes on where "
        "train.run_dir is not there: an s3://, gs:// or hdfs:// URI, or a folder.",
    )
    grace_seconds: float = Field(
        300.0,
        gt=0,
        description="After a stop was asked for: how long the step and its checkpoint may take before it ends without.",
    )


class EvaluateConfig(Section):
    """How ranking is measured."""

    split: Literal["valid", "test"] = Field("test", description="Which rows.")
    ranker: Literal["model", "popularity"] = Field("model", description="The run's (or base) model, or the popularity floor.")
    num_candidates: int | Literal["all"] = Field(20, description="1 target + the rest drawn by hash; all: the whole catalogue.")
    max_users: int | None = Field(None, ge=1, description="Users evaluated, drawn by hash. None: all.")
    seed: int = Field(
        0, ge=0, lt=1 << 32, description="Of candidates and of the users drawn. Shared by all models of a comparison."
    )
    output_dir: str | None = Field(None, description="Where results go; None: the run directory, or <run_dir>-base for a CONFIG.")


class ProfileConfig(Section):
    """How `rec-dist profile` measures. Nothing here touches a run."""

    warmup_steps: int = Field(3, ge=1, lt=1 << 30, description="Steps before those that count: compilation, caches, allocator.")
    steps: int = Field(10, ge=1, lt=1 << 30, description="Steps that count, with real data and again with random tokens.")
    trace_ranks: list[int] = Field(
        default_factory=lambda: [0], description="Ranks that write a Chrome trace of one more step: trace-rank-N.json."
    )
    memory_snapshot: bool = Field(
        False,
        description="Also write the CUDA allocator's history of that step: memory-rank-N.pickle, for pytorch.org/memory_viz.",
    )
    output_dir: str | None = Field(None, description="Where results go; None: <run_dir>-profile.")


class PlanConfig(Section):
    """What `rec-dist plan` reckons with. Nothing here touches a run."""

    cluster: str | None = Field(None, description="Cluster file, such as configs/clusters/8xh100.yaml; plan needs one.")
    model: str | None = Field(None, description="Folder whose config.json is planned with; None: model.path.")
    prompt_tokens: float | None = Field(
        None, ge=1, description="Mean tokens of a prompt; None: 16 + prompt.num_virtual + items shown * plan.completion_tokens."
    )
    completion_tokens: float = Field(10.0, gt=1, description="Mean tokens of a title with what frames it.")
    overlap: float = Field(0.5, ge=0, le=1, description="Share of ZeRO-3's gathers that hides behind compute: an assumption.")
    margin: float = Field(0.08, ge=0, lt=1, description="Share added to torch's memory for fragmentation: an assumption.")


class RunConfig(Section):
    """One run: everything that `prepare`, `train`, `evaluate`, `profile`, `plan` and `submit` read."""

    data: DataConfig
    prompt: PromptConfig = Field(default_factory=lambda: PromptConfig())
    negatives: NegativesConfig = Field(default_factory=lambda: NegativesConfig())
    model: ModelConfig = Field(default_factory=lambda: ModelConfig())
    adapter: AdapterConfig = Field(default_factory=lambda: AdapterConfig())
    task: TaskConfig = Field(default_factory=lambda: TaskConfig())
    train: TrainConfig
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig())
    cluster: ClusterConfig = Field(default_factory=lambda: ClusterConfig())
    checkpoint: CheckpointConfig = Field(default_factory=lambda: CheckpointConfig())
    evaluate: EvaluateConfig = Field(default_factory=lambda: EvaluateConfig())
    track: TrackConfig = Field(default_factory=lambda: TrackConfig())
    profile: ProfileConfig = Field(default_factory=lambda: ProfileConfig())
    plan: PlanConfig = Field(default_factory=lambda: PlanConfig())
    submit: SubmitConfig = Field(default_factory=lambda: SubmitConfig())
