"""A headless Chromium driven over its DevTools pipe: no package, no port, no network."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
         "--disable-component-update", "--disable-extensions", "--remote-debugging-pipe", "--hide-scrollbars"]  # fmt: skip


class Browser:
    """One page of one browser."""

    def __init__(self) -> None:
        self.profile = tempfile.mkdtemp(prefix="orpo-chromium-")
        reads, self.write_to = os.pipe()
        self.read_from, writes = os.pipe()

        def fds() -> None:  # the protocol speaks on 3 and 4
            first, second = os.dup(reads), os.dup(writes)
            os.dup2(first, 3)
            os.dup2(second, 4)

        self.process = subprocess.Popen(
            [str(CHROMIUM), *FLAGS, f"--user-data-dir={self.profile}", "about:blank"],
            preexec_fn=fds, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(reads)
        os.close(writes)
        self.buffer, self.number, self.events = b"", 0, []
        target = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self(f"{domain}.enable")

    session: str | None = None

    def __call__(self, method: str, **params: Any) -> Any:
        """A command's result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.write_to, json.dumps(message).encode() + b"\0")
        return self._until(lambda one: one.get("id") == self.number, method)

    def _until(self, found: Any, what: str, seconds: float = 120) -> Any:
        end = time.monotonic() + seconds
        while True:
            while b"\0" in self.buffer:
                text, _, self.buffer = self.buffer.partition(b"\0")
                message = json.loads(text)
                if "id" not in message:
                    self.events.append(message)
                if found(message):
                    assert "error" not in message, (what, message)
                    return message.get("result", message)
            left = end - time.monotonic()
            assert left > 0 and select.select([self.read_from], [], [], left)[0], f"no answer to {what}"
            self.buffer += os.read(self.read_from, 1 << 20)

    def open(self, page: Path, width: int = 1200, height: int = 900, dark: bool = False, touch: bool = False) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.events.clear()
        self("Page.navigate", url=page.resolve().as_uri())
        self._until(lambda one: one.get("method") == "Page.loadEventFired", "load")

    def run(self, script: str) -> Any:
        """The value of an expression on the page."""
        done = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def complaints(self) -> list[str]:
        """Everything on the console and every exception since the page was opened."""
        self.run("1")  # whatever is under way has been told by then
        names = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(one["params"]) for one in self.events if one["method"] in names]

    def asked(self) -> list[str]:
        """Addresses that were requested since the page was opened, the page aside."""
        self.run("1")
        sent = [one["params"]["request"]["url"] for one in self.events if one["method"] == "Network.requestWillBeSent"]
        return sent[1:] if sent and sent[0].startswith("file:") else sent

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **more)

    def drag(self, x0: float, x1: float, y: float) -> None:
        self.mouse("Moved", x0, y)
        self.mouse("Pressed", x0, y, button="left", buttons=1, clickCount=1)
        for share in (0.3, 0.7, 1.0):
            self.mouse("Moved", x0 + (x1 - x0) * share, y, button="left", buttons=1)
        self.mouse("Released", x1, y, button="left", clickCount=1)

    def key(self, name: str, text: str = "") -> None:
        codes = {"ArrowRight": 39, "ArrowLeft": 37, "Escape": 27, "Home": 36, "End": 35, "Tab": 9, "Enter": 13}
        both = {"key": name, "code": name, "windowsVirtualKeyCode": codes.get(name, 0)} | (
            {"text": text} if text else {}
        )
        self("Input.dispatchKeyEvent", type="keyDown", **both)
        self("Input.dispatchKeyEvent", type="keyUp", **both)

    def box(self, selector: str) -> dict[str, float]:
        """Place and size in the window, once it has been scrolled to."""
        return self.run(
            f"(() => {{const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            "const b = e.getBoundingClientRect(); return {x: b.x, y: b.y, width: b.width, height: b.height}})()"
        )

    def picture(self, path: Path, whole: bool = True) -> None:
        shot = self("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **(
            {"clip": {"x": 0, "y": 0, "scale": 1, "width": self.run("innerWidth"), "height": self.run("document.documentElement.scrollHeight")}}
            if whole else {}))  # fmt: skip
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        os.close(self.write_to)
        os.close(self.read_from)
        shutil.rmtree(self.profile, ignore_errors=True)
