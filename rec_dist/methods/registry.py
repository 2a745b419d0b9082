"""The method of a configuration, and your own methods: register_method(), task.plugin, or the entry points of a package."""

from typing import cast

from rec_dist.config import method_table
from rec_dist.config.schema import RunConfig
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.method import FittedMethod, Method, TrainedMethod, missing_members
from rec_dist.methods.task import Task


def register_method(method: Method) -> None:
    """Makes `method` a value of task.kind in this process, such as a notebook with cluster.launcher=local.

    Workers on Ray run in other processes: name the method with task.plugin=module:object, or as an entry point of the group
    `rec_dist.methods`. A second method of the same name replaces the first. Raises UserError for a built-in name, a missing
    member, or a section that task has already.
    """
    if isinstance(method, type):
        raise UserError(f"register_method() takes an instance and {method.__name__} is a class; give {method.__name__}()")
    _check_members(method, "register_method()")
    method_table.register(method)


def get_method(kind: str, plugin: str | None = None) -> Method:
    """The method named `kind`; plugin: its `module:object`, None to look it up by name.

    Raises UserError if there is none, and names the methods that there are.
    """
    method = cast(Method, method_table.find(kind, plugin))
    _check_members(method, "task.kind" if plugin is None else "task.plugin")
    return method


def method_of(config: RunConfig) -> Method:
    """The method that task.kind and task.plugin name."""
    return get_method(config.task.kind, config.task.plugin)


def find_initial_weights(config: RunConfig) -> InitialWeights:
    """What training starts from. Raises UserError if any of it is missing or damaged."""
    return method_of(config).initial_weights(config)


def build_task(config: RunConfig, initial: InitialWeights, device: str, *, split: str = "train") -> Task:
    """The task on `split` (train or valid) of data.path. Raises UserError for anything that would fail later."""
    method = method_of(config)
    if isinstance(method, FittedMethod):
        raise UserError(f"task.kind={method.name} is fitted at once, without training steps; run `rec-dist train` on it")
    return cast(TrainedMethod, method).build(config, initial, device, split=split)


def fitted_method_of(config: RunConfig) -> FittedMethod | None:
    """The method of `config` if it is fitted at once, None if it trains."""
    method = method_of(config)
    return method if isinstance(method, FittedMethod) else None


def check_workers_find(config: RunConfig) -> None:
    """Raises UserError if the method was registered in this process and Ray's workers would not know it."""
    task = config.task
    if config.cluster.launcher == "ray" and method_table.is_registered_here_only(task.kind, task.plugin):
        raise UserError(
            f"task.kind={task.kind} is registered in this process only; set task.plugin=module:object so that Ray's workers find "
            "it, or cluster.launcher=local"
        )


def _check_members(method: object, place: str) -> None:
    if missing := missing_members(method):
        name = getattr(method, "name", type(method).__name__)
        raise UserError(f"{place}: the method {name} lacks {', '.join(missing)}; see rec_dist.methods.method.Method")
