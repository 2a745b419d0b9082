"""Retrieval: losses and gradients by hand, rows where they belong, item vectors whitened and cached, ranks as by brute force."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rec_dist.config.schema import RunConfig
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.registry import build_task, get_method
from rec_dist.methods.retrieval.batch import LAST, SEEN, RetrievalExample, columns_of, pack_retrieval
from rec_dist.methods.retrieval.head import ItemTable, Terms, softmax_losses
from rec_dist.methods.retrieval.ranker import log_probs
from rec_dist.methods.retrieval.saved_model import load_retrieval
from rec_dist.methods.task import Passes
from rec_dist.methods.whitening import whitened, whitening
from rec_dist.packing.pooled_prompts import pack_pooled_spans
from rec_dist.runtime.world import World

KIND = ("task.kind=retrieval", "task.retrieval.width=12")
TEMPERATURE = 0.1


def make(tiny_config: Any, tiny_model_dir: Path, *changes: Any) -> Any:
    config = RunConfig.model_validate(tiny_config("run", *KIND, *changes))
    return build_task(config, InitialWeights(tiny_model_dir), "cpu")


def with_items(task: Any, folder: Path, module: Any = None) -> Any:
    """The module of a task, with its item vectors."""
    module = task.model.build().eval() if module is None else module
    score = lambda batch: module(batch)[2].detach().float()
    task.first_pass(Passes(module, score, folder, World(), 100, lambda done, total: None))
    return module


@cache
def plain_model(model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32).eval()


def plain_states(model_dir: Path, task: Any, items: list[int]) -> torch.Tensor:
    """The mean state of the tokens of each title, from plain transformers: (n, D)."""
    model = plain_model(model_dir)
    builder = task.data.prompts.builder
    ids, spans = list(builder.pieces.begin), []
    for item in items:
        ids += builder.pieces.item_prefix
        spans.append((len(ids), len(ids) + len(builder.titles[item])))
        ids += builder.titles[item].tolist()
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
    return torch.stack([hidden[first:end].mean(0) for first, end in spans])


def example(items: list[int], start: int) -> RetrievalExample:
    """Three tokens an item, of which the last two are its title."""
    shown = len(items) - 1
    ends = 3 * np.arange(1, shown + 1)
    spans = np.stack([ends - 2, ends], axis=1)[start - len(items) :]
    return RetrievalExample(np.asarray(items, dtype=np.int32), start, np.arange(3 * shown, dtype=np.int32), spans)


def table(num_items: int, width: int) -> ItemTable:
    rng = torch.Generator().manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(num_items, width, generator=rng), dim=1)
    counts = torch.arange(num_items).float() % 4
    return ItemTable(vectors, torch.zeros(width), torch.eye(width), (1 + counts).log())


def logits_by_hand(users: torch.Tensor, items: ItemTable, terms: torch.Tensor, histories: list[list[int]]) -> torch.Tensor:
    """z (M, I) as head.py defines it, one number at a time. terms: seen, last, popularity."""
    z = torch.empty(len(histories), len(items.vectors), dtype=torch.float64)
    for m, history in enumerate(histories):
        for i in range(len(items.vectors)):
            relation = terms[1] if i == history[-1] else terms[0] if i in history else 0.0
            cosine = (users[m] * items.vectors[i].double()).sum()
            z[m, i] = (cosine + relation + terms[2] * items.log_counts[i].double()) / TEMPERATURE
    return z


EXAMPLES = [example([3, 7, 3, 5, 7, 9], 2), example([8, 0], 1), example([1, 2, 1, 4], 3)]
HISTORIES = [[3, 7], [3, 7, 3], [3, 7, 3, 5], [3, 7, 3, 5, 7], [8], [1, 2, 1]]
TARGETS = [3, 5, 7, 9, 0, 4]


@pytest.mark.parametrize("logits_at_once", [1 << 20, 25, 1])
def test_the_full_softmax_and_its_gradients_by_hand(logits_at_once: int) -> None:
    batch, items = pack_retrieval(EXAMPLES, num_items=11, logits_at_once=logits_at_once), table(11, 4)
    assert batch.targets.tolist() == TARGETS
    assert len(batch.chunks) == {1 << 20: 1, 25: 3, 1: 6}[logits_at_once]
    users, values = torch.randn(6, 4, dtype=torch.float64), torch.tensor([-0.2, 0.3, 0.1], dtype=torch.float64)
    mine, hand = [[tensor.clone().requires_grad_() for tensor in (users, values)] for _ in range(2)]
    found = softmax_losses(mine[0], items, Terms(*mine[1].unbind()), batch, temperature=TEMPERATURE)
    wanted = -logits_by_hand(hand[0], items, hand[1], HISTORIES).log_softmax(1)[range(6), TARGETS]
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for one, other in zip(mine, hand, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("logits_at_once", [1 << 20, 7])
def test_the_sampled_softmax_and_its_gradients_by_hand(logits_at_once: int) -> None:
    """Draws repeat, hold targets and items of histories."""
    drawn, expected = np.asarray([7, 3, 7, 10, 0]), np.log([0.5, 1.5, 0.5, 0.1, 2.0])
    batch = pack_retrieval(EXAMPLES, num_items=11, negatives=(drawn, expected), logits_at_once=logits_at_once)
    items, users = table(11, 4), torch.randn(6, 4, dtype=torch.float64)
    values = torch.tensor([-0.2, 0.3, 0.1], dtype=torch.float64)
    mine, hand = [[tensor.clone().requires_grad_() for tensor in (users, values)] for _ in range(2)]
    found = softmax_losses(mine[0], items, Terms(*mine[1].unbind()), batch, temperature=TEMPERATURE)
    z = logits_by_hand(hand[0], items, hand[1], HISTORIES)
    rows = []
    for m, target in enumerate(TARGETS):
        others = [z[m, j] - batch.log_expected[n].double() for n, j in enumerate(drawn.tolist()) if j != target]
        rows.append(torch.stack([z[m, target], *others]).logsumexp(0) - z[m, target])
    wanted = torch.stack(rows)
    found.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for one, other in zip(mine, hand, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_each_item_of_a_history_is_a_pair_once() -> None:
    rows, items, relation = EXAMPLES[0].pairs()
    found = [{(int(i), int(r)) for row, i, r in zip(rows, items, relation, strict=True) if row == m} for m in range(4)]
    assert found == [
        {(3, SEEN), (7, LAST)},
        {(3, LAST), (7, SEEN)},
        {(3, SEEN), (7, SEEN), (5, LAST)},
        {(3, SEEN), (7, LAST), (5, SEEN)},
    ]
    assert len(rows) == sum(map(len, found))


def test_columns_hold_every_draw_of_an_item() -> None:
    places, columns = columns_of(np.asarray([4, 9, 4, 2]), np.asarray([4, 1, 2, 4, 4]))
    assert [set(columns[places == place].tolist()) for place in range(4)] == [{0, 3, 4}, set(), {0, 3, 4}, {2}]
    assert (np.diff(places) >= 0).all()


def test_whitened_vectors_have_no_correlations_and_unit_variance() -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(400, 9)) @ rng.normal(size=(9, 9)) + 30).astype(np.float32)
    mean, directions = whitening([values[:7], values[7:]], 5, key="width")
    z = (values - mean) @ directions
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(z.T @ z / 400, np.eye(5), atol=1e-9)
    whole = values.astype(np.float64) - values.mean(0, dtype=np.float64)
    variances = np.linalg.svd(whole, compute_uv=False)[:5] ** 2 / 400
    kept = (whole @ directions / np.linalg.norm(directions, axis=0)).var(axis=0)
    np.testing.assert_allclose(kept, variances, rtol=1e-8)  # the strongest directions, in order
    np.testing.assert_allclose(np.linalg.norm(whitened(values, mean, directions), axis=1), 1, atol=1e-6)
    with pytest.raises(UserError, match=r"width \(9\) is more than the 8 directions"):
        whitening([np.concatenate([values[:, :8], values[:, :1]], axis=1)], 9, key="width")


def test_item_vectors_are_the_states_of_plain_transformers_and_are_kept(tiny_config, tiny_model_dir, tmp_path) -> None:
    task = make(tiny_config, tiny_model_dir)
    module = with_items(task, tmp_path)
    raw = torch.cat([plain_states(tiny_model_dir, task, [item]) for item in range(80)])
    mean, directions = whitening([raw.numpy()], 12, key="width")
    np.testing.assert_allclose(module.table.vectors.numpy(), whitened(raw.numpy(), mean, directions), atol=2e-3)
    assert sorted(path.name for path in (tmp_path / "items").iterdir()) == ["items.json", "items.safetensors"]
    before = (tmp_path / "items" / "items.safetensors").stat().st_mtime_ns

    def never(batch: Any) -> Any:
        raise AssertionError("computed again")

    again = task.model.build()
    task.first_pass(Passes(again, never, tmp_path, World(), 300, lambda done, total: None))  # any token budget
    assert torch.equal(again.table.vectors, module.table.vectors)
    for changed in (("task.retrieval.pooling=last",), ("prompt.instruction=Seen",), ("task.retrieval.width=11",)):
        other = make(tiny_config, tiny_model_dir, *changed)
        with pytest.raises(AssertionError, match="computed again"):
            other.first_pass(Passes(again, never, tmp_path, World(), 100, lambda done, total: None))
    content = bytearray((tmp_path / "items" / "items.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "items" / "items.safetensors").write_bytes(content)
    renewed = with_items(task, tmp_path)
    assert torch.equal(renewed.table.vectors, module.table.vectors)
    assert (tmp_path / "items" / "items.safetensors").stat().st_mtime_ns != before


def test_refreshed_vectors_are_those_of_the_model_as_it_is(tiny_config, tiny_model_dir, tmp_path) -> None:
    task = make(tiny_config, tiny_model_dir, "task.retrieval.refresh_every=3")
    module = with_items(task, tmp_path)
    before, passes = module.table.vectors, Passes(module, lambda batch: module(batch)[2], tmp_path, World(), 100, print)
    assert module.table.changing_buffers == ("vectors",)
    task.after_step(passes, 3)
    torch.testing.assert_close(module.table.vectors, before, rtol=1e-4, atol=1e-4)
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    task.after_step(passes, 4)
    torch.testing.assert_close(module.table.vectors, before, rtol=1e-4, atol=1e-4)
    task.after_step(passes, 6)
    assert (module.table.vectors - before).abs().max() > 0.05
    prompts = task.data.prompts
    for item in (0, 41, 79):
        history = np.asarray([item], dtype=np.int32)
        state = module.encoder(pack_pooled_spans([prompts.tokens(history)], np.zeros(1, dtype=np.int64), prompts.spans(history)))
        wanted = torch.nn.functional.normalize((state[0] - module.table.mean) @ module.table.whitening, dim=0)
        torch.testing.assert_close(module.table.vectors[item], wanted.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("targets", [1, 4])
def test_the_loss_is_that_of_plain_transformers(targets: int, tiny_config, tiny_model_dir, tmp_path) -> None:
    """Batch mates change nothing, and every target sees the items before it alone."""
    changes = (f"train.targets_per_prompt={targets}", "train.global_batch_size=8")
    task = make(tiny_config, tiny_model_dir, *changes)
    module = with_items(task, tmp_path)
    torch.nn.init.normal_(module.project.linear.weight, std=0.3)
    module.terms.weight.data = torch.tensor([-0.2, -0.5, 0.05])
    examples = [task.data.example(index) for index in (5, 1, 9)]
    together = module(task.data.collate(examples, step=0))[2]
    wanted = []
    for one in examples:
        begin = max(0, one.start - 5)
        for position in range(one.start, len(one.items)):
            history = one.items[:position].tolist()
            state = plain_states(tiny_model_dir, task, history[begin:])[-1:]
            users = module.project(state, module.table).double()
            z = logits_by_hand(users, module.table, module.terms.weight.double(), [history])
            logps = (z * TEMPERATURE / module.temperature).log_softmax(1).detach()
            wanted.append(float(logps[0, one.items[position]]))
    np.testing.assert_allclose(together.numpy(), wanted, atol=2e-4)
    alone = torch.cat([module(task.data.collate([one], step=0))[2] for one in examples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_sampled", [0, 16])
def test_a_dummy_batch_adds_nothing_and_still_has_a_graph(num_sampled: int, tiny_config, tiny_model_dir, tmp_path) -> None:
    task = make(tiny_config, tiny_model_dir, f"task.retrieval.num_sampled={num_sampled}")
    module = with_items(task, tmp_path)
    idle = task.data.collate([], step=0)
    loss_sum, sums, _ = module(idle)
    loss_sum.backward()
    assert (idle.num_groups, loss_sum.item(), sums.tolist()) == (0, 0.0, [0.0] * 6)
    assert all(not p.grad.any() for p in module.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in module.encoder.parameters())


def test_gradients_reach_adapter_projection_and_terms(tiny_config, tiny_model_dir, tmp_path) -> None:
    task = make(tiny_config, tiny_model_dir)
    module = with_items(task, tmp_path)
    trains = {name for name, p in module.named_parameters() if p.requires_grad}
    assert {name for name in trains if "lora_" not in name} == {
        "project.linear.weight",
        "project.linear.bias",
        "terms.weight",
    }
    loss_sum, sums, _ = module(task.data.collate([task.data.example(0), task.data.example(1)], step=0))
    assert (float(sums[0]), float(sums[1])) == (pytest.approx(loss_sum.item(), rel=1e-6), 2.0)
    assert (sums[2:] / sums[1]).tolist() == pytest.approx([0.0, 0.0, 1.0, 0.05])
    loss_sum.backward()
    got = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert got == {name for name in trains if "lora_A" not in name}, "lora_B starts at 0, so lora_A has no gradient yet"
    fixed = make(tiny_config, tiny_model_dir, "task.retrieval.terms=false").model.build()
    assert not fixed.terms.weight.requires_grad and not fixed.terms.weight.any()


def test_a_learnt_temperature_divides_the_cosines_alone(tiny_config, tiny_model_dir, tmp_path) -> None:
    task = make(tiny_config, tiny_model_dir, "task.retrieval.learn_temperature=true", "train.targets_per_prompt=4")
    module = with_items(task, tmp_path)
    module.terms.weight.data = torch.tensor([-0.2, -0.5, 0.05])
    torch.nn.init.constant_(module.project.sharpness, 0.02)
    one = next(one for one in map(task.data.example, range(20)) if len(one.items) - one.start == 4)
    loss_sum, sums, _ = module(task.data.collate([one], step=0))
    loss_sum.backward()
    own = 0.05 * np.exp(-0.02 / 0.05)  # of the cosines
    assert float(sums[5] / sums[1]) == pytest.approx(own, rel=1e-5)

    def by_hand(temperature: float) -> float:
        total = 0.0
        for position in range(one.start, len(one.items)):
            history = one.items[:position].tolist()
            state = plain_states(tiny_model_dir, task, history[max(0, one.start - 5) :])[-1:]
            user = torch.nn.functional.normalize((state - module.table.mean) @ module.table.whitening, dim=1).double()
            cosines = (user @ module.table.vectors.T.double())[0]
            relation = torch.tensor([-0.5 if i == history[-1] else -0.2 if i in history else 0.0 for i in range(80)])
            z = cosines / temperature + (relation + 0.05 * module.table.log_counts).double() / 0.05
            total -= float(z.log_softmax(0)[one.items[position]])
        return total

    assert loss_sum.item() == pytest.approx(by_hand(own), abs=2e-3)
    step = 1e-4
    slope = (by_hand(0.05 * np.exp(-(0.02 + step) / 0.05)) - by_hand(0.05 * np.exp(-(0.02 - step) / 0.05))) / (2 * step)
    assert module.project.sharpness.grad.item() == pytest.approx(slope, rel=2e-2, abs=0.05)


@pytest.mark.parametrize("learns", ["true", "false"])
def test_a_saved_head_ranks_as_by_brute_force(learns: str, tiny_config, tiny_model_dir, tmp_path) -> None:
    task = make(tiny_config, tiny_model_dir, f"task.retrieval.learn_temperature={learns}")
    module = with_items(task, tmp_path)
    torch.nn.init.normal_(module.project.linear.weight, std=0.3)
    if learns == "true":
        torch.nn.init.constant_(module.project.sharpness, 0.02)
    module.terms.weight.data = torch.tensor([-0.2, -0.5, 0.05])
    (tmp_path / "model").mkdir()
    weights = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    task.save(weights, module, tmp_path / "model")
    model = load_retrieval(tmp_path / "model")
    assert len(load_file(tmp_path / "model" / "adapter_model.safetensors")) == len(weights) - (4 if learns == "true" else 3)
    histories = [np.asarray(items, dtype=np.int32) for items in ([3, 17, 3, 42], [7], [5, 6, 7, 8, 9, 10, 5])]
    candidates = [np.arange(80, dtype=np.int32), np.asarray([7, 8, 79], dtype=np.int32), np.arange(80, dtype=np.int32)]
    states = torch.cat([plain_states(tiny_model_dir, task, items[-5:].tolist())[-1:] for items in histories])
    found = list(log_probs(model, states.numpy(), zip(histories, candidates, strict=True)))
    users = module.project(states, module.table).double()
    length = np.exp(0.4) if learns == "true" else 1.0  # 0.4 is 0.02 / 0.05
    np.testing.assert_allclose(users.norm(dim=1).detach(), length, rtol=1e-5)
    z = logits_by_hand(users, module.table, module.terms.weight.double(), [items.tolist() for items in histories])
    wanted = (z * TEMPERATURE / module.temperature).log_softmax(1).detach().numpy()
    for u in range(3):
        np.testing.assert_allclose(found[u], wanted[u, candidates[u]], atol=1e-4)
    data, ranker, description = task.data.prepared, get_method("retrieval").ranker, tmp_path / "model" / "retrieval.json"
    ranker.check(tmp_path / "model", data)
    description.write_text(description.read_text().replace(data.manifest.fingerprint, "another"))
    with pytest.raises(UserError, match="was trained on another data set"):
        ranker.check(tmp_path / "model", data)
    (tmp_path / "model" / "retrieval.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="damaged retrieval model"):
        load_retrieval(tmp_path / "model")


def test_a_model_that_drops_the_mask_is_refused(tiny_config, tiny_model_dir) -> None:
    task = make(tiny_config, tiny_model_dir)
    module: Any = task.model.build().eval()
    task.model.check(module, lambda batch: module(batch)[2])

    def blind(prompts: Any) -> Any:
        batch = prompts.batch
        whole = replace(batch, prompt_ids=batch.prompt_ids * 0, sizes=batch.sizes.sum(axis=0, keepdims=True))
        return replace(prompts, batch=whole)

    with pytest.raises(UserError, match=r"model\.path: .* does not keep to the mask"):
        task.model.check(module, lambda batch: module(blind(batch))[2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["adapter.kind=soft_prompt"], ("adapter.kind=soft_prompt", "set adapter.kind=lora")),
        (["prompt.candidates=listed"], ("prompt.candidates=listed", "none")),
        (["prompt.style=chat"], ("prompt.style=chat", "prompt.style=list")),
        (["prompt.num_virtual=3"], ("prompt.num_virtual (3)", "set it to 0")),
        (["task.retrieval.width=33"], ("task.retrieval.width (33)", "32", "lower it")),
        (["train.max_tokens_per_micro_batch=20"], ("train.max_tokens_per_micro_batch (20)", "raise it")),
        (["train.targets_per_prompt=3"], ("train.global_batch_size (8)", "train.targets_per_prompt (3)")),
    ],
)
def test_what_cannot_work_is_refused(changes, words, tiny_config, tiny_model_dir) -> None:
    with pytest.raises(UserError) as fault:
        make(tiny_config, tiny_model_dir, *changes)
    assert all(word in str(fault.value) for word in words), str(fault.value)


def test_a_whole_run_learns_ranks_and_embeds(tiny_config, tmp_path) -> None:
    """Train, evaluate and embed by the command. The data mostly go from item i to i + 7, which popularity cannot know."""
    from rec_dist.cli import main

    settings = ("train.targets_per_prompt=4", "optimizer.lr=0.02", "train.epochs=40", "train.max_steps=120")
    more = (
        "task.retrieval.temperature=0.3",
        "train.global_batch_size=32",
        "evaluate.num_candidates=all",
        "evaluate.max_users=60",
    )
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tiny_config(tmp_path / "run", *KIND, *settings, *more)), encoding="utf-8")
    assert main(["train", str(path)]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert main(["embed", str(tmp_path / "run"), str(tmp_path / "embedded")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["event"] == "step"]
    assert np.mean(losses[-5:]) < 0.75 * np.log(80) < 1.1 * np.mean(losses[:2])
    last = [row for row in rows if row["event"] == "step"][-1]
    assert last["terms/last"] < 0 and last["terms/seen"] < 0, "no item of these data repeats"
    assert rows[-1]["metrics"]["hr@10"]["value"] > 0.4
    assert main(["train", str(path)]) == 0, "a finished run is left as it is"
