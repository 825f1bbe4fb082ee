"Explorers: one HTML fragment that is small, self-contained, safe to embed and usable in a real browser."
import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dit_sr_kit.core import ConfigError
from dit_sr_kit.explorers import SpectrumExplorer, TrajectoryExplorer, compare
from dit_sr_kit.explorers import fragment as shell
from dit_sr_kit.explorers import runs
from dit_sr_kit.explorers.spectrum import BANDS, band_pass
from dit_sr_kit.images import resize
from dit_sr_kit.trajectory import Trajectory
from tests.tools.browser import chromium, pixels


def picture(height, width, seed=0):
    "Something with edges and texture, `(1,3,H,W)`."
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    waves = torch.stack([torch.sin(9 * x + 5 * y), torch.cos(14 * y * x), (x > 0.4).float()])[None]
    return (0.5 + 0.25 * waves + 0.08 * torch.randn(1, 3, height, width, generator=g)).clamp(0, 1)


def make(steps=5, side=64, width=None, hr=True, lr=True, batch=1, images=False, **meta):
    "A run without a network: the estimate walks from the LR picture to the HR picture."
    g = torch.Generator().manual_seed(1)
    truth = torch.cat([picture(side, width or side, i) for i in range(batch)])
    small = resize(truth, scale=0.25).clamp(0, 1)
    up = resize(small, size=tuple(truth.shape[-2:]))
    run = Trajectory(lr=small if lr else None, hr=truth if hr else None, meta=dict(preset="toy", seed=3, **meta))
    for i in range(steps):
        share, sigma = ((i + 1) / steps) ** 2, 2 * (1 - (i + 1) / (steps + 1))
        pred = up + share * (truth - up)
        x = pred + sigma * torch.randn(truth.shape, generator=g)
        numbers = dict(sigma=sigma, snr=1 / sigma**6, odd=float("inf") if i == 0 else 1.0)
        run.record(i, steps - 1 - i, 2 * x - 1, 2 * pred - 1, numbers, *((x.clamp(0, 1), pred.clamp(0, 1)) if images else ()))
    run.result = pred.clamp(0, 1)
    return run


@pytest.fixture(scope="module")
def explorers():
    "One explorer of each kind, with its fragment."
    run = make()
    made = dict(trajectory=TrajectoryExplorer(run), compared=compare(run, make(steps=3), labels=["five", "three <b>"]),
                spectrum=SpectrumExplorer(run))
    return {k: (e, e.html()) for k, e in made.items()}


KINDS = ("trajectory", "compared", "spectrum")


@pytest.mark.parametrize("kind", KINDS)
def test_a_notebook_gets_html_and_text_and_nothing_else(explorers, kind):
    explorer, html = explorers[kind]
    bundle = explorer._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"} and bundle["text/html"] == html
    assert len(bundle["text/plain"]) < 400


@pytest.mark.parametrize("kind", KINDS)
def test_structure_of_the_fragment(explorers, kind):
    explorer, html = explorers[kind]
    name = shell.element_name(explorer.kind)
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)+", name)
    assert html.startswith(f"<{name} ") and html.count(f"</{name}>") == 1
    assert 'data-lm-suppress-shortcuts="true"' in html.split(">")[0]
    light, script = html.split(f"</{name}>")
    assert "<table" not in light and " id=" not in light
    assert script.count("</script") == 1 and "<!--" not in script and f'define("{name}")' in script
    alt = re.search(r'<img alt="([^"]+)" src="data:image/webp;base64,([^"]+)"', light)
    assert len(alt[1]) > 60
    strip = Image.open(io.BytesIO(base64.b64decode(alt[2])))
    assert strip.format == "WEBP" and strip.width > 300
    text = re.search(r'<script type="application/json">(.*?)</script><span hidden></span>', light, re.S)[1]
    assert "<" not in text
    data = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert data["title"] and data["question"].endswith("?") and len(data["how_to_read"]) >= 3 and len(data["limits"]) >= 3
    assert len(data["stepLabels"]) == len(data["x"]) == data["count"] == 5


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_is_there(explorers, kind):
    explorer, _ = explorers[kind]
    data = explorer.data
    used = set(re.findall(r'"frames":"([^"]+)"', shell.json_for_html(data)))
    for name in used:
        names = [name + str(b) for b in range(len(data["bands"]))] if name.endswith(".") else [name]
        for n in names:
            assert n in data["frames"], n
            frame = data["frames"][n]
            assert len(frame["uris"]) in (1, 3, 5) and (frame["lut"] is None or frame["lut"] in data["luts"])
    first = Image.open(io.BytesIO(base64.b64decode(next(iter(data["frames"].values()))["uris"][0])))
    assert first.format == "WEBP" and first.size[0] == 64


