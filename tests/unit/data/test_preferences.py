"""Preference rows: all layouts give the same rows, faults are counted, and exported rows train like their source."""

import gzip
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared_rows import Row, write_prepared

from rec_dist.commands.export_rows import export_rows
from rec_dist.config.schema import DataConfig, RunConfig
from rec_dist.data.dataset.preferences import PreferenceData
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.dataset.schema import PreferenceRow
from rec_dist.data.dataset.verify import verify
from rec_dist.data.prepare.prepare import prepare
from rec_dist.data.prompts.text_prompts import tokenize_rows
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.registry import build_task
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.packed_batch import pack_prompts
from rec_dist.training.validation import validation_task

WANTED = [("Next:", [" A", " B", " C"]), ("Then:", [" B", " D"])]


def prepared(source: Path, folder: Path, **changes: object) -> PreferenceData:
    config = DataConfig(**{"source": str(source), "path": str(folder), "format": "preferences", **changes})
    prepare(config)
    return PreferenceData.open(folder)


def rows_of(data: PreferenceData) -> list[tuple[str, list[str]]]:
    return [(row.prompt, row.completions) for rows in data.rows() for row in rows]


def as_lists() -> list[dict[str, Any]]:
    return [{"prompt": prompt, "chosen": texts[0], "rejected": texts[1:]} for prompt, texts in WANTED]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lists(folder: Path) -> Path:
    return write(folder / "rows.jsonl", as_lists())


def a_text_and_a_list(folder: Path) -> Path:
    return write(folder / "rows.jsonl", [as_lists()[0], {**as_lists()[1], "rejected": " D"}])


def numbered(folder: Path) -> Path:
    rows = [{"prompt": p, "chosen": t[0], **{f"rejected{k}": text for k, text in enumerate(t[1:], 1)}} for p, t in WANTED]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def ranked_and_packed(folder: Path) -> Path:
    with gzip.open(folder / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"prompt": p, "completions": t, "other": 1}) + "\n" for p, t in WANTED)
    return folder / "rows.jsonl.gz"


def csv_with_holes(folder: Path) -> Path:
    (folder / "rows.csv").write_text("prompt,chosen,rejected1,rejected2\nNext:, A, B, C\nThen:, B, D,\n")
    return folder / "rows.csv"


def parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(as_lists()), folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.mark.parametrize("layout", [lists, a_text_and_a_list, numbered, ranked_and_packed, csv_with_holes, parquet])
def test_every_layout_reads_the_same(layout, tmp_path):
    data = prepared(layout(tmp_path), tmp_path / "out")
    assert rows_of(data) == WANTED
    assert data.manifest.counts == {"rows": 2, "most_rejected": 2}
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("history", [["Kent", "Kinks"], "Kent::Kinks"])
def test_rows_of_candidates(history, tmp_path):
    row = {"historyList": history, "itemList": ["Moby", "Nena", "Ok Go"], "trueSelection": "Nena"}
    (tmp_path / "lastfm-train.json").write_text(json.dumps([row]))
    prompt = "A user liked:\n- Kent\n- Kinks\nThe next one is among:\n- Moby\n- Nena\n- Ok Go\nThe next one: "
    assert rows_of(prepared(tmp_path / "lastfm-train.json", tmp_path / "out")) == [(prompt, ["Nena", "Moby", "Ok Go"])]


def test_rows_that_cannot_be_used_are_counted_and_shown(tmp_path):
    good = as_lists()[0]
    bad = [{**good, "prompt": ""}, {**good, "chosen": 3}, {**good, "rejected": []}, {**good, "rejected": [" A"]}]
    bad += [{**good, "rejected": [1]}, {**good, "rejected": None}]
    path = write(tmp_path / "rows.jsonl", [good, *bad])
    with path.open("a") as file:
        file.write("\nno json\n[1]\n")
    with pytest.raises(UserError) as caught:
        prepared(path, tmp_path / "out", max_bad_rows=7)
    message = str(caught.value)
    assert "data.max_bad_rows (7) is exceeded: 8 rows" in message
    for words in (
        f"{path}:2: prompt is empty",
        f"{path}:3: chosen is not a text",
        f"{path}:4: no rejected completion",
        f"{path}:5: the chosen completion is also rejected",
        f"{path}:6: rejected is neither a text nor a list of texts",
        f"{path}:9: not a JSON object ('no json'), 2 of this kind",
    ):
        assert words in message
    data = prepared(path, tmp_path / "out", max_bad_rows=8)
    assert rows_of(data) == WANTED[:1]
    assert data.manifest.bad_rows["no rejected completion"] == 2


