"""From a YAML file or a mapping, and overrides, to a validated RunConfig.

One message names all faults, each with a suggestion.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import SafeDumper, YAMLError, dump

from rec_dist.config.changes import updated
from rec_dist.config.paths import check_uris
from rec_dist.config.schema import RunConfig
from rec_dist.errors import UserError

_Model = TypeVar("_Model", bound=BaseModel)
ConfigLike = str | Path | Mapping[str, Any] | RunConfig
Overrides = Sequence[str] | Mapping[str, Any]
PIPELINE = "pipeline"  # the section that a file for `rec-dist run` has, and no other
_EXTENDS = "extends"
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=", re.ASCII)


def is_override(word: str) -> bool:
    """Whether a word of a command line is section.key=value."""
    return _OVERRIDE.match(word) is not None


def load_mapping(source: str | Path | Mapping[str, Any], overrides: Overrides = ()) -> dict[str, Any]:
    """A YAML file or a mapping, what it `extends` (a path beside it, merged underneath) and overrides, interpolations resolved.

    overrides: words section.key=value, or a mapping of keys (dotted or nested) to values.
    Raises UserError for a missing or unreadable file, a cycle of `extends`, or a malformed override.
    """
    merged = _of_mapping(source) if isinstance(source, Mapping) else _read(Path(source), ())
    where = "the configuration" if isinstance(source, Mapping) else source
    if isinstance(overrides, Mapping):
        merged, overrides = updated(merged, overrides), ()
    for override in [overrides] if isinstance(overrides, str) else overrides:
        if not is_override(override):
            raise UserError(f"override {override!r} is not section.key=value; for example optimizer.lr=1e-4")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, YAMLError, TypeError, UnicodeError) as fault:
            raise UserError(f"override {override!r} cannot be applied: {_first_line(fault)}") from fault
    try:
        value = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as fault:
        raise UserError(f"{where}: {_first_line(fault)}") from fault
    assert isinstance(value, dict)
    return {str(key): entry for key, entry in value.items()}


def _of_mapping(source: Mapping[str, Any]) -> Any:
    """A mapping as OmegaConf's, with what it `extends`: a path, relative to the current folder."""
    own = updated(OmegaConf.create(), source)
    parent = own.pop(_EXTENDS, None)
    return own if parent is None else OmegaConf.merge(_read(Path(str(parent)), ()), own)


def _read(path: Path, above: tuple[Path, ...]) -> Any:
    try:
        path = path.expanduser().resolve()
        found = path.is_file()
    except (OSError, RuntimeError, ValueError) as fault:
        raise UserError(
            f"{str(path)[:200]} is no usable path ({_first_line(fault)[:200]}); give the path of a YAML file"
        ) from fault
    if path in above:
        raise UserError(f"{path} extends itself through {' -> '.join(p.name for p in above)}; remove one `extends`")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the path of a YAML configuration in it")
    if not found:
        raise UserError(f"{path} does not exist; give the path of a YAML configuration, such as configs/quickstart-sdpo.yaml")
    try:
        own = OmegaConf.load(path)
    except (YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException, RecursionError) as fault:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(fault).split())}") from fault
    if not isinstance(own, DictConfig):
        raise UserError(f"{path} holds no mapping of sections; see configs/quickstart-sdpo.yaml")
    try:
        parent = own.pop(_EXTENDS, None)
        return own if parent is None else OmegaConf.merge(_read(path.parent / str(parent), (*above, path)), own)
    except (OmegaConfBaseException, TypeError) as fault:
        raise UserError(f"{path} and what it extends do not fit together: {_first_line(fault)}") from fault


def sections(path: Path) -> set[str]:
    """The top-level keys of a YAML file and of what it `extends`, without any override: they tell what kind of file it is."""
    return {str(key) for key in _read(path, ())}


def load_config(config: ConfigLike, overrides: Overrides = ()) -> RunConfig:
    """The validated configuration of a run, from a YAML file, a mapping of sections, or a RunConfig, with `overrides` on top.

    overrides: words "section.key=value", as on the command line, or a mapping: {"train.max_steps": 10}.
    Raises UserError, whose message names every fault with the key that is meant, or says that the file is a pipeline.

    >>> load_config({"data": {"path": "prepared"}, "train": {"run_dir": "run"}}, ["train.max_steps=10"]).train.max_steps
    10
    """
    if isinstance(config, RunConfig):
        if not overrides:
            check_uris(config)
            return config
        config = config.model_dump()
    value = load_mapping(config, overrides)
    if not isinstance(config, Mapping) and PIPELINE in value and PIPELINE in sections(Path(config)):
        raise UserError(
            f"{config} is a pipeline of stages (it has the section `{PIPELINE}`), which `rec-dist run` takes; this command takes "
            "the configuration of one run, such as a target of those stages"
        )
    loaded = validate(value, RunConfig, "the configuration" if isinstance(config, Mapping) else str(config))
    check_uris(loaded)
    return loaded


