"The site: its configuration, the lint that runs after the build, and `make docs` on a machine without Quarto."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools import site as tool

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = "https://someone.github.io/kit/"
HOME, TEMPORARY = "/" + "root/me", "/" + "tmp/tmpab12/x.png"  # in two parts: no file of ours names a machine's path


def notebook(path, outputs=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [dict(cell_type="markdown", source=["# A"]), dict(cell_type="code", source=[], outputs=list(outputs))]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))


@pytest.fixture
def built(tmp_path):
    "A small site with two pages and nothing wrong: (notebooks, site)."
    nbs, site = tmp_path / "nbs", tmp_path / "_docs"
    notebook(nbs / "index.ipynb")
    notebook(nbs / "chapters" / "11a_ResShift.ipynb")
    notebook(nbs / ".ipynb_checkpoints" / "index-checkpoint.ipynb")
    (site / "chapters").mkdir(parents=True)
    (site / "images").mkdir()
    (site / "images" / "a picture.png").write_bytes(b"x")
    (site / "index.html").write_text(
        '<html><head><link rel="stylesheet" href="site.css"><script src="https://elsewhere.org/x.js"></script></head><body>'
        '<a href="#here" id="here">x</a><a href="chapters/resshift.html#rs-6">y</a><a href="./">z</a><a href="mailto:a@b">m</a>'
        f'<a href="{ADDRESS}chapters/resshift.html#rs-6">w</a><a href="https://elsewhere.org/nothing">e</a>'
        f'<img src="images/a%20picture.png" alt="a"><img src="data:image/png;base64,{HOME}/y" alt="b">'
        f'<pre><span># not |</span></pre><script>"?@eq-1"\n#| "{HOME}/x"</script></body></html>')
    (site / "site.css").write_text("")
    (site / "chapters" / "resshift.html").write_text(
        '<html><body><a id="rs-6"></a><a href="../index.html#here">x</a><a href="../">up</a></body></html>')
    return nbs, site


def problems(built):
    return list(tool.lint_site(built[1], built[0], ADDRESS))


def test_a_good_site_has_no_problems(built):
    assert problems(built) == []


@pytest.mark.parametrize("html,found", [
    ('<a href="nowhere.html">x</a>', "dead link nowhere.html"),
    ('<a href="chapters/11a_ResShift.ipynb">x</a>', "dead link chapters/11a_ResShift.ipynb"),
    ('<a href="chapters/resshift.html#rs-7">x</a>', "no such anchor: link chapters/resshift.html#rs-7"),
    ('<a href="#nothing">x</a>', "no such anchor: link #nothing"),
    (f'<a href="{ADDRESS}layers/gone.html">x</a>', "dead link https://someone.github.io/kit/layers/gone.html"),
    ('<a href="../../etc/passwd">x</a>', "outside the site: link ../../etc/passwd"),
    ('<img src="images/gone.png" alt="a">', "dead file images/gone.png"),
    ('<script src="assets/plotly.min.js"></script>', "dead file assets/plotly.min.js"),
    ('<link rel="stylesheet" href="gone.css">', "dead file gone.css"),
    ("<p>see ?@eq-one</p>", "unresolved reference ?@eq-one"),
    ('<pre><code><span class="co">#| export</span>\nx = 1</code></pre>', "raw directive '#| export'"),
    (f"<pre>Saved to {HOME}/x.png</pre>", f"path of a machine '{HOME}'"),
    (f"<pre>{TEMPORARY}</pre>", f"path of a machine '{TEMPORARY}'"),
    ('<a href="file:///x">x</a>', "path of a machine 'file:///x'")])
def test_problems_are_found(html, found, built):
    page = built[1] / "index.html"
    page.write_text(page.read_text().replace("</body>", f"{html}</body>"))
    assert problems(built) == [f"index.html: {found}"]


def test_a_notebook_without_a_page(built):
    notebook(built[0] / "labs" / "01_see.ipynb")
    assert problems(built) == ["labs/01_see.ipynb has no page labs/see.html"]


@pytest.mark.parametrize("name,page", [("chapters/11_resshift.ipynb", "chapters/resshift.html"), ("index.ipynb", "index.html"),
                                       ("labs/03b_Two_Words.ipynb", "labs/two_words.html")])
def test_page_names_are_those_of_nbdev(name, page):
    from nbdev.doclinks import _nbpath2html

    assert tool.page_name(Path(name)) == Path(page) == _nbpath2html(Path(name))


# ---------------------------------------------------------------- configuration
def test_our_configuration():
    assert list(tool.lint_config(ROOT / "_quarto.yml", ROOT / "nbs")) == []


@pytest.mark.parametrize("old,new,found", [
    ("website:", "web-site: {}\nwebsite:", "unknown key 'web-site'"),
    ("  type: website", "  type: website\n  outputdir: x", "unknown key 'project.outputdir'"),
    ("bread-crumbs", "breadcrumbs", "unknown key 'website.breadcrumbs'"),
    ("contents: [index.ipynb]", "contents: [index.ipynb, more.ipynb]", "'more.ipynb' names no file"),
    ("contents: chapters/*", "contents: chapter/*", "'chapter/*' names no file")])
