"The command line: exit codes, what is written where, and what is found wrong before the work begins."
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_sr_kit import SRPipeline, __version__, cli
from tests.test_pipeline import picture, small_pipeline

COMMANDS = ("presets", "env", "upscale", "explore")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A saved pipeline; its network is small and untrained."
    folder = tmp_path_factory.mktemp("model")
    small_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    "An empty folder to work in, with two photographs."
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a.png", 1), ("b.jpg", 2)): photo(seed).save(name)
    return tmp_path


def photo(seed=0, height=10, width=12):
    levels = (picture(height, width, seed)[0].movedim(0, -1).numpy() * 255).round().astype(np.uint8)
    return Image.fromarray(levels)


def files():
    return sorted(str(p) for p in Path(".").rglob("*") if p.is_file())


# ---------------------------------------------------------------- words
def test_help_and_version(capsys):
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"dit-sr {__version__}\n"
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS) and "Exit code" in text
    for name in COMMANDS:
        assert cli.main([name, "--help"]) == 0
        assert "--json" in capsys.readouterr().out


def test_no_command_shows_the_help(capsys):
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and all(name in captured.err for name in COMMANDS)


@pytest.mark.parametrize("words", [
    "restore a.png out.png", "upscale", "upscale a.png", "upscale a.png out.png --steps 0", "upscale a.png out.png --steps two",
    "upscale a.png out.png --steps -3", "upscale a.png out.png --seed -1", f"upscale a.png out.png --seed {2**63}",
    "upscale a.png out.png --sampler euler", "upscale a.png out.png --tile 3", "upscale a.png out.png --color-fix sepia",
    "upscale a.png out.png --fast", "explore a.png", "explore a.png x.html --crop 0", "presets --all"])
def test_wrong_words(words, capsys):
    assert cli.main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "dit-sr" in captured.err and files() == ["a.png", "b.jpg"]


def test_help_is_light():
    code = ("import sys\nfrom dit_sr_kit.cli import main\n"
            "assert [main(a) for a in (['--help'], ['upscale', '--help'], ['--version'], [], ['x'])] == [0, 0, 0, 2, 2]\n"
            "heavy = {'torch', 'numpy', 'PIL', 'diffusers', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_installed_command():
    command = Path(sys.executable).with_name("dit-sr")
    if not command.exists(): pytest.skip("dit_sr_kit is not installed in this environment")
    done = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"dit-sr {__version__}\n", "")
    assert subprocess.run([command, "nothing"], capture_output=True).returncode == 2


