"""P2Rec's stage 1: held-out items reach no prompt, preference or category; losses by hand; gradients where they belong."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from p2rec_teacher import CATEGORIES, NUM_CATEGORIES, write_p2rec_teacher
from safetensors.torch import load_file

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.prompts.builder import PromptBuilder
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.p2rec.categories import item_categories, preference, shuffled
from rec_dist.methods.p2rec.reconstruct import PREFERENCE_HEAD_NAME, UserExamples, losses_of, reconstruction_loss
from rec_dist.methods.registry import build_task
from rec_dist.packing.pooled_prompts import PooledPrompts, pack_pooled_prompts
from rec_dist.storage.checksums import parse_manifest, write_manifest
from rec_dist.training.validation import validation_task

STAGE_ONE = ("task.kind=p2rec_reconstruct", f"task.p2rec.num_categories={NUM_CATEGORIES}")


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: Any, tiny_data: Path) -> Path:
    return write_p2rec_teacher(tmp_path_factory.mktemp("teacher") / "model", PreparedData.open(tiny_data))


def make(tiny_config: Any, tiny_model_dir: Path, teacher: Path, *changes: Any) -> Any:
    config = RunConfig.model_validate(tiny_config("run", *STAGE_ONE, *changes))
    task = build_task(config, InitialWeights(tiny_model_dir, teacher=teacher), "cpu")
    assert isinstance(task.data, UserExamples)
    return task


def test_categories_are_the_clusters_of_what_was_trained():
    rng = np.random.default_rng(0)
    centres = np.asarray([[10.0, 0], [-10, 0], [0, 10]])
    kind = np.arange(60) % 3
    vectors = (centres[kind] + rng.normal(size=(60, 2))).astype(np.float32)
    counts = np.ones(60, dtype=np.int64)
    counts[57:] = 0  # never trained: far away they would make a cluster of their own
    vectors[57:] = [[500, 500], [501, 500], [500, 501]]
    found = item_categories(vectors, counts, num_categories=3, seed=0)
    assert [len(set(found[:57][kind[:57] == k].tolist())) for k in range(3)] == [1, 1, 1]
    assert len(set(found[:57].tolist())) == 3
    assert np.array_equal(found, item_categories(vectors, counts, num_categories=3, seed=0))
    with pytest.raises(UserError, match=r"task\.p2rec\.num_categories \(58\) is more than the 57 items"):
        item_categories(vectors, counts, num_categories=58, seed=0)


def test_mini_batches_find_the_same_corners(monkeypatch):
    monkeypatch.setattr("rec_dist.methods.p2rec.categories._MINI_BATCHES_FROM", 10)
    kind = np.arange(200) % 2
    vectors = np.stack([kind * 20.0, np.random.default_rng(0).normal(size=200)], axis=1).astype(np.float32)
    found = item_categories(vectors, np.ones(200, dtype=np.int64), num_categories=2, seed=1)
    assert len(set(found[kind == 0].tolist())) == len(set(found[kind == 1].tolist())) == 1
    assert found[0] != found[1]


def test_a_preference_by_hand():
    categories = np.asarray([2, 0, 2, 1, 0], dtype=np.int32)
    found = preference(categories, np.asarray([0, 2, 3, 4], dtype=np.int32), 4)
    assert found.tolist() == [0.25, 0.25, 0.5, 0.0]
    assert found.dtype == np.float32


def test_shuffling_keeps_sizes_and_leaves_untrained_items():
    categories = (np.arange(300) % 7).astype(np.int32)
    counts = (np.arange(300) < 280).astype(np.int64)
    mixed = shuffled(categories, counts, seed=0)
    assert np.array_equal(np.bincount(mixed), np.bincount(categories))
    assert np.array_equal(mixed[280:], categories[280:])
    assert 0.05 < (mixed[:280] == categories[:280]).mean() < 0.3  # 1 in 7 by chance
    assert not np.array_equal(mixed, shuffled(categories, counts, seed=1))


def test_both_losses_by_hand():
    """KL of (1/2, 1/2, 0) from softmax(ln 4, 0, 0) = (4, 1, 1) / 6; squared errors of the head's output itself."""
    outputs, wanted = torch.tensor([[np.log(4.0), 0.0, 0.0]]).float(), torch.tensor([[0.5, 0.5, 0.0]])
    (kl,), said = losses_of(outputs, wanted, kind="kl")
    assert float(kl) == pytest.approx(0.5 * np.log(0.5 / (4 / 6)) + 0.5 * np.log(0.5 / (1 / 6)), rel=1e-6)
    assert said[0].tolist() == pytest.approx([4 / 6, 1 / 6, 1 / 6])
    (mse,), raw = losses_of(outputs, wanted, kind="mse")
    assert float(mse) == pytest.approx(((np.log(4) - 0.5) ** 2 + 0.25 + 0) / 3, rel=1e-6)
    assert torch.equal(raw, outputs)
    assert float(losses_of(wanted.log().clamp(min=-1e4), wanted, kind="kl")[0]) == pytest.approx(0, abs=1e-6)
    assert float(losses_of(wanted, wanted, kind="mse")[0]) == 0


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_sums_counts_and_a_dummy_batch(kind, tiny_config, tiny_model_dir, teacher_dir):
    task = make(tiny_config, tiny_model_dir, teacher_dir, f"task.p2rec.loss={kind}")
    micro_batch = task.data.collate([task.data.example(index) for index in (0, 3, 4)], step=0)
    outputs = torch.randn(3, NUM_CATEGORIES, generator=torch.Generator().manual_seed(0))
    found = reconstruction_loss(outputs, micro_batch, kind=kind)
    losses, said = losses_of(outputs, micro_batch.labels, kind=kind)
    assert float(found.loss_sum) == pytest.approx(float(losses.sum()), rel=1e-6)
    assert float(found.count) == 3
    assert float(found.metrics["preference/distance"]) == pytest.approx(
        float((said - micro_batch.labels).abs().sum() / 2), rel=1e-6
    )
    idle = task.data.collate([], step=0)
    broken = torch.full((1, NUM_CATEGORIES), float("nan"), requires_grad=True)
    nothing = reconstruction_loss(broken, idle, kind=kind)
    nothing.loss_sum.backward()
    assert (nothing.loss_sum.item(), float(nothing.count), idle.num_groups) == (0.0, 0.0, 0)
    assert not broken.grad.any()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_held_out_items_are_in_no_prompt_and_no_preference(
    pooling, tiny_config, tiny_model_dir, teacher_dir, tiny_data, tiny_tokenizer
):
    """For every user, the prompt is that of the last training items, and the preference counts training items only."""
    task = make(tiny_config, tiny_model_dir, teacher_dir, f"task.p2rec.pooling={pooling}")
    data = PreparedData.open(tiny_data)
    train, held_out = data.split("train"), {}
    for name in ("valid", "test"):
        part = data.split(name)
        for row, user in enumerate(part.user_ids.tolist()):
            held_out.setdefault(user, set()).update(part.items_of(row)[part.first_target[row] :].tolist())
    assert task.sampler.num_examples == len(train) > 50
    for row in range(len(train)):
        items, example = train.items_of(row), task.data.example(row)
        assert not held_out[int(train.user_ids[row])] & set(items.tolist())
        names = [f"\n- {data.titles[item]}" for item in items[-5:]]
        assert tiny_tokenizer.decode(example.tokens) == "A user watched:" + "".join(names) + "\n-"
        behind = len(tiny_tokenizer("A user watched:").input_ids)
        assert example.num_pooled == (1 if pooling == "last" else len(example.tokens) - behind)
        counts = np.asarray([(CATEGORIES[items] == k).sum() for k in range(NUM_CATEGORIES)]) / len(items)
        assert sorted(example.preference.tolist()) == pytest.approx(sorted(counts.tolist()))
    assert len(set(zip(task.data.categories.tolist(), CATEGORIES.tolist(), strict=True))) == NUM_CATEGORIES, (
        "the corners are found"
    )


