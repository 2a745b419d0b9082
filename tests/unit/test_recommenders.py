"""The recommenders and their task.

No score depends on batch mates or on the future, losses equal a naive truth, and the models learn.
"""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from small_recommenders import CYCLE, NUM_USERS, SHAPES, SHARED, config, train

from rec_dist.config.schema import DataConfig
from rec_dist.data.prepare.prepare import prepare
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import PopularityScorer
from rec_dist.methods.sequential.next_item import NextItem, Recommender, build_recommender, last_scores
from rec_dist.methods.sequential.saved_model import kind_of, load_recommender
from rec_dist.methods.sequential.scorer import SequentialScorer
from rec_dist.methods.sequential.sequences import dummy_batch, history_batch, lay_out
from rec_dist.methods.sequential.task import build_sequential_task
from rec_dist.runtime.world import World
from rec_dist.training.loader import divide


@pytest.fixture(params=list(SHAPES))
def kind(request) -> str:
    return request.param


@pytest.fixture
def module(kind) -> Recommender:
    torch.manual_seed(0)
    return build_recommender(kind, asdict(SHAPES[kind])).double().eval()


def sequences(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, SHARED["num_items"], n).astype(np.int32) for n in lengths]


def test_batch_mates_and_padding_change_no_score(module):
    histories = sequences(3, 12, 1, 7)
    together = last_scores(module, history_batch(histories, 12))
    alone = torch.cat([last_scores(module, history_batch([history], 12)) for history in histories])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(together[0], together[1])


def test_padding_holds_nothing_that_is_read(module):
    short, long = sequences(2, 9)
    batch = history_batch([short, long], 12)
    wider = replace(batch, longest=12, slots=torch.tensor([*range(2), *range(12, 21)]))
    torch.testing.assert_close(last_scores(module, wider), last_scores(module, batch), rtol=1e-12, atol=1e-12)


def test_a_later_item_changes_no_earlier_position(module):
    (items,) = sequences(10)
    changed = items.copy()
    changed[6] = (items[6] + 1) % SHARED["num_items"]
    before, after = (module.encode(history_batch([row], 12)) for row in (items, changed))
    assert torch.equal(before[:6], after[:6])
    assert (before[6:] != after[6:]).any(dim=1).all()


def test_an_appended_item_changes_no_earlier_position(module):
    (items,) = sequences(10)
    whole, part = module.encode(history_batch([items], 12)), module.encode(history_batch([items[:7]], 12))
    torch.testing.assert_close(whole[:7], part, rtol=1e-12, atol=1e-12)


def test_only_the_last_max_length_items_are_read(module):
    (items,) = sequences(20)
    assert torch.equal(last_scores(module, history_batch([items], 12)), last_scores(module, history_batch([items[-12:]], 12)))


def test_order_matters(module):
    (items,) = sequences(8)
    swapped = items.copy()
    swapped[[-3, -2]] = items[[-2, -3]]
    assert not torch.allclose(last_scores(module, history_batch([items], 12)), last_scores(module, history_batch([swapped], 12)))


def test_loss_is_the_naive_sum_over_positions(module):
    rows, counts = sequences(5, 12, 1), (4, 7, 1)
    targets = sequences(*counts, seed=1)
    loss, sums, logps = NextItem(module)(lay_out(rows, targets))
    truth = []
    for items, wanted in zip(rows, targets, strict=True):
        for back, target in enumerate(wanted[::-1]):  # the last target follows the whole row
            prefix = items[: len(items) - back]
            truth.append(last_scores(module, history_batch([prefix], 12))[0].log_softmax(-1)[int(target)])
    torch.testing.assert_close(loss, -torch.stack(truth).sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logps.sum(), torch.stack(truth).sum().detach(), rtol=1e-12, atol=1e-12)
    assert sums.dtype == torch.float64
    assert sums.tolist() == pytest.approx([loss.item(), 12.0], abs=1e-5)


