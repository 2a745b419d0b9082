"""Distillation: the loss by hand, lists that are those of the teacher, and a student that follows it; resumed, the same student."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_recommenders import SHAPES
from small_recommenders import config as small_config

import rec_dist
from rec_dist.cli import main
from rec_dist.commands import distil as command
from rec_dist.commands.distil import DistilOptions, distil
from rec_dist.config.load import load_config
from rec_dist.data.artifacts.scored_lists import LISTS_NAME, ScoredLists, read_lists
from rec_dist.data.artifacts.teacher import TopItems
from rec_dist.data.dataset.prepared_data import open_data
from rec_dist.data.sampling.item_sampler import ItemSampler
from rec_dist.errors import StopRequested, UserError
from rec_dist.methods.neighbours.config import NeighboursConfig
from rec_dist.methods.neighbours.scorer import NeighboursScorer
from rec_dist.methods.neighbours.tables import NeighbourTables
from rec_dist.methods.registry import build_task, find_initial_weights
from rec_dist.methods.sequential.next_item import NextItem, build_recommender
from rec_dist.methods.sequential.sequences import lay_out
from rec_dist.methods.sequential.soft_targets import SoftTargets
from rec_dist.ranking import rank as ranking
from rec_dist.ranking import unfinished
from rec_dist.ranking.prefixes import TrainingPrefixes
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.world import World
from rec_dist.training.loader import step_work

CYCLE, ITEMS, WEIGHT = 23, 37, 0.3


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


@pytest.mark.parametrize("num_sampled", [0, 20])
def test_the_loss_by_hand(num_sampled: int) -> None:
    """Two sequences, three targets: two with a list, of which one is shorter, and one without."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = build_recommender("sasrec", SHAPES["sasrec"].__dict__).double().eval()
    batch = lay_out([np.asarray(row, dtype=np.int32) for row in ([1, 2, 3], [4, 5])], [np.asarray([3, 7]), np.asarray([9])])
    listed = np.asarray([[7, 3, 30], [0, 0, 0], [11, 12, 0]], dtype=np.int32)
    shares = np.asarray([[0.5, 0.25, 0.25], [0, 0, 0], [0.75, 0.25, 0]], dtype=np.float32)
    batch = batch.with_lists(listed, shares)
    negatives = ItemSampler(num_sampled, 0, rng.integers(0, 50, ITEMS)).draw(0) if num_sampled else None
    if negatives is not None:
        batch = batch.with_negatives(*negatives)
    loss, sums, logps = NextItem(model, WEIGHT)(batch)
    logits = model.score(model.encode(batch)[batch.rows]).detach().numpy()
    parts = []
    for row, target, items, own in zip(logits, [3, 7, 9], listed, shares, strict=True):
        if negatives is None:
            logq = log_softmax(row)
        else:
            others = [row[j] - log for j, log in zip(*negatives, strict=True) if j != target]
            logq = row - np.log(np.exp([row[target], *others]).sum())
        divergence = sum(p * (np.log(p) - logq[item]) for item, p in zip(items, own, strict=True) if p > 0)
        parts.append((-logq[target], divergence, own.sum() > 0))
    expected = sum((1 - WEIGHT * has) * entropy + WEIGHT * has * divergence for entropy, divergence, has in parts)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert sums.tolist() == pytest.approx([expected, 3, sum(p[0] for p in parts), sum(p[1] for p in parts)], rel=1e-5)
    assert logps.tolist() == pytest.approx([-p[0] for p in parts], rel=1e-5)


