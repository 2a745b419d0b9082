"""DELRec: no prompt knows what comes at or after its position; the loss is its formula; only the soft prompt gets gradients."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rec_dist.config.schema import RunConfig
from rec_dist.data.artifacts.teacher import TopItems, write_teacher
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import UserError
from rec_dist.methods.delrec.build import random_lists, teacher_lists
from rec_dist.methods.delrec.distill import DistillExamples, WeightedChoices
from rec_dist.methods.delrec.prompts import PATTERN, TEMPORAL
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.registry import build_task
from rec_dist.models.soft_prompt import SoftPromptEmbedding
from rec_dist.packing.packed_batch import pack_prompts

VOCABULARY, NUM_VIRTUAL = 320, 6
DISTILL = (
    "task.kind=delrec_distill",
    "adapter.kind=soft_prompt",
    f"prompt.num_virtual={NUM_VIRTUAL}",
    "task.delrec.top_h=3",
    "task.delrec.teacher=random",
    "negatives.num=5",
    "train.max_tokens_per_micro_batch=2048",
)


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: Any, tiny_data: Path) -> Path:
    """A teacher's lists for every training target: the items that follow the last one, outside the history."""
    data = PreparedData.open(tiny_data)
    split = data.split("train")
    users, positions, lists = [], [], []
    for row in range(len(split)):
        items = split.items_of(row)
        for position in range(int(split.first_target[row]), len(items)):
            ahead = (items[position - 1] + 7 * np.arange(1, 40)) % data.num_items
            lists.append([item for item in dict.fromkeys(ahead.tolist()) if item not in items[:position]][:4])
            users.append(int(split.user_ids[row]))
            positions.append(position)
    folder = tmp_path_factory.mktemp("teacher") / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(b"weights")
    found = TopItems(np.asarray(users), np.asarray(positions), np.asarray(lists, dtype=np.int32))
    fingerprint = data.manifest.fingerprint
    write_teacher(
        folder, np.zeros((data.num_items, 2), dtype=np.float32), [found], top_h=4, weights=weights, data_fingerprint=fingerprint
    )
    return folder


def make(tiny_config: Any, tiny_model_dir: Path, tmp_path: Path, *changes: Any, teacher: Path | None = None) -> Any:
    config = RunConfig.model_validate(tiny_config(tmp_path / "run", *DISTILL, *changes))
    task = build_task(config, InitialWeights(tiny_model_dir, teacher=teacher), "cpu")
    assert isinstance(task.data, DistillExamples)
    return task


def answers(prompt: Any) -> list[list[int]]:
    """The completions as token lists."""
    ends = np.cumsum(prompt.lengths)
    return [prompt.targets[end - length : end].tolist() for end, length in zip(ends, prompt.lengths, strict=True)]


def same(first: Any, second: Any) -> bool:
    return all(
        np.array_equal(getattr(first, name), getattr(second, name)) for name in ("tokens", "branch_points", "targets", "lengths")
    )


