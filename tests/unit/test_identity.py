"""Two attempts at one run have one identity; a change of anything that is trained gives another."""

from rec_dist.config.schema import RunConfig
from rec_dist.runtime.identity import differences, identity

BASE = RunConfig.model_validate(
    {"data": {"source": "s", "path": "p"}, "train": {"run_dir": "r"}, "task": {"kind": "sft"}}
).model_dump(mode="json")


def changed(section: str, key: str, value: object) -> dict[str, object]:
    return {**BASE, section: {**BASE[section], key: value}}


def test_what_trains_is_in_the_identity() -> None:
    for section, key, value in (
        ("optimizer", "lr", 0.5),
        ("train", "seed", 7),
        ("negatives", "num", 9),
        ("prompt", "max_history", 3),
    ):
        other = changed(section, key, value)
        assert differences(BASE, other) == [f"{section}.{key}"]
        assert identity(other) != identity(BASE)


def test_what_changes_no_result_is_not() -> None:
    for section, key, value in (
        ("cluster", "num_workers", 9),
        ("train", "max_tokens_per_micro_batch", 77),
        ("train", "dataloader_num_workers", 2),
        ("data", "path", "elsewhere"),
    ):
        other = changed(section, key, value)
        assert differences(BASE, other) == []
        assert identity(other) == identity(BASE)
