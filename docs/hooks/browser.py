"""A headless Chromium that a program looks at pages with: `with Browser(profile) as browser`, and then it does what a user does."""

import base64
import itertools
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class Browser:
    """A browser with one page, that finds nothing but this machine.

    It is spoken to in the DevTools protocol over two pipes, which the browser has as its descriptors 3 and 4.

    Args:
      profile: a folder of its own.

    Attributes:
      console: what pages have said there, and errors that nobody caught.
    """

    def __init__(self, profile: Path) -> None:
        heard, self._write = os.pipe()
        read, told = os.pipe()
        line = f'exec 3<&{heard} 4>&{told} && exec chromium "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", line, "bash", *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(heard, told),
            stderr=subprocess.DEVNULL,
        )
        os.close(heard)
        os.close(told)
        self._read, self._rest, self._numbers, self.console = read, b"", itertools.count(1), []
        self._session: str | None = None
        target = next(each for each in self("Target.getTargets")["targetInfos"] if each["type"] == "page")
        self._session = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        self("Runtime.enable")
        self("Page.enable")
        self("Emulation.setFocusEmulationEnabled", enabled=True)  # because no window of a screen gives it the focus

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """What the browser answers to a method of the protocol. Raises RuntimeError: it refuses."""
        number = next(self._numbers)
        asked = {"id": number, "method": method, "params": params}
        asked |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        while (told := self._next()).get("id") != number:
            if told["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                self.console.append(told["params"])
        if "error" in told:
            raise RuntimeError(f"{method}: {told['error']['message']}")
        return told["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._read, 2**16)
            if not part:
                raise RuntimeError("chromium has ended")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def look(self, width: int, height: int, dark: bool = False, scale: float = 1) -> None:
        """Makes the window so large, in CSS pixels, on a dark or light screen."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str) -> None:
        """Goes to a page."""
        self("Page.navigate", url=address)

    def value(self, expression: str) -> Any:
        """Of an expression of JavaScript in the page. Raises RuntimeError: it fails."""
        told = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(json.dumps(told["exceptionDetails"]))
        return told["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> None:
        """Until an expression is true. Raises TimeoutError."""
        until = time.monotonic() + seconds
        while not self.value(expression):
            if time.monotonic() > until:
                raise TimeoutError(f"not in {seconds} s: {expression}")
            time.sleep(0.02)

    def press(self, key: str, text: str = "") -> None:
        """A key by its name, such as Tab; `text` is what it types."""
        codes = {"Enter": 13, "Tab": 9, "Escape": 27}
        told = {"key": key, "windowsVirtualKeyCode": codes.get(key, 0)}
        self("Input.dispatchKeyEvent", type="keyDown", text=text, **told)
        self("Input.dispatchKeyEvent", type="keyUp", **told)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self("Input.insertText", text=text)

    def screenshot(self) -> bytes:
        """What the window shows, as PNG."""
        return base64.b64decode(self("Page.captureScreenshot", format="png")["data"])
