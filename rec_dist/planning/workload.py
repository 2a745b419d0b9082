"""Tokens of a step: from groups of mean lengths to rows, pairs and packs.

Letters: P tokens of a prompt, C of a completion with its end, K negatives, t targets on one trunk, W workers.
"""

from dataclasses import dataclass, replace

from rec_dist.models.flex import padded_length


@dataclass(frozen=True)
class Workload:
    """groups of a global step in trunks of `targets` groups, each with `negatives` + 1 completions; lengths are means.

    prompts: of one group, each on a trunk of its own, which share a pack (DELRec's stage 1: one an objective).
    """

    groups: int
    targets: int
    negatives: int
    prompt: float
    completion: float
    prompts: int = 1

    @property
    def trunks(self) -> int:
        """Trunks of a step."""
        return self.groups // self.targets * self.prompts

    @property
    def trunk(self) -> float:
        """Tokens of a prompt and of the chosen titles that stand on it: P + (t - 1) C."""
        return self.prompt + (self.targets - 1) * self.completion

    @property
    def branches(self) -> float:
        """Rows of branches: the negatives, and the last chosen item; a completion's last token is never fed. (tK + 1)(C - 1)."""
        return (self.targets * self.negatives + 1) * (self.completion - 1)

    @property
    def rows(self) -> float:
        """Rows of a trunk with its branches."""
        return self.trunk + self.branches

    @property
    def unit(self) -> float:
        """Rows that are never parted: of a trunk, or of all prompts of a group."""
        return self.rows * self.prompts

    def within(self, tokens: int) -> "Workload":
        """The same with a prompt so short that a unit has at most `tokens` rows; as it is where no prompt does that."""
        prompt = tokens // self.prompts - (self.rows - self.prompt)
        return replace(self, prompt=float(prompt)) if 1 <= prompt < self.prompt else self

    @property
    def scored(self) -> float:
        """Distinct rows that the head multiplies: the fork of each group, and C - 1 a completion."""
        return self.targets * (1 + (self.negatives + 1) * (self.completion - 1))

    @property
    def pairs(self) -> float:
        """Pairs of rows that see each other; a branch sees half of the titles behind the first fork in the mean, and of itself."""
        seen = self.prompt + (self.targets - 1) * self.completion / 2 + self.completion / 2
        return self.trunk * (self.trunk + 1) / 2 + self.branches * seen


@dataclass(frozen=True)
class Packs:
    """How a step falls onto the busiest worker: `count` forward passes, rows run in each (padding included), and what they hold."""

    count: int
    rows: float
    trunks: float
    fill: float  # of the budgets of all workers, the share that holds tokens


def pack(workload: Workload, *, tokens_per_pack: int, workers: int, flex: bool) -> Packs:
    """Whole units of the mean length into packs; a multiple of the workers, filled evenly, as the loader does. 0 if none fits."""
    most = int(tokens_per_pack // workload.unit)
    if most == 0:
        return Packs(0, 0.0, 0.0, 0.0)
    units = workload.trunks // workload.prompts
    count = -(-units // (most * workers))
    trunks = -(-units // (count * workers)) * workload.prompts
    rows = float(padded_length(0, tokens_per_pack)) if flex else trunks * workload.rows
    fill = workload.trunks * workload.rows / (count * workers * tokens_per_pack)
    return Packs(count, rows, float(trunks), fill)