def test_a_dummy_batch_contributes_exactly_zero(module):
    batch = dummy_batch()
    loss, sums, _ = NextItem(module)(batch)
    loss.backward()
    assert (loss.item(), sums.tolist()) == (0.0, [0.0, 0.0])
    assert (batch.num_groups, batch.num_logical_tokens) == (0, 0)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} took no part: ranks would fall out of step"
        assert not parameter.grad.any(), name


def test_dropout_only_in_training(module):
    (items,) = sequences(9)
    batch = history_batch([items], 12)
    assert torch.equal(last_scores(module, batch), last_scores(module, batch))
    module.train()
    assert not torch.equal(last_scores(module, batch), last_scores(module, batch))


def test_an_empty_history_is_refused():
    with pytest.raises(ValueError, match="history 1 is empty"):
        history_batch(sequences(3, 0), 12)


@pytest.mark.parametrize("max_length", [2, 3, 5, 50])
def test_every_target_is_scored_once_with_what_precedes_it(tmp_path, max_length):
    task = build_sequential_task(config(tmp_path, max_length=max_length))
    examples = [task.data.example(index) for index in range(task.sampler.num_examples)]
    assert sum(example.num_scored for example in examples) == sum(6 + user % 4 - 1 for user in range(NUM_USERS))
    assert max(example.num_tokens for example in examples) <= max_length
    for example in examples:
        following = (example.items + 1) % CYCLE  # the data set's rule, which the item numbers happen to keep
        assert np.array_equal(following[-len(example.targets) :], example.targets)


@pytest.mark.parametrize("num_sampled", [0, 6])
def test_packing_and_accumulation_change_no_sum(tmp_path, kind, num_sampled):
    task = build_sequential_task(config(tmp_path, kind=kind, more={"num_sampled": num_sampled}))
    module = task.model.build().double().eval()
    first = np.arange(10)
    drawn = task.data.draw(first, np.zeros_like(first))
    losses = []
    for tokens, size in ((64, 1), (8, 1), (1000, 3)):
        total = torch.zeros(2, dtype=torch.float64)
        for rank in range(size):
            work = divide(task, drawn, step=0, epoch=0, max_tokens=tokens, world=World(rank=rank, size=size))
            total += sum(module(batch)[1] for batch in work.batches)
        assert float(total[1]) == work.num_scored
        losses.append(float(total[0]))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)


def test_initial_weights_are_the_seeds(tmp_path):
    task, other = build_sequential_task(config(tmp_path)), build_sequential_task(config(tmp_path, seed=1))
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = task.model.build().model.item_embedding.weight
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, task.model.build().model.item_embedding.weight)
    assert not torch.equal(first, other.model.build().model.item_embedding.weight)


