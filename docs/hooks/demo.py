"""The moving picture of the page of `flowlm serve`: `python docs/hooks/demo.py` makes docs/serve.webp, with a headless Chromium."""

import io
import tempfile
import threading
from pathlib import Path

from PIL import Image

from browser import Browser
from flowlm.serving import models, server

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs/serve.webp"
CHECKPOINT, ASKED = "checkpoints/grammar_matched", "model=grammar_matched&prompt=the+old+___+feeds+...&seed=3"
SIZE = 1260, 620
SHORT, LONG = 220, 3500  # milliseconds of a frame, and of the last
# The page gets the next event of a stream when `go` is called, so that there is a picture of each.
PACED = """
const asked = window.fetch;
window.fetch = async (...how) => {
  const answer = await asked(...how);
  if (!answer.headers.get("content-type").startsWith("text/event-stream")) return answer;
  const whole = await answer.text(), events = whole.split("\\n\\n").filter(event => event !== "");
  const body = new ReadableStream({
    async pull(to) {
      if (!events.length) return to.close();
      if (!events[0].includes("[DONE]")) await new Promise(go => { window.go = go; });
      to.enqueue(new TextEncoder().encode(events.shift() + "\\n\\n"));
    },
  }, {highWaterMark: 0});
  return new Response(body, {status: answer.status, headers: answer.headers});
};
"""
SHOWN = "[...document.querySelectorAll('#cards .text')].map(e => e.textContent).join('|')"


def frames(address: str) -> list[Image.Image]:
    """The page after each event that changes a text, and when all are written."""
    found, before = [], None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, Browser(Path(profile)) as browser:
        browser.look(*SIZE)
        browser.open(f"{address}/?{ASKED}")  # once before, so that the times are not those of a browser that starts
        browser.wait("document.body?.dataset.state === 'done'")
        browser("Page.addScriptToEvaluateOnNewDocument", source=PACED)
        browser.open(f"{address}/?{ASKED}")
        while True:
            browser.wait("Boolean(window.go) || document.body?.dataset.state === 'done'")
            shown, done = browser.value(SHOWN), browser.value("document.body.dataset.state === 'done'")
            if done or shown != before:
                found.append(Image.open(io.BytesIO(browser.screenshot())).convert("RGB"))
            if done:
                return found
            before = shown
            browser.value("(() => { const go = window.go; window.go = null; go(); })()")


def main() -> None:
    """Serves, looks, and writes the picture."""
    with server.listening("127.0.0.1", 0) as opened:
        served = models.load_served([str(ROOT / CHECKPOINT)])
        models.warm(served, 1)
        here = server.Server(served, opened, most_rows=8, most_waiting=64, timeout=60.0)
        thread = threading.Thread(target=here.run)
        thread.start()
        try:
            first, *others = frames(server.address(opened))
        finally:
            here.stop()
            thread.join()
    times = [*[SHORT] * len(others), LONG]
    first.save(
        PICTURE, save_all=True, append_images=others, duration=times, loop=0, quality=60, method=6, minimize_size=True
    )
    print(f"{PICTURE}: {1 + len(others)} frames, {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
