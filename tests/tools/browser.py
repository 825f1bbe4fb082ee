"A headless Chromium for tests, or a reason to skip."
import os
import shutil
from contextlib import contextmanager

import pytest

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


@contextmanager
def chromium():
    "A running browser. Skips the test where playwright or a browser is missing."
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra 'dev')")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


PIXELS = """element => [...element.shadowRoot.querySelectorAll('canvas')].map(c => {
  const copy = new OffscreenCanvas(c.width, c.height).getContext('2d', { willReadFrequently: true });
  copy.drawImage(c, 0, 0);
  const d = copy.getImageData(0, 0, c.width, c.height).data;
  let sum = 7; for (let i = 0; i < d.length; i += 4) sum = (sum * 31 + d[i] + 3 * d[i + 1] + 5 * d[i + 2]) % 1000000007;
  return sum; })"""


def pixels(explorer):
    "One checksum for each canvas of an explorer (a playwright locator)."
    return explorer.evaluate(PIXELS)
