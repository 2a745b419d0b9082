"""A prompt with its branch points and the completions that branch off there, as token arrays. Batches are packed from these.

P prompt tokens, G groups, N completions, B completion rows, M scored tokens.
"""

from dataclasses import dataclass

import numpy as np

from rec_dist.runtime.arrays import F32, I32, I64


@dataclass(frozen=True)
class GroupedPrompt:
    """One prompt with its branch points and completions, ready to pack. G may be 0, for a prompt without completions."""

    tokens: I32  # (P,)
    branch_points: I32  # (G,) prompt position whose row predicts the first token of each completion of the group
    keys: I64  # (G,) identity of each group, for the reference cache and for results
    group_sizes: I32  # (G,) completions of each group, the chosen one first
    completion_inputs: I32  # (B,) completions without their last token, which predicts nothing
    input_lengths: I32  # (N,) C - 1; 0 if the prompt itself continues with the completion, so that its rows serve
    lengths: I32  # (N,) C >= 1: scored tokens of each completion
    targets: I32  # (M,) the whole completions
    margins: F32 | None = None  # (N,) by how much a completion's reward has to be below the chosen one's; None for 0

    @property
    def num_tokens(self) -> int:
        """Rows this prompt takes in a batch."""
        return len(self.tokens) + len(self.completion_inputs)

    @property
    def num_groups(self) -> int:
        """Groups on this prompt."""
        return len(self.branch_points)

    @property
    def num_scored(self) -> int:
        """Scored tokens M."""
        return len(self.targets)

    @property
    def num_logical_tokens(self) -> int:
        """Tokens of the same work if the prompt were repeated before each completion."""
        return int(np.dot(self.branch_points + 1, self.group_sizes)) + len(self.targets)
