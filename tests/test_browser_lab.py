"The first lab as a student meets it: JupyterLab, a real kernel, Run All Cells, and the slider of the explorer."
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.tools.browser import chromium, pixels

ROOT = Path(__file__).resolve().parents[1]
LAB = ROOT / "nbs" / "labs" / "01_see_it_work.ipynb"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def jupyterlab(folder):
    "A JupyterLab server on a folder, with settings of its own. Yields (address, token)."
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed (extra 'lab')")
    home, port, token = folder / "home", free_port(), secrets.token_hex(16)
    home.mkdir()
    own = {f"JUPYTER_{k}_DIR": str(home / k.lower()) for k in ("CONFIG", "DATA", "RUNTIME")}
    env = dict(os.environ, **own, JUPYTERLAB_SETTINGS_DIR=str(home / "settings"), JUPYTERLAB_WORKSPACES_DIR=str(home / "work"),
               IPYTHONDIR=str(home / "ipython"), PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
               OMP_NUM_THREADS="1", JUPYTER_TOKEN=token)
    log = open(folder / "server.log", "wb")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
         "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder / 'notebooks'}", "--ServerApp.allow_root=True",
         "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None"],
        cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if server.poll() is not None:
                pytest.fail("JupyterLab did not start:\n" + (folder / "server.log").read_text()[-3000:])
            try:
                with urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=2):
                    break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail("JupyterLab did not answer:\n" + (folder / "server.log").read_text()[-3000:])
        yield address, token
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()


def without_outputs(source, target):
    "Copy a notebook as a fresh checkout would show it, so that nothing saved can pass for a result."
    notebook = json.loads(source.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(notebook), encoding="utf-8")


def errors_in(page):
    "What cells report, as text."
    return "\n".join(page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'], .jp-OutputArea-output"
                                  "[data-mime-type='application/vnd.jupyter.error']").all_text_contents())[-3000:]


def run_and_step(page, address, token, name):
    "Open a notebook, run all cells, step the first explorer. Returns checksums of its panels before and after."
    page.goto(f"{address}/lab/tree/{name}?token={token}&reset", wait_until="domcontentloaded")
    page.wait_for_selector(".jp-NotebookPanel .jp-Notebook", timeout=120_000)
    page.wait_for_function("window.jupyterapp && jupyterapp.shell.currentWidget && jupyterapp.shell.currentWidget.sessionContext"
                           " && jupyterapp.shell.currentWidget.sessionContext.isReady", timeout=180_000)
    page.evaluate("async () => { const box = jupyterapp.shell.currentWidget; await box.context.ready; await box.revealed;"
                  " await jupyterapp.commands.execute('notebook:run-all-cells'); }")
    explorer = page.locator(".dit-sr-explorer").first
    explorer.wait_for(state="attached", timeout=300_000)
    explorer.scroll_into_view_if_needed()
    page.wait_for_selector(".dit-sr-explorer[data-ready=true]", timeout=120_000)
    explorer.scroll_into_view_if_needed()
    slider = explorer.locator("input.steps").first
    slider.focus()
    page.keyboard.press("Home")
    before = pixels(explorer)
    page.keyboard.press("ArrowRight")
    label = explorer.locator("output.now").first.text_content()
    after = pixels(explorer)
    active = page.evaluate("jupyterapp.shell.currentWidget.content.activeCellIndex")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("jupyterapp.shell.currentWidget.content.activeCellIndex") == active, "JupyterLab took the arrow key"
    return before, after, label


@pytest.mark.timeout(900)
def test_first_lab_in_jupyterlab(tmp_path):
    if not LAB.is_file():
        pytest.skip(f"{LAB.name} is not there")
    without_outputs(LAB, tmp_path / "notebooks" / LAB.name)
    with chromium() as browser, jupyterlab(tmp_path) as (address, token):
        page = browser.new_context(viewport=dict(width=1400, height=1000)).new_page()
        try:
            before, after, label = run_and_step(page, address, token, LAB.name)
        except Exception as e:
            shots = os.environ.get("BROWSER_SHOTS")
            if shots:
                page.screenshot(path=str(Path(shots) / "lab_failed.png"))
            raise AssertionError(f"{type(e).__name__}: {e}\ncells say: {errors_in(page)}") from e
        if os.environ.get("BROWSER_SHOTS"):
            page.screenshot(path=str(Path(os.environ["BROWSER_SHOTS"]) / "lab.png"))
    assert len(before) >= 3 and label.startswith("step 2 of")
    changed = [a != b for a, b in zip(before, after)]
    assert changed[0] and changed[1], "the noisy sample and the estimate change with the step"