def validate(value: dict[str, Any], model: type[_Model], where: str) -> _Model:
    """`value` as `model`; all faults in one UserError, each `dotted.path: what; the way out`."""
    try:
        return model.model_validate(_numbers(value, model))
    except ValidationError as fault:
        raise UserError(f"{where}: " + "; ".join(_explain(fault.errors(), model))) from fault


def to_yaml(config: BaseModel) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


class _Dumper(SafeDumper):  # type: ignore[misc]  # PyYAML has no types here
    """Writes text of several lines as such."""


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if text.endswith("\n") else None)
)


def to_plain_yaml(value: Any) -> str:
    """Mappings, lists and scalars as YAML, in their order."""
    return str(dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000))


def _explain(errors: Sequence[Any], model: type[BaseModel]) -> list[str]:
    """One phrase a faulty key; the branches of a union are told together."""
    known = _keys(model)
    phrases: dict[str, str] = {}
    for error in errors:
        path = [str(part) for part in error["loc"]]
        if error["type"] == "extra_forbidden":
            for dotted in _leaves(".".join(path), error["input"]):
                close = _closest(dotted, known)
                phrases[dotted] = "is no key" + (f"; did you mean {close}?" if close else "")
            continue
        dotted = _as_key(path, known, model)
        what = error["msg"][0].lower() + error["msg"][1:]
        if error["type"] == "missing":
            phrases[dotted] = "is missing"
        elif dotted in phrases:
            phrases[dotted] = phrases[dotted].replace(", got ", f", or {what.removeprefix('input should be ')}, got ", 1)
        else:
            phrases[dotted] = f"{what}, got {error['input']!r}"
            if error["type"] == "string_type" and isinstance(error["input"], int | float):  # 4:00:00 is a number in YAML: 14400
                text = "..." if dotted in known else str(error["input"])
                phrases[dotted] += f"; put text in quotes, on a command line '{dotted}=\"{text}\"'"
    return [f"{dotted} {phrase}" if phrase.startswith("is ") else f"{dotted}: {phrase}" for dotted, phrase in phrases.items()]


def _leaves(prefix: str, value: Any) -> list[str]:
    if isinstance(value, dict) and value:
        return [leaf for key, entry in value.items() for leaf in _leaves(f"{prefix}.{key}", entry)]
    return [prefix]


def _as_key(path: list[str], known: dict[str, str], model: type[BaseModel]) -> str:
    """The location without the union branches that pydantic appends to it; in a mapping with the entry's name."""
    for length in range(len(path), 0, -1):
        if ".".join(path[:length]) in known:
            return ".".join(path[: length + _is_mapping(path[:length], model)])
    return ".".join(path)


def _is_mapping(path: list[str], model: type[BaseModel]) -> bool:
    """Whether the field at `path` takes entries of the user's naming."""
    annotation = model.model_fields[path[0]].annotation
    return _is_mapping(path[1:], _models_in(annotation)[0]) if path[1:] else get_origin(annotation) is dict


def _closest(dotted: str, known: dict[str, str]) -> str | None:
    """The known key most like `dotted`: by its whole path, or by its last part where that is a key of one section alone."""
    others = [key for key in known if not dotted.startswith(f"{key}.")]  # the section it was written into is no answer
    same = [key for key in others if key.split(".")[-1] == dotted.split(".")[-1]]
    found = difflib.get_close_matches(dotted, others, n=1, cutoff=0.8) or (same if len(same) == 1 else [])
    found = found or difflib.get_close_matches(dotted, others, n=1, cutoff=0.6)
    return found[0] if found else None


def _keys(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Every dotted key of a model -> its meaning; sections included."""
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
    """An environment variable is a string, and so is 1e-4 in YAML 1.1; where a float is wanted it becomes one.

    Nothing else does.
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


def _first_line(fault: BaseException) -> str:
    return str(fault).splitlines()[0] if str(fault) else type(fault).__name__