# ---------------------------------------------------------------- reports
def test_presets(capsys):
    assert cli.main(["presets"]) == 0
    captured = capsys.readouterr()
    assert "dit-sr-tiny " in captured.out and captured.err == ""
    assert cli.main(["presets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["dit-sr-tiny"]["weights"] and not rows["dit-sr"]["weights"] and rows["dit-sr"]["description"]


def test_env(capsys):
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in text and str(Path.home()) not in text.split()
    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packages"]["dit_sr_kit"] == __version__


# ---------------------------------------------------------------- upscale
def upscale(words, model, code=0):
    assert cli.main(["upscale", *words.split(), "--model", model, "--steps", "2"]) == code


def test_one_image(model, capfd):
    upscale("a.png out.png --seed 5", model)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == "out.png  48x40\n"  # no bars, no warnings
    expected = SRPipeline.from_pretrained(model)("a.png", num_inference_steps=2, seed=5, progress=False).images[0]
    assert np.array_equal(Image.open("out.png"), expected)


def test_options_reach_the_pipeline(model):
    run = lambda words: (upscale(f"a.png out.png {words}", model), np.asarray(Image.open("out.png")))[1]
    plain = run("")
    assert np.array_equal(plain, run("--seed 0")) and np.array_equal(plain, run("--device cpu"))
    for words in ("--seed 1", "--sampler ddim", "--color-fix adain"): assert not np.array_equal(plain, run(words)), words
    Image.fromarray(np.tile(np.asarray(photo()), (1, 3, 1))).save("a.png")
    assert not np.array_equal(run(""), run("--tile 16"))


def test_several_images(model, capsys):
    upscale("a.png b.jpg new/folder --json", model)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == [
        dict(image=name, output=str(Path("new/folder") / f"{name[0]}_sr.png"), width=48, height=40) for name in ("a.png", "b.jpg")]
    assert captured.err == "" and files() == ["a.png", "b.jpg", "new/folder/a_sr.png", "new/folder/b_sr.png"]
    upscale("b.jpg alone/", model)
    assert Path("alone/b_sr.png").read_bytes() == Path("new/folder/b_sr.png").read_bytes()
    upscale("b.jpg new", model)
    assert Path("new/b_sr.png").is_file()


@pytest.mark.parametrize("suffix", cli.SUFFIXES)
def test_formats(suffix, model):
    upscale(f"a.png out{suffix}", model)
    assert Image.open(f"out{suffix}").size == (48, 40)


@pytest.mark.parametrize("words,hint", [
    ("a.png out", "suffix"), ("a.png out.docx", ".png"), ("a.png a.png", "overwrite"), ("a.png ./a.png", "overwrite"),
    ("a.png b.jpg out.png", "folder"), ("a.png b.jpg text", "folder"), ("a.png text/", "folder"), ("a.png more/a.bmp out", "one name"),
    ("a.png a_sr.png .", "overwrite"), ("a.png out.png --steps 16", "from 1 to 15"), ("a.png out.png --device tpu", "tpu"),
    ("a.png out.png --model dit-sr-tinny", "did you mean 'dit-sr-tiny'")])
def test_wrong_usage(words, hint, model, capsys):
    Path("text").write_text("a file without a suffix")
    Path("more").mkdir()
    for name in ("more/a.bmp", "a_sr.png"): photo().save(name)
    before = {name: Path(name).read_bytes() for name in files()}
    words = words if "--model" in words else f"{words} --model {model}"
    assert cli.main(["upscale", *words.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("dit-sr upscale: ") and hint.lower() in captured.err.lower()
    assert {name: Path(name).read_bytes() for name in files()} == before


def failing_inputs():
    Path("letter.png").write_text("Dear Sir or Madam")
    Path("half.png").write_bytes(Path("a.png").read_bytes()[:120])
    Path("half.jpg").write_bytes(Path("b.jpg").read_bytes()[:300])
    Path("empty.png").write_bytes(b"")
    Path("folder.png").mkdir()


@pytest.mark.parametrize("name", ["nowhere.png", "letter.png", "half.png", "half.jpg", "empty.png", "folder.png"])
@pytest.mark.parametrize("company", [False, True])
def test_bad_images_stop_the_run_before_it_begins(name, company, model, capsys):
    failing_inputs()
    Path("out.png").write_bytes(b"what was there")
    before = files()
    upscale(f"a.png {name} folder" if company else f"{name} out.png", model, code=1)
    captured = capsys.readouterr()
    assert captured.out == "" and name in captured.err and captured.err.count("\n") == 1
    assert files() == before and Path("out.png").read_bytes() == b"what was there"


def test_failed_runs(model, capsys, monkeypatch):
    assert cli.main("upscale a.png out.png --model dit-sr".split()) == 1
    assert "no bundled weights" in capsys.readouterr().err
    Path("here").mkdir()
    assert cli.main("upscale a.png out.png --model ./here".split()) == 1
    assert "pipeline.json" in capsys.readouterr().err
    upscale("a.png a.png/x/out.png", model, code=1)  # a folder that cannot be made
    assert files() == ["a.png", "b.jpg"]
    from dit_sr_kit import core, pipelines

    def missing(name): raise core.WeightsUnavailable("The weights are not in this installation.")
    monkeypatch.setattr(pipelines, "bundled_weights", missing)
    assert cli.main("upscale a.png out.png".split()) == 1
    assert "not in this installation" in capsys.readouterr().err


def interrupt(error):
    "A pipeline whose second picture raises."
    def call(self, image, **how):
        if str(image) == "b.jpg": raise error
        return type("Out", (), dict(images=[photo()]))
    return call


@pytest.mark.parametrize("error,words", [(KeyboardInterrupt(), "interrupted"), (RuntimeError("out of memory: 9 TB"), "--tile"),
                                         (OSError(28, "No space left on device"), "No space left")])
def test_interruptions(error, words, model, capsys, monkeypatch):
    Path("done").mkdir()
    Path("done/b_sr.png").write_bytes(b"what was there")
    monkeypatch.setattr(SRPipeline, "__call__", interrupt(error))
    upscale("a.png b.jpg done", model, code=1)
    assert words in capsys.readouterr().err
    assert files() == ["a.png", "b.jpg", "done/a_sr.png", "done/b_sr.png"]
    assert Path("done/b_sr.png").read_bytes() == b"what was there"


def test_a_fault_of_ours_keeps_its_traceback(model, monkeypatch):
    monkeypatch.setattr(SRPipeline, "__call__", interrupt(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes"): upscale("a.png b.jpg out", model)


def test_a_write_that_fails_leaves_the_old_file(model, capsys, monkeypatch):
    Path("out.png").write_bytes(b"what was there")

    def half(self, path, **how):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", half)
    upscale("a.png out.png", model, code=1)
    assert "No space left" in capsys.readouterr().err
    assert files() == ["a.png", "b.jpg", "out.png"] and Path("out.png").read_bytes() == b"what was there"


@pytest.mark.skipif(os.name == "nt", reason="no SIGPIPE there")
def test_a_closed_pipe_is_no_traceback():
    code = "import sys; from dit_sr_kit.cli import main; sys.exit(main(['presets', '--json']))"
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.close()
    error = run.stderr.read()
    assert run.wait() == 1 and "Traceback" not in error and "BrokenPipe" not in error


def test_progress_on_a_terminal_only(model, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(SRPipeline, "__call__", lambda self, image, progress, **how: seen.append(progress) or
                        type("Out", (), dict(images=[photo()])))
    upscale("a.png out.png", model)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    upscale("a.png out.png", model)
    assert seen == [False, True]


# ---------------------------------------------------------------- explore
def explore(words, model, code=0):
    assert cli.main(["explore", *words.split(), "--model", model, "--steps", "3"]) == code


@pytest.mark.parametrize("reference", [False, True])
def test_explore(reference, model, capsys):
    photo(height=200, width=260).save("large.png")
    explore("large.png page.html --crop 16 --json" + " --reference" * reference, model)
    report = json.loads(capsys.readouterr().out)
    page = Path("page.html")
    assert report == dict(output="page.html", steps=3, bytes=page.stat().st_size)
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>") and "<img alt=" in text
    assert ("Error against HR" in text) == reference
    assert not [word for word in ('src="http', "src='http", 'href="http', "import(") if word in text]


def test_a_reference_with_hard_edges(model):
    "Shrinking overshoots there, and a picture outside [0,1] would be refused."
    Image.fromarray(np.kron(np.indices((8, 8)).sum(0) % 2 * 255, np.ones((6, 6))).astype(np.uint8)).save("board.png")
    explore("board.png board.html --reference", model)


def test_explore_one_pixel(model):
    Image.new("RGB", (1, 1)).save("dot.png")
    explore("dot.png dot.html", model)
    assert Path("dot.html").is_file()


@pytest.mark.parametrize("words,code,hint", [
    ("a.png page.pdf", 2, ".html"), ("a.png page", 2, ".html"), ("nowhere.png page.html", 1, "nowhere.png"),
    ("a.png a.png/page.html", 1, "a.png"), ("dot.png page.html --reference", 2, "at least 4")])
def test_explore_errors(words, code, hint, model, capsys):
    Image.new("RGB", (3, 3)).save("dot.png")
    explore(words, model, code)
    assert hint in capsys.readouterr().err and not list(Path(".").glob("page*"))