def test_shares_are_a_softmax_over_the_list_at_the_temperature(tmp_path: Path) -> None:
    split = open_data(small_config(tmp_path, cycle=CYCLE).data).split("train")
    users, length = split.user_ids[[1, 1, 3]], int(split.offsets[2] - split.offsets[1])
    lists = TopItems(users, np.asarray([2, length - 1, 1]), np.asarray([[4, 5, 6], [7, 8, -1], [9, 1, 2]], dtype=np.int32))
    scores = np.asarray([[3.0, 1.0, -1.0], [2.0, 0.0, 9.0], [1.0, 1.0, 1.0]], dtype=np.float32)
    soft = SoftTargets(ScoredLists(lists, scores), split, temperature=2.0)
    begin = int(split.offsets[1])
    items, shares = soft.of(begin + 1, begin + length)
    assert items.shape == (length - 1, 3) and np.flatnonzero(shares.sum(axis=1)).tolist() == [1, length - 2]
    np.testing.assert_allclose(shares[1], np.exp([1.5, 0.5, -0.5]) / np.exp([1.5, 0.5, -0.5]).sum(), rtol=1e-6)
    np.testing.assert_allclose(shares[-1], [np.e / (np.e + 1), 1 / (np.e + 1), 0], rtol=1e-6)  # what pads the list has no share
    assert items[1].tolist() == [4, 5, 6] and items[-1].tolist() == [7, 8, 0]


def test_a_list_without_items_is_none(tmp_path: Path) -> None:
    split = open_data(small_config(tmp_path, cycle=CYCLE).data).split("train")
    lists = TopItems(split.user_ids[[0, 0]], np.asarray([1, 2]), np.asarray([[-1, -1], [5, -1]], dtype=np.int32))
    soft = SoftTargets(ScoredLists(lists, np.zeros((2, 2), dtype=np.float32)), split, temperature=1.0)
    items, shares = soft.of(1, 4)
    assert shares.tolist() == [[0, 0], [1, 0], [0, 0]] and items.tolist() == [[0, 0], [5, 0], [0, 0]]


def test_the_last_targets_of_each_user_come_first_and_no_held_out_item_is_one(tmp_path: Path) -> None:
    data = open_data(small_config(tmp_path, cycle=CYCLE).data)
    split = data.split("train")
    every = TrainingPrefixes(data, None)
    assert every.total == split.num_targets
    some = TrainingPrefixes(data, len(split) + 5)
    last = {int(user): int(split.offsets[row + 1] - split.offsets[row]) - 1 for row, user in enumerate(split.user_ids)}
    found = list(zip(some.user_ids.tolist(), some.positions.tolist(), strict=True))
    assert len(found) == len(split) + 5 and found == sorted(found)
    assert {pair for pair in found if pair[1] == last[pair[0]]} == set(last.items())
    assert all(last[user] - position <= 1 for user, position in found)
    histories = [history for block in some.blocks(7, 7) for history in block.histories]
    for (user, position), history in zip(found[7:], histories, strict=True):
        row = int(np.searchsorted(split.user_ids, user))
        assert history.tolist() == split.items_of(row)[:position].tolist()


def run_of(folder: Path, name: str, *, epochs: int = 2, **task: object) -> dict:
    value = small_config(folder, cycle=CYCLE, epochs=epochs).model_dump(exclude_unset=True)
    train = {**value["train"], "run_dir": str(folder / name)}
    return {
        **value,
        "task": {**value["task"], **task},
        "train": train,
        "cluster": {"launcher": "local"},
        "optimizer": {"lr": 5e-3},
    }


def student(folder: Path, name: str, *, epochs: int = 2, **distil_keys: object) -> dict:
    value = run_of(folder, name, epochs=epochs)
    value["task"]["sequential"]["distil"] = {"weight": 1.0, **distil_keys}
    return value


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of the data, and a run of neighbours, which order what no training row tells apart by the item's id."""
    folder = tmp_path_factory.mktemp("teacher")
    return folder, Path(rec_dist.train(run_of(folder, "neighbours", kind="neighbours")).path)


def taught(folder: Path, run: Path, name: str, **distil_keys: object) -> RunDirectory:
    options = DistilOptions(top_k=10)
    return distil(run, student(folder, name, lists=str(folder / "lists"), **distil_keys), options=options, progress=False)


def brute_force(data: object, run: Path, history: np.ndarray, k: int) -> list[tuple[int, float]]:
    scorer = NeighboursScorer(NeighbourTables.read(run / "model"), NeighboursConfig())
    (scores,) = scorer.score([history], [np.arange(data.num_items)])
    return [(i, scores[i]) for i in np.argsort(-scores, kind="stable").tolist() if i not in history][:k]


