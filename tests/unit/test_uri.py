"""No message shows a credential of a URI, wherever it was given, and no configuration accepts one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rec_dist.cli import main
from rec_dist.config.paths import pinned
from rec_dist.config.schema import RunConfig
from rec_dist.errors import UserError
from rec_dist.models.pretrained import config_folder, resolve_model
from rec_dist.storage.location import Location
from rec_dist.storage.uri import local_path, refuse_credentials, shown

Make = Callable[..., dict[str, Any]]
SECRET = "SUPERSECRET"
WITH_SECRET = [
    f"s3://AKIAX:{SECRET}@bucket/x",
    f"s3://AKIAX:{SECRET}@bucket/x?region=us-east-1",
    f"s3://AKIAX:{SECRET}/abc@bucket/x",
    f"s3://AKIAX:{SECRET}//a+b/c@bucket/x?region=us-east-1",
    f"s3://AKIAX:12/{SECRET}@bucket/x",
    f"s3://AKIAX:{SECRET}/abc",
    f"s3://AKIAX:{SECRET}@buc ket/x",
    f"s3://AKIAX:{SECRET}%zz@bucket/x",
    f"s3://AKIAX:{SECRET}#abc@bucket/x",
    f"s3://AKIAX:{SECRET}?abc@bucket/x",
    f"s3://AKIAX:abc?{SECRET}@bucket/x?region=us-east-1",
    f"s3://AKIAX:{SECRET}@/x",
    f"s3://{SECRET}@bucket/x",
    f"s3://AKIAX:p@{SECRET}@bucket/x",
    f"s3://bucket/x?endpoint_override=http://AKIAX:{SECRET}@127.0.0.1:9",
    f"gs://user:{SECRET}@bucket/x",
    f"hdfs://user:{SECRET}@host:8020/x",
]


@pytest.mark.parametrize("uri", WITH_SECRET)
def test_credentials_are_refused_and_never_shown(uri: str) -> None:
    assert SECRET not in shown(uri)
    with pytest.raises(UserError, match=r"^data\.path \(\w+://.*\) has credentials in it.*AWS_SECRET_ACCESS_KEY") as caught:
        refuse_credentials(uri, "data.path")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("s3://bucket/x?region=us-east-1&scheme=http", "s3://bucket/x"),
        ("s3://bucket/of@me/x/", "s3://bucket/of@me/x"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("s3://bucket?endpoint_override=127.0.0.1:9000", "s3://bucket"),
        ("gs://anonymous@bucket/x", "gs://bucket/x"),
        ("hdfs://host:8020/a@b/x?user=me", "hdfs://host:8020/a@b/x"),
        ("hdfs://me@host:8020/x", "hdfs://host:8020/x"),
        ("hdfs://[::1]:8020/x", "hdfs://[::1]:8020/x"),
        ("file:///tmp/a:b@c", "file:///tmp/a:b@c"),
        ("/data/a:b@c?d", "/data/a:b@c?d"),
        ("runs/x", "runs/x"),
    ],
)
def test_what_holds_no_secret_is_taken_and_named(uri: str, name: str) -> None:
    assert shown(uri) == name
    refuse_credentials(uri, "data.path")


@pytest.mark.parametrize(
    "key",
    [
        "data.path",
        "data.source",
        "data.cache_dir",
        "checkpoint.remote",
        "train.run_dir",
        "train.init_from",
        "evaluate.questions",
        "evaluate.output_dir",
        "model.path",
        "plan.model",
        "plan.cluster",
        "task.delrec.teacher",
    ],
)
@pytest.mark.parametrize("uri", [WITH_SECRET[1], WITH_SECRET[2]])
def test_no_command_takes_them_or_writes_them_down(
    key: str, uri: str, tmp_path: Path, tiny_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tiny_config(tmp_path / "run")), encoding="utf-8")
    for words in (["train"], ["prepare"], ["plan"], ["submit", "--to", "ray", "--dry-run"]):
        assert main([*words, str(file), f"{key}={uri}"]) == 2
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert line.startswith(f"error: {key} (s3://bucket/x) has credentials in it"), line
        assert SECRET not in printed.err + printed.out
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("command", ["status", "verify"])
@pytest.mark.parametrize(
    "uri", [*WITH_SECRET, f"S3://AKIAX:{SECRET}@bucket/x", f"https://user:{SECRET}@host/x", f"abfs://a:{SECRET}@b"]
)
def test_no_place_is_opened_with_them(command: str, uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, uri]) == 2
    printed = capsys.readouterr()
    assert SECRET not in printed.err + printed.out
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize(
    "section", [("train", "run_dir"), ("data", "cache_dir"), ("train", "init_from"), ("evaluate", "output_dir")]
)
def test_a_folder_that_is_a_uri_is_named_without_them(section: tuple[str, str], tmp_path: Path, tiny_config: Make) -> None:
    config = tiny_config(tmp_path / "run", {".".join(section): WITH_SECRET[2]})
    with pytest.raises(UserError, match=r"\(s3://bucket/x\) is a URI; give a folder") as caught:
        pinned(RunConfig.model_validate(config))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("find", [resolve_model, config_folder])
def test_a_model_that_is_a_uri_is_named_without_them(find: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"model\.path \(s3://bucket/x\)") as caught:
        find(WITH_SECRET[2])
    assert SECRET not in str(caught.value)


def test_the_home_of_nobody_is_refused() -> None:
    with pytest.raises(UserError, match="~no-such-user/data names the home of a user who is not known"):
        local_path("~no-such-user/data")


def test_a_forked_process_opens_a_store_anew() -> None:
    """On the connection that came along, two processes would read each other's answers."""
    location = Location("s3://bucket/data?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1")
    opened = location._system
    child = os.fork()
    if not child:
        os._exit(int(location._system is opened))
    assert os.waitpid(child, 0)[1] == 0
    assert location._system is opened