def test_settings_without_effect_and_empty_files_are_refused(tmp_path):
    path = lists(tmp_path)
    with pytest.raises(UserError, match=r"data.min_rating has no effect on data.format=preferences"):
        prepared(path, tmp_path / "out", min_rating=4.0)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"holds no usable preference row"):
        prepared(tmp_path / "empty.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_two_kinds_of_data_set_are_distinguished(tmp_path, tiny_data):
    prepared(lists(tmp_path), tmp_path / "out")
    with pytest.raises(UserError, match=r"holds preference rows, which have no items to rank"):
        PreparedData.open(tmp_path / "out")
    with pytest.raises(UserError, match=r"holds interactions, not preference rows"):
        PreferenceData.open(tiny_data)


def test_many_rows_keep_their_completions_over_shards(tmp_path):
    rows = [{"prompt": f"p{r}", "chosen": f"c{r}", "rejected": [f"r{r}-{k}" for k in range(1 + r % 4)]} for r in range(3000)]
    wanted = [(row["prompt"], [row["chosen"], *row["rejected"]]) for row in rows]
    for num_shards, held in ((1, [3000]), (2, [1024 + 952, 1024]), (4, [1024, 1024, 952, 0])):
        folder = tmp_path / f"out-{num_shards}"
        data = prepared(write(tmp_path / "rows.jsonl", rows), folder, num_shards=num_shards)
        assert rows_of(data) == wanted, num_shards
        assert [shard.rows for shard in data.manifest.splits["train"].shards] == held
        assert verify(folder) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda raw: raw[:-8], r"train-00000-of-00001.arrow has \d+ bytes, not \d+"),
        (lambda raw: raw.replace(b" C", b" X"), r"train-00000-of-00001.arrow has changed"),
    ],
)
def test_damage_is_found(change, found, tmp_path):
    prepared(lists(tmp_path), tmp_path / "out", num_shards=1)
    shard = tmp_path / "out" / "train-00000-of-00001.arrow"
    shard.write_bytes(change(shard.read_bytes()))
    (problem,) = verify(tmp_path / "out")
    assert re.search(found, problem)
    with pytest.raises(UserError, match=found):
        PreferenceData.open(tmp_path / "out")