@pytest.mark.parametrize("kind", KINDS)
def test_no_address_of_another_machine(explorers, kind):
    _, html = explorers[kind]
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", html))
    assert all(a.startswith("http://www.w3.org/") for a in addresses), addresses
    assert not re.search(r"\b(src|href)=\"(?!data:)", html) and "@import" not in html and "url(" not in html
    assert not re.search(r"(?<![\w.])(fetch|require|XMLHttpRequest|import)\(", html)


def test_what_users_write_cannot_end_the_script():
    run = make(steps=2)
    run.meta["preset"] = "</script><script>alert(1)</script><!--\u2028"
    html = TrajectoryExplorer(run).html()
    assert "alert(1)" in html and "</script><script>alert" not in html and "<!--" not in html and "\u2028" not in html


def test_code_changes_the_name_of_the_element(monkeypatch):
    before = shell.element_name("trajectory")
    monkeypatch.setattr(shell, "explorer_module", lambda kind: "other code")
    assert shell.element_name("trajectory") != before


@pytest.mark.parametrize("side", [128, 192])
def test_budget_with_fifteen_steps(side):
    run = make(steps=15, side=side)
    for explorer in (TrajectoryExplorer(run, size=192), SpectrumExplorer(run, size=side)):
        report = explorer.size_report()
        assert report["total"] == len(explorer.html().encode()) <= 1_500_000
        assert sum(report["frames"].values()) + report["module"] + report["film_strip"] < report["total"]
        assert report["module"] < 60_000


def test_budget_lowers_the_quality_of_the_largest_group_first():
    frames = shell.Frames()
    g = torch.Generator().manual_seed(0)
    frames.add("noise", [torch.rand(3, 64, 64, generator=g) for _ in range(4)])
    frames.add("flat", [torch.full((3, 64, 64), 0.5)])
    free = frames.encode(10**9)
    assert set(free["qualities"].values()) == {shell.QUALITIES[0]}
    size = sum(map(len, free["frames"]["noise"]["uris"]))
    tight = frames.encode(int(0.7 * size))
    assert tight["qualities"]["noise"] < tight["qualities"]["flat"] == shell.QUALITIES[0]
    with pytest.raises(ConfigError, match="smaller size="):
        frames.encode(100)


@pytest.mark.parametrize("change", [dict(hr=False), dict(lr=False), dict(hr=False, lr=False), dict(steps=1), dict(width=96),
                                    dict(images=True), dict(batch=2)], ids=str)
def test_incomplete_and_unusual_runs(change):
    run = make(**{"steps": 2, **change})
    run.result = None
    last = change.get("batch", 1) - 1
    assert len(TrajectoryExplorer(run, sample=last).html()) > 10_000
    assert len(SpectrumExplorer(run, sample=last).html()) > 10_000


def test_very_small_pictures():
    assert TrajectoryExplorer(make(side=4, steps=2)).data["width"] == 4
    with pytest.raises(ConfigError, match="at least 64"):
        SpectrumExplorer(make(side=32, steps=2))


def test_large_pictures_are_cropped_and_long_runs_thinned():
    data = TrajectoryExplorer(make(side=128, width=64, steps=9), size=32, max_steps=4).data
    assert (data["width"], data["height"], data["count"]) == (32, 32, 4)
    assert "central 32×32" in data["facts"] and "4 of them shown" in data["facts"]
    assert [t.split(" ·")[0] for t in data["stepLabels"]] == ["step 1 of 9", "step 4 of 9", "step 6 of 9", "step 9 of 9"]


def test_numbers_are_of_the_whole_picture_before_encoding():
    from dit_sr_kit.metrics import MetricProtocol, psnr
    run = make()
    chart = TrajectoryExplorer(run, size=16).data["charts"][0]
    expected = [float(psnr(p.clamp(0, 1), run.hr, MetricProtocol())) for p in run.images()]
    shown = chart["series"][0]["values"]
    for value, want in zip(shown, expected):
        assert value is None if not np.isfinite(want) else value == pytest.approx(want, rel=1e-5)


def test_scales_are_shared_by_all_runs():
    rows = compare(make(), make(steps=3)).data["rows"]
    for a, b in zip(rows[0]["panels"], rows[1]["panels"]):
        assert a.get("bar") == b.get("bar")


