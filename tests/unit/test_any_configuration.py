"""Any mapping of values that the schema allows either trains three steps of a tiny model or is one line that says what to change.

A model that trained is also evaluated, and its adapter merged: nothing trains that the other commands refuse. The values of each
key come from its type and limits in the schema. REC_DIST_CONFIGURATIONS=300 tries as many, about a second each; by default a
handful, the same each time.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from p2rec_teacher import write_p2rec_teacher
from pydantic import BaseModel

import rec_dist
from rec_dist.config.method_table import BUILT_IN
from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import UserError
from rec_dist.methods.registry import get_method

_NUMBER = int(os.environ.get("REC_DIST_CONFIGURATIONS", "3"))
SECTIONS = ("prompt", "negatives", "model", "adapter", "task", "train", "optimizer", "cluster", "checkpoint")
LEFT_OUT = {
    # paths, names of packages and addresses, of which most values are rightly missing
    *("model.path", "model.revision", "task.plugin", "train.run_dir", "train.init_from", "cluster.address", "checkpoint.remote"),
    *("cluster.launcher", "train.max_steps", "train.epochs", "train.log_every_steps"),  # this process, and three steps told
    *("cluster.hang_seconds", "checkpoint.grace_seconds"),  # a second would be shorter than a load
    *("optimizer.lr", "optimizer.eps", "optimizer.betas"),  # below, so that losses stay finite
    *("task.delrec.teacher", "task.p2rec.teacher", "task.ensemble.members", "task.ensemble.served"),  # below
    *("task.sequential.init_embeddings", "task.sequential.distil.lists", "task.neighbours.embeddings"),
}
NUMBERS = (0, 1, 2, 3, 4, 5, 8, 10, 16, 20, 64, 80, 100, 512, 1000)
SHARES = (0.0, 1e-6, 0.1, 0.5, 0.9, 1.0, 1.5, 3.0, 1000.0)
TEXTS = ("", " ", "\n", "\n-", "a", "<eos>", "<|user|>", "Grüße\u200b 東京", "\x00", "{{ x }}", "word " * 40)
EXTRA: dict[str, list[Any]] = {
    "optimizer.lr": [1e-5, 0.01],
    "adapter.target_modules": ["all-linear", ["q_proj"], ["q_proj", "v_proj"], ".*proj", ".*_[ab]", "[", "", [], ["lm_head"]],
    "task.delrec.teacher": ["random"],
    "cluster.zero_stage": ["auto", 0, 1, 2, 3],
    "cluster.num_workers": ["auto", 1, 2, 0, -1],
    "cluster.cpus_per_worker": ["auto", 0.5, 4.0],
}
WITHOUT_LANGUAGE_MODEL = ("sequential", "neighbours", "ensemble")


def _values(kind: Any, metadata: list[Any]) -> Iterator[Any]:
    """Values of a type of the schema, most of them within its limits."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        yield from _values(arguments[0], [*arguments[1:], *metadata])
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from _values(argument, metadata)
    elif origin is Literal:
        yield from arguments
    elif kind is NoneType:
        yield None
    elif kind is bool:
        yield from (True, False)
    elif kind is int:
        yield from (number for number in NUMBERS if _within(number, metadata))
        yield -1
    elif kind is float:
        yield from (share for share in SHARES if _within(share, metadata))
    elif kind is str:
        yield from TEXTS
    elif origin is list and get_origin(arguments[0]) is Literal:
        yield from ([argument] for argument in get_args(arguments[0]))


def _within(number: float, metadata: list[Any]) -> bool:
    limits = [part for given in metadata for part in getattr(given, "metadata", [given])]
    faults = (
        (lambda limit: getattr(limit, "ge", None) is not None and number < limit.ge),
        (lambda limit: getattr(limit, "gt", None) is not None and number <= limit.gt),
        (lambda limit: getattr(limit, "le", None) is not None and number > limit.le),
        (lambda limit: getattr(limit, "lt", None) is not None and number >= limit.lt),
    )
    return not any(fault(limit) for limit in limits for fault in faults)


def _keys(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, list[Any]]]:
    for name, field in section.model_fields.items():
        key = f"{prefix}.{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, key)
        elif key not in LEFT_OUT:
            found = list(_values(field.annotation, list(field.metadata)))
            if found:
                yield key, found


def _all_keys() -> dict[str, list[Any]]:
    fields = RunConfig.model_fields
    found: dict[str, list[Any]] = {}
    for name in SECTIONS:
        annotation: Any = fields[name].annotation
        section = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
        found.update(_keys(section, name))
    return {**found, **EXTRA, "task.kind": list(BUILT_IN)}


