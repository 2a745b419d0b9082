"""The page of `rec-dist serve` in a real browser, through its WebDriver: by keyboard, offline, with a title that looks like markup.

Needs Debian's packages chromium and chromium-driver (`apt-get install chromium chromium-driver`).
"""

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_clients import Client, serving
from worker_processes import free_port

import rec_dist
from rec_dist.config.schema import DataConfig
from rec_dist.data.prepare.prepare import prepare

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("chromium") is None or shutil.which("chromedriver") is None,
        reason="needs a browser: apt-get install chromium chromium-driver",
    ),
]
MARKUP = "<img src=x onerror=\"document.title='owned'\">"
FIRST = ("The", "An Old", "Beyond the", "Return to the", "Last", "Silver")
SECOND = ("Harbour", "Orchard", "Signal", "Lighthouse", "Expedition", "Garden")
ENTER = "\ue007"
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def title(item: int) -> str:
    return MARKUP if item == 8 else f"{FIRST[item % 6]} {SECOND[item // 6]} ({1960 + item})"


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble on a made-up catalogue: a user takes every first, fifth or seventh item, which two items tell, and one does not."""
    folder = tmp_path_factory.mktemp("ensemble")
    lines = ["user,item,timestamp,title"]
    for user in range(108):
        for step in range(9):
            item = (user * 11 + step * (1, 5, 7)[user % 3]) % 36
            lines.append(f'u{user},{item},{step},"{title(item).replace(chr(34), chr(34) * 2)}"')
    (folder / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = str(folder / "rows.csv")
    data = DataConfig(source=source, path=str(folder / "data"), split="leave_one_out", min_user_interactions=1)
    prepare(data)
    common: dict[str, Any] = {"data": data.model_dump(), "cluster": {"launcher": "local"}}
    sequential = {"width": 16, "num_heads": 2, "dropout": 0.0, "max_length": 8}
    tasks: dict[str, Any] = {
        "sasrec": {"kind": "sequential", "sequential": sequential},
        "neighbours": {"kind": "neighbours"},
    }
    members = {}
    for name, task in tasks.items():
        train = {"run_dir": str(folder / name), "global_batch_size": 16, "max_tokens_per_micro_batch": 256, "epochs": 40}
        optimizer = {"lr": 1e-2, "schedule": "constant"}
        members[name] = str(rec_dist.train({**common, "task": task, "train": train, "optimizer": optimizer}).path)
    task = {"kind": "ensemble", "ensemble": {"members": members}}
    return rec_dist.train({**common, "task": task, "train": {"run_dir": str(folder / "ensemble")}}).path


class Browser:
    """A headless Chromium through the W3C WebDriver protocol."""

    def __init__(self, url: str, folder: Path) -> None:
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder}"]
        # No other host than this machine, so that a page which needs one fails.
        arguments.append("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
        options = {"args": [*arguments, "--window-size=1200,820"], "binary": shutil.which("chromium")}
        capabilities = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        self._url = f"{url}/session"
        self._url += f"/{self._call('', {'capabilities': capabilities})['sessionId']}"

    def _call(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}{path}", data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)["value"]

    def open(self, address: str) -> None:
        self._call("/url", {"url": address})

    def run(self, script: str, *values: Any) -> Any:
        return self._call("/execute/sync", {"script": script, "args": list(values)})

    def type(self, keys: str) -> None:
        """Types into whatever has the focus."""
        focused = self._call("/element/active")[_ELEMENT]
        self._call(f"/element/{focused}/value", {"text": keys})

    def resize(self, width: int, height: int) -> None:
        self._call("/window/rect", {"width": width, "height": height})

    def screenshot(self) -> bytes:
        return base64.b64decode(self._call("/screenshot"))

    def log(self) -> list[Any]:
        """What the console said, errors of loading included."""
        entries: list[Any] = self._call("/se/log", {"type": "browser"})
        return entries

    def close(self) -> None:
        request = urllib.request.Request(self._url, method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()

    def until(self, script: str) -> Any:
        deadline = time.monotonic() + 60
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, (script, self.run("return document.body.innerText"))
            time.sleep(0.05)
        return value


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    port = free_port()
    with (tmp_path / "driver.log").open("wb") as log:
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=log, stderr=log)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{url}/status", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < deadline and driver.poll() is None
                time.sleep(0.1)
        made = Browser(url, tmp_path / "profile")
        try:
            yield made
        finally:
            made.close()
    finally:
        driver.terminate()
        driver.wait(30)


def texts(browser: Browser, selector: str) -> list[str]:
    """The text of every element that a selector finds."""
    found: list[str] = browser.run(f"return [...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")
    return found


def add(browser: Browser, words: str, name: str) -> None:
    """Searches and adds by keyboard alone: words, then Tab to the first item found, then Enter."""
    before = browser.run("return document.querySelectorAll('#history li').length")
    browser.run("const box = document.getElementById('search'); box.value = ''; box.focus()")
    browser.type(words)
    browser.until(f"return document.querySelector('#found button')?.textContent === {json.dumps(name)}")
    browser.type("\ue004")
    assert browser.run("return document.activeElement.getAttribute('aria-label')") == f"Add {name}"
    browser.type(ENTER)
    browser.until(f"return document.querySelectorAll('#history li').length === {before + 1}")


def listed(client: Client, *history: int) -> list[str]:
    reply = client.post("/v1/rank", {"history": [str(item) for item in history], "top_k": 10})
    return [item["title"] for item in reply.body["items"]]


def test_a_history_by_keyboard_changes_the_list_and_a_title_is_text(ensemble: Path, browser: Browser) -> None:
    in_page = "return JSON.stringify([...document.querySelectorAll('#list .title')].map(e => e.textContent)) === "
    shown: Callable[[list[str]], str] = lambda wanted: (
        in_page + json.dumps(json.dumps(wanted, ensure_ascii=False, separators=(",", ":")))
    )
    with serving(ensemble) as client:
        browser.open(f"http://127.0.0.1:{client.port}/")
        browser.until(shown(listed(client)))
        assert "by popularity" in browser.run("return document.getElementById('status').textContent")
        add(browser, "lighthouse 1980", title(20))
        browser.until(shown(listed(client, 20)))
        add(browser, "onerror", MARKUP)
        browser.until(shown(listed(client, 20, 8)))
        assert texts(browser, "#history span") == [title(20), MARKUP]
        assert browser.run("return document.querySelectorAll('img').length") == 0
        assert "owned" not in browser.run("return document.title")
        members = texts(browser, "#list li:first-child .members .name")
        assert {"sasrec", "neighbours"} <= set(members)
        assert " ms" in browser.run("return document.getElementById('status').textContent")
        add(browser, "1966", title(6))
        browser.until(shown(listed(client, 20, 8, 6)))
        if folder := os.environ.get("REC_DIST_SCREENSHOTS"):
            (Path(folder) / "serve.png").write_bytes(browser.screenshot())
        browser.run("document.querySelector('#history button').focus()")
        browser.type(ENTER)
        browser.until(shown(listed(client, 8, 6)))
        assert browser.run("return document.activeElement.textContent") == "Remove"
        named = "e => e.ariaLabel || e.textContent || e.labels?.length"
        assert browser.run(f"return [...document.querySelectorAll('button, input')].every({named})")
        browser.resize(380, 700)
        browser.until("return getComputedStyle(document.querySelector('main')).gridTemplateColumns.split(' ').length === 1")
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
        browser.open(f"http://127.0.0.1:{client.port}/docs")
        browser.until("return document.body.innerText.includes('POST /v1/rank')")
        assert [entry for entry in browser.log() if entry["level"] == "SEVERE"] == []


def test_a_token_is_asked_for_by_the_page(ensemble: Path, browser: Browser, tmp_path: Path) -> None:
    token = "token-of-the-page-test"
    (tmp_path / "token").write_text(token, encoding="ascii")
    with serving(ensemble, token_file=tmp_path / "token") as client:
        browser.open(f"http://127.0.0.1:{client.port}/")
        browser.until("return !document.getElementById('access').hidden")
        browser.run("document.getElementById('token').focus()")
        browser.type(token + ENTER)
        browser.until("return document.querySelectorAll('#list .title').length === 10")
        assert browser.run("return document.getElementById('access').hidden")
