"""The bytes of one device, part by part. Pure formulas of plain numbers; docs/planning.md derives them.

Letters: T rows of a micro-batch, h width, i inner width of the MLP, q = heads * head width, k = kv heads * head width,
b bytes a number.
"""

from dataclasses import dataclass, replace

from rec_dist.models.flex import padded_length
from rec_dist.models.known_decoders import Architecture, Parameters

_MIB = 1 << 20
_HEAD_GPU, _HEAD_CPU = 256 * _MIB, 3 * 64 * _MIB  # rec_dist_kernels: one chunk in place on GPUs; three in plain PyTorch
_MASK_ROWS, _MASK_COPIES = 1024, 6  # rows that models/flex.py makes at once; booleans alive at the same time


@dataclass(frozen=True)
class Zero:
    """What engine/settings.py configures in DeepSpeed, in elements. stage: 0 to 3."""

    stage: int
    persistence: int = 0  # parameters up to this size stay whole on every rank
    reuse: int = 0  # a gathered parameter stays if its next use is within this many elements
    prefetch: int = 0
    bucket: int = 0  # of gradients

    def within(self, live: int) -> "Zero":
        """The same with at most `live` elements kept or prefetched (engine/settings.py)."""
        return replace(self, reuse=min(self.reuse, live), prefetch=min(self.prefetch, live))


@dataclass(frozen=True)
class Setup:
    """Everything that decides the memory of a device.

    element: bytes a number (2 bfloat16, 4 float32). rank: of the adapter, or 0.
    reference: none, cached or online; if online, every micro-batch is scored once more just before it trains.
    soft_prompt: only vectors before the layers train.
    """

    shape: Architecture
    parameters: Parameters
    zero: Zero
    workers: int
    element: int
    max_tokens: int
    attention: str  # flex, per_prompt or sdpa
    checkpointing: bool
    rank: int
    on_gpu: bool
    reference: str = "none"
    soft_prompt: bool = False

    @property
    def flex(self) -> bool:
        """Whether attention is FlexAttention."""
        return self.attention == "flex"

    @property
    def rows(self) -> int:
        """Rows of the largest micro-batch; FlexAttention pads to whole blocks."""
        return padded_length(0, self.max_tokens) if self.flex else self.max_tokens