def test_lists_are_those_of_brute_force_and_a_stopped_teacher_goes_on(teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, run = teacher
    taught(folder, run, "one")
    data = open_data(small_config(folder, cycle=CYCLE).data)
    found = read_lists(folder / "lists", data_fingerprint=data.manifest.fingerprint)
    split = data.split("train")
    assert len(found.lists.positions) == split.num_targets
    for place in range(0, split.num_targets, 9):
        row = int(np.searchsorted(split.user_ids, found.lists.user_ids[place]))
        wanted = brute_force(data, run, split.items_of(row)[: found.lists.positions[place]], 10)
        assert found.lists.items[place].tolist() == [item for item, _ in wanted]
        np.testing.assert_allclose(found.scores[place], [score for _, score in wanted], rtol=1e-6)

    monkeypatch.setattr(ranking, "MOST_USERS", 16)
    monkeypatch.setattr(unfinished, "_SECONDS", 0.0)
    model = command.ranked_model(run, {})
    batches, real = [], command._batch

    def stops(ranked, *arguments):
        if len(batches) == 3:
            raise KeyboardInterrupt
        batches.append(ranked)
        return real(ranked, *arguments)

    monkeypatch.setattr(command, "_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        command.make_lists(model, folder / "again", DistilOptions(10), exclude_seen=True, progress=False)
    assert not (folder / "again" / LISTS_NAME).exists()
    monkeypatch.setattr(command, "_batch", lambda ranked, *rest: (batches.append(ranked), real(ranked, *rest))[1])
    command.make_lists(model, folder / "again", DistilOptions(10), exclude_seen=True, progress=False)
    assert sum(len(ranked.users) for ranked in batches) == split.num_targets, "no target was ranked twice"
    again = read_lists(folder / "again", data_fingerprint=data.manifest.fingerprint)
    assert np.array_equal(again.lists.items, found.lists.items) and np.array_equal(again.scores, found.scores)


@pytest.mark.parametrize("killed", ["once", "twice"])
def test_lists_that_are_whole_are_not_made_again(teacher, killed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill before teacher.json is written: of the command that made the lists, or of the next one as well."""
    _, run = teacher
    model, lists = command.ranked_model(run, {}), tmp_path / "lists"
    make = lambda: command.make_lists(model, lists, DistilOptions(10), exclude_seen=True, progress=False)

    def stops(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(command, "finish_lists", stops)
        with pytest.raises(KeyboardInterrupt):
            make()
        if killed == "twice":
            with pytest.raises(KeyboardInterrupt):
                make()
    monkeypatch.setattr(command, "_batch", stops)  # nothing is ranked again
    make()
    assert len(read_lists(lists, data_fingerprint=model.data.manifest.fingerprint).lists.items)
    unfinished.parts_folder(lists / LISTS_NAME).mkdir(exist_ok=True)  # as a kill right after teacher.json leaves it
    make()
    assert not unfinished.parts_folder(lists / LISTS_NAME).exists()


def test_lists_that_another_process_finishes_right_now_stay(teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just after this one has looked for teacher.json, and before it looks for parts."""
    _, run = teacher
    model, lists, look = command.ranked_model(run, {}), tmp_path / "lists", command.finished_lists
    make = lambda: command.make_lists(model, lists, DistilOptions(10), exclude_seen=True, progress=False)
    unfinished.parts_folder(lists / LISTS_NAME).mkdir(parents=True)  # the other process is at work

    def looks(folder: Path, **inputs: Any) -> bool:
        found = look(folder, **inputs)
        with monkeypatch.context() as patched:
            patched.setattr(command, "finished_lists", look)
            make()
        return found

    with monkeypatch.context() as patched:
        patched.setattr(command, "finished_lists", looks)
        with pytest.raises(UserError, match=str(lists)):
            make()
    assert len(read_lists(lists, data_fingerprint=model.data.manifest.fingerprint).lists.items)


def overlap(run: Path, other: Path) -> float:
    """The mean share of the ten best items that two runs have in common."""
    pairs = [
        {(row["user_id"], row["item_id"]) for row in rec_dist.rank(path, top_k=10, split="test").to_pylist()}
        for path in (run, other)
    ]
    return len(pairs[0] & pairs[1]) / len(pairs[0])


def test_the_student_follows_the_teacher_more_closely_than_one_without(teacher) -> None:
    folder, run = teacher
    with_teacher = taught(folder, run, "student", epochs=30).path
    without = Path(rec_dist.train(run_of(folder, "alone", epochs=30)).path)
    close, far = overlap(with_teacher, run), overlap(without, run)
    assert close > far + 0.1, (close, far)
    rows = [row for row in RunDirectory(with_teacher).rows() if "loss/teacher" in row]
    assert rows[-1]["loss/teacher"] < rows[0]["loss/teacher"]
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["loss/teacher"], rel=1e-5)  # at weight 1


def test_a_stopped_student_ends_like_one_that_was_not(teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, run = teacher
    whole = taught(folder, run, "whole").path
    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "stop_wanted", lambda self, step: step == 3)
        with pytest.raises(StopRequested):
            taught(folder, run, "stopped")
    stopped = taught(folder, run, "stopped").path
    assert (stopped / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("num_sampled", [0, 9])
def test_packing_and_a_rank_without_work_change_no_sum(teacher, num_sampled: int) -> None:
    folder, run = teacher
    taught(folder, run, "packed")
    value = student(folder, "packed", lists=str(folder / "lists"), weight=0.4)
    value["task"]["sequential"] |= {"num_sampled": num_sampled}
    config = load_config(value)
    task = build_task(config, find_initial_weights(config), "cpu")
    module = task.model.build().eval()
    totals = []
    for max_tokens in (8, 64):
        work = step_work(task, 0, max_tokens=max_tokens, world=World())
        totals.append(torch.stack([module(batch)[1] for batch in work.batches]).sum(dim=0))
    assert len(totals[0]) == 4 and float(totals[0][3]) > 0
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-5, atol=1e-5)
    dummy = task.data.collate([], step=0)
    assert dummy.listed.shape == (1, 10) and module(dummy)[1].tolist() == [0.0] * 4


def test_what_cannot_work_is_one_line(teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run = teacher
    taught(folder, run, "errors")
    for keys, words in (
        ({}, r"distil\.weight \(1\.0\) has no effect without task\.sequential\.distil\.lists"),
        ({"lists": str(tmp_path)}, "holds no lists of a teacher .*rec-dist distil"),
    ):
        with pytest.raises(UserError, match=words):
            rec_dist.train(student(folder, "x", **keys))
    with pytest.raises(UserError, match=r"the lists of another teacher \(different: top_k\)"):
        distil(run, student(folder, "x", lists=str(folder / "lists")), options=DistilOptions(11), progress=False)
    with pytest.raises(UserError, match=r"has task\.kind=neighbours"):
        distil(run, run_of(folder, "x", kind="neighbours"), progress=False)
    with pytest.raises(UserError, match="--max-targets"):
        distil(run, student(folder, "x"), options=DistilOptions(max_targets=0), progress=False)
    other = tmp_path / "other"
    other.mkdir()
    small_config(other, cycle=CYCLE - 2)  # prepares other data, which the next call finds there
    with pytest.raises(UserError, match="another data set"):
        rec_dist.train(student(other, "y", lists=str(folder / "lists")))
    assert main(["distil", str(tmp_path / "nothing"), "--into", "sequential-ml-100k:sasrec", "data.path=nowhere"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    content = bytearray((folder / "lists" / LISTS_NAME).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "lists" / LISTS_NAME).write_bytes(content)
    try:
        with pytest.raises(UserError, match=f"{LISTS_NAME} has changed.*rec-dist distil"):
            rec_dist.train(student(folder, "x", lists=str(folder / "lists")))
    finally:
        content[len(content) // 2] ^= 1
        (folder / "lists" / LISTS_NAME).write_bytes(content)
