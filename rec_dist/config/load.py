"""From a YAML file or a mapping, and overrides, to a validated RunConfig.

All faults come in one message, each with its dotted key. An unknown key comes with the key that was probably meant.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError

from rec_dist.config.compose import PIPELINE, RUNS, VARS, load_plain, load_unresolved, resolved, runs_of, sections
from rec_dist.config.overrides import Overrides, override
from rec_dist.config.paths import check_uris
from rec_dist.config.references import References, get, raw_references, references, remember, with_references
from rec_dist.config.schema import RunConfig, schema_for
from rec_dist.config.task import METHOD_ERROR
from rec_dist.config.yaml_text import escaped, unescaped
from rec_dist.errors import UserError

_Model = TypeVar("_Model", bound=BaseModel)
ConfigLike = str | Path | Mapping[str, Any] | RunConfig

# Keys and values that have another name now.
RENAMED = {
    "train.tokens_per_pack": "train.max_tokens_per_micro_batch",
    "train.groups_per_step": "train.global_batch_size",
    "train.targets_per_trunk": "train.targets_per_prompt",
    "checkpoint.mirror": "checkpoint.remote",
    "checkpoint.validation_units": "checkpoint.validation_examples",
}
_OF_TRAINING = ("track", "checkpoint", "profile")  # no command reads these from a saved configuration
ALL_SECTIONS = tuple(RunConfig.model_fields)
RENAMED_VALUES = {("model.attention", "trunkwise"): "per_prompt"}


def load_config(config: ConfigLike, overrides: Overrides = ()) -> RunConfig:
    """The validated configuration of a run.

    config: a YAML file, the name of a shipped recipe, either with `:NAME` for one of its runs, a mapping of sections, or a
    RunConfig.
    overrides: words "section.key=value", as on the command line, or a mapping: {"train.max_steps": 10}.
    Raises UserError that names every fault, or says that the file holds several runs and which.

    >>> config = {"data": {"path": "prepared"}, "train": {"run_dir": "run"}}
    >>> load_config(config, ["train.max_steps=10"]).train.max_steps
    10
    """
    if isinstance(config, RunConfig):
        if not overrides:
            check_uris(config)
            return config
        config = with_references(config, escaped(config.model_dump()))
    if not isinstance(config, str | os.PathLike | Mapping):
        raise UserError(f"a configuration is a YAML file, a mapping or a RunConfig, and not of type {type(config).__name__}")
    where = "the configuration" if isinstance(config, Mapping) else str(config)
    if not isinstance(config, Mapping) and {PIPELINE, RUNS} & sections(Path(config)):
        names = runs_of(Path(config))
        way_out = f"one of its runs, such as {where}:{names[0]} (runs: {', '.join(names)})" if names else "the target of a stage"
        raise UserError(
            f"{where} is a pipeline of stages, which `rec-dist run` takes; this command takes one run: give {way_out}"
        )
    unresolved = load_unresolved(config, overrides)
    value = resolved(unresolved, where)
    if isinstance(value.get(VARS), dict):  # they are resolved now
        del value[VARS]
    found = {key: text for key, text in references(unresolved).items() if key[0] != VARS}
    loaded = remember(validate(value, RunConfig, where, found), found)
    check_uris(loaded)
    return loaded


def load_saved(path: Path, overrides: Overrides = (), *, unread: Sequence[str] = (), way_out: str | None = None) -> RunConfig:
    """The configuration that a run directory keeps (config.yaml), with overrides on top.

    The file may be somebody else's, so text with ${...} in it stays text, and it extends no other file. Overrides are yours: they
    may hold references, as for load_config. Raises UserError as load_config does, and for text that came from the environment when
    the run began, which is not kept and not read from yours, unless an override gives it. unread: sections that the caller does not
    read, in which such text stays a reference. way_out: of that error, for a caller that takes no overrides.
    """
    plain = load_plain(path)
    value = resolved(override(OmegaConf.create(escaped(unescaped(plain))), overrides, {}), str(path))
    for key in raw_references(plain):
        if key[0] not in (*_OF_TRAINING, *unread) and get(value, key) == unescaped(get(plain, key)):
            name = ".".join(key)
            raise UserError(
                f"{path}: {name} ({get(plain, key)}) came from the environment, which a saved configuration does not read; "
                + (way_out or f"give {name}=... on the command line")
            )
    loaded = validate(value, RunConfig, str(path))
    check_uris(loaded)
    return loaded


def validate(value: dict[str, Any], model: type[_Model], where: str, hidden: References | None = None) -> _Model:
    """`value` as `model`. hidden: the texts that messages show in place of values.

    Raises one UserError with all faults, each as `dotted.path: what; the way out`.
    """
    schema = schema_for(value) if model is RunConfig else model
    try:
        return model.model_validate(_numbers(value, schema))
    except ValidationError as fault:
        raise UserError(f"{where}: " + "; ".join(_explain(fault.errors(), schema, hidden or {}))) from (None if hidden else fault)


def _explain(errors: Sequence[Any], model: type[BaseModel], hidden: References) -> list[str]:
    """One phrase for each faulty key. The branches of a union share one. hidden: what is shown of some keys' values."""
    known = _keys(model)
    phrases: dict[str, str] = {}
    for error in errors:
        path = [str(part) for part in error["loc"]]
        if error["type"] == "extra_forbidden":
            for dotted in _leaves(".".join(path), error["input"]):
                phrases[dotted] = _no_key(dotted, known)
            continue
        dotted = _as_key(path, known, model)
        what = error["msg"][0].lower() + error["msg"][1:]
        if error["type"] == "missing":
            phrases[dotted] = "is missing"
        elif error["type"] == METHOD_ERROR:
            phrases[dotted] = what
        elif dotted in phrases:
            phrases[dotted] = phrases[dotted].replace(", got ", f", or {what.removeprefix('input should be ')}, got ", 1)
        else:
            given = hidden.get(tuple(dotted.split(".")), error["input"])
            phrases[dotted] = f"{what}, got {given!r}"
            if new := RENAMED_VALUES.get((dotted, str(error["input"]))):
                phrases[dotted] += f"; it is now called {new}"
            if error["type"] == "string_type" and isinstance(error["input"], int | float):  # 4:00:00 is a number in YAML: 14400
                text = "..." if dotted in known else str(error["input"])
                phrases[dotted] += f"; put text in quotes, on a command line '{dotted}=\"{text}\"'"
    return [f"{dotted} {phrase}" if phrase.startswith("is ") else f"{dotted}: {phrase}" for dotted, phrase in phrases.items()]


