"""Batches that processes build while this one holds a GPU (train.dataloader_num_workers), against those of the thread.

The processes are forked from one that has used the GPU, and must not touch it. Their batches come through a pipe and are copied into
pinned memory here (training/loader.py).
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu_attention import prompts_of
from benchmarks.gpu_peers import groups_of
from benchmarks.gpu_rows import Place, Row, Suite
from benchmarks.gpu_step import Groups, point_of
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.methods.task import Task, TaskModel
from rec_dist.packing.transfer import to_device
from rec_dist.runtime.world import World
from rec_dist.training.loader import StepWork, steps_ahead

_STEPS, _MICRO_BATCHES, _TOKENS, _VOCAB = 8, 4, 8192, 128_256


def task_of(place: Place) -> Task:
    """Random prompts, as many as fill every step's micro-batches; there is no model."""
    point, tokens = point_of(tiny=place.tiny), 128 if place.tiny else _TOKENS
    groups = groups_of("d", point, tokens) * _MICRO_BATCHES
    prompts = prompts_of(replace(point, groups=groups * _STEPS), _VOCAB)
    model = TaskModel(build=torch.nn.Module, dtype=torch.float32, width=8, metric_names=())
    sampler = GlobalBatchSampler(num_examples=len(prompts), examples_per_step=groups, epochs=1, seed=0)
    return Task("benchmark", sampler, Groups(prompts), model, save=lambda weights, module, folder: None)


def made(task: Task, place: Place, num_workers: int) -> tuple[list[StepWork], float]:
    """All steps, and the seconds that each took once the first was there."""
    tokens, world = 128 if place.tiny else _TOKENS, World(device=place.device)
    with steps_ahead(task, range(_STEPS), max_tokens=tokens, world=world, num_workers=num_workers) as work:
        first = next(work)
        began = time.perf_counter()
        rest = list(work)
        return [first, *rest], (time.perf_counter() - began) / len(rest)


def tensors(work: StepWork) -> Iterator[torch.Tensor]:
    """Those of the packed batches of a step."""
    for batch in work.batches:
        yield from (part for part in vars(batch).values() if isinstance(part, torch.Tensor))


def measure(place: Place, num_workers: int) -> Row:
    """Whether the steps are those of the thread, whether they lie in pinned memory and reach the device, and how long one takes."""
    torch.ones(8, device=place.device).sum().item()  # the device is in use before anything is forked
    task = task_of(place)
    expected, _ = made(task, place, 0)
    found, seconds = made(task, place, num_workers)
    pairs = [
        (one, other)
        for mine, theirs in zip(found, expected, strict=True)
        for one, other in zip(tensors(mine), tensors(theirs), strict=True)
    ]
    sent: Any = to_device(found[0].batches[0], place.device)
    return {
        "equal": all(torch.equal(one, other) for one, other in pairs),
        "pinned": all(one.is_pinned() for one, _ in pairs) if place.on_gpu else None,
        "sent": torch.equal(sent.input_ids.cpu(), expected[0].batches[0].input_ids),
        "ms a step": seconds * 1e3,
    }


def run(suite: Suite) -> None:
    """A row for the thread and one for a process."""
    for num_workers in (0, 1):
        expected = 10.0 if suite.place.on_gpu else 0.0
        suite.row({"processes": num_workers}, expected, lambda count=num_workers: measure(suite.place, count))  # type: ignore[misc]