def test_problems_of_a_configuration(old, new, found, tmp_path):
    text = (ROOT / "_quarto.yml").read_text()
    assert old in text
    (tmp_path / "_quarto.yml").write_text(text.replace(old, new, 1))
    assert any(found in problem for problem in tool.lint_config(tmp_path / "_quarto.yml", ROOT / "nbs"))


def test_a_notebook_that_no_sidebar_names(tmp_path):
    notebook(tmp_path / "nbs" / "index.ipynb")
    notebook(tmp_path / "nbs" / "more" / "x.ipynb")
    (tmp_path / "_quarto.yml").write_text("website: {sidebar: {contents: [index.ipynb]}}\n")
    assert list(tool.lint_config(tmp_path / "_quarto.yml", tmp_path / "nbs")) == ["_quarto.yml: the sidebar leaves out more/x.ipynb"]


# ---------------------------------------------------------------- plotly
def test_prepare_copies_the_script_once_and_only_if_it_is_used(tmp_path):
    nbs = tmp_path / "nbs"
    notebook(nbs / "index.ipynb")
    assert "nothing" in tool.prepare(nbs) and not (nbs / "assets").exists()
    notebook(nbs / "labs" / "01_plot.ipynb", [dict(output_type="display_data", data={tool.PLOTLY: {}}, metadata={})])
    assert "copied" in tool.prepare(nbs)
    script = nbs / "assets" / "plotly.min.js"
    before = script.stat()
    assert before.st_size > 10**6 and "already" in tool.prepare(nbs) and script.stat().st_mtime_ns == before.st_mtime_ns


# ---------------------------------------------------------------- make docs
def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    "A copy of the project whose set-up is complete and whose programs only say that they were called."
    if not shutil.which("make"): pytest.skip("no make on this machine")
    for name in ("Makefile", "settings.ini", "setup.py"): shutil.copy(ROOT / name, tmp_path)
    for name in ("python", "nbdev_docs", "nbdev_export", "jupyter"):
        program(tmp_path / ".venv" / "bin" / name, f'echo "{name} $*" >> "$PWD/calls"; exit 0')
    tools = tmp_path / "path"
    for name in ("sh", "rm", "touch", "awk"):
        (tools / name).parent.mkdir(exist_ok=True)
        (tools / name).symlink_to(shutil.which(name))
    for stamp in (".python", ".lab", ".dev"): (tmp_path / ".venv" / stamp).touch()
    return tmp_path


def make(checkout, *words):
    (checkout / "calls").unlink(missing_ok=True)
    environment = dict(PATH=str(checkout / "path"), HOME=str(checkout), SHELL="/bin/sh")
    done = subprocess.run([shutil.which("make"), *words], cwd=checkout, env=environment, capture_output=True, text=True)
    calls = (checkout / "calls").read_text().splitlines() if (checkout / "calls").exists() else []
    return done, calls


@pytest.mark.parametrize("fresh", [False, True])
def test_docs_without_quarto(checkout, fresh):
    if fresh: shutil.rmtree(checkout / ".venv")
    done, calls = make(checkout, "docs")
    assert done.returncode != 0 and "https://quarto.org" in done.stdout + done.stderr
    assert calls == [] and (checkout / ".venv").exists() != fresh, "nothing runs: nbdev_docs would download Quarto and install packages on its own"


def test_docs_with_quarto(checkout):
    program(checkout / "path" / "quarto", "exit 0")
    (checkout / "_proc").mkdir()
    done, calls = make(checkout, "docs")
    assert done.returncode == 0, done.stderr
    assert calls == ["python tests/tools/site.py prepare", "nbdev_docs ", "python tests/tools/site.py lint _docs"]
    assert not (checkout / "_proc").exists()


def test_set_up_is_skipped_when_nothing_changed(checkout):
    for target in ("lab", "test"):
        done, calls = make(checkout, target)
        assert done.returncode == 0, done.stderr
        assert len(calls) == 1 and "pip" not in calls[0], calls


def test_set_up_is_repeated_when_requirements_changed(checkout):
    future = (checkout / ".venv" / ".dev").stat().st_mtime + 10
    os.utime(checkout / "settings.ini", (future, future))
    done, calls = make(checkout, "test")
    assert done.returncode == 0, done.stderr
    assert calls[0] == "python -m pip install --quiet -e .[dev]" and calls[1].startswith("python -m pytest tests") and len(calls) == 2


def test_the_interpreter_can_be_chosen(checkout):
    shutil.rmtree(checkout / ".venv")
    done, calls = make(checkout, "-n", "PYTHON=python3.12", "test")
    assert done.returncode == 0 and "python3.12 -m venv .venv" in done.stdout and calls == []


def test_help_lists_every_target(checkout):
    done, calls = make(checkout, "help")
    phony = next(l for l in (ROOT / "Makefile").read_text().splitlines() if l.startswith(".PHONY")).split()[1:]
    assert done.returncode == 0 and all(any(l.startswith(t + " ") for l in done.stdout.splitlines()) for t in phony)
    assert make(checkout)[0].stdout == done.stdout  # `make` alone is `make help`
