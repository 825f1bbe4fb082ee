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
from dit_sr_kit.images import SUFFIXES, load_image, save_image
from tests.test_pipeline import picture, small_pipeline

COMMANDS = ("presets", "env", "upscale", "explore", "evaluate")


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
    "upscale a.png out.png --fast", "upscale a.png out.png --tile big", "upscale a.png out.png --blend hann",
    "upscale a.png out.png --batch-size 0", "upscale a.png out.png --overlap -1", "evaluate", "evaluate a.png --color luma", "explore a.png", "explore a.png x.html --crop 0", "presets --all"])
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
        dict(image=name, output=str(Path("new/folder") / f"{name[0]}_sr.png"), status="restored", width=48, height=40)
        for name in ("a.png", "b.jpg")]
    assert captured.err == "" and files() == ["a.png", "b.jpg", "new/folder/a_sr.png", "new/folder/b_sr.png"]
    upscale("b.jpg alone/", model)
    assert Path("alone/b_sr.png").read_bytes() == Path("new/folder/b_sr.png").read_bytes()
    upscale("b.jpg new", model)
    assert Path("new/b_sr.png").is_file()


@pytest.mark.parametrize("suffix", SUFFIXES)
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
def test_a_bad_image_leaves_everything_as_it_was(name, model, capsys):
    failing_inputs()
    Path("out.png").write_bytes(b"what was there")
    before = files()
    upscale(f"{name} out.png", model, code=1)
    captured = capsys.readouterr()
    assert captured.out == "" and name in captured.err and captured.err.count("\n") == 1
    assert files() == before and Path("out.png").read_bytes() == b"what was there"


def test_bad_images_are_named_and_the_others_restored(model, capsys):
    failing_inputs()
    Path("folder.png").rmdir()
    words = "nowhere.png letter.png a.png half.png empty.png b.jpg results"
    upscale(words, model, code=1)
    errors = capsys.readouterr().err
    assert all(name in errors for name in ("nowhere.png", "letter.png", "half.png", "empty.png", "4 of 6"))
    assert sorted(os.listdir("results")) == ["a_sr.png", "b_sr.png"]
    upscale(words + " --json", model, code=1)
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert [row["status"] for row in rows] == ["unreadable", "unreadable", "kept", "unreadable", "unreadable", "kept"]
    assert "nowhere.png" in rows[0]["error"] and "width" in rows[2] and "width" not in rows[0]


# ---------------------------------------------------------------- folders, and runs that go on
def test_folders_and_patterns(model, capsys):
    for name in ("photos/c.png", "photos/d.bmp", "photos/below/e.png", "photos/.f.png"): save_image(photo(), name)
    Path("photos/notes.txt").write_text("no picture")
    upscale("photos out", model)
    assert sorted(os.listdir("out")) == ["c_sr.png", "d_sr.png"]
    upscale("photos/** a.p?g deep", model)
    assert sorted(os.listdir("deep")) == ["a_sr.png", "c_sr.png", "d_sr.png", "e_sr.png"]
    save_image(photo(), "odd[1].png")
    upscale("odd[1].png odd/", model)  # a name that looks like a pattern
    assert os.listdir("odd") == ["odd[1]_sr.png"]


@pytest.mark.parametrize("words,code,hint", [("nothing out", 1, "folder"), ("*.webp out", 1, "pattern"), ("photos photos", 2, "OUT"),
                                             ("photos ./photos/", 2, "OUT"), ("photos out.png", 2, "folder")])
def test_folders_that_cannot_be_done(words, code, hint, model, capsys):
    Path("nothing").mkdir()
    for name in ("c", "d"): save_image(photo(), f"photos/{name}.png")
    before = files()
    upscale(words, model, code)
    assert hint in capsys.readouterr().err and files() == before


def test_an_interrupted_run_goes_on(model, capsys, monkeypatch):
    for name in "cde": save_image(photo(ord(name)), f"photos/{name}.png")
    with monkeypatch.context() as patch:
        patch.setattr(SRPipeline, "__call__", interrupt(KeyboardInterrupt()))
        upscale("photos out", model, code=1)
    assert os.listdir("out") == ["c_sr.png"]
    before = Path("out/c_sr.png").read_bytes()
    capsys.readouterr()
    upscale("photos out", model)
    assert capsys.readouterr().err == "out/c_sr.png  48x40  (kept)\nout/d_sr.png  48x40\nout/e_sr.png  48x40\n"
    assert Path("out/c_sr.png").read_bytes() == before

    def count(words):
        calls = []
        real = SRPipeline.__call__
        with monkeypatch.context() as patch:
            patch.setattr(SRPipeline, "__call__", lambda self, *a, **k: (calls.append(1), real(self, *a, **k))[1])
            upscale(f"photos out {words}", model)
        return len(calls)
    assert count("") == 0 and count("--batch-size 2") == 0 and count("--device cpu") == 0
    assert count("--seed 1") == 3 and count("--seed 1") == 0 and count("--seed 1 --overwrite") == 3
    save_image(photo(9), "photos/d.png")  # another source
    Path("out/e_sr.png").write_bytes(before[:100])  # a damaged result
    assert count("--seed 1") == 2


