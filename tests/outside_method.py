"""A method in a package outside the checkout, for tests: a hinge loss with its own keys, and a ranker that adds popularity."""

from pathlib import Path

PACKAGE = '''"""A hinge loss on whole titles, and a ranker that adds how often an item was chosen."""

from pathlib import Path

import numpy as np
from pydantic import Field

from rec_dist.config.section import Section
from rec_dist.losses import LossSums
from rec_dist.methods.language_model.method import LanguageModelMethod
from rec_dist.methods.language_model.objective import Objective
from rec_dist.methods.language_model.ranker import LanguageModelRanker
from rec_dist_kernels import segment_ids


class HingeConfig(Section):
    """The keys below task.hinge."""

    margin: float = Field(5.0, gt=0, description="Nats by which the chosen title should lead the mean of the rejected ones.")
    popularity: float = Field(0.0, ge=0, description="Weight of log(1 + training count) in a score.")
    notes: str | None = Field(None, description="A file.", json_schema_extra={"path": True, "names": ["none"]})


class HingeRanker(LanguageModelRanker):
    """A score is log p(title) + popularity * log(1 + count)."""

    def score(self, evaluation, launch):
        scores, cost = super().score(evaluation, launch)
        weight = evaluation.config.task.section(HingeConfig).popularity
        added = weight * np.log1p(evaluation.data.train_counts)
        return [s + added[e.candidates] for s, e in zip(scores, evaluation.examples)], {**cost, "popularity_weight": weight}


class Hinge(LanguageModelMethod):
    """L = max(0, margin - (log p(chosen) - mean log p(rejected)))."""

    name = "hinge"
    section = ("hinge", HingeConfig)
    ranker = HingeRanker()

    def objective(self, config, num_rejected):
        margin = config.task.section(HingeConfig).margin

        def loss(logps, batch):
            offsets, num_groups = batch.group_offsets, len(batch.group_offsets) - 1
            ids = segment_ids(offsets, len(logps))
            logps = logps.masked_fill(batch.weights[ids] == 0, 0.0)  # an empty micro-batch is a group of weight 0
            chosen = logps[offsets[:-1]]
            sums = logps.new_zeros(num_groups).index_add(0, ids, logps)
            rejected = (sums - chosen) / (offsets.diff() - 1).clamp(min=1)
            losses = (margin - (chosen - rejected)).clamp(min=0)
            violations = ((losses > 0) * batch.weights).sum().detach()
            return LossSums((losses * batch.weights).sum(), batch.weights.sum(), {"hinge/violations": violations})

        return Objective(
            "hinge", num_rejected, needs_reference=False, counts_tokens=False, metric_names=("hinge/violations",), loss=loss
        )


HINGE = Hinge()
'''


def write_package(folder: Path) -> Path:
    """Writes the package hinge_method into `folder`, which belongs on PYTHONPATH."""
    (folder / "hinge_method").mkdir(parents=True)
    (folder / "hinge_method" / "__init__.py").write_text(PACKAGE, encoding="utf-8")
    return folder


def write_entry_point(folder: Path, entry: str = "hinge = hinge_method:HINGE") -> Path:
    """Writes what pip would record of an installed package with this entry point into `folder`, which belongs on PYTHONPATH."""
    info = folder / "hinge_method-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hinge-method\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[rec_dist.methods]\n{entry}\n", encoding="utf-8")
    return folder
