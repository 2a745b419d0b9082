"""The packed batch: many prompts and their completions as one flat run of tokens, without padding and without a batch axis.

T batch rows, G groups, N completions, M scored tokens. A prompt of P tokens with N completions of C tokens costs P + N(C - 1)
rows, against N(P + C) if the prompt is repeated for each: 3.8x less at P=512, C=10, N=4, and 12.7x at N=16.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.transfer import to_device
from rec_dist.runtime.arrays import I64
from rec_dist_kernels import AllowedPlan, HeadPlan, plan_groups


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch; models/attention.py says which rows see each other. `weights` is 0 only in a dummy batch."""

    input_ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64: 0..P-1 in a prompt; a completion continues after its branch point
    prompt_ids: Tensor  # (T,) int64: which prompt a row belongs to
    completion_ids: Tensor  # (T,) int64: which completion, or -1 in a prompt
    limits: Tensor  # (T,) int64: last prompt position a row sees: its own, or the branch point of its completion
    rows: Tensor  # (M,) int64: the row that predicts each scored token (the branch point's row for the first of a completion)
    targets: Tensor  # (M,) int64: scored token ids
    completion_offsets: Tensor  # (N+1,) int64 into rows and targets
    group_offsets: Tensor  # (G+1,) int64 into completions; the first completion of a group is the positive
    keys: Tensor  # (G,) int64: identity of each group
    weights: Tensor  # (G,) float32
    reference_logps: Tensor  # (N,) float32, zeros if no reference is needed
    sizes: I64  # (prompts, 2), on the host: the rows of each prompt and those of its completions
    num_logical_tokens: int
    plan: HeadPlan  # of rows, for the head: made with the batch, because on a device the host would wait to learn its chunks
    margins: Tensor | None = None  # (N,) float32: as in GroupedPrompt, None if no prompt has any
    allowed: AllowedPlan | None = None  # which words each scored token competes with; None: the vocabulary

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    @property
    def num_groups(self) -> int:
        """Groups that count: 0 in a dummy batch."""
        return int((self.weights > 0).sum())

    @property
    def completion_weights(self) -> Tensor:
        """(N,): the weight of each completion's group."""
        return self.weights.repeat_interleave(self.group_offsets.diff(), output_size=len(self.reference_logps))

    def to(self, device: str) -> "PackedBatch":
        """The same batch on `device`: one copy that the host does not wait for."""
        return to_device(self, device)

    def padded_to(self, length: int, *, joined: bool = False) -> "PackedBatch":
        """The same batch with padding rows up to `length`, which are not scored.

        Each is a prompt of its own that sees only itself; joined: together they are one prompt, one piece of work for attention
        that goes prompt by prompt.
        """
        missing = length - self.num_tokens
        assert missing >= 0, f"a batch of {self.num_tokens} rows does not fit into {length}"
        if not missing:
            return self
        zeros = self.positions.new_zeros(missing)
        count = torch.arange(missing, device=zeros.device)
        positions, prompts = (count, zeros) if joined else (zeros, count)
        return replace(
            self,
            input_ids=torch.cat([self.input_ids, zeros]),
            positions=torch.cat([self.positions, positions]),
            prompt_ids=torch.cat([self.prompt_ids, prompts + self.prompt_ids[-1] + 1]),
            completion_ids=torch.cat([self.completion_ids, zeros - 1]),
            limits=torch.cat([self.limits, positions]),
            sizes=np.concatenate([self.sizes, [[missing, 0]] if joined else np.tile([[1, 0]], (missing, 1))]),
        )

    def with_random_tokens(self, vocab_size: int, generator: np.random.Generator) -> "PackedBatch":
        """The same batch with random token ids from 0..vocab_size-1: the same cost with other contents."""
        fed, scored = (generator.integers(0, vocab_size, len(ids)) for ids in (self.input_ids, self.targets))
        return replace(self, input_ids=torch.from_numpy(fed), targets=torch.from_numpy(scored))

    def with_reference(self, logps: Tensor) -> "PackedBatch":
        """The same batch with reference log-probs (N,)."""
        return replace(self, reference_logps=logps.to(self.reference_logps))


