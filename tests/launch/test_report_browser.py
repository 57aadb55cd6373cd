"""The report in a real browser, as wide as a phone and as a desk: all is drawn, nothing is cut, nothing is fetched.

Chromium is driven by its DevTools protocol over a pipe (JSON, NUL-terminated), so no driver is needed.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_samples

from commpress.launch import records, report

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)
SIZES = {"phone": (390, 844), "desk": (1280, 800)}
LIMIT_SECONDS = 60.0

MEASURE = """
new Promise(done => setTimeout(done, 300)).then(() => {
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement, box = parent.getBoundingClientRect();
    if (!walker.currentNode.textContent.trim() || !box.width || parent.closest('script, .modebar')) continue;
    texts.push({
      text: walker.currentNode.textContent.trim(),
      size: parseFloat(getComputedStyle(parent).fontSize),
      cut: !parent.closest('.wide') && (box.left < 0 || box.right > document.documentElement.clientWidth),
    });
  }
  const marks = '.scatterlayer .trace path, .barlayer .point path';
  return {
    width: document.documentElement.clientWidth,
    scroll_width: document.documentElement.scrollWidth,
    height: document.documentElement.scrollHeight,
    figures: [...document.querySelectorAll('.plotly-graph-div')].map(figure => ({
      shapes: figure.querySelectorAll(marks).length,
      width: figure.querySelector('.main-svg')?.getBoundingClientRect().width ?? 0,
    })),
    texts,
  };
})
"""


class Chromium:
    """A headless Chromium with one page. `events` are those that it sent so far."""

    def __init__(self, profile: Path) -> None:
        reading, writing = os.pipe(), os.pipe()
        # its ends must not be 3 or 4 already, as which it expects them
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (reading[0], writing[1])]
        os.close(reading[0])
        os.close(writing[1])
        self.send_fd, self.receive_fd = reading[1], writing[0]
        place = f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}'
        command = ["bash", "-c", place, "bash", str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(command, pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for fd in theirs:
            os.close(fd)
        self.buffer, self.count, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = next(t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: object) -> dict[str, Any]:
        """Call a method of the protocol; its result."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.send_fd, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer}"
        return dict(answer["result"])

    def receive(self) -> dict[str, Any]:
        until = time.monotonic() + LIMIT_SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.receive_fd], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"Chromium said nothing for {LIMIT_SECONDS} s"
            part = os.read(self.receive_fd, 1 << 20)
            assert part, "Chromium ended"
            self.buffer += part
        message, self.buffer = self.buffer.split(b"\0", 1)
        return dict(json.loads(message))

    def open(self, path: Path, width: int, height: int) -> None:
        """Load a file at that size of the window; returns when it has loaded."""
        self.events.clear()
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.ask("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def evaluate(self, script: str) -> Any:
        """The value of a promise in the page."""
        found = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"]["value"]

    def screenshot(self, path: Path, width: int, height: int) -> None:
        """The whole page as a PNG."""
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))

    def sent(self, *methods: str) -> list[dict[str, Any]]:
        """The events of those names."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def close(self) -> None:
        self.process.kill()  # bash became Chromium; what it started ends with the pipe and with it
        self.process.wait()
        os.close(self.send_fd)
        os.close(self.receive_fd)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    path = folder / "report.html"
    path.write_text(report.page([records.read(file) for file in report_samples.write(folder)]), encoding="utf-8")
    return path


@pytest.mark.parametrize("size", SIZES)
def test_the_report_at_the_width_of(chromium: Chromium, page: Path, tmp_path: Path, size: str) -> None:
    chromium.open(page, *SIZES[size])
    found = chromium.evaluate(MEASURE)
    chromium.screenshot(tmp_path / f"{size}.png", SIZES[size][0], found["height"])
    assert (tmp_path / f"{size}.png").stat().st_size > 10_000

    assert not chromium.sent("Runtime.exceptionThrown", "Log.entryAdded")
    assert not [e for e in chromium.sent("Runtime.consoleAPICalled") if e["type"] in ("error", "warning", "assert")]
    fetched = [e["request"]["url"] for e in chromium.sent("Network.requestWillBeSent")]
    assert [url for url in fetched if not url.startswith("data:")] == [page.as_uri()]

    assert found["scroll_width"] <= found["width"] <= SIZES[size][0]
    assert len(found["figures"]) == 14
    for figure in found["figures"]:
        assert figure["shapes"] > 0
        assert 0 < figure["width"] <= found["width"]
    assert min(text["size"] for text in found["texts"]) >= 12
    assert [text["text"] for text in found["texts"] if text["cut"]] == []


CHOOSE = """
(async () => {
  const figure = [...document.querySelectorAll('.plotly-graph-div')].at(-1);
  const press = element => element.dispatchEvent(new MouseEvent('click', {bubbles: true}));
  const before = figure.data[3].hovertext[0];
  press(figure.querySelector('.updatemenu-header'));
  press([...figure.querySelectorAll('.updatemenu-dropdown-button')].at(-1));
  await new Promise(done => setTimeout(done, 300));
  return [before, figure.data[3].hovertext[0]];
})()
"""


def test_the_menu_of_a_timeline_shows_another_step(chromium: Chromium, page: Path) -> None:
    chromium.open(page, *SIZES["desk"])
    assert chromium.evaluate(CHOOSE) == ["bucket 0, step 4, 19.20 ms", "bucket 0, step 3, 22.40 ms"]
    assert not chromium.sent("Runtime.exceptionThrown", "Log.entryAdded")
