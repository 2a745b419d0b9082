"""Preparing through files on disk writes the same bytes as preparing in memory, however small the pieces are."""

import gzip
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.verify import verify
from rec_dist.data.prepare import prepare as prepare_module
from rec_dist.data.prepare import shards
from rec_dist.data.prepare.blockwise.driver import STEP, Sizes
from rec_dist.data.prepare.blockwise.scratch import Work, read_batch, write_batches
from rec_dist.data.prepare.blockwise.selection import last_of_few_shot, nth_smallest
from rec_dist.data.prepare.prepare import choose_place, prepare
from rec_dist.data.sources.blocks import cut_text, read_block, whole
from rec_dist.errors import UserError
from rec_dist.runtime.messages import messages_to

SMALL = Sizes(block_bytes=120, partition_rows=9, range_rows=15, num_bins=16)


def both(folder: Path, sizes: Sizes = SMALL, **changes: object) -> tuple[list[str] | str, list[str] | str]:
    """Returns the log lines or the error of each way. If both succeed, checks that all files are the same."""
    said: list[list[str] | str] = []
    for place in ("memory", "disk"):
        lines: list[str] = []
        shutil.rmtree(folder / place, ignore_errors=True)
        config = DataConfig(**{"path": str(folder / place), "prepare_on": place, **changes})
        try:
            with messages_to(lines.append):
                prepare(config, sizes=sizes)
            said.append([line.replace(f"/{place}:", "/PLACE:") for line in lines if not line.startswith(STEP)])
        except UserError as fault:
            said.append(str(fault))
    if isinstance(said[0], list):
        names = sorted(path.name for path in (folder / "memory").iterdir())
        assert names == sorted(path.name for path in (folder / "disk").iterdir())
        for name in names:
            assert (folder / "memory" / name).read_bytes() == (folder / "disk" / name).read_bytes(), name
    return said[0], said[1]


# Few users, items and times, so that ties, repeats, shared titles and short users are common. Titles hold quotes and line ends.
ROW = st.tuples(st.integers(0, 14), st.integers(0, 9), st.integers(1, 5), st.integers(0, 30), st.integers(0, 40))
RULES = ["leave_one_out", "global_temporal", "user_ratio"]


def as_csv(raw: list[tuple[int, ...]]) -> str:
    """Rows of csv, some of which are unreadable."""
    lines = ["user,item,rating,timestamp,title,categories"]
    for user, item, rating, time, odd in raw:
        title = f'"The ""{item // 2}""\nfilm"' if item % 3 == 0 else f"Film {item}{'!' if odd == 7 else ''}"
        lines.append(f"u{user},i{item},{'x' if odd == 3 else rating},{'' if odd == 5 else time},{title},a|{item}")
        if odd == 9:
            lines.append("one cell")
        if odd == 11:
            lines.append("")
    return "\n".join(lines) + "\n"


drawn_data = given(
    st.lists(ROW, min_size=60, max_size=200),
    st.sampled_from(RULES),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([None, 2, 5]),
    st.sampled_from([None, 3.0]),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.3]),
)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@drawn_data
def test_disk_writes_what_memory_writes(tmp_path, raw, rule, min_user, min_item, few, least, num_shards, cold):
    same_on_disk(tmp_path, raw, rule, min_user, min_item, few, least, num_shards, cold)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@drawn_data
def test_the_same_for_many_files(tmp_path, raw, rule, min_user, min_item, few, least, num_shards, cold):
    same_on_disk(tmp_path, raw, rule, min_user, min_item, few, least, num_shards, cold)


def same_on_disk(tmp_path, raw, rule, min_user, min_item, few, least, num_shards, cold):
    folder = tmp_path / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "log.csv").write_text(as_csv(raw))
    memory, disk = both(
        folder,
        source=str(folder / "log.csv"),
        split=rule,
        valid_fraction=0.2,
        test_fraction=0.2,
        min_user_interactions=min_user,
        min_item_interactions=min_item,
        max_train_users=few,
        min_rating=least,
        num_shards=num_shards,
        max_bad_rows=1000,
        cold_items_fraction=cold,
    )
    assert memory == disk


def test_many_blocks_partitions_ranges_and_batches(tmp_path, monkeypatch):
    """Every loop of the blockwise way runs more than once, including the loop over record batches."""
    monkeypatch.setattr(shards, "BATCH_ROWS", 13)
    generator = random.Random(1)
    rows = [(generator.randrange(90), generator.randrange(40), generator.randrange(1, 6), t, 0) for t in range(3000)]
    (tmp_path / "log.csv").write_text(as_csv(rows))
    sizes = Sizes(block_bytes=4000, partition_rows=500, range_rows=300, num_bins=64)
    settings = {"source": str(tmp_path / "log.csv"), "split": "global_temporal", "min_item_interactions": 40, "min_rating": 2.0}
    memory, disk = both(tmp_path, sizes, num_shards=2, **settings)
    assert memory == disk
    assert verify(tmp_path / "disk") == []
    with pa.memory_map(str(tmp_path / "disk" / "train-00000-of-00002.arrow")) as mapped:
        assert pa.ipc.open_file(mapped).num_record_batches > 1