def same_prompt(one: GroupedPrompt, two: GroupedPrompt) -> None:
    for name in ("tokens", "branch_points", "group_sizes", "completion_inputs", "input_lengths", "lengths", "targets"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


def test_exported_interactions_come_back_as_the_same_prompts(tmp_path, tiny_config, tiny_model_dir):
    """The text of a prompt and its completions has the same tokens as the pieces, target by target."""
    config = RunConfig.model_validate(tiny_config(tmp_path / "run", "task.kind=sdpo"))
    count = export_rows(config, tmp_path / "rows.jsonl")
    task = build_task(config, InitialWeights(tiny_model_dir), "cpu")
    assert count == len(task.data.targets)
    prepared(tmp_path / "rows.jsonl", tmp_path / "text", num_shards=1)
    rewritten = RunConfig.model_validate(
        tiny_config(tmp_path / "run", "task.kind=sdpo", {"data.path": str(tmp_path / "text"), "data.format": "preferences"})
    )
    text = build_task(rewritten, InitialWeights(tiny_model_dir), "cpu")
    for index in range(0, count, 7):
        same_prompt(task.data.example(index, 0), text.data.example(index))
    again = tmp_path / "again.jsonl"
    export_rows(rewritten, again)
    assert again.read_bytes() == (tmp_path / "rows.jsonl").read_bytes()


def test_rows_with_different_numbers_of_rejected_share_micro_batches(tiny_tokenizer):
    rows = tokenize_rows([[PreferenceRow(*row) for row in WANTED]], tiny_tokenizer, [0], rejected=True)
    assert rows.num_rejected.tolist() == [2, 1]
    batch = pack_prompts([rows.grouped_prompt(0), rows.grouped_prompt(1)])
    assert batch.group_offsets.tolist() == [0, 3, 5]
    begins = batch.completion_offsets.tolist()
    texts = [tiny_tokenizer.decode(batch.targets[a : b - 1].tolist()) for a, b in pairwise(begins)]
    assert texts == [" A", " B", " C", " B", " D"]
    assert {int(batch.targets[end - 1]) for end in begins[1:]} == {0}
    chosen = tokenize_rows([[PreferenceRow(*row) for row in WANTED]], tiny_tokenizer, [0], rejected=False)
    assert chosen.num_rejected.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("task.kind=dpo",), r"data.path has rows with 2 rejected completions; set task.kind=dmpo, sdpo, mppo or dynamicpo"),
        (
            ("task.kind=sdpo", "train.max_tokens_per_micro_batch=8"),
            r"train.max_tokens_per_micro_batch \(8\) is smaller than the longest preference row",
        ),
        (("task.kind=sdpo", "train.targets_per_prompt=2"), r"train.targets_per_prompt above 1 needs interactions"),
        (("task.kind=msl",), r"task.kind=msl ranks items; set it to sft, dpo, dmpo, sdpo, mppo or dynamicpo"),
        (("task.kind=sequential",), r"holds preference rows, which have no items"),
    ],
)
def test_what_rows_cannot_do_is_refused_at_set_up(changes, words, tmp_path, tiny_config, tiny_model_dir):
    prepared(lists(tmp_path), tmp_path / "out")
    config = RunConfig.model_validate(tiny_config(tmp_path / "run", *changes, {"data.path": str(tmp_path / "out")}))
    with pytest.raises(UserError, match=words):
        build_task(config, InitialWeights(tiny_model_dir), "cpu")


def test_a_validation_is_refused(tmp_path, tiny_config, tiny_model_dir):
    prepared(lists(tmp_path), tmp_path / "out")
    changes = ("task.kind=sdpo", "checkpoint.validation_examples=4", {"data.path": str(tmp_path / "out")})
    config = RunConfig.model_validate(tiny_config(tmp_path / "run", *changes))
    with pytest.raises(UserError, match=r"holds preference rows, .* no valid split; set checkpoint.validation_examples=0"):
        validation_task(config, InitialWeights(tiny_model_dir), "cpu")


@pytest.mark.parametrize("output", ["folder", "file/out.jsonl", "x" * 300])
def test_an_export_that_has_no_place_is_refused(output, tmp_path, tiny_config):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    config = RunConfig.model_validate(tiny_config(tmp_path / "run", "task.kind=sdpo"))
    with pytest.raises(UserError, match=r"--out .*; choose another file"):
        export_rows(config, tmp_path / output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_an_export_writes_over_no_file(tmp_path, tiny_config):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("years of work")
    config = RunConfig.model_validate(tiny_config(tmp_path / "run", "task.kind=sdpo"))
    with pytest.raises(UserError, match=r"--out .*rows.jsonl\) exists; choose a file that does not"):
        export_rows(config, rows)
    assert rows.read_text() == "years of work"


def test_a_negative_with_the_title_of_its_target_is_left_out(tmp_path, tiny_config):
    """data.merge_equal_titles=false: two items may share a title, and a completion cannot be chosen and rejected at once."""
    titles = ["Cup", "Lid", "Lid", "Jar"]
    write_prepared(tmp_path / "data", {"train": [Row(0, [0, 1]), Row(1, [0, 3])]}, titles)
    changes = {"data.path": str(tmp_path / "data"), "data.cache_dir": str(tmp_path / "cache"), "negatives.num": 2}
    config = RunConfig.model_validate(tiny_config(tmp_path / "run", changes))
    assert export_rows(config, tmp_path / "rows.jsonl") == 2
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["chosen"] for row in rows] == [" Lid", " Jar"]
    assert rows[0]["rejected"] == [" Jar"], "its other negative is item 2, the only one left"
    assert rows[1]["rejected"] == [" Lid", " Lid"]
    assert len(rows_of(prepared(tmp_path / "rows.jsonl", tmp_path / "again"))) == 2
