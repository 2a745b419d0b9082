"""The pages build as a site without a dead link, and links between the Markdown files also work where no site is built.

Cost: the build takes about 5 s on an idle core.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIGURE = ROOT / "docs" / "figures" / "shared-prompt.svg"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "launchers").glob("*.md")])
_FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_ANCHORED = re.compile(r"\]\(([^)\s#]*)#([^)\s]+)\)")


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "--site-dir", str(site)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


def anchors(page: Path) -> set[str]:
    """The anchors that a host of the repository gives to the headings of a page."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = [
        re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading).strip().lower() for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    ]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert {"index.html", "api/rec_dist.html", "LOG.html"} <= {str(page.relative_to(tmp_path / "site")) for page in pages}
    loaded = re.compile(r"<(?:script|img|link)[^>]*(?:src|href)=\"?https?://")
    assert [str(page) for page in pages if loaded.search(page.read_text(encoding="utf-8"))] == []


def test_a_dead_link_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Home\n\n[gone](gone.md) and [nowhere](#nowhere)\n", encoding="utf-8")
    shared = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    validation = re.search(r"^validation:.*?(?=^\S)", shared, re.MULTILINE | re.DOTALL)
    assert validation
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"site_name: broken\nplugins: []\n{validation[0]}\nnav: [index.md]\n", encoding="utf-8")
    done = build(config, tmp_path / "site")
    assert done.returncode != 0
    assert "gone.md" in done.stderr + done.stdout
    assert "nowhere" in done.stderr + done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_into_pages_name_a_heading(page: Path) -> None:
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    links = [
        (target, anchor) for target, anchor in _ANCHORED.findall(text) if "://" not in target and not target.endswith(".ipynb")
    ]
    assert [
        f"{target}#{anchor}" for target, anchor in links if anchor not in anchors((page.parent / target) if target else page)
    ] == []


def test_the_figure_is_what_its_script_draws(tmp_path: Path) -> None:
    drawn = tmp_path / "figure.svg"
    subprocess.run([sys.executable, str(FIGURE.with_name("make_shared_prompt.py")), str(drawn)], check=True)
    assert drawn.read_text(encoding="utf-8") == FIGURE.read_text(encoding="utf-8")
