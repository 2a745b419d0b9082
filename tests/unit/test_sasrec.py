"""SASRec and its task: no score depends on batch mates or on the future, losses equal a naive truth, and it learns."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rec_dist.config.schema import DataConfig, RunConfig
from rec_dist.data.prepare import prepare
from rec_dist.evaluate.rankers import SequentialRanker
from rec_dist.models.sasrec import SASRec, SASRecShape, history_batch, lay_out, stand_in
from rec_dist.runtime.errors import UserError
from rec_dist.runtime.world import World
from rec_dist.tasks.sequential import build_sequential_task, load_sasrec
from rec_dist.train.loader import divide, step_work

SHAPE = SASRecShape(num_items=37, width=16, num_layers=2, num_heads=2, dropout=0.3, max_length=12)
NUM_USERS, CYCLE = 24, 11


def model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object) -> SASRec:
    torch.manual_seed(seed)
    return SASRec(replace(SHAPE, **changes)).to(dtype).eval()


def sequences(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, SHAPE.num_items, n).astype(np.int32) for n in lengths]


def config(folder: Path, *, width: int = 16, max_length: int = 8, **train: object) -> RunConfig:
    """A data set in which item (i + 1) % CYCLE always follows item i; rows of 8 to 11 items, the last two held out."""
    path = folder / "rows.csv"
    if not path.exists():
        lines = ["user,item,timestamp"]
        for user in range(NUM_USERS):  # one round at most: a user chooses an item once
            lines += [f"u{user},i{(user + step) % CYCLE:02d},{step}" for step in range(8 + user % 4)]
        path.write_text("\n".join(lines) + "\n")
        data = DataConfig(source=str(path), path=str(folder / "data"), split="leave_one_out", min_user_interactions=1)
        prepare(data, log=lambda line: None)
    sequential = {"width": width, "num_heads": 2, "dropout": 0.0, "max_length": max_length}
    return RunConfig.model_validate(
        {
            "data": {"source": str(path), "path": str(folder / "data"), "split": "leave_one_out"},
            "task": {"kind": "sequential", "sequential": sequential},
            "train": {"run_dir": str(folder / "run"), "groups_per_step": 8, "tokens_per_pack": 64, **train},
        }
    )


def test_batch_mates_and_padding_change_no_score():
    module, histories = model(), sequences(3, 12, 1, 7)
    together = module.scores(history_batch(histories, 12))
    alone = torch.cat([module.scores(history_batch([history], 12)) for history in histories])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(together[0], together[1])


def test_padding_holds_nothing_that_is_read():
    module, (short, long) = model(), sequences(2, 9)
    batch = history_batch([short, long], 12)
    wider = replace(batch, longest=12, slots=torch.tensor([*range(2), *range(12, 21)]))
    torch.testing.assert_close(module.scores(wider), module.scores(batch), rtol=1e-12, atol=1e-12)


def test_a_later_item_changes_no_earlier_position():
    module, (items,) = model(), sequences(10)
    changed = items.copy()
    changed[6] = (items[6] + 1) % SHAPE.num_items
    before, after = (module.hidden(history_batch([row], 12)) for row in (items, changed))
    assert torch.equal(before[:6], after[:6])
    assert (before[6:] != after[6:]).any(dim=1).all()


def test_an_appended_item_changes_no_earlier_position():
    module, (items,) = model(), sequences(10)
    whole, part = module.hidden(history_batch([items], 12)), module.hidden(history_batch([items[:7]], 12))
    torch.testing.assert_close(whole[:7], part, rtol=1e-12, atol=1e-12)


def test_only_the_last_max_length_items_are_read():
    module, (items,) = model(), sequences(20)
    assert torch.equal(module.scores(history_batch([items], 12)), module.scores(history_batch([items[-12:]], 12)))


def test_order_matters():
    module, (items,) = model(), sequences(8)
    swapped = items.copy()
    swapped[[1, 2]] = items[[2, 1]]
    assert not torch.allclose(module.scores(history_batch([items], 12)), module.scores(history_batch([swapped], 12)))


def test_loss_is_the_naive_sum_over_positions():
    module, rows, counts = model(), sequences(5, 12, 1), (4, 7, 1)
    targets = sequences(*counts, seed=1)
    loss, sums, logps = module(lay_out(rows, targets))
    truth = []
    for items, wanted in zip(rows, targets, strict=True):
        for back, target in enumerate(wanted[::-1]):  # the last target follows the whole row
            prefix = items[: len(items) - back]
            truth.append(module.scores(history_batch([prefix], 12))[0].log_softmax(-1)[int(target)])
    torch.testing.assert_close(loss, -torch.stack(truth).sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logps.sum(), torch.stack(truth).sum().detach(), rtol=1e-12, atol=1e-12)
    assert sums.dtype == torch.float64
    assert sums.tolist() == pytest.approx([loss.item(), 12.0], abs=1e-5)


def test_stand_in_contributes_exactly_zero():
    module, batch = model(), stand_in()
    loss, sums, _ = module(batch)
    loss.backward()
    assert (loss.item(), sums.tolist()) == (0.0, [0.0, 0.0])
    assert (batch.num_groups, batch.num_logical_tokens) == (0, 0)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} took no part: ranks would fall out of step"
        assert not parameter.grad.any(), name


def test_dropout_only_in_training():
    module, (items,) = model(), sequences(9)
    batch = history_batch([items], 12)
    assert torch.equal(module.scores(batch), module.scores(batch))
    module.train()
    assert not torch.equal(module.scores(batch), module.scores(batch))


def test_an_empty_history_is_refused():
    with pytest.raises(ValueError, match="history 1 is empty"):
        history_batch(sequences(3, 0), 12)


@pytest.mark.parametrize("max_length", [2, 3, 5, 50])
def test_every_target_is_scored_once_with_what_precedes_it(tmp_path, max_length):
    task = build_sequential_task(config(tmp_path, max_length=max_length))
    units = [task.unit(index, 0) for index in range(task.order.num_units)]
    assert sum(unit.num_scored for unit in units) == sum(6 + user % 4 - 1 for user in range(NUM_USERS))
    assert max(unit.num_tokens for unit in units) <= max_length
    for unit in units:
        following = (unit.items + 1) % CYCLE  # the data set's rule, which the item numbers happen to keep
        assert np.array_equal(following[-len(unit.targets) :], unit.targets)


def test_packing_and_accumulation_change_no_sum(tmp_path):
    task = build_sequential_task(config(tmp_path))
    module = task.build_module().double().eval()
    units = [task.unit(index, 0) for index in range(10)]
    losses = []
    for tokens, size in ((64, 1), (8, 1), (1000, 3)):
        total = torch.zeros(2, dtype=torch.float64)
        for rank in range(size):
            work = divide(task, units, step=0, epoch=0, tokens_per_pack=tokens, world=World(rank=rank, size=size))
            total += sum(module(batch)[1] for batch in work.batches)
        assert float(total[1]) == work.num_scored
        losses.append(float(total[0]))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)


def test_initial_weights_are_the_seeds(tmp_path):
    task, other = build_sequential_task(config(tmp_path)), build_sequential_task(config(tmp_path, seed=1))
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = task.build_module().catalogue.weight
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, task.build_module().catalogue.weight)
    assert not torch.equal(first, other.build_module().catalogue.weight)


def test_saved_model_scores_the_same(tmp_path):
    task = build_sequential_task(config(tmp_path))
    module, folder = task.build_module().eval(), tmp_path / "model"
    folder.mkdir()
    task.save_model(dict(module.state_dict()), module, folder)
    batch = history_batch([np.arange(5, dtype=np.int32)], 8)
    assert torch.equal(load_sasrec(folder).scores(batch), module.scores(batch))
    assert (folder / "items.arrow").read_bytes() == (tmp_path / "data" / "items.arrow").read_bytes()
    assert json.loads((folder / "sequential.json").read_text())["data_fingerprint"]
    (folder / "sequential.json").write_text(json.dumps({"shape": {**task._shape.as_dict(), "num_items": 3}}))
    with pytest.raises(UserError, match="damaged"):
        load_sasrec(folder)
    with pytest.raises(UserError, match="holds no sequential model"):
        load_sasrec(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 15}, r"task\.sequential\.width \(15\).*num_heads \(2\)"),
        ({"max_length": 65}, r"train\.tokens_per_pack \(64\).*max_length is 65"),
        ({"targets_per_trunk": 2}, r"train\.targets_per_trunk \(2\)"),
        ({"init_from": "runs/other"}, r"train\.init_from"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        build_sequential_task(config(tmp_path, **changes))


def test_learns_a_deterministic_pattern(tmp_path):
    task = build_sequential_task(config(tmp_path, epochs=30))
    module = task.build_module().train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for step in range(task.order.num_steps):
        work = step_work(task, step, tokens_per_pack=64, world=World())
        optimizer.zero_grad()
        for batch in work.batches:
            (module(batch)[0] / work.num_scored).backward()
        optimizer.step()
    test = task._data.split("test")
    histories = [test.items_of(row)[:-1] for row in range(len(test))]
    everything = np.arange(task._data.num_items, dtype=np.int32)
    scores = SequentialRanker(module).score(histories, [everything] * len(histories))
    best = [int(values.argmax()) for values in scores]
    hits = np.mean([item == int(test.items_of(row)[-1]) for row, item in enumerate(best)])
    assert hits > 0.9