def pack_prompts(prompts: list[GroupedPrompt]) -> PackedBatch:
    """Concatenates prompts, each followed by its completions. Vectorised; about 5 us a completion."""
    prompt_lengths = np.asarray([len(t.tokens) for t in prompts])
    completion_counts = np.asarray([len(t.input_lengths) for t in prompts])
    input_sums = np.asarray([len(t.completion_inputs) for t in prompts])
    starts = np.concatenate([[0], np.cumsum(prompt_lengths + input_sums)])  # (U+1,)
    total = int(starts[-1])
    lengths = np.concatenate([t.input_lengths for t in prompts]).astype(np.int64)  # (N,)
    group_sizes = np.concatenate([t.group_sizes for t in prompts]).astype(np.int64)  # (G,)
    branch_points = np.repeat(np.concatenate([t.branch_points for t in prompts]).astype(np.int64), group_sizes)  # (N,)
    owner = np.repeat(np.arange(len(prompts)), completion_counts)  # (N,) prompt of each completion

    inputs_before = np.concatenate([[0], np.cumsum(lengths)])  # (N+1,) completion tokens before each completion, over all prompts
    prompt_inputs_before = np.cumsum(input_sums) - input_sums
    completion_starts = starts[owner] + prompt_lengths[owner] + inputs_before[:-1] - prompt_inputs_before[owner]  # (N,) rows
    completion_rows = np.repeat(completion_starts - inputs_before[:-1], lengths) + np.arange(inputs_before[-1])  # (B,)
    within = completion_rows - np.repeat(completion_starts, lengths)  # (B,) 0-based position in its completion
    branch_point_of_row = np.repeat(branch_points, lengths)

    input_ids, positions = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
    completion_ids = np.full(total, -1, dtype=np.int64)
    prompt_ids = np.repeat(np.arange(len(prompts)), prompt_lengths + input_sums)
    prompt_rows = np.repeat(starts[1:] - input_sums - np.cumsum(prompt_lengths), prompt_lengths) + np.arange(prompt_lengths.sum())
    input_ids[prompt_rows] = np.concatenate([t.tokens for t in prompts])
    input_ids[completion_rows] = np.concatenate([t.completion_inputs for t in prompts])
    positions[prompt_rows] = prompt_rows - np.repeat(starts[:-1], prompt_lengths)
    positions[completion_rows] = branch_point_of_row + 1 + within
    limits = positions.copy()
    limits[completion_rows] = branch_point_of_row
    completion_ids[completion_rows] = np.repeat(np.arange(len(lengths)), lengths)

    # The branch point's row predicts the first scored token. Completion row j - 1 predicts token j, or, if the prompt itself
    # continues with the completion, the prompt row j after the branch point.
    scored = np.concatenate([t.lengths for t in prompts]).astype(np.int64)  # (N,)
    completion_offsets = np.concatenate([[0], np.cumsum(scored)])
    branch_point_rows = starts[owner] + branch_points
    along_prompt = lengths < scored - 1
    rows = np.repeat(np.where(along_prompt, branch_point_rows, completion_starts - 1) - completion_offsets[:-1], scored)
    rows += np.arange(len(rows))
    rows[completion_offsets[:-1]] = branch_point_rows
    group_offsets = np.concatenate([[0], np.cumsum(group_sizes)])
    scoring = [torch.from_numpy(array) for array in (rows, completion_offsets, group_offsets)]
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        positions=torch.from_numpy(positions),
        prompt_ids=torch.from_numpy(prompt_ids),
        completion_ids=torch.from_numpy(completion_ids),
        limits=torch.from_numpy(limits),
        rows=scoring[0],
        targets=torch.from_numpy(np.concatenate([t.targets for t in prompts]).astype(np.int64)),
        completion_offsets=scoring[1],
        group_offsets=scoring[2],
        keys=torch.from_numpy(np.concatenate([t.keys for t in prompts])),
        weights=torch.ones(len(group_sizes)),
        reference_logps=torch.zeros(len(lengths)),
        sizes=np.stack([prompt_lengths, input_sums], axis=1),
        num_logical_tokens=int((branch_points + 1).sum()) + len(rows),
        plan=plan_groups(*scoring),
        margins=_margins(prompts),
    )


def _margins(prompts: list[GroupedPrompt]) -> Tensor | None:
    if all(prompt.margins is None for prompt in prompts):
        return None
    parts = [np.zeros(len(p.lengths), dtype=np.float32) if p.margins is None else p.margins for p in prompts]
    return torch.from_numpy(np.concatenate(parts))


def dummy_batch(num_negatives: int) -> PackedBatch:
    """The smallest batch, of weight 0, for a rank with nothing to do: every rank must run the same collectives."""
    size = 1 + num_negatives
    prompt = GroupedPrompt(
        tokens=np.zeros(1, dtype=np.int32),
        branch_points=np.zeros(1, dtype=np.int32),
        keys=np.asarray([-1], dtype=np.int64),
        group_sizes=np.asarray([size], dtype=np.int32),
        completion_inputs=np.empty(0, dtype=np.int32),
        input_lengths=np.zeros(size, dtype=np.int32),
        lengths=np.ones(size, dtype=np.int32),
        targets=np.zeros(size, dtype=np.int32),
    )
    return replace(pack_prompts([prompt]), weights=torch.zeros(1), num_logical_tokens=0)
