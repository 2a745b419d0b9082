"""The reference of all keys as Markdown: `python -m rec_dist.config.reference` prints docs/configuration.md."""

import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rec_dist.config.pipeline_schema import PipelineConfig
from rec_dist.config.schema import RunConfig

_PREFACE = """\
# Configuration

<!-- `make docs` writes this page from the descriptions in rec_dist/config/; edit them there. -->

    rec-dist COMMAND CONFIG [section.key=value ...]

CONFIG is a YAML file, the name of a shipped recipe (`rec-dist recipes` lists them, `rec-dist init
NAME` writes one to edit), or either followed by `:NAME` for one of its runs, such as
`quickstart:sft`.

* A file may begin with `extends`: one entry or a list. The entries are merged from left to right,
  and the file's own keys go on top. Sections are merged key by key; lists and values are replaced.
  An entry is a path relative to the file (it ends in `.yaml` or begins with `./`, `../` or `/`), or
  a shipped configuration such as `method/sdpo`, `data/ml-100k`, `model/llama3-8b` or
  `recipes/quickstart:sft`.
* Overrides on the command line go on top of the file, in their order. OmegaConf resolves
  `${section.key}` and `${oc.env:NAME}`; values that only serve such references stand in a section
  `vars`. Text from `${oc.env:NAME}`, other than paths, is written down as its reference
  ([security.md](security.md#secrets-and-people)).
* An unknown key is refused with the key that you probably meant, a renamed one with its new name.
  One message names all faults.
* Nothing is coerced, with one exception: where a number is wanted, text such as `1e-4` (which YAML
  1.1 does not read as a number) becomes one.
* Relative paths start at the folder in which the command runs.
* One function (`rec_dist/engine/settings.py`) makes DeepSpeed's configuration from these keys; no
  key hands it JSON.
* A run directory belongs to the configuration that started it. Between two attempts you may change
  only: the sections `cluster`, `checkpoint`, `track`, `evaluate`, `profile`, `plan` and `submit`;
  `train.run_dir` itself (when you move the directory), `train.max_tokens_per_micro_batch`,
  `train.dataloader_num_workers`, `train.log_every_steps`, `train.max_bad_steps` and
  `train.access`; `model.attention`, `model.fused_layers` and `model.activation_checkpointing`;
  `data.path`, `data.access`, `data.num_shards`, `data.cache_dir` and `data.cache_bytes`. The data
  at `data.path` must stay the same.
"""
_PIPELINES = """\
## Pipeline files

`rec-dist run` takes a file with these sections. Each stage is the command `rec-dist DO TARGET
SET...` (embed: `DO TARGET TO SET...`) in its own process. A stage may use `${vars.NAME}` and
`${matrix.NAME}`. Overrides of `vars` and of `runs.NAME` also reach the commands of the stages. A
run in `runs` may extend another one of the same file by its name.
"""
_SEE = {
    "track": "Gauges for Prometheus need no key: [clusters.md](clusters.md#watching).",
    "plan": "For the keys of a cluster file, see [planning.md](planning.md#cluster-files).",
    "submit": "For how to use it, see [clusters.md](clusters.md).",
}
_HEADER = "| key | default | values | meaning |\n|---|---|---|---|\n"
_PLAIN = {None: "null", True: "true", False: "false"}


def reference() -> str:
    """The whole page."""
    parts = [_PREFACE]
    for name, field in RunConfig.model_fields.items():
        model = models_in(field.annotation)[0]
        about = " ".join(word for word in ((model.__doc__ or "").strip(), _SEE.get(name)) if word)
        parts.append(f"## {name}\n\n{about}\n\n{_HEADER}{''.join(_rows(model, f'{name}.'))}")
    parts.append(f"{_PIPELINES}\n{_HEADER}{''.join(_rows(PipelineConfig))}")
    return "\n".join(parts)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field's type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def _rows(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """One row for each key. The keys of a list of sections stand under `name[]`."""
    for name, field in model.model_fields.items():
        inner = models_in(field.annotation)
        if inner:
            mark = "[]" if get_origin(field.annotation) is list else ""
            yield from _rows(inner[0], f"{prefix}{name}{mark}.")
        else:
            values = _values(field.annotation).replace("number", f"number{_limits(field)}", 1)
            meaning = re.sub("(?<!`)<", "&lt;", field.description or "")  # Markdown would take <run_dir> for a tag
            yield f"| `{prefix}{name}` | {_default(field)} | {values} | {meaning} |\n"


def _values(annotation: Any) -> str:
    """The values that a key takes, as you write them in YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return ", ".join(_values(part) for part in arguments)
    if origin is tuple:
        return f"{len(arguments)} of: {_values(arguments[0])}"
    if origin is list:
        return f"list of: {_values(arguments[0])}"
    if origin is dict and get_origin(arguments[1]) is dict:
        return "mapping of name to: sections"
    if origin is dict:
        return f"mapping of name to: {_values(arguments[1])}"
    names = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", NoneType: "`null`"}
    return names.get(annotation, "section")


def _limits(field: FieldInfo) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [f"{sign} {getattr(entry, name)}" for entry in field.metadata for name, sign in signs.items() if hasattr(entry, name)]
    return f" ({', '.join(found)})" if found else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, bool):
        return f"`{_PLAIN[value]}`"
    if isinstance(value, str):
        return "`" + value.replace("\n", "\\n") + "`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(str(entry) for entry in value)}]`"
    return f"`{value}`"


if __name__ == "__main__":
    print(reference(), end="")