class Altered:
    """A split in which one row holds other items."""

    def __init__(self, split: Any, row: int, items: np.ndarray) -> None:
        self._split, self._row, self._items = split, row, items

    def __getattr__(self, name: str) -> Any:
        return getattr(self._split, name)

    def items_of(self, row: int) -> np.ndarray:
        return self._items if row == self._row else self._split.items_of(row)

    def take(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return np.concatenate([self.items_of(row)[:count] for row, count in zip(rows.tolist(), counts.tolist(), strict=True)])


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("kind", ["random", "trained"])
def test_items_at_and_after_a_position_change_no_prompt_of_it(
    kind, listed, tiny_config, tiny_model_dir, teacher_dir, tiny_data, tmp_path
):
    """For all positions of all users, the rest of the row, including held-out items, is replaced with other items."""
    changes = ("prompt.candidates=listed", "prompt.num_candidates=6", "evaluate.num_candidates=6") if listed else ()
    teacher = teacher_dir if kind == "trained" else None
    task = make(tiny_config, tiny_model_dir, tmp_path, *changes, teacher=teacher)
    split, targets = task.data.split, task.data.targets
    assert len(targets) > 200
    rng = np.random.default_rng(0)
    for index in range(len(targets)):
        row, position = int(targets.rows[index]), int(targets.starts[index])
        assert position >= 3
        lists = task.data.lists(np.asarray([index]))[0]
        own = split.items_of(row)
        changed = np.concatenate([own[:position], rng.permutation(task.data.prepared.num_items)[: len(own) - position]]).astype(
            np.int32
        )
        altered = Altered(split, row, changed)
        if kind == "trained":  # what a list knows: tests/unit/test_teacher.py
            other_lists = lambda _, lists=lists: lists[None]
        else:
            counts = task.data.prepared.train_counts
            other_lists = random_lists(altered, targets, counts, seed=0, top_h=3)  # type: ignore[arg-type]
        other = replace(task.data, split=altered, lists=other_lists)
        before, after = task.data.example(index, 0), other.example(index, 0)
        assert all(same(a, b) for a, b in zip(before.prompts, after.prompts, strict=True))


def test_no_held_out_item_is_given_as_history_or_answer(tiny_config, tiny_model_dir, teacher_dir, tiny_data, tmp_path):
    """Validation and test items of a user occur in none of their prompts except where a draw or the teacher put them."""
    task = make(tiny_config, tiny_model_dir, tmp_path, teacher=teacher_dir)
    data = PreparedData.open(tiny_data)
    held_out: dict[int, set[int]] = {}
    for name in ("valid", "test"):
        part = data.split(name)
        for row, user in enumerate(part.user_ids.tolist()):
            held_out.setdefault(user, set()).update(part.items_of(row)[part.first_target[row] :].tolist())
    for index in range(len(task.data.targets)):
        at = task.data.place(index, 0)
        assert len(at.before) == at.position
        assert not held_out[at.user] & set(at.before.tolist())
        assert not set(at.listed.tolist()) & set(at.before.tolist())
        title = lambda item: task.data.builder.completion(item).tolist()
        temporal, pattern = task.data.example(index, 0).prompts
        assert answers(temporal)[0] == title(int(at.before[-1]))
        assert [answers(pattern)[place] for place in range(3)] == [title(int(item)) for item in at.listed]
        seen = [title(int(item)) for item in at.before]
        assert not [answer for answer in answers(temporal)[1:] + answers(pattern) if answer in seen]


def test_the_prompts_read_as_the_paper_says(tiny_config, tiny_model_dir, teacher_dir, tiny_tokenizer, tmp_path):
    changes = (
        "prompt.candidates=listed",
        "prompt.num_candidates=6",
        "evaluate.num_candidates=6",
        {"prompt.candidates_header": "\nOne of:"},
    )
    task = make(tiny_config, tiny_model_dir, tmp_path, *changes, teacher=teacher_dir)
    index = int(np.flatnonzero(task.data.targets.starts == 4)[0])
    at, (temporal, pattern) = task.data.place(index, 0), task.data.example(index, 0).prompts
    names = [f"\n- {task.data.prepared.titles[item]}" for item in at.before]
    shown = [f"\n- {task.data.prepared.titles[item]}" for item in at.listed]
    for objective, prompt in ((TEMPORAL, temporal), (PATTERN, pattern)):
        first = VOCABULARY + objective * NUM_VIRTUAL
        assert prompt.tokens[:NUM_VIRTUAL].tolist() == list(range(first, first + NUM_VIRTUAL))
        text = tiny_tokenizer.decode(prompt.tokens[NUM_VIRTUAL:])
        listed = text[text.index("\nOne of:") + 8 : text.rindex("\n-")].rsplit("\n", 1)[0]
        candidates = [tiny_tokenizer.decode(answer[:-1]).strip() for answer in answers(prompt)]
        assert sorted(listed.split("\n- ")[1:]) == sorted(candidates)
        text = text.replace(f"\nOne of:{listed}", "")
        after, before = "\nWatched next:", "\nThe movie right before it:"
        expected = {
            TEMPORAL: f"{''.join(names[:3])}{after}{names[2]}{before}{names[1]}{after}{shown[0]}{before}\n-",
            PATTERN: f"{''.join(names)}\nA recommender also likes:{shown[1]}{shown[2]}\nWhat it likes most:\n-",
        }[objective]
        assert text == "A user watched:" + expected


def test_gradients_reach_the_soft_prompt_alone_and_are_kept_apart(tiny_config, tiny_model_dir, teacher_dir, tmp_path):
    """The gradient is the weighted sum of each objective's gradient, and each is the one that its loss alone gives."""
    task = make(tiny_config, tiny_model_dir, tmp_path, teacher=teacher_dir)
    module: Any = task.model.build()
    prompt, exchange = module.input_embeddings.prompt, task.exchange(module)
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["model.model.embed_tokens.prompt"]
    examples = [task.data.example(index, 0) for index in (0, 5, 9)]
    module.loss.weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    module(task.data.collate(examples[:2], step=0))[0].backward()
    module(task.data.collate(examples[2:], step=0))[0].backward()
    whole, parts = prompt.grad.clone(), exchange.step_sums().view(2, NUM_VIRTUAL, -1)
    assert not [name for name, p in module.named_parameters() if p.grad is not None and p is not prompt]
    assert not float(exchange.step_sums().abs().sum()), "taken twice"
    torch.testing.assert_close(parts.sum(0).float(), whole)
    for objective in (TEMPORAL, PATTERN):
        prompt.grad = None
        batch = pack_prompts([example.prompts[objective] for example in examples])
        logps = module(batch)[2]
        choice = torch.stack([-scores.log_softmax(0)[0] for scores in logps.view(3, -1)]).sum()
        (gradient,) = torch.autograd.grad(choice, prompt)
        torch.testing.assert_close(parts[objective].float(), (0.3, 0.7)[objective] * gradient, rtol=1e-4, atol=1e-6)


def test_the_loss_and_its_metrics(tiny_config, tiny_model_dir, teacher_dir, tmp_path):
    task = make(tiny_config, tiny_model_dir, tmp_path, teacher=teacher_dir)
    batch = task.data.collate([task.data.example(index, 0) for index in (1, 2)], step=0)
    loss, logps = WeightedChoices((TEMPORAL, PATTERN)), torch.randn(24, generator=torch.Generator().manual_seed(0))
    loss.weights = torch.tensor([0.2, 0.8], dtype=torch.float64)
    losses = -logps.view(4, 6).log_softmax(1)[:, 0]  # temporal, pattern, temporal, pattern
    found = loss(logps, batch)
    assert float(found.loss_sum) == pytest.approx(float(0.2 * losses[0::2].sum() + 0.8 * losses[1::2].sum()), rel=1e-6)
    assert float(found.count) == 2
    expected = [float(losses[0::2].sum()), float(losses[1::2].sum()), 2 * 0.2]
    assert [float(value) for value in found.metrics.values()] == pytest.approx(expected, rel=1e-6)
    idle = loss(torch.full((6,), float("nan")), task.data.collate([], step=0))
    assert (float(idle.loss_sum), float(idle.count)) == (0.0, 0.0)


def test_the_gradient_rule():
    loss = WeightedChoices((TEMPORAL, PATTERN))
    gradients = torch.zeros(2, 3, 4, dtype=torch.float64)
    gradients[TEMPORAL, 0, 0], gradients[PATTERN, 1, 1] = 8.0 * 0.5, 2.0 * 0.5  # norms 8 and 2, each times its weight
    loss.balance(gradients)
    assert loss.weights.tolist() == pytest.approx([1 / 3, 2 / 3])  # 8 ** -0.5 : 2 ** -0.5
    kept = loss.weights.clone()
    for spoiled in (float("nan"), float("inf"), 0.0):
        gradients[TEMPORAL] = spoiled
        loss.balance(gradients)
        assert torch.equal(loss.weights, kept)


@pytest.mark.parametrize("objective", ["temporal", "pattern"])
def test_one_objective_alone(objective, tiny_config, tiny_model_dir, teacher_dir, tmp_path):
    task = make(tiny_config, tiny_model_dir, tmp_path, f"task.delrec.objectives={objective}", teacher=teacher_dir)
    both = make(tiny_config, tiny_model_dir, tmp_path, teacher=teacher_dir)
    (prompt,), prompts = task.data.example(3, 0).prompts, both.data.example(3, 0).prompts
    assert same(prompt, prompts[("temporal", "pattern").index(objective)])
    module: Any = task.model.build()
    loss_sum, sums, logps = module(task.data.collate([task.data.example(3, 0)], step=0))
    assert loss_sum.item() == pytest.approx(-logps.log_softmax(0)[0].item(), rel=1e-5)
    assert float(sums[1]) == 1
    loss_sum.backward()
    assert len(task.exchange(module).step_sums()) == 0


def test_the_vectors_are_the_rows_beyond_the_vocabulary():
    torch.manual_seed(0)
    tokens = torch.nn.Embedding(10, 4)
    embedding = SoftPromptEmbedding(tokens, torch.randn(3, 4))
    ids = torch.tensor([[9, 10, 12, 13, 15, 0]])
    wanted = [
        tokens.weight[9],
        embedding.prompt[0],
        embedding.prompt[2],
        embedding.prompt[0],
        embedding.prompt[2],
        tokens.weight[0],
    ]
    assert torch.equal(embedding(ids)[0], torch.stack(wanted))


def test_vectors_start_as_embeddings_of_title_tokens(tiny_config, tiny_model_dir, tmp_path):
    task = make(tiny_config, tiny_model_dir, tmp_path)
    embedding = task.model.build().input_embeddings
    known = embedding.tokens.weight[torch.from_numpy(np.unique(task.data.builder.titles.tokens)).long()]
    assert all(bool((known == row).all(dim=1).any()) for row in embedding.prompt)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["adapter.kind=lora"], ("adapter.kind=lora", "set adapter.kind=soft_prompt")),
        (["prompt.num_virtual=0"], ("prompt.num_virtual is 0",)),
        (["negatives.num=1"], ("negatives.num (1)", "task.delrec.top_h")),
        (["prompt.style=chat"], ("prompt.style=chat", "set prompt.style=list")),
        (["train.targets_per_prompt=2"], ("train.targets_per_prompt (2)",)),
        (["prompt.candidates=listed"], ("prompt.num_candidates (20)", "negatives.num + 1 (6)")),
        (["negatives.num=75"], ("negatives.num (75)", "lower it")),
        (["train.max_tokens_per_micro_batch=100"], ("train.max_tokens_per_micro_batch (100)", "raise it")),
        (["task.kind=sft"], ("adapter.kind=soft_prompt", "set adapter.kind=lora")),
        (["task.kind=delrec", "adapter.kind=lora"], ("prompt.num_virtual (6)", "train.init_from")),
        (["task.kind=delrec", "adapter.kind=lora", "prompt.num_virtual=0", "negatives.num=0"], ("negatives.num is 0",)),
    ],
)
def test_what_cannot_take_effect_is_refused(changes, words, tiny_config, tiny_model_dir, tmp_path):
    config = RunConfig.model_validate(tiny_config(tmp_path / "run", *DISTILL, *changes))
    with pytest.raises(UserError) as caught:
        build_task(config, InitialWeights(tiny_model_dir), "cpu")
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_teacher_of_other_data_or_too_short_is_refused(tiny_config, tiny_model_dir, teacher_dir, tmp_path):
    with pytest.raises(UserError, match=r"task\.delrec\.top_h \(5\) is more than the 4"):
        make(tiny_config, tiny_model_dir, tmp_path, "task.delrec.top_h=5", teacher=teacher_dir)
    data = SimpleNamespace(manifest=SimpleNamespace(fingerprint="other"))
    with pytest.raises(UserError, match="another data set"):
        teacher_lists(teacher_dir, data, None, None, None, top_h=2)  # type: ignore[arg-type]