def test_a_retrained_model_makes_its_pictures_anew(tmp_path, capsys):
    small_pipeline().save_pretrained("model")
    upscale("a.png out.png", "./model")
    small_pipeline(kappa=1.0).save_pretrained("model")
    capsys.readouterr()
    upscale("a.png out.png", "./model")
    assert "kept" not in capsys.readouterr().err
    stamp = Image.open("out.png").info["dit-sr"]
    assert json.loads(stamp)["seed"] == 0 and str(tmp_path) not in stamp


def test_profile_and_tags_are_kept(model):
    from PIL import ImageCms

    profile, tags = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "a camera"
    photo().save("a.jpg", exif=tags, icc_profile=profile)
    for suffix in (".png", ".jpg", ".webp"):
        upscale(f"a.jpg out{suffix}", model)
        with Image.open(f"out{suffix}") as image:
            assert image.size == (40, 48) and image.info["icc_profile"] == profile
            assert dict(image.getexif()) == {0x010F: "a camera"}


# ---------------------------------------------------------------- evaluate
def evaluate(words, code=0):
    assert cli.main(["evaluate", *words.split()]) == code


def test_evaluate_folders(capsys):
    from dit_sr_kit.metrics import MetricProtocol
    from dit_sr_kit.metrics import evaluate as measure

    for name, size in (("c", (32, 40)), ("d", (24, 24))):
        hr = picture(*size, seed=1)
        save_image(hr, f"hr/{name}.png")
        save_image((hr + 0.02).clamp(0, 1), f"sr/{name}{'_sr' if name == 'c' else ''}.png")
    evaluate("hr sr")
    text = capsys.readouterr().out
    assert "limited range" in text and "mean" in text and "PSNR" in text
    evaluate("hr sr --color rgb --border 2 --json --csv new/table.csv")
    result = json.loads(capsys.readouterr().out)["restored"]
    assert result["protocol"]["color"] == "rgb" and result["protocol"]["crop_border"] == 2 and result["names"] == ["c", "d"]
    single = measure(load_image("sr/d.png"), load_image("hr/d.png"), MetricProtocol("rgb", 2))
    assert result["scores"]["psnr"][1] == single.psnr
    lines = Path("new/table.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("method,picture,psnr") and lines[2].startswith(f"restored,d,{single.psnr!r}")
    evaluate("hr/c.png sr/c_sr.png")


def test_evaluate_a_model(model, capsys):
    save_image(picture(49, 50), "hr/c.png")
    evaluate(f"hr --model {model} --steps 2 --json")
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["bicubic", "small"] and result["bicubic"]["mean"]["psnr"] > 20
    evaluate(f"hr --model {model} --steps 2")
    assert "bicubic" in capsys.readouterr().out


@pytest.mark.parametrize("words,code,hint", [
    ("nothing sr", 1, "nothing"), ("hr nothing", 1, "nothing"), ("hr sr", 1, "1 of 2"), ("hr/c.png bad.png", 1, "c: "),
    ("hr/c.png small.png", 1, "shape"), ("hr both", 2, "several"), ("tiny.png --steps 1", 1, "tiny"), ("hr --preset dit-sr-tinny", 2, "dit-sr-tiny")])
def test_evaluate_errors(words, code, hint, capsys):
    Path("nothing").mkdir()
    Path("bad.png").write_text("no picture")
    for name in ("hr/c.png", "hr/d.png", "sr/c_sr.png", "both/c.png", "both/c_sr.png", "both/d.png"): save_image(picture(48, 48), name)
    save_image(picture(12, 12), "small.png")
    save_image(picture(3, 3), "tiny.png")
    evaluate(words, code)
    captured = capsys.readouterr()
    assert captured.out == "" and hint in captured.err


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
    calls = []

    def call(self, image, **how):
        calls.append(image)
        if len(calls) == 2: raise error
        return type("Out", (), dict(images=[photo(0, 40, 48)]))
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
    upscale("a.png out.png --overwrite", model)
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
