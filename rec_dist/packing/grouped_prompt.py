"""A prompt: one prompt, the completion points on it and the completions that completion off, as token arrays. What a batch is packed from.

P prompt tokens, G groups, N completions, B completion rows, M scored tokens.
"""

from dataclasses import dataclass

import numpy as np

from rec_dist.runtime.arrays import I32, I64


@dataclass(frozen=True)
class GroupedPrompt:
    """One prompt with its completion points, ready to micro-batch. G may be 0: a prompt that nothing is scored behind."""

    tokens: I32  # (P,)
    branch_points: I32  # (G,) prompt position whose row predicts the first token of the group's completions
    keys: I64  # (G,) identity of each target, for the reference cache and for results
    group_sizes: I32  # (G,) completions of each group, the chosen one first
    completion_inputs: I32  # (B,) completions without their last token, which nothing reads
    input_lengths: I32  # (N,) C - 1; 0 where the prompt itself reads on with the completion, whose rows then serve
    lengths: I32  # (N,) C >= 1: scored tokens of each completion
    targets: I32  # (M,) completions whole

    @property
    def num_tokens(self) -> int:
        """Rows this prompt takes in a batch."""
        return len(self.tokens) + len(self.completion_inputs)

    @property
    def num_groups(self) -> int:
        """Targets on this prompt."""
        return len(self.branch_points)

    @property
    def num_scored(self) -> int:
        """Scored tokens M."""
        return len(self.targets)

    @property
    def num_logical_tokens(self) -> int:
        """Tokens of the same work with every prompt written out before each of its completions."""
        return int(np.dot(self.branch_points + 1, self.group_sizes)) + len(self.targets)