def test_the_catalogue_of_an_items_file_and_times_that_are_missing(tmp_path):
    generator = random.Random(2)
    rows = [(generator.randrange(30), generator.randrange(20)) for _ in range(600)]
    (tmp_path / "a.inter").write_text("user_id:token\titem_id:token\n" + "".join(f"u{u}\ti{i}\n" for u, i in rows))
    names = "".join(f"i{i}\tTitle {i // 2}\n" for i in range(19, 2, -1))
    (tmp_path / "a.item").write_text("item_id:token\ttitle:token_seq\n" + names)
    source = str(tmp_path / "a.inter")
    memory, disk = both(tmp_path, source=source, split="leave_one_out", max_bad_rows=600)
    assert memory == disk
    assert any("item is not in a.item" in line for line in memory)
    memory, disk = both(tmp_path, source=source, split="leave_one_out", max_bad_rows=5)
    assert memory == disk
    assert "data.max_bad_rows (5) is exceeded" in str(memory)


def test_a_packed_source(tmp_path):
    text = "user,item,timestamp\n" + "".join(f"u{r % 17},i{r % 11},{r}\n" for r in range(900))
    with gzip.open(tmp_path / "log.csv.gz", "wt") as file:
        file.write(text)
    memory, disk = both(tmp_path, source=str(tmp_path / "log.csv.gz"), split="leave_one_out")
    assert memory == disk


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("user,item,rating,timestamp\n", {}),
        ("user,item,timestamp\na,x,1\n", {"min_rating": 4.0}),
        ("user,item,rating\na,x,5\n", {"split": "global_temporal"}),
        ("user,item,rating,timestamp\na,x,1,1\n", {"min_rating": 4.0}),
        ("user,item,rating,timestamp\na,x,5,1\na,y,5,1\n", {}),
        ("user,item,rating,timestamp,title\na,x,5,1,\na,y,5,1,Y\n", {}),
        ("user,item\n" + "a,x\n" * 50 + "b,\xe9\n", {}),
    ],
)
def test_the_same_mistakes_are_refused_with_the_same_words(text, changes, tmp_path):
    (tmp_path / "log.csv").write_bytes(text.encode("latin-1"))
    settings = {"source": str(tmp_path / "log.csv"), "split": "leave_one_out", "min_user_interactions": 1, **changes}
    memory, disk = both(tmp_path, **settings)
    assert isinstance(memory, str)
    assert memory == disk
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_an_interrupted_prepare_leaves_nothing(tmp_path, monkeypatch):
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "log.csv").write_text("user,item,timestamp\n" + "".join(f"u{r % 7},i{r % 5},{r}\n" for r in range(90)))
    monkeypatch.setattr(prepare_module, "publish", die)
    config = DataConfig(source=str(tmp_path / "log.csv"), path=str(tmp_path / "out"), split="leave_one_out", prepare_on="disk")
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 9), st.text('ab"\n,', max_size=6)), max_size=40), st.integers(1, 30))
def test_blocks_of_quoted_text_end_between_rows(tmp_path, cells, size):
    rows = [f'{number},"{text.replace(chr(34), chr(34) * 2)}"\n' for number, text in cells]
    path = tmp_path / "x.csv"
    path.write_text("head\n" + "".join(rows))
    blocks = cut_text(whole(0, path, len("head\n")), quoted_after=",", size=size)
    data = path.read_text()
    ends, place = {len("head\n")}, len("head\n")
    for row in rows:
        place += len(row)
        ends.add(place)
    assert "".join(data[block.begin : block.end] for block in blocks) == "".join(rows)
    assert all(block.begin in ends and block.end in ends for block in blocks)


def test_a_job_that_runs_twice_at_once_leaves_a_whole_file(tmp_path):
    """A machine that Ray takes for lost may still run its job, while another machine runs it again."""
    file = Work(str(tmp_path), "attempt") / "rows-000000.arrow"

    def batches():
        yield {"row": np.arange(3)}
        write_batches(file, [{"row": np.arange(3)}, {"row": np.arange(5)}])
        assert read_batch(file, 1).num_rows == 5, "the file of the other stays whole"
        yield {"row": np.arange(5)}

    write_batches(file, batches())
    assert [read_batch(file, index).num_rows for index in (0, 1)] == [3, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["rows-000000.arrow"]


def test_a_file_that_is_shorter_where_a_job_runs_is_named(tmp_path):
    (tmp_path / "log.csv").write_text("user,item\n" + "a,x\n" * 50)
    block = cut_text(whole(0, tmp_path / "log.csv", 10), quoted_after=None, size=30)[-1]
    (tmp_path / "log.csv").write_text("user,item\n" + "a,x\n" * 20)
    with pytest.raises(UserError, match=r"log\.csv is shorter on the machine .* or changed while it was read; give all machines"):
        read_block(block)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-(2**62), 2**62) | st.integers(-3, 3), max_size=8), min_size=1, max_size=5), st.data())
