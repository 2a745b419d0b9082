"""Made-up files in the layouts of MiniOneRec and of BEAR, with values that a reader can check by hand. Titles are invented."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

Window = tuple[str, list[int], int]  # user, history, target

# Items 10..15 are rows 0..5. Two share a title, and one has an HTML entity.
TITLES = {10: "Blue kettle", 11: "Red kettle", 12: "Spare lid", 13: "Tea &amp; strainer", 14: "Spare lid", 15: "Cup"}
TRAIN: list[Window] = [("ann", [10], 11), ("bob", [12], 13), ("ann", [10, 11], 12)]
VALID: list[Window] = [
    ("ann", [11, 12], 10),  # continues, and repeats an item
    ("bob", [12, 13], 14),
    ("ann", [15, 13], 14),  # continues nothing
    ("cat", [14], 15),
]
TEST: list[Window] = [("ann", [12, 10], 13), ("dan", [10], 11), ("ann", [10, 13], 14)]


def write_minionerec(folder: Path, *, parts: Sequence[str] = ("train", "valid", "test"), nested: bool = True) -> Path:
    """Writes the four files as the authors lay them out (nested), or side by side and packed. Returns the folder."""
    info = "".join(f"<a_{item}><b_1><c_2>\t{title}\t{item}\n" for item, title in TITLES.items())
    texts = {"info": info}
    rows = {"train": TRAIN, "valid": VALID, "test": TEST}
    texts |= {part: minionerec_text(rows[part]) for part in parts}
    for part, text in texts.items():
        suffix = "txt" if part == "info" else "csv"
        if nested:
            path = folder / part / f"Kitchen_5_2016-10-2018-11.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"Kitchen.{part}.{suffix}.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def minionerec_text(rows: Sequence[Window]) -> str:
    """Rows as MiniOneRec writes them: lists as Python prints them, titles in quotes, semantic ids behind."""
    lines = ["user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid"]
    for user, history, target in rows:
        titles, sids = [TITLES[item] for item in history], [f"<a_{item}>" for item in history]
        lines.append(f'{user},"{titles}","{TITLES[target]}","{history}",{target},"{sids}",<a_{target}>')
    return "\n".join(lines) + "\n"


def bear_text(rows: Sequence[Window]) -> str:
    """Rows as BEAR writes them: the target is the last of item_ids."""
    lines = [f'{user},"{[*history, target]}",{1000 + place}' for place, (user, history, target) in enumerate(rows)]
    return "\n".join(["user_id,item_ids,timestamp", *lines]) + "\n"


def write_bear(folder: Path) -> Path:
    """Writes train and test rows, each in one file of the category Kitchen, and id2name4Rec.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Kitchen.train.csv").write_text(bear_text(TRAIN + VALID), encoding="utf-8")
    (folder / "Kitchen.test.csv.gz").write_bytes(gzip.compress(bear_text(TEST).encode()))
    (folder / "Kitchen.id2name4Rec.json").write_text(json.dumps({str(item): title for item, title in TITLES.items()}))
    return folder
