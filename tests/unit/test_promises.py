"""Every promise of the documents names a test that is there, and the page that lists them all is current."""

import re
from pathlib import Path

import pytest
from promises import ROOT, SOURCES, commands_of, marks_of, page, promises


def test_the_page_is_current() -> None:
    """`make docs` writes it."""
    assert (ROOT / "docs" / "promises.md").read_text(encoding="utf-8") == page()


def test_no_promise_is_without_a_test() -> None:
    rows = promises()
    assert len(rows) > 80, "the tables were not found"
    assert [row.text for row in rows if not row.tests or not row.text] == []


def test_every_named_test_is_there() -> None:
    for row in promises():
        for path, name in row.tests:
            assert (ROOT / path).is_file(), f"{row.document}: {row.text} names {path}"
            tests = marks_of(path)
            assert tests, f"{path} holds no test"
            assert name is None or name in tests, f"{row.document}: {row.text} names {path}::{name}"
        assert commands_of(row), row.text


@pytest.mark.parametrize("source", ["README.md", *SOURCES])
def test_test_files_that_the_prose_names_are_there(source: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::\w+)?`", Path(ROOT, source).read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_a_row_without_a_test_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import promises as module

    (tmp_path / "docs").mkdir()
    for source in module.SOURCES:
        (tmp_path / source).write_text("| promise | test |\n|---|---|\n| it flies | |\n| it swims | `tests/a.py::test_b` |\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert [row.tests for row in module.promises()][:2] == [(), (("tests/a.py", "test_b"),)]