def test_the_nth_smallest_of_many_arrays(parts, data):
    together = sorted(value for part in parts for value in part)
    if not together:
        return
    place = data.draw(st.integers(0, len(together) - 1))
    assert nth_smallest([np.sort(np.array(part, dtype=np.int64)) for part in parts], place) == together[place]


def test_few_shot_takes_the_smallest_draws_and_then_the_first_users():
    lowest = [(np.array([0.1, 0.5]), np.array([4, 1])), (np.array([0.5]), np.array([9]))]
    assert [last_of_few_shot(lowest, limit) for limit in (1, 2, 4, None)] == [(0.1, 4), (0.5, 1), None, None]


def test_few_shot_with_as_many_draws_as_asked_for_ends_at_the_last_of_them():
    """A part of five users gives its two smallest draws, and the other three users must not train."""
    assert last_of_few_shot([(np.array([0.5, 0.1]), np.array([1, 4]))], 2) == (0.5, 1)


@pytest.mark.parametrize("few", [1, 2, 20, 21])
def test_few_shot_of_one_range_is_that_in_memory(tmp_path, few):
    rows = [(user, item, 3, 10 * user + item, 0) for user in range(20) for item in range(5)]
    (tmp_path / "log.csv").write_text(as_csv(rows))
    large = Sizes(block_bytes=1 << 20, partition_rows=1 << 20, range_rows=1 << 20, num_bins=16)
    settings = {"source": str(tmp_path / "log.csv"), "split": "leave_one_out", "min_item_interactions": 1, "num_shards": 1}
    memory, disk = both(tmp_path, large, max_train_users=few, **settings)
    assert memory == disk
    with pa.memory_map(str(next((tmp_path / "disk").glob("train-*.arrow")))) as mapped:
        assert pa.ipc.open_file(mapped).read_all().num_rows == min(few, 20)


def test_where_the_work_is_done(tmp_path, monkeypatch):
    path = tmp_path / "log.csv"
    path.write_text("user,item\n")
    assert choose_place("auto", [path], with_ray=True) == "memory"
    monkeypatch.setattr(prepare_module, "LARGE_BYTES", 5)
    assert choose_place("auto", [path], with_ray=True) == "ray"
    assert choose_place("auto", [path], with_ray=False) == "disk"
    assert choose_place("memory", [path], with_ray=True) == "memory"
    with pytest.raises(UserError, match=r"data.prepare_on=ray works only from the command line"):
        choose_place("ray", [path], with_ray=False)


def test_a_process_that_prepares_twice_reads_the_items_file_of_each(tmp_path):
    """Both runs use the same work folder, and the second must not read the item names of the first."""
    for first in (0, 5):
        folder = tmp_path / "work"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        names = [f"i{number}" for number in range(first, first + 5)]
        (folder / "a.inter").write_text(
            "user_id:token\titem_id:token\n" + "".join(f"u{n % 3}\t{names[n // 3]}\n" for n in range(15))
        )
        (folder / "a.item").write_text("item_id:token\ttitle:token\n" + "".join(f"{name}\tTitle {name}\n" for name in names))
        memory, disk = both(folder, source=str(folder / "a.inter"), split="leave_one_out")
        assert memory == disk
        assert isinstance(disk, list)


def test_equal_titles_keep_their_items_both_ways(tmp_path):
    path = tmp_path / "log.csv"
    rows = [f"u{user},i{item},{user + item},{'Twin' if item < 2 else f'title {item}'}" for user in range(6) for item in range(6)]
    path.write_text("\n".join(["user,item,timestamp,title", *rows]) + "\n")
    found = {}
    for place in ("memory", "disk"):
        config = DataConfig(
            source=str(path), path=str(tmp_path / place), split="leave_one_out", prepare_on=place, merge_equal_titles=False
        )
        manifest = prepare(config, sizes=SMALL)
        found[place] = [(entry.name, entry.sha256) for entry in manifest.files]
        assert (manifest.counts["items"], manifest.counts["merged_items"]) == (6, 0)
    assert found["memory"] == found["disk"]
    merged = prepare(DataConfig(source=str(path), path=str(tmp_path / "merged"), split="leave_one_out"))
    assert (merged.counts["items"], merged.counts["merged_items"]) == (5, 1)