KEYS = _all_keys()


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Any]:
    """A method, and values of up to seven keys, of the sections of other methods seldom."""
    kind = draw(st.sampled_from(KEYS["task.kind"]))
    own = get_method(kind).section
    mine = [
        key
        for key in sorted(KEYS)
        if not key.startswith("task.") or key.count(".") == 1 or (own and key.startswith(f"task.{own[0]}."))
    ]
    keys = draw(st.lists(st.sampled_from([key for key in mine if key != "task.kind"]), max_size=7, unique=True))
    chosen = {key: draw(st.sampled_from(KEYS[key])) for key in keys}
    if kind == "delrec_distill":  # which needs three keys of its own
        chosen = {
            "adapter.kind": "soft_prompt",
            "prompt.num_virtual": 2,
            "task.delrec.teacher": "random",
            "task.delrec.top_h": 3,
        } | chosen
    return {"task.kind": kind, "train.max_tokens_per_micro_batch": draw(st.sampled_from([8, 128, 256, 512, 1024])), **chosen}


def _one_line(fault: UserError) -> None:
    text = str(fault)
    assert text and "\n" not in text and "Traceback" not in text, text


@pytest.fixture(scope="module")
def earlier(tiny_config: Callable[..., dict[str, Any]], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of a teacher for P2Rec, and one of neighbours, a member for ensembles."""
    folder = tmp_path_factory.mktemp("earlier")
    write_p2rec_teacher(folder / "teacher" / "model", PreparedData.open(tiny_data))
    rec_dist.train(tiny_config(folder / "neighbours", "task.kind=neighbours"))
    return folder


def _try(config: dict[str, Any], folder: Path) -> None:
    run_dir = Path(config["train"]["run_dir"])
    try:
        run = rec_dist.train(config)
    except UserError as fault:
        _one_line(fault)
        event("refused")
        assert not run_dir.exists(), "a refused run left its directory behind"
        return
    event("trained")
    assert run.finished and any(run.model_path.iterdir())
    assert len(run.metrics("step")) == (0 if config["task"]["kind"] in ("neighbours", "ensemble") else 3)
    metrics = rec_dist.evaluate(run)
    assert 0 <= metrics["hr@10"]["value"] <= 1
    candidates = [f"i{item:03d}" for item in range(config["evaluate"]["num_candidates"])]
    ranked = rec_dist.rank(run, [["i079", "i001"]], candidates=[candidates], top_k=len(candidates), exclude_seen=False)
    assert sorted(ranked["item_id"].to_pylist()) == candidates
    if config["task"]["kind"] not in WITHOUT_LANGUAGE_MODEL and config["adapter"]["kind"] != "none":
        from rec_dist.commands.export import export

        export(run.path, folder / "merged", kind="merged")
    assert rec_dist.train(config).path == run.path  # it is finished, and nothing of its configuration is refused later


def _config(make: Callable[..., dict[str, Any]], earlier: Path, folder: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    tree = OmegaConf.create(make(folder / "run", "train.max_steps=3", "train.epochs=100", "evaluate.max_users=5"))
    members = {"neighbours": str(earlier / "neighbours")}
    for key, value in {"task.p2rec.teacher": str(earlier / "teacher"), "task.ensemble.members": members, **chosen}.items():
        OmegaConf.update(tree, key, value, force_add=True)
    config: Any = OmegaConf.to_container(tree)
    if config["prompt"].get("candidates") == "listed":
        config["evaluate"]["num_candidates"] = config["prompt"].get("num_candidates", 20)
    return dict(config)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, as DeepSpeed is first imported here
def test_any_configuration_trains_or_is_one_line(tiny_config: Callable[..., dict[str, Any]], earlier: Path) -> None:
    @settings(
        max_examples=_NUMBER,
        deadline=None,
        derandomize=_NUMBER < 100,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(changes())
    @example({"task.kind": "sft"})  # is merged
    @example({"task.kind": "sequential"})  # its notes named keys that it does not read, and fell over the members of an ensemble
    @example({"task.kind": "neighbours", "cluster.use_gpu": True})  # trained, and `rank` refused it
    def check(chosen: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as place:
            _try(_config(tiny_config, earlier, Path(place), chosen), Path(place))

    check()


def test_the_generator_knows_every_section() -> None:
    assert {key.partition(".")[0] for key in KEYS} == set(SECTIONS)
    assert {f"task.{section[0]}" for name in BUILT_IN if (section := get_method(name).section)} >= {
        key.rpartition(".")[0] for key in KEYS if key.count(".") == 2
    }
    assert not {key for key in LEFT_OUT if "." not in key}
    with pytest.raises(UserError):
        rec_dist.train({"train": {"max_steps": 3}})
