"""The tokens of a step: from groups of mean lengths to rows, pairs of rows and micro-batches.

Letters: P tokens of a prompt, C of a completion with its end, K negatives, t targets a prompt, W workers.
"""

from dataclasses import dataclass, replace
from math import ceil

from rec_dist.models.flex import padded_length


@dataclass(frozen=True)
class Workload:
    """The groups of an optimizer step: `targets` groups share a prompt, each with `negatives` + 1 completions. Lengths are means.

    prompts_per_group: prompts of one group, which share a micro-batch (DELRec's stage 1 has one for each objective).
    """

    groups: int
    targets: int
    negatives: int
    prompt: float
    completion: float
    prompts_per_group: int = 1

    @property
    def num_prompts(self) -> int:
        """Prompts of a step."""
        return self.groups // self.targets * self.prompts_per_group

    @property
    def prompt_rows(self) -> float:
        """Tokens of a prompt and of the chosen completions that extend it: P + (t - 1) C."""
        return self.prompt + (self.targets - 1) * self.completion

    @property
    def completion_rows(self) -> float:
        """Rows of the negatives and of the last chosen completion. A completion's last token is never fed: (tK + 1)(C - 1)."""
        return (self.targets * self.negatives + 1) * (self.completion - 1)

    @property
    def rows(self) -> float:
        """Rows of a prompt with its completions."""
        return self.prompt_rows + self.completion_rows

    @property
    def example(self) -> float:
        """Rows of an example, which is never split: those of a prompt, or of all prompts of a group."""
        return self.rows * self.prompts_per_group

    def within(self, tokens: int) -> "Workload":
        """The same with the prompt cut so that an example has at most `tokens` rows; unchanged if no length achieves that."""
        prompt = tokens // self.prompts_per_group - (self.rows - self.prompt)
        return replace(self, prompt=float(prompt)) if 1 <= prompt < self.prompt else self

    @property
    def scored(self) -> float:
        """Distinct rows that the head multiplies: the branch point of each group, and C - 1 a completion."""
        return self.targets * (1 + (self.negatives + 1) * (self.completion - 1))

    @property
    def pairs(self) -> float:
        """Pairs of rows that attend to each other. A completion sees on average half of the titles after the first branch point."""
        seen = self.prompt + (self.targets - 1) * self.completion / 2 + self.completion / 2
        return self.prompt_rows * (self.prompt_rows + 1) / 2 + self.completion_rows * seen


@dataclass(frozen=True)
class MicroBatches:
    """A step on the busiest worker: `count` forward passes, the rows of each with padding, and the prompts in each."""

    count: int
    rows: float
    num_prompts: float
    fill: float  # share of all workers' budgets that holds tokens


def pack(workload: Workload, *, max_tokens: int, workers: int, flex: bool) -> MicroBatches:
    """Packs whole examples of the mean length into micro-batches, the same number a worker, filled evenly, as the loader does.

    The count is 0 if not even one example fits.
    """
    most = int(max_tokens // workload.example)
    if most == 0:
        return MicroBatches(0, 0.0, 0.0, 0.0)
    examples = workload.num_prompts // workload.prompts_per_group
    count = -(-examples // (most * workers))
    prompts = -(-examples // (count * workers)) * workload.prompts_per_group
    rows = float(padded_length(ceil(prompts * workload.rows))) if flex else prompts * workload.rows
    fill = workload.num_prompts * workload.rows / (count * workers * max_tokens)
    return MicroBatches(count, rows, float(prompts), fill)