def test_the_prompt_is_that_of_an_eval_example(tiny_config, tiny_model_dir, teacher_dir):
    task = make(tiny_config, tiny_model_dir, teacher_dir)
    builder: PromptBuilder = task.data.builder
    history = np.asarray([3, 17, 42], dtype=np.int32)
    assert np.array_equal(builder.prompt(history), builder.grouped_prompt(history, [history[:1]], [0]).tokens)


def test_the_control_keeps_the_categories_sizes(tiny_config, tiny_model_dir, teacher_dir):
    plain = make(tiny_config, tiny_model_dir, teacher_dir)
    control = make(tiny_config, tiny_model_dir, teacher_dir, "task.p2rec.shuffle_categories=true")
    assert np.array_equal(np.bincount(control.data.categories), np.bincount(plain.data.categories))
    assert not np.array_equal(control.data.categories, plain.data.categories)
    assert np.array_equal(control.data.example(2).tokens, plain.data.example(2).tokens)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_batch_mates_change_nothing_and_rows_are_pooled_as_stated(pooling, tiny_config, tiny_model_dir, teacher_dir):
    task = make(tiny_config, tiny_model_dir, teacher_dir, f"task.p2rec.pooling={pooling}")
    module: Any = task.model.build().double()
    examples = [task.data.example(index) for index in (5, 1, 9)]
    together = module(task.data.collate(examples, step=0))[2]
    alone = torch.cat([module(task.data.collate([example], step=0))[2] for example in examples])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
    base = module.encoder.base
    for example, state in zip(examples, together, strict=True):
        hidden = base.base_model(input_ids=torch.from_numpy(example.tokens.astype(np.int64))[None]).last_hidden_state[0]
        rows = hidden[-1:] if pooling == "last" else hidden[len(task.data.builder.pieces.begin) :]
        torch.testing.assert_close(state.double(), rows.mean(0).double(), rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_adapter_and_the_head_alone(tiny_config, tiny_model_dir, teacher_dir):
    task = make(tiny_config, tiny_model_dir, teacher_dir)
    module: Any = task.model.build()
    torch.nn.init.normal_(module.linear.weight)  # it starts at 0 and then passes no gradient down
    trains = {name for name, p in module.named_parameters() if p.requires_grad}
    assert {name for name in trains if "lora_" not in name} == {"linear.weight", "linear.bias"}
    assert len(trains) > 10
    loss_sum, sums, _ = module(task.data.collate([task.data.example(0), task.data.example(1)], step=0))
    assert (float(sums[0]), float(sums[1])) == (pytest.approx(loss_sum.item(), rel=1e-6), 2.0)
    loss_sum.backward()
    got = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert got == {name for name in trains if "lora_A" not in name}, "lora_B starts at 0, so lora_A has no gradient yet"


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_it_starts_from_the_one_guess_for_all(kind, tiny_config, tiny_model_dir, teacher_dir):
    """Over all users, the first loss is the one that the log states for that guess. The caller's generator is unchanged."""
    task = make(tiny_config, tiny_model_dir, teacher_dir, f"task.p2rec.loss={kind}", "train.max_steps=40", "train.epochs=9")
    task.model.build()
    module: Any = task.model.build()
    with torch.no_grad():
        loss_sum, sums, _ = module(
            task.data.collate([task.data.example(index) for index in range(task.sampler.num_examples)], step=0)
        )
    assert f"has loss {float(loss_sum / sums[1]):.4f}" in task.notes()[-1]


def test_the_log_says_what_one_guess_for_all_costs(tiny_config, tiny_model_dir, teacher_dir):
    task = make(tiny_config, tiny_model_dir, teacher_dir, "train.max_steps=40")
    every = np.stack([task.data.example(index).preference for index in range(task.sampler.num_examples)]).astype(np.float64)
    guess = every.mean(axis=0)
    kl = np.where(every > 0, every * np.log(np.where(every > 0, every, 1) / guess), 0).sum(axis=1).mean()
    assert task.notes()[-1].endswith(f"said of each of them, has loss {kl:.4f}")


def test_workers_that_cluster_differently_are_noticed(tiny_config, tiny_model_dir, teacher_dir):
    task = make(tiny_config, tiny_model_dir, teacher_dir)
    exchange = task.exchange(torch.nn.Module())
    own = exchange.step_sums()
    assert len(own) == 3
    other = own + torch.tensor([0.0, 1.0, 2 * float(own[1]) + 1])  # a print one larger
    for sums in (own + other, 3 * own + other):
        with pytest.raises(UserError, match="do not find the same categories"):
            exchange.end_step(sums)
    exchange.end_step(5 * own)
    assert len(exchange.step_sums()) == 0
    exchange.end_step(exchange.step_sums())


def test_what_a_run_leaves(tiny_config, tiny_model_dir, teacher_dir, tmp_path):
    task = make(tiny_config, tiny_model_dir, teacher_dir)
    module: Any = task.model.build()
    weights = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    task.save(weights, module, tmp_path)
    saved = load_file(tmp_path / PREFERENCE_HEAD_NAME)
    assert torch.equal(saved["weight"], weights["linear.weight"])
    assert torch.equal(saved["bias"], weights["linear.bias"])
    assert saved["categories"].tolist() == task.data.categories.tolist()
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert len(adapter) == len(weights) - 2
    assert json.loads((tmp_path / "base.json").read_text())["path"] == str(tiny_model_dir)


def test_a_model_that_drops_the_mask_is_refused(tiny_config, tiny_model_dir, teacher_dir):
    task = make(tiny_config, tiny_model_dir, teacher_dir)
    module: Any = task.model.build().eval()
    task.model.check(module, lambda batch: module(batch)[2])

    def blind(micro_batch: PooledPrompts) -> PooledPrompts:
        """All prompts count as one."""
        batch = micro_batch.batch
        whole = replace(batch, prompt_ids=batch.prompt_ids * 0, sizes=batch.sizes.sum(axis=0, keepdims=True))
        return replace(micro_batch, batch=whole)

    with pytest.raises(UserError, match=r"model\.path: .* does not keep to the mask"):
        task.model.check(module, lambda batch: module(blind(batch))[2])


def test_rows_are_where_they_are_said_to_be():
    prompts = [np.asarray(tokens, dtype=np.int32) for tokens in ([7, 8, 9], [4], [1, 2])]
    micro_batch = pack_pooled_prompts(prompts, [2, 1, 2])
    assert micro_batch.batch.input_ids.tolist() == [7, 8, 9, 4, 1, 2]
    assert micro_batch.batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert (micro_batch.rows.tolist(), micro_batch.owners.tolist()) == ([1, 2, 3, 4, 5], [0, 0, 1, 2, 2])
    assert (micro_batch.num_tokens, micro_batch.num_groups, micro_batch.labels.shape) == (6, 3, (3, 0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["adapter.kind=none"], ("adapter.kind=none", "set adapter.kind=lora")),
        (["prompt.candidates=listed"], ("prompt.candidates=listed", "set prompt.candidates=none")),
        (["train.targets_per_prompt=2"], ("train.targets_per_prompt (2)", "remove it")),
        (["task.p2rec.num_categories=81"], ("task.p2rec.num_categories (81)", "lower it")),
        (
            ["train.max_tokens_per_micro_batch=20"],
            ("train.max_tokens_per_micro_batch (20)", "raise it or lower prompt.max_history"),
        ),
        (
            [{"prompt.instruction": "a " * 600}, "train.max_tokens_per_micro_batch=9999"],
            ("positions", "512", "shorten prompt.instruction"),
        ),
    ],
)
def test_what_cannot_take_effect_is_refused(changes, words, tiny_config, tiny_model_dir, teacher_dir):
    with pytest.raises(UserError) as caught:
        make(tiny_config, tiny_model_dir, teacher_dir, *changes)
    assert all(word in str(caught.value) for word in words), caught.value


def test_no_validation_and_no_teacher_of_other_data(tiny_config, tiny_model_dir, teacher_dir, tmp_path):
    config = RunConfig.model_validate(tiny_config("run", *STAGE_ONE, "checkpoint.validation_examples=4"))
    with pytest.raises(UserError, match=r"checkpoint\.validation_examples: .* set it to 0"):
        validation_task(config, InitialWeights(tiny_model_dir, teacher=teacher_dir), "cpu")
    other = tmp_path / "model"
    other.mkdir()
    for path in teacher_dir.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    manifest = parse_manifest((other / "teacher.json").read_bytes(), 2)
    write_manifest(other / "teacher.json", 2, {**manifest, "data_fingerprint": "another"})
    with pytest.raises(UserError, match="another data set"):
        make(tiny_config, tiny_model_dir, other)


def test_embeddings_that_are_not_finite_make_no_categories():
    vectors = np.ones((9, 2), dtype=np.float32)
    vectors[4, 1] = np.nan
    with pytest.raises(UserError, match=r"task\.p2rec\.teacher holds item embeddings that are not finite"):
        item_categories(vectors, np.ones(9, dtype=np.int64), num_categories=2, seed=0)
