"""Random prompts for tests: ragged groups, shared branch points, completions of 1 to 6 tokens.

A tree also exists as plain lists.
"""

from dataclasses import dataclass

import numpy as np

from rec_dist.packing.grouped_prompt import GroupedPrompt


@dataclass(frozen=True)
class Tree:
    """A prompt as a person would write it down: groups[g] = (branch point, completions), all token ids."""

    prompt: list[int]
    groups: list[tuple[int, list[list[int]]]]

    def grouped_prompt(self, first_key: int = 0) -> GroupedPrompt:
        """The same as arrays."""
        answers = [answer for _, group in self.groups for answer in group]
        inputs = [
            [] if self.along(branch_point, answer) else answer[:-1] for branch_point, group in self.groups for answer in group
        ]
        return GroupedPrompt(
            tokens=np.asarray(self.prompt, dtype=np.int32),
            branch_points=np.asarray([branch_point for branch_point, _ in self.groups], dtype=np.int32),
            keys=np.arange(first_key, first_key + len(self.groups), dtype=np.int64),
            group_sizes=np.asarray([len(group) for _, group in self.groups], dtype=np.int32),
            completion_inputs=np.asarray([token for row in inputs for token in row], dtype=np.int32),
            input_lengths=np.asarray([len(row) for row in inputs], dtype=np.int32),
            lengths=np.asarray([len(answer) for answer in answers], dtype=np.int32),
            targets=np.asarray([token for answer in answers for token in answer], dtype=np.int32),
        )

    def along(self, branch_point: int, answer: list[int]) -> bool:
        """Whether the prompt itself continues with `answer` after `branch point`, so that it needs no completion of its own."""
        return self.prompt[branch_point + 1 : branch_point + len(answer)] == answer[:-1]

    def written_out(self) -> list[tuple[list[int], list[int]]]:
        """(prompt up to the branch point, completion) of every completion, as a peer would replicate them."""
        return [(self.prompt[: branch_point + 1], answer) for branch_point, group in self.groups for answer in group]


def random_tree(rng: np.random.Generator, *, vocab_size: int, prompt: int, groups: int, max_negatives: int = 3) -> Tree:
    """A prompt of `prompt` tokens with `groups` ascending branch points of 1 + 0..max_negatives completions each.

    The last branch point is at the end. About half of the chosen completions that fit continue the prompt itself, as the next
    item of a history does.
    """
    tokens = lambda count: rng.integers(0, vocab_size, size=count).tolist()
    branch_points = [*sorted(rng.integers(0, prompt, size=groups - 1).tolist()), prompt - 1]
    tree = Tree(
        tokens(prompt),
        [
            (branch_point, [tokens(rng.integers(1, 7)) for _ in range(1 + rng.integers(max_negatives + 1))])
            for branch_point in branch_points
        ],
    )
    for branch_point, answers in tree.groups:
        if len(answers[0]) - 1 <= prompt - 1 - branch_point and rng.integers(2):
            answers[0][:-1] = tree.prompt[branch_point + 1 : branch_point + len(answers[0])]
    return tree
