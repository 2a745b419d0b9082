"""Hooks of mkdocs (mkdocs.yml): pages that lie outside of docs/, the notebook as a page, and links between all of them.

The Markdown files link to each other as they lie in the repository, so that they work on any host of it. Here such a link is
rewritten to the page of the site. A link to a file that is no page, such as LICENSE, becomes its text.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {  # file of the repository -> page of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "launchers/README.md": "launchers.md",
}
NOTEBOOK, NOTEBOOK_PAGE = "docs/tour.ipynb", "tour.md"
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"(^ *```.*?^ *```[^\n]*$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from outside of docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    if (ROOT / NOTEBOOK).is_file():
        files.append(File.generated(config, NOTEBOOK_PAGE, content=notebook_text(ROOT / NOTEBOOK)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrites the links of a page."""
    at = page.file.src_uri
    source = next((path for path, target in OUTSIDE.items() if target == at), f"docs/{at}")
    parts = _FENCE.split(markdown)
    return "".join(
        part if number % 2 else _LINK.sub(lambda link: rewritten(link, source, at), part) for number, part in enumerate(parts)
    )


def rewritten(link: re.Match[str], source: str, at: str) -> str:
    """A link of the file `source`, as the page `at` needs it."""
    mark, label, address = link.groups()
    path, _, anchor = address.partition("#")
    if not path or "://" in path or path.startswith("mailto:"):
        return link.group(0)
    label = _LINK.sub(lambda inner: rewritten(inner, source, at), label)
    named = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if named == NOTEBOOK:
        target = NOTEBOOK_PAGE
    elif named in OUTSIDE:
        target = OUTSIDE[named]
    elif named.startswith("docs/"):
        target = named.removeprefix("docs/")
    else:
        return label  # a file of the repository that is no page
    relative = posixpath.relpath(target, posixpath.dirname(at) or ".")
    return f"{mark}[{label}]({relative}{f'#{anchor}' if anchor else ''})"


def notebook_text(path: Path) -> str:
    """A notebook as Markdown: its texts, its code, and what the code printed."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"]).rstrip()
        if cell["cell_type"] == "markdown":
            parts.append(text)
        elif cell["cell_type"] == "code" and text:
            parts.append(f"```python\n{text}\n```")
            outputs = [output.get("text") or output.get("data", {}).get("text/plain") or [] for output in cell.get("outputs", [])]
            shown = "".join("".join(lines) for lines in outputs).rstrip()
            parts += [f"```text\n{shown}\n```"] if shown else []
    return "\n\n".join(parts) + "\n"
