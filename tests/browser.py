"""A headless Chromium, driven over two pipes by its DevTools protocol; no package needed.

Messages are JSON, each ended by a zero byte: commands go in at the browser's descriptor 3, answers
and events come out at 4.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 60.0  # for an answer
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35}


def find() -> str | None:
    """Return the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser process; a context manager."""

    def __init__(self, program: str, profile: Path):
        (there_in, here_out), (here_in, there_out) = os.pipe(), os.pipe()
        self.here_in, self.here_out, self.rest = here_in, here_out, b""
        words = [program, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        words += ["--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        words += ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking"]
        if os.geteuid() == 0:
            words.append("--no-sandbox")  # the sandbox does not work for root
        # pipes take the lowest free descriptors, so that 3 is never the second one
        moved = f'exec "$@" 3<&{there_in} 4>&{there_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", moved, "bash", *words],
            pass_fds=(there_in, there_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there_in)
        os.close(there_out)
        self.count, self.events = 0, []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(SECONDS)
        os.close(self.here_in)
        os.close(self.here_out)

    def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; events received meanwhile are stored."""
        self.count += 1
        number, command = self.count, {"id": self.count, "method": method, "params": params}
        if session is not None:
            command["sessionId"] = session
        os.write(self.here_out, json.dumps(command).encode() + b"\0")
        answer = self.wait(lambda message: "id" in message and message["id"] == number, method)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def wait(self, wanted: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Read messages until one satisfies `wanted`, and return it."""
        end = time.monotonic() + SECONDS
        while True:
            message = self._read(end, what)
            if "method" in message:
                self.events.append(message)
            if wanted(message):
                return message

    def _read(self, end: float, what: str) -> dict[str, Any]:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.here_in], [], [], max(0.0, end - time.monotonic()))
            got = os.read(self.here_in, 1 << 20) if ready else b""
            if not got:
                raise RuntimeError(f"the browser {'ended' if ready else 'is silent'}: {what}")
            self.rest += got
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)


class Page:
    """A tab that shows one file in a window of a size."""

    def __init__(self, browser: Browser, file: Path, width: int, dark: bool = False):
        self.browser, self.width = browser, width
        target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=file.resolve().as_uri())
        browser.wait(lambda event: self._named(event, "Page.loadEventFired"), "the page's load")

    def _named(self, event: dict[str, Any], method: str) -> bool:
        return ("method" in event and event["method"] == method) and (
            event["sessionId"] == self.session
        )

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Give this tab a command."""
        return self.browser.ask(method, self.session, **params)

    def run(self, script: str, *values: Any) -> Any:
        """Call a JavaScript function with JSON values and return its result."""
        words = f"({script})({', '.join(map(json.dumps, values))})"
        result = self.ask("Runtime.evaluate", expression=words, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{words[:200]}: {result['exceptionDetails']}")
        return result["result"]["value"] if "value" in result["result"] else None

    def point(self, selector: str, number: int = 0, click: bool = False) -> None:
        """Move the mouse to an element, the `number`-th of a selector, and maybe click there."""
        place = self.run(
            """(selector, number) => {
              const element = document.querySelectorAll(selector)[number];
              element.scrollIntoView({ block: "center", inline: "center" });
              const { left, top, width, height } = element.getClientRects()[0];
              return { x: left + width / 2, y: top + height / 2 };
            }""",
            selector,
            number,
        )
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", **place)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                button = {"button": "left", "clickCount": 1}
                self.ask("Input.dispatchMouseEvent", type=kind, **place, **button)

    def press(self, key: str) -> None:
        """Press a key on the focused element."""
        named = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, **named)

    def complaints(self) -> list[str]:
        """Return errors and warnings of the console, and requests for anything but files."""
        messages = []
        for event in self.browser.events:
            if "sessionId" not in event or event["sessionId"] != self.session:
                continue
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                messages.append(json.dumps(params["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled":
                messages.append(json.dumps(params["args"]))
            elif event["method"] == "Log.entryAdded":
                messages.append(params["entry"]["text"])
            elif event["method"] == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("file:", "data:")):
                    messages.append(f"request for {url}")
        return messages
