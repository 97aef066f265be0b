"""Headless Chromium, driven by the DevTools protocol over its debugging pipe.

The pipe (file descriptors 3 and 4 of the browser) takes messages of JSON that end with a zero byte,
so that no port is opened and no client library is needed.
https://chromedevtools.github.io/devtools-protocol
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions",
)  # fmt: skip

_LAY_PIPE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """The path of a Chromium on this machine, None without one."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Page:
    """One tab, and everything that it said."""

    def __init__(self, read: int, write: int, patience: float) -> None:
        self._read, self._write, self._patience = read, write, patience
        self._buffer = b""
        self._last_id = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, *, to_tab: bool = True, **params: Any) -> dict[str, Any]:
        """The result of a command to the tab, or to the browser. Raises RuntimeError if it is
        refused."""
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if self._session is not None and to_tab:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") != self._last_id:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']['message']}")
            else:
                result: dict[str, Any] = answer["result"]
                return result

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        answer = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def open(self, path: Path, until: str) -> None:
        """Loads a file and waits until an expression of the page is true."""
        self.send("Page.navigate", url=path.resolve().as_uri())
        self.wait(f"document.readyState === 'complete' && Boolean({until})", f"{path} is ready")

    def wait(self, condition: str, told: str) -> None:
        """Until an expression is true. Raises TimeoutError, with what was waited for."""
        end = time.monotonic() + self._patience
        while not self.run(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"waited in vain until {told}; {self.complaints()}")
            time.sleep(0.02)

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and what was asked of any network."""
        found = []
        for event in self.events:
            kind, params = event.get("method"), event.get("params", {})
            if kind == "Runtime.exceptionThrown":
                found.append(json.dumps(params["exceptionDetails"])[:500])
            elif kind == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
                found.append(" ".join(str(a.get("value")) for a in params["args"]))
            elif kind == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
            elif kind == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("file:", "data:", "blob:", "about:")):
                    found.append(f"asked for {url}")
        return found

    def cpu_seconds(self) -> float:
        """Processor time of the processes that lay out and run pages, so far."""
        found = self.send("SystemInfo.getProcessInfo", to_tab=False)["processInfo"]
        return sum(float(one["cpuTime"]) for one in found if one["type"] == "renderer")

    def resize(self, width: int, height: int, *, is_phone: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=is_phone)  # fmt: skip

    def prefer(self, scheme: str) -> None:
        """'dark' or 'light'."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], self._patience)[0]:
                raise TimeoutError(f"no answer from Chromium in {self._patience} s")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError("Chromium has ended")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@contextmanager
def opened(program: str, patience: float = 60.0) -> Iterator[Page]:
    """A tab of a new browser with a profile of its own; both are gone afterwards."""
    (its_read, our_write), (our_read, its_write) = os.pipe(), os.pipe()
    # Out of the way of 3 and 4, on which the browser's own process lays them.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (its_read, its_write)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _LAY_PIPE,
                *map(str, ends),
                program,
                *_FLAGS,
                f"--user-data-dir={profile}",
            ],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (its_read, its_write, *ends):
            os.close(end)
        try:
            yield Page(our_read, our_write, patience)
        finally:
            # It ends by itself once its pipe is closed.
            os.close(our_write)
            os.close(our_read)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
