"""Sequential recommenders on disk, and the shape that a configuration gives them."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.dataset.schema import ITEMS_NAME
from rec_dist.errors import TRAIN_AGAIN, UserError, one_line
from rec_dist.methods.catalogue_file import CatalogueFile
from rec_dist.methods.sequential.config import SequentialConfig
from rec_dist.methods.sequential.next_item import SHAPES, Recommender, Shape, build_recommender
from rec_dist.runtime.identity import flat

WEIGHTS_NAME, SHAPE_NAME = "model.safetensors", "sequential.json"
SHAPE_FILE = CatalogueFile(SHAPE_NAME)
_READ = ("task.plugin", "task.kind", "task.sequential.", "model.dtype")  # building the task refuses a dtype without effect
_OF_EVERY_MODEL = ("model", "num_sampled", "top_h", "distil", "init_embeddings")


def shape_of(settings: SequentialConfig, num_items: int) -> Shape:
    """The shape of the model that task.sequential describes.

    Raises UserError for a key that has no effect on that model, or a value that cannot work.
    """
    kind = settings.model
    keys = {field.name for field in fields(SHAPES[kind])} - {"num_items"}
    for name, field in SequentialConfig.model_fields.items():
        value = getattr(settings, name)
        if name not in keys and name not in _OF_EVERY_MODEL and value != field.default:
            raise UserError(
                f"task.sequential.{name} ({value}) has no effect on task.sequential.model={kind}, which reads "
                f"{', '.join(sorted(keys))}; remove it"
            )
    if kind == "sasrec" and settings.width % settings.num_heads:
        raise UserError(
            f"task.sequential.width ({settings.width}) is not a multiple of task.sequential.num_heads ({settings.num_heads}); "
            "change one of them"
        )
    if kind == "caser" and settings.window > settings.max_length:
        raise UserError(
            f"task.sequential.window ({settings.window}) is larger than task.sequential.max_length ({settings.max_length}); "
            "lower it, or raise that"
        )
    return SHAPES[kind](num_items=num_items, **{name: getattr(settings, name) for name in keys})


def unread_keys(config: RunConfig) -> list[str]:
    """The keys that only a language model reads and that differ from their default.

    They make a warning and not an error, since you get a baseline by changing task.kind in the configuration of a language model.
    Keys are compared by value, because a saved configuration has every key set. adapter.kind=none describes a recommender, so it
    is left out.
    """
    sections = {name: getattr(config, name) for name in ("prompt", "negatives", "model", "adapter", "task")}
    default = {name: dict(flat(type(section)().model_dump())) for name, section in sections.items()}
    changed = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, value in flat(section.model_dump())
        if value != default[name].get(key) and f"{name}.{key}={value}" != "adapter.kind=none"
    ]
    return [key for key in changed if not key.startswith(_READ)]


def kind_of(shape: Shape) -> str:
    """The value of task.sequential.model for this shape."""
    return next(kind for kind, known in SHAPES.items() if isinstance(shape, known))


def save_recommender(shape: Shape, weights: dict[str, Tensor], data: PreparedData, folder: Path) -> Recommender:
    """Writes weights, shape and catalogue into `folder`, reads the model back, compares it and returns it, on the CPU."""
    save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    SHAPE_FILE.write(folder, data, model=kind_of(shape), shape=asdict(shape))
    data.copy_items(folder / ITEMS_NAME)
    model = load_recommender(folder)
    read_back = model.state_dict()
    assert weights.keys() == read_back.keys() and all(torch.equal(read_back[name], value) for name, value in weights.items()), (
        folder
    )
    return model


def load_recommender(folder: Path) -> Recommender:
    """The model that save_recommender() wrote into `folder`, on the CPU, in evaluation mode.

    Raises UserError if there is none, or its weights have another shape.
    """
    if not (folder / SHAPE_NAME).is_file() or not (folder / WEIGHTS_NAME).is_file():
        raise UserError(f"{folder} holds no sequential model ({SHAPE_NAME} and {WEIGHTS_NAME}); let its run finish first")
    try:
        saved = json.loads((folder / SHAPE_NAME).read_text(encoding="utf-8"))
        with torch.random.fork_rng(devices=[]):
            model = build_recommender(saved["model"], saved["shape"])
        model.load_state_dict(load_file(folder / WEIGHTS_NAME))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as fault:
        raise UserError(f"{folder} holds a damaged sequential model ({one_line(fault)}); {TRAIN_AGAIN}") from fault
    return model.eval()