@pytest.mark.parametrize("call, message", [
    (lambda: TrajectoryExplorer(Trajectory()), "record=True"),
    (lambda: TrajectoryExplorer(make(steps=2), sample=1), "expected 0 to 0"),
    (lambda: TrajectoryExplorer(make(steps=2), size=3), "at least 8"),
    (lambda: TrajectoryExplorer(make(steps=2), max_steps=1), "at least 2"),
    (lambda: SpectrumExplorer(make(steps=2), band=9), "expected 0 to 4"),
    (lambda: compare(make(steps=2)), "two or more"),
    (lambda: compare(make(steps=2), make(steps=2), labels=["a"]), "one label each"),
    (lambda: compare(make(steps=2), make(steps=2, side=128)), "one size"),
    (lambda: shell.explorer_module("nothing"), "Known kinds: .*trajectory"),
    (lambda: shell.to_levels(torch.zeros(2, 4, 4)), "one picture"),
    (lambda: shell.build_fragment("trajectory", dict(title="", question=""), "", " "), "alt text"),
])
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_bands_add_up_to_the_picture():
    x = picture(64, 96)[0, 0]
    corners = [(0.5, 1.0)]
    torch.testing.assert_close(sum(band_pass(x, (*BANDS, *corners))), x.double(), atol=1e-12, rtol=0)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    wave = torch.cos(2 * torch.pi * 3 / 16 * (x + 0.5))  # 0.1875 cycles per pixel; mirrors into itself
    inside = [p.square().mean() / wave.square().mean() for p in band_pass(wave)]
    assert inside[3] > 0.999 and sum(inside[:3]) + inside[4] < 1e-3


def test_spread_keeps_both_ends():
    for count in range(1, 40):
        kept = runs.spread(count, 7)
        assert kept[0] == 0 and kept[-1] == count - 1 and kept == sorted(set(kept)) and len(kept) == min(count, 7)


def test_coefficients_share_an_axis():
    assert runs.normalised([1.0, 2.0, 4.0]) == ([0.25, 0.5, 1.0], "")
    values, how = runs.normalised([1e-3, 1.0, 1e3])
    assert how == " (log)" and values == pytest.approx([0, 0.5, 1])
    assert runs.normalised([0.0, 0.0]) == ([0.0, 0.0], "")


