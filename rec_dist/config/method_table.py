"""Where methods are found: built in, installed as an entry point, named by task.plugin, or registered in this process.

Only names and import strings, so that a configuration can be checked without torch. methods/registry.py gives the objects their
type.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from rec_dist.config.section import Section
from rec_dist.errors import UserError

ENTRY_POINTS = "rec_dist.methods"  # the group in which an installed package names its methods


@dataclass(frozen=True)
class BuiltIn:
    """A method of this package: `module:object`, and the key below task with the class of its own section, if it has one."""

    method: str
    section: tuple[str, str] | None = None


BUILT_IN = {
    "sft": BuiltIn("rec_dist.methods.preference.method:SFT"),
    "dpo": BuiltIn("rec_dist.methods.preference.method:DPO"),
    "dmpo": BuiltIn("rec_dist.methods.preference.method:DMPO"),
    "sdpo": BuiltIn("rec_dist.methods.preference.method:SDPO"),
    "mppo": BuiltIn("rec_dist.methods.preference.method:MPPO"),
    "dynamicpo": BuiltIn("rec_dist.methods.preference.method:DYNAMICPO"),
    "recpo": BuiltIn("rec_dist.methods.recpo.method:RECPO", ("recpo", "rec_dist.methods.recpo.config:RecpoConfig")),
    "msl": BuiltIn("rec_dist.methods.msl.method:MSL", ("msl", "rec_dist.methods.msl.config:MslConfig")),
    "sequential": BuiltIn(
        "rec_dist.methods.sequential.method:SEQUENTIAL", ("sequential", "rec_dist.methods.sequential.config:SequentialConfig")
    ),
    "delrec_distill": BuiltIn(
        "rec_dist.methods.delrec.method:DELREC_DISTILL", ("delrec", "rec_dist.methods.delrec.config:DelrecConfig")
    ),
    "delrec": BuiltIn("rec_dist.methods.delrec.method:DELREC"),
    "p2rec_reconstruct": BuiltIn(
        "rec_dist.methods.p2rec.method:P2REC_RECONSTRUCT", ("p2rec", "rec_dist.methods.p2rec.config:P2RecConfig")
    ),
    "neighbours": BuiltIn(
        "rec_dist.methods.neighbours.method:NEIGHBOURS",
        ("neighbours", "rec_dist.methods.neighbours.config:NeighboursConfig"),
    ),
    "ensemble": BuiltIn(
        "rec_dist.methods.ensemble.method:ENSEMBLE", ("ensemble", "rec_dist.methods.ensemble.config:EnsembleConfig")
    ),
    "retrieval": BuiltIn(
        "rec_dist.methods.retrieval.method:RETRIEVAL", ("retrieval", "rec_dist.methods.retrieval.config:RetrievalConfig")
    ),
}

_registered: dict[str, Any] = {}


class MethodError(UserError):
    """No such method. key: task.kind or task.plugin. what: the message without the key."""

    def __init__(self, key: str, what: str) -> None:
        super().__init__(f"{key}: {what}")
        self.key, self.what = key, what


def register(method: Any) -> None:
    """Makes an outside method known in this process; a second one of the same name replaces the first."""
    name = getattr(method, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise UserError(f"a method needs a `name` that is an identifier, for task.kind; got {name!r}")
    if name in BUILT_IN:
        raise UserError(f"the method {name} is built in; give yours another name")
    _check_section(method, f"the method {name}")
    _registered[name] = method


def is_registered_here_only(kind: str, plugin: str | None) -> bool:
    """Whether another process could not find this method."""
    return plugin is None and kind in _registered and kind not in _installed()


def names() -> list[str]:
    """The values of task.kind that need no task.plugin."""
    return list(dict.fromkeys([*BUILT_IN, *_registered, *_installed()]))


def find(kind: str, plugin: str | None) -> Any:
    """The method object. Raises MethodError if no method has that name, or if it cannot be imported."""
    if plugin is not None:
        method = load_plugin(plugin)
        if method.name != kind:
            raise MethodError(
                "task.kind", f"is {kind}, and task.plugin ({plugin}) is the method {method.name}; set task.kind={method.name}"
            )
        return method
    if kind in BUILT_IN:
        return _import(BUILT_IN[kind].method)
    if kind in _registered:
        return _registered[kind]
    if kind in (installed := _installed()):
        return _load_entry_point(installed[kind])
    known = names()
    close = difflib.get_close_matches(kind, known, n=1)
    meant = f" (did you mean {close[0]!r}?)" if close else ""
    raise MethodError(
        "task.kind", f"should be {_listed(known)}, or the method that task.plugin=module:object names{meant}, got {kind!r}"
    )


def check_kind(kind: str, plugin: str | None) -> None:
    """Raises MethodError as find(), without importing a built-in method."""
    if plugin is not None or kind not in BUILT_IN:
        find(kind, plugin)


def outside_section(kind: str, plugin: str | None) -> tuple[str, type[Section]] | None:
    """The section of a method from outside: (key below task, class). None for a built-in method, or one without a section."""
    if plugin is None and kind in BUILT_IN:
        return None
    section: tuple[str, type[Section]] | None = getattr(find(kind, plugin), "section", None)
    return section


@cache
def built_in_sections() -> dict[str, type[Section]]:
    """The sections of all built-in methods by their key below task."""
    found = [entry.section for entry in BUILT_IN.values() if entry.section is not None]
    return {key: _import(place) for key, place in found}


def load_plugin(plugin: str) -> Any:
    """The method at `module:object`. Raises MethodError if it is not there, or is no method."""
    module, _, name = plugin.partition(":")
    if not module or not name:
        raise MethodError("task.plugin", f"should be module:object, such as my_package.hinge:HINGE, got {plugin!r}")
    try:
        method = _import(plugin)
    except ImportError as fault:
        raise MethodError(
            "task.plugin", f"{plugin} cannot be imported ({fault}); install its package here and on every node, or set PYTHONPATH"
        ) from fault
    except AttributeError as fault:
        raise MethodError("task.plugin", f"{plugin} cannot be imported ({fault}); name an object of that module") from fault
    except Exception as fault:  # the module is the user's and may raise anything
        raise MethodError(
            "task.plugin", f"{plugin} cannot be imported ({type(fault).__name__}: {fault}); correct that module, or its name"
        ) from fault
    return _checked(method, "task.plugin", plugin)


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def _load_entry_point(point: EntryPoint) -> Any:
    package = point.dist.name if point.dist is not None else "a package"
    try:
        method = point.load()
    except Exception as fault:  # the module may raise anything
        raise MethodError(
            "task.kind", f"{point.name} is a method of {package}, which cannot be imported ({fault}); repair or remove it"
        ) from fault
    method = _checked(method, "task.kind", f"{point.name} of {package}")
    if method.name != point.name:
        raise MethodError(
            "task.kind",
            f"the entry point {point.name} of {package} is the method {method.name}; its package must give both one name",
        )
    return method


def _checked(method: Any, key: str, place: str) -> Any:
    if isinstance(method, type) or not isinstance(getattr(method, "name", None), str):
        raise MethodError(key, f"{place} is no method: name an instance with the members of rec_dist.methods.method.Method")
    _check_section(method, f"{key}: {place}")
    return method


def _check_section(method: Any, place: str) -> None:
    section = getattr(method, "section", None)
    if section is None:
        return
    if not (isinstance(section, tuple) and len(section) == 2 and isinstance(section[0], str) and section[0].isidentifier()):
        raise UserError(f"{place} has the section {section!r}; give a tuple of its key below task, an identifier, and its class")
    key, kind = section
    if not (isinstance(kind, type) and issubclass(kind, Section)):
        raise UserError(f"{place} has the section {key}, whose class must derive from rec_dist.config.section.Section")
    if key in built_in_sections() or key in ("plugin", "kind", "beta", "reference", "section") or hasattr(Section, key):
        raise UserError(f"{place} has the section {key}, which task has already; give it another name")


def _import(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def _listed(words: Iterable[str]) -> str:
    return ", ".join(repr(word) for word in words)
