"""How often torch.compile makes a graph while micro-batches of different lengths train and are then scored.

A compilation takes about 15 s on a GPU, during which every rank waits. The micro-batches are padded to whole blocks; the second
length may compile once more, with lengths as variables, and no later one may.
"""

from dataclasses import replace

import torch

from benchmarks.gpu_attention import SHAPE, SMALL, prompts_of
from benchmarks.gpu_rows import Place, Row, Suite
from benchmarks.peer_methods import Grouped, build_model
from benchmarks.peer_targets import Point
from rec_dist.models.flex import allow_compilations, num_compilations

GROUPS = (2, 7, 3, 8, 5, 2)  # of each micro-batch; a group has 118 rows, 32 in tiny shapes


def count(place: Place) -> Row:
    """Rows of each micro-batch, and the graphs made so far after each: while training, then while scoring."""
    shape, point = (SMALL, Point(20, 4, 3, 1)) if place.tiny else (SHAPE, Point(90, 8, 3, 1))
    model = build_model(shape, lora=False, device=place.device, attention="auto").train()
    allow_compilations()
    micro_batches = [prompts_of(replace(point, groups=groups), shape.vocab) for groups in GROUPS]
    runner = Grouped(model, micro_batches, 3, adapter=False, device=place.device)
    before = num_compilations()
    training, scoring = [], []
    for batch in runner.batches:
        runner.scorer(batch)[0].backward()
        training.append(num_compilations() - before)
    model.eval()
    for batch in runner.batches:
        with torch.no_grad():
            runner.scorer(batch)
        scoring.append(num_compilations() - before)
    return {
        "rows": [runner.scorer.num_rows(batch) for batch in runner.batches],
        "training": training,
        "scoring": scoring,
        "training, after the second": training[-1] - training[1],
        "scoring, after the second": scoring[-1] - scoring[1],
    }


def run(suite: Suite) -> None:
    """One row."""
    suite.row({"method": "varying lengths"}, 50.0 if suite.place.on_gpu else 0.0, lambda: count(suite.place))
