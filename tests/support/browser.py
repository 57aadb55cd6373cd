"""A headless Chromium, driven by its DevTools protocol over a pipe (JSON, NUL-terminated), so that no driver is needed."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)
SIZES = {"phone": (390, 844), "desk": (1280, 800)}
LIMIT_SECONDS = 60.0


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