def _no_key(dotted: str, known: dict[str, str]) -> str:
    if dotted in RENAMED:
        return f"is no key; it is now called {RENAMED[dotted]}"
    close = _closest(dotted, known)
    return "is no key" + (f"; did you mean {close}?" if close else "")


def _leaves(prefix: str, value: Any) -> list[str]:
    if isinstance(value, dict) and value:
        return [leaf for key, entry in value.items() for leaf in _leaves(f"{prefix}.{key}", entry)]
    return [prefix]


def _as_key(path: list[str], known: dict[str, str], model: type[BaseModel]) -> str:
    """The location without the union branches that pydantic appends. In a mapping, the entry's name is kept."""
    for length in range(len(path), 0, -1):
        if ".".join(path[:length]) in known:
            return ".".join(path[: length + _is_mapping(path[:length], model)])
    return ".".join(path)


def _is_mapping(path: list[str], model: type[BaseModel]) -> bool:
    """Whether the field at `path` is a mapping whose keys the user chooses."""
    annotation = model.model_fields[path[0]].annotation
    return _is_mapping(path[1:], _models_in(annotation)[0]) if path[1:] else get_origin(annotation) is dict


def _closest(dotted: str, known: dict[str, str]) -> str | None:
    """The known key closest to `dotted`: by its whole path, or by its last part if only one section has such a key."""
    others = [key for key in known if not dotted.startswith(f"{key}.")]  # never suggest the section that it was written into
    same = [key for key in others if key.split(".")[-1] == dotted.split(".")[-1]]
    found = difflib.get_close_matches(dotted, others, n=1, cutoff=0.8) or (same if len(same) == 1 else [])
    found = found or difflib.get_close_matches(dotted, others, n=1, cutoff=0.6)
    return found[0] if found else None


def _keys(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Every dotted key of a model, sections included, with its description."""
    keys: dict[str, str] = {}
    for name, field in model.model_fields.items():
        keys[prefix + name] = field.description or ""
        for inner in _models_in(field.annotation):
            keys |= _keys(inner, f"{prefix}{name}.")
    return keys


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _numbers(value: Any, annotation: Any) -> Any:
    """Turns text into a float where a float is wanted: environment variables are text, and so is 1e-4 in YAML 1.1.

    Nothing else is coerced.
    """
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    models = _models_in(annotation)
    if isinstance(value, dict) and models:
        fields = models[0].model_fields
        return {key: _numbers(entry, fields[key].annotation) if key in fields else entry for key, entry in value.items()}
    if isinstance(value, list):
        inner = [part for part in get_args(annotation) if part is not Ellipsis]
        return [_numbers(entry, inner[0] if inner else None) for entry in value]
    wants_float = annotation is float or (get_origin(annotation) in (Union, UnionType) and float in get_args(annotation))
    if wants_float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if wants_float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