def test_saved_model_scores_the_same(tmp_path, kind):
    task = build_sequential_task(config(tmp_path, kind=kind))
    module, folder = task.model.build().eval(), tmp_path / "model"
    folder.mkdir()
    task.save(dict(module.state_dict()), module, folder)
    batch = history_batch([np.arange(5, dtype=np.int32)], 8)
    assert torch.equal(last_scores(load_recommender(folder), batch), last_scores(module.model, batch))
    assert kind_of(load_recommender(folder).shape) == kind
    assert (folder / "items.arrow").read_bytes() == (tmp_path / "data" / "items.arrow").read_bytes()
    assert json.loads((folder / "sequential.json").read_text())["data_fingerprint"]
    for damage in ({"shape": {**asdict(task.save.shape), "num_items": 3}}, {"shape": {"size": 1}}, {"model": "gpt"}):
        saved = {"model": kind, "shape": asdict(task.save.shape), **damage}
        (folder / "sequential.json").write_text(json.dumps(saved))
        with pytest.raises(UserError, match="damaged"):
            load_recommender(folder)
    with pytest.raises(UserError, match="holds no sequential model"):
        load_recommender(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 15}, r"task\.sequential\.width \(15\).*num_heads \(2\)"),
        ({"max_length": 65}, r"train\.max_tokens_per_micro_batch \(64\).*max_length is 65"),
        ({"targets_per_prompt": 2}, r"train\.targets_per_prompt \(2\)"),
        ({"init_from": "runs/other"}, r"train\.init_from"),
        ({"kind": "caser", "more": {"num_layers": 3}}, r"num_layers \(3\) has no effect on task\.sequential\.model=caser"),
        ({"kind": "gru4rec", "more": {"num_heads": 4}}, r"num_heads \(4\) has no effect.*which reads dropout, max_length"),
        ({"more": {"window": 7}}, r"window \(7\) has no effect on task\.sequential\.model=sasrec"),
        ({"kind": "caser", "more": {"window": 9}}, r"window \(9\) is larger than task\.sequential\.max_length \(8\)"),
        ({"more": {"top_h": 4}}, r"top_h \(4\) is more than the longest history leaves: 11 items of the catalogue less 8"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        build_sequential_task(config(tmp_path, **changes))


def hits(task, ranker) -> float:
    """hr@1 of the last item of each test row among the whole catalogue; a tie is a miss."""
    test = task.data.prepared.split("test")
    histories = [test.items_of(row)[:-1] for row in range(len(test))]
    everything = np.arange(task.data.prepared.num_items, dtype=np.int32)
    scores = ranker.score(histories, [everything] * len(histories))
    wanted = [int(test.items_of(row)[-1]) for row in range(len(test))]
    return float(np.mean([(values >= values[item]).sum() == 1 for item, values in zip(wanted, scores, strict=True)]))


@pytest.mark.parametrize("num_sampled", [CYCLE, CYCLE + 1, 10_000])
def test_as_many_sampled_items_as_the_catalogue_is_the_full_softmax(tmp_path, kind, num_sampled):
    tasks = [build_sequential_task(config(tmp_path, kind=kind, more={"num_sampled": num})) for num in (0, num_sampled)]
    full, sampled = (
        task.model.build()(task.data.collate([task.data.example(index) for index in range(5)], step=3)) for task in tasks
    )
    assert torch.equal(full[0], sampled[0])
    assert torch.equal(full[2], sampled[2])
    assert "the softmax is the full one" in tasks[1].notes()[0]


def test_sampled_items_are_those_of_the_step(tmp_path):
    first, again = (build_sequential_task(config(tmp_path, more={"num_sampled": 6})) for _ in range(2))
    examples = [first.data.example(index) for index in range(3)]
    batch, same, later = (
        first.data.collate(examples, step=3),
        again.data.collate(examples[:1], step=3),
        first.data.collate(examples, step=4),
    )
    assert torch.equal(batch.negatives, same.negatives)
    assert torch.equal(batch.negatives, first.data.collate([], step=3).negatives)
    assert not torch.equal(batch.negatives, later.negatives)


@pytest.mark.parametrize("num_sampled", [0, 8])
def test_learns_a_deterministic_pattern(tmp_path, kind, num_sampled):
    task = build_sequential_task(config(tmp_path, kind=kind, epochs=30, more={"num_sampled": num_sampled}))
    assert hits(task, SequentialScorer(train(task))) > 0.9


def test_beats_popularity_on_a_markov_chain(tmp_path, kind):
    """Item i is followed by i + 1 (0.7), i + 2 or i + 3 (0.15 each) of 60, and most users begin near item 0."""
    rng, lines = np.random.default_rng(3), ["user,item,timestamp"]
    for user in range(90):
        item = int(rng.geometric(0.08))
        for step in range(int(rng.integers(8, 14))):
            lines.append(f"u{user},i{item % 60:02d},{step}")
            item += int(rng.choice([1, 2, 3], p=[0.7, 0.15, 0.15]))
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    prepare(
        DataConfig(source=str(tmp_path / "rows.csv"), path=str(tmp_path / "data"), split="leave_one_out", min_user_interactions=1)
    )
    task = build_sequential_task(config(tmp_path, kind=kind, epochs=20))
    popularity = hits(task, PopularityScorer(task.data.prepared.train_counts))
    model = hits(task, SequentialScorer(train(task)))
    assert popularity < 0.3 < 0.5 < model, (popularity, model)
