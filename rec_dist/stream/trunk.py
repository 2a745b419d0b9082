"""A trunk: one prompt, the forks on it and the completions that branch off, as token arrays. What a stream is packed from.

P trunk tokens, G groups, N completions, B branch rows, M scored tokens.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Trunk:
    """One prompt with its forks, ready to pack. G may be 0: a prompt that nothing is scored behind."""

    tokens: I32  # (P,)
    forks: I32  # (G,) trunk position whose row predicts the first token of the group's completions
    keys: I64  # (G,) identity of each target, for the reference cache and for results
    group_sizes: I32  # (G,) completions of each group, the chosen one first
    branch_tokens: I32  # (B,) completions without their last token, which nothing reads
    branch_lengths: I32  # (N,) C - 1; 0 where the trunk itself reads on with the completion, whose rows then serve
    lengths: I32  # (N,) C >= 1: scored tokens of each completion
    targets: I32  # (M,) completions whole

    @property
    def num_tokens(self) -> int:
        """Rows this trunk takes in a stream."""
        return len(self.tokens) + len(self.branch_tokens)

    @property
    def num_groups(self) -> int:
        """Targets on this trunk."""
        return len(self.forks)

    @property
    def num_scored(self) -> int:
        """Scored tokens M."""
        return len(self.targets)

    @property
    def num_logical_tokens(self) -> int:
        """Tokens of the same work with every prompt written out before each of its completions."""
        return int(np.dot(self.forks + 1, self.group_sizes)) + len(self.targets)
