"""`rec-dist export-rows`: training data in the usual preference layout, a JSON object a line: prompt, chosen, rejected (a list).

Preference rows are written as they are. Interactions become one row for each target of the train split: the history as text, the
chosen title, and the negatives of the first epoch, so that another trainer sees what `rec-dist train` would. The end of a
completion (prompt.end) is left out, because trainers append their own. Cost: about 50 us a row.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.manifest import PREFERENCES, Manifest
from rec_dist.data.dataset.preferences import PreferenceData, open_preferences
from rec_dist.data.dataset.prepared_data import PreparedData, open_data
from rec_dist.data.sampling.targets import index_targets
from rec_dist.errors import UserError
from rec_dist.methods.language_model.builders import build_negative_sampler
from rec_dist.storage.files import atomic_path
from rec_dist.storage.outputs import check_output

logger = logging.getLogger(__name__)


def export_rows(config: RunConfig, output: Path) -> int:
    """Writes the rows of data.path to `output` and returns how many.

    Raises UserError for prompts that cannot be written as plain text, and for an output that exists or cannot be a file.
    """
    check_output(output, "--out")
    if Manifest.load(config.data.path).kind == PREFERENCES:
        rows = _stored(open_preferences(config.data))
    else:
        rows = _drawn(config, open_data(config.data))
    count = 0
    with atomic_path(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    logger.info(f"{count} rows in {output}")
    return count


def _stored(data: PreferenceData) -> Iterator[dict[str, Any]]:
    for rows in data.rows():
        for row in rows:
            yield {"prompt": row.prompt, "chosen": row.completions[0], "rejected": row.completions[1:]}


def _drawn(config: RunConfig, data: PreparedData) -> Iterator[dict[str, Any]]:
    prompt, negatives = config.prompt, config.negatives
    if negatives.kind == "model":
        raise UserError("export-rows draws negatives without a run directory; set negatives.kind to another than model")
    if prompt.style != "list" or prompt.candidates != "none":
        raise UserError("export-rows writes prompts as plain text: set prompt.style=list and prompt.candidates=none")
    split = data.split("train")
    targets = index_targets(split, 1)
    sampler = build_negative_sampler(config, negatives.num, data)
    longest = max((len(split.items_of(row)) for row in range(len(split))), default=0)
    if negatives.num > data.num_items - longest - len(data.held_out):
        raise UserError(f"negatives.num ({negatives.num}) is more than the catalogue of {data.num_items} items allows; lower it")
    for row, position in zip(targets.rows.tolist(), targets.starts.tolist(), strict=True):
        items = split.items_of(row)
        rejected = sampler.draw(
            epoch=0,
            user=int(split.user_ids[row]),
            position=position,
            seen=items[: position + 1],
            explicit_negatives=split.explicit_negatives_of(row),
        )
        history = items[max(0, position - prompt.max_history) : position]
        shown = "".join(f"{prompt.item_prefix} {data.titles[item]}" for item in history.tolist())
        chosen = data.titles[int(items[position])]
        others = [data.titles[item] for item in rejected.tolist() if data.titles[item] != chosen]
        if others or not negatives.num:  # else all negatives have the target's title, and there is nothing to prefer
            yield {
                "prompt": f"{prompt.instruction}{shown}{prompt.item_prefix}",
                "chosen": f" {chosen}",
                "rejected": [f" {title}" for title in others],
            }