def test_to_html_is_atomic(tmp_path, explorers):
    explorer, html = explorers["trajectory"]
    page = explorer.to_html(tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and html in page and [p.name for p in (tmp_path / "new").iterdir()] == ["page.html"]


def test_live_recomputes_and_keeps_the_view_on_errors():
    calls = []

    def compute(image, seed, steps, sampler, kappa, progress):
        calls.append((image, seed, steps, sampler, kappa))
        if seed == 13:
            raise ValueError("thirteen")
        progress(1, steps)
        return make(steps=steps)

    view = TrajectoryExplorer.live(compute, images={"cat": "a", "dog": "b"}, max_steps=4, steps=3, kappa=1.5, size=32)
    assert calls == [("a", 0, 3, "ancestral", 1.5)] and len(view.result) == 3
    widget = view.children[-1].children[0]
    assert widget.data["count"] == 3 and "export default" in widget._esm
    view.controls["image"].value = "dog"
    view.controls["steps"].value = 2
    view.controls["sampler"].value = "ddim"
    assert calls[-1] == ("b", 0, 2, "ddim", 1.5) and widget.data["count"] == 2 and view.children[-1].children[0] is widget
    view.controls["seed"].value = 13
    note = view.children[1].children[1].value
    assert "thirteen" in note and widget.data["count"] == 2 and not view.controls["seed"].disabled
    view.controls["seed"].value = 14
    assert view.children[1].children[1].value == "" and calls[-1][1] == 14
    with pytest.raises(ConfigError, match="at least one picture"):
        TrajectoryExplorer.live(compute, images=[])


# ---------------------------------------------------------------- a real browser

@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


def open_page(browser, path, **options):
    "Open a file without a network. Returns the page and the list of everything that went wrong."
    context = browser.new_context(offline=True, viewport=dict(width=1200, height=900), **options)
    page, trouble = context.new_page(), []
    page.on("console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: trouble.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else trouble.append(r.url))
    page.goto(path.as_uri())
    page.wait_for_selector(".dit-sr-explorer[data-ready=true]", timeout=60_000)
    return page, trouble


def test_stepping_in_a_browser(browser, tmp_path, explorers):
    page, trouble = open_page(browser, explorers["trajectory"][0].to_html(tmp_path / "page.html"))
    host = page.locator(".dit-sr-explorer")
    slider, label = host.locator("input.steps"), host.locator("output.now")
    assert host.locator("canvas").count() == 5 and not host.locator("img").is_visible()
    start = pixels(host)
    slider.evaluate("s => { s.value = 3; s.dispatchEvent(new Event('input')); }")
    moved = pixels(host)
    assert all(a != b for a, b in zip(start, moved)) and label.text_content().startswith("step 4 of 5")
    slider.focus()
    for key, step in (("ArrowLeft", 3), ("ArrowRight", 4), ("End", 5), ("ArrowRight", 5), ("Home", 1), ("ArrowLeft", 1)):
        page.keyboard.press(key)
        assert label.text_content().startswith(f"step {step} of 5"), key
    assert pixels(host) == start
    page.keyboard.down("h")
    held = pixels(host)
    assert held[1] != start[1] and held[4] != start[4] and held[0] == start[0]
    page.keyboard.up("h")
    assert pixels(host) == start
    host.get_by_role("button", name="show LR").click()
    assert pixels(host)[1] != start[1]
    host.get_by_role("button", name="show LR").click()
    page.keyboard.press("+")
    zoomed = pixels(host)
    assert all(a != b for a, b in zip(zoomed[:4], start[:4])) and zoomed[4] == start[4]  # a spectrum has no place in the picture
    page.keyboard.press("0")
    page.mouse.move(0, 0)
    assert pixels(host) == start
    slider.focus()
    page.keyboard.press(" ")
    page.wait_for_function("document.querySelector('.dit-sr-explorer').shadowRoot.querySelector('output.now').textContent.startsWith('step 5')", timeout=20_000)
    assert not trouble


def test_bands_and_comparison_in_a_browser(browser, tmp_path, explorers):
    page, trouble = open_page(browser, explorers["spectrum"][0].to_html(tmp_path / "s.html"), color_scheme="dark")
    host = page.locator(".dit-sr-explorer")
    assert host.locator(".explorer").get_attribute("data-theme") == "dark"
    host.locator("input.steps").focus()
    start = pixels(host)
    page.keyboard.press("ArrowUp")
    assert all(a != b for a, b in zip(start, pixels(host))) and "1/4 – 1/2" in host.locator(".extra output").text_content()
    assert not trouble
    page, trouble = open_page(browser, explorers["compared"][0].to_html(tmp_path / "c.html"))
    host = page.locator(".dit-sr-explorer")
    assert host.locator(".rowlabel").all_text_contents() == ["five", "three <b>"]
    start = pixels(host)
    host.locator("input.steps").focus()
    page.keyboard.press("End")
    assert len(start) == 10 and all(a != b for a, b in zip(start, pixels(host))) and not trouble


def test_two_instances_and_a_page_without_scripts(browser, tmp_path, explorers):
    html = explorers["trajectory"][1] + explorers["spectrum"][1] + explorers["trajectory"][1]
    path = tmp_path / "two.html"
    path.write_text(shell.build_page(html, "two"), encoding="utf-8")
    page, trouble = open_page(browser, path)
    page.wait_for_function("document.querySelectorAll('.dit-sr-explorer[data-ready=true]').length === 3", timeout=60_000)
    first, last = page.locator(".dit-sr-explorer").first, page.locator(".dit-sr-explorer").last
    before = pixels(first), pixels(last)
    last.locator("input.steps").focus()
    page.keyboard.press("End")
    assert pixels(first) == before[0] and pixels(last) != before[1] and not trouble
    still = browser.new_context(offline=True, java_script_enabled=False).new_page()
    still.goto(path.as_uri())
    assert still.locator("img").count() == 3 and still.locator("img").first.is_visible()
    assert still.locator("img").first.bounding_box()["width"] > 200


def test_an_explorer_added_later_is_built(browser, tmp_path, explorers):
    "As a notebook does it: the fragment arrives by innerHTML, and its script is started by hand."
    path = tmp_path / "empty.html"
    path.write_text("<!DOCTYPE html><meta charset='utf-8'><body></body>", encoding="utf-8")
    page = browser.new_context(offline=True).new_page()
    page.goto(path.as_uri())
    for count in (1, 2):
        page.evaluate("""html => { const box = document.createElement('div'); box.innerHTML = html; document.body.append(box);
          for (const old of box.querySelectorAll(':scope > script')) { const s = document.createElement('script');
            s.type = old.type; s.textContent = old.textContent; old.replaceWith(s); } }""", explorers["trajectory"][1])
        page.wait_for_function(f"document.querySelectorAll('.dit-sr-explorer[data-ready=true]').length === {count}", timeout=60_000)