def shard(elements: int, workers: int) -> int:
    """Elements of a parameter that one worker holds: equal parts, the last one padded."""
    return -(-elements // workers)


def held_parameters(parameters: Parameters, zero: Zero, workers: int) -> int:
    """Elements that a rank holds between steps: all below stage 3; from there a shard of each, but persistent ones whole."""
    if zero.stage < 3:
        return parameters.total
    return sum(size if size <= zero.persistence else shard(size, workers) for size in parameters.sizes)


def persistent_shards(parameters: Parameters, zero: Zero, workers: int) -> int:
    """Elements of the shards that persistent parameters have in addition to their whole copies."""
    if zero.stage < 3:
        return 0
    return sum(shard(size, workers) for size in parameters.sizes if size <= zero.persistence)


def gathered_sizes(parameters: Parameters, zero: Zero) -> list[int]:
    """Elements of each parameter that stage 3 gathers, in the order of use; a tied head is used again at the end."""
    if zero.stage < 3:
        return []
    sizes = [size for size in parameters.sizes if size > zero.persistence]
    return [*sizes, parameters.head] if parameters.tied and parameters.head > zero.persistence else sizes


def kept_elements(sizes: list[int], zero: Zero, *, tied: bool) -> int:
    """Elements that stay gathered from the forward pass to the backward pass.

    The last modules stay, as long as what lies between their two uses (everything after them, twice) is below the reuse distance.
    """
    kept = 0
    for size in reversed(sizes):
        if 2 * kept >= zero.reuse:
            break
        kept += size
    whole = sum(sizes) - (sizes[-1] if tied and sizes else 0)
    return min(kept, whole)


def live_elements(parameters: Parameters, zero: Zero) -> int:
    """Most elements gathered at once: what is kept for the backward pass or the largest module, and the prefetched ones."""
    sizes = gathered_sizes(parameters, zero)
    if not sizes:
        return 0
    tied = parameters.tied and parameters.head > zero.persistence
    whole = sum(sizes) - (parameters.head if tied else 0)
    return min(max(kept_elements(sizes, zero, tied=tied), max(sizes)) + zero.prefetch, whole)


def gradient_bytes(setup: Setup) -> int:
    """Below stage 2 whole and in the run's dtype; from there a float32 share, because micro-batches are summed in float32.

    Soft prompts add the sum of each objective in float32 (models/soft_prompt.py).
    """
    trainable = setup.parameters.trainable
    of_objectives = 2 * 4 * trainable if setup.soft_prompt else 0
    return of_objectives + (trainable * setup.element if setup.zero.stage < 2 else shard(trainable, setup.workers) * 4)


def optimizer_bytes(setup: Setup) -> int:
    """AdamW's two moments in float32, and a float32 copy of what trains unless the weights are float32 and not flattened."""
    copy = 0 if setup.element == 4 and setup.zero.stage in (0, 3) else 4
    elements = setup.parameters.trainable if setup.zero.stage == 0 else shard(setup.parameters.trainable, setup.workers)
    return elements * (8 + copy)


def layer_bytes(setup: Setup) -> int:
    """What one layer keeps for its backward pass, for T rows; a row costs

        norms       2 * (4h + bh + 4)  the float32 input of each and its scale, and the output, which the matrices multiply
        attention   b * (2q + 2s)      queries and output, keys and values (s); + 4 a head for its normaliser
        MLP         4 * b * i          gate, its activation, up, their product
        adapter     b * rank           a module that has one
        full        2 * bh             fine-tuning of all weights: the normalised input of each norm's weight

    With soft prompts no matrix trains, so none keeps its input: the norms' output, the MLP's product, the full term and the
    second copy of the output below drop out.

    s = k under FlexAttention. With a dense mask keys and values are repeated to s = q, and each layer holds the mask as numbers,
    b * T a row. Prompt by prompt s is k on a CPU and q on a GPU, and a second, joined copy of the output costs b * q. This equals,
    byte for byte, what autograd saves on a CPU (tests/unit/test_planning_memory.py).
    """
    shape, b, rows = setup.shape, setup.element, setup.rows
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inputs = not setup.soft_prompt  # kept for the gradient of a matrix: its own or its adapter's
    norms = 2 * ((4 + b * inputs) * shape.width + 4)
    shared = setup.flex or (setup.attention == "per_prompt" and not setup.on_gpu)
    attention = (
        b * (2 * q + 2 * (k if shared else q)) + 4 * shape.heads + (b * q if setup.attention == "per_prompt" and inputs else 0)
    )
    mask = b * rows if setup.attention == "sdpa" else 0
    mlp = (3 + inputs) * b * shape.inner
    extra = b * setup.rank * setup.parameters.adapted // shape.layers if setup.rank else 2 * b * shape.width * inputs
    return rows * (norms + attention + mask + mlp + extra)


def activation_bytes(setup: Setup) -> int:
    """Of all layers (with checkpointing only the input of each, and one layer whole), and of the last norm."""
    shape, b = setup.shape, setup.element
    inputs = shape.layers * setup.rows * shape.width * b
    layers = inputs + layer_bytes(setup) if setup.checkpointing else shape.layers * layer_bytes(setup)
    return layers + setup.rows * (4 + b) * shape.width


def backward_bytes(setup: Setup) -> int:
    """Gradients that pass through one layer: three of the MLP's inner width and two of the width."""
    return setup.rows * setup.element * (3 * setup.shape.inner + 2 * setup.shape.width)


def head_bytes(setup: Setup) -> int:
    """Chunks of logits, at most those of all rows; the gradient of the hidden rows; in float32 that of the head if it trains."""
    whole = 4 * setup.rows * setup.shape.vocabulary
    chunk = min(_HEAD_GPU, whole) if setup.on_gpu else min(_HEAD_CPU, 3 * whole)
    trains = setup.parameters.work is not None and setup.parameters.work.head_trains
    return chunk + setup.rows * setup.shape.width * setup.element + (4 * setup.parameters.head if trains else 0)


def bucket_elements(setup: Setup) -> int:
    """The whole bucket on a GPU; on a CPU, pages that no gradient touches take no memory."""
    return setup.zero.bucket if setup.on_gpu else min(setup.zero.bucket, setup.parameters.trainable)


def mask_bytes(setup: Setup) -> int:
    """Booleans while the mask is built: a band of rows under FlexAttention, else all pairs of one prompt of T rows."""
    return setup.rows * (_MASK_ROWS if setup.flex else setup.rows) * _MASK_COPIES


def memory(setup: Setup, *, reserved: float, margin: float) -> dict[str, float]:
    """Bytes of each part; a device needs their sum. margin: share of all that torch allocates, added for fragmentation."""
    zero, b = setup.zero, setup.element
    held = held_parameters(setup.parameters, zero, setup.workers) + persistent_shards(setup.parameters, zero, setup.workers)
    parts: dict[str, float] = {
        "parameters": held * b,
        "gradients": gradient_bytes(setup),
        "optimizer state": optimizer_bytes(setup),
        # One worker gathers nothing: its shard is the whole parameter.
        "gathered layers": live_elements(setup.parameters, zero) * b if setup.workers > 1 else 0,
        "gradient bucket": bucket_elements(setup) * b,
        "activations": activation_bytes(setup),
        "backward of a layer": backward_bytes(setup),
        "head": head_bytes(setup),
        "mask": mask_bytes(setup),
    }
    parts["fragmentation"] = margin * sum(parts.values())
    parts["reserved"] = reserved
    return parts
