"""A teacher's files: lists depend only on the history before their position, and belong to one model and one data set."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_rows import Row, write_prepared
from small_recommenders import SHAPES, config, train

from rec_dist.data.artifacts.teacher import TopItems, read_teacher, write_teacher
from rec_dist.data.dataset.prepared_data import SequenceSplit
from rec_dist.errors import UserError
from rec_dist.methods.sequential import teacher
from rec_dist.methods.sequential.next_item import build_recommender, last_scores
from rec_dist.methods.sequential.sequences import history_batch
from rec_dist.methods.sequential.task import build_sequential_task

NUM_ITEMS, MAX_LENGTH, TOP_H = 37, 12, 5


def split_of(rows: list[np.ndarray], first: list[int]) -> SequenceSplit:
    with tempfile.TemporaryDirectory() as folder:
        users = [Row(user * 10 + 3, items.tolist(), start) for user, (items, start) in enumerate(zip(rows, first, strict=True))]
        split = write_prepared(Path(folder) / "data", {"train": users}, [f"t{i}" for i in range(NUM_ITEMS)]).split("train")
        # opens the shards, which stay mapped when the folder is removed
        split.take(np.arange(len(split)), np.diff(split.offsets))
        return split


def lists_of(kind: str, split: SequenceSplit) -> TopItems:
    torch.manual_seed(0)
    model = build_recommender(kind, SHAPES[kind].__dict__).double().eval()
    parts = list(teacher.top_items(model, split, num_items=NUM_ITEMS, max_length=MAX_LENGTH, top_h=TOP_H, device="cpu"))
    return TopItems(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("user_ids", "positions", "items")))


def rows(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.permutation(NUM_ITEMS)[:n].astype(np.int32) for n in lengths]


@pytest.mark.parametrize("kind", list(SHAPES))
@pytest.mark.parametrize("at_once", [1 << 24, 3 * NUM_ITEMS])
def test_lists_are_those_of_each_history_alone(kind, at_once, monkeypatch):
    """Compares rows shorter and longer than max_length, in passes of few rows, with one history at a time."""
    monkeypatch.setattr(teacher, "_LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(teacher, "_ROWS_AT_ONCE", 20)
    split = split_of(rows(2, 20, 13, 12, 1, 7), [1, 1, 13, 4, 1, 6])
    found = lists_of(kind, split)
    torch.manual_seed(0)
    model = build_recommender(kind, SHAPES[kind].__dict__).double().eval()
    expected = []
    for row in range(len(split)):
        items = split.items_of(row)
        for position in range(int(split.first_target[row]), len(items)):
            history = items[:position]
            scores = last_scores(model, history_batch([history], MAX_LENGTH))[0].detach().numpy().copy()
            scores[history] = -np.inf
            expected.append((int(split.user_ids[row]), position, np.argsort(-scores)[:TOP_H].tolist()))
    assert list(zip(found.user_ids.tolist(), found.positions.tolist(), found.items.tolist(), strict=True)) == expected


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(list(SHAPES)), length=st.integers(2, 20), position=st.integers(1, 19), seed=st.integers(0, 1000))
def test_items_at_and_after_a_position_change_no_list_up_to_it(kind, length, position, seed):
    position = min(position, length - 1)
    row, mate = rows(length, 9, seed=seed)
    changed = row.copy()
    changed[position:] = np.random.default_rng(seed + 1).permutation(NUM_ITEMS)[: length - position]  # including repeats
    before, after = (lists_of(kind, split_of([items, mate], [1, 1])) for items in (row, changed))
    own = (before.user_ids == 3) & (before.positions <= position)
    assert own.sum() == position
    assert np.array_equal(before.items[own], after.items[own])
    others = before.user_ids != 3
    assert np.array_equal(before.items[others], after.items[others])


def saved(tmp_path, **changes):
    task = build_sequential_task(config(tmp_path, kind="caser", epochs=2, more={"top_h": 3, **changes}))
    model, folder = train(task), tmp_path / "model"
    folder.mkdir()
    task.save({f"model.{name}": value for name, value in model.state_dict().items()}, model, folder)
    return task, model, folder


def test_a_run_leaves_embeddings_and_a_list_for_every_training_target(tmp_path):
    task, model, folder = saved(tmp_path)
    found = read_teacher(folder, data_fingerprint=task.data.prepared.manifest.fingerprint)
    assert np.array_equal(found.embeddings, model.item_embedding.weight.detach().numpy())
    assert found.lists.items.shape == (task.data.split.num_targets, 3)
    assert (np.lexsort((found.lists.positions, found.lists.user_ids)) == np.arange(task.data.split.num_targets)).all()
    train_items = {int(user): task.data.split.items_of(row) for row, user in enumerate(task.data.split.user_ids)}
    for user, position, items in zip(found.lists.user_ids, found.lists.positions, found.lists.items, strict=True):
        assert not set(items.tolist()) & set(train_items[int(user)][:position].tolist())
    manifest = json.loads((folder / "teacher.json").read_text())
    assert (manifest["top_h"], manifest["data_fingerprint"]) == (3, task.data.prepared.manifest.fingerprint)
    assert not list(folder.glob(".*")), "a temporary file was left"


def test_nothing_is_written_without_top_h(tmp_path):
    _, _, folder = saved(tmp_path, top_h=0)
    assert sorted(path.name for path in folder.iterdir()) == ["items.arrow", "model.safetensors", "sequential.json"]
    with pytest.raises(UserError, match=r"teacher\.json is missing.*task\.sequential\.top_h above 0"):
        read_teacher(folder, data_fingerprint="any")


@pytest.mark.parametrize("name", ["model.safetensors", "item_embeddings.arrow", "top_items.arrow"])
def test_a_changed_byte_is_noticed(tmp_path, name):
    task, _, folder = saved(tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} has changed"):
        read_teacher(folder, data_fingerprint=task.data.prepared.manifest.fingerprint)


def test_other_data_are_refused(tmp_path):
    _, _, folder = saved(tmp_path)
    with pytest.raises(UserError, match="another data set"):
        read_teacher(folder, data_fingerprint="other")


def test_no_list_is_written_half(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"w")
    whole = TopItems(np.asarray([1]), np.asarray([2]), np.zeros((1, 4), dtype=np.int32))

    def broken():
        yield whole
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_teacher(tmp_path, np.zeros((2, 3), dtype=np.float32), broken(), top_h=4, weights=weights, data_fingerprint="d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["item_embeddings.arrow", "model.safetensors"]
    write_teacher(
        tmp_path, np.zeros((2, 3), dtype=np.float32), [whole, replace(whole)], top_h=4, weights=weights, data_fingerprint="d"
    )
    assert len(read_teacher(tmp_path, data_fingerprint="d").lists.user_ids) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}', '{"format_version": 2, "weights": [], "files": []}'])
def test_a_damaged_description_is_refused(tmp_path, text):
    task, _, folder = saved(tmp_path)
    (folder / "teacher.json").write_text(text)
    with pytest.raises(UserError, match=r"teacher\.json .*remove finished\.json of that run and train it again"):
        read_teacher(folder, data_fingerprint=task.data.prepared.manifest.fingerprint)
