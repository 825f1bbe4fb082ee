"Explorers: one HTML fragment that is small, self-contained, safe to embed and usable in a real browser."
import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dit_sr_kit.attention_captures import AttentionState, attended_distance, rollout, store_rows, stream_share
from dit_sr_kit.captures import ModulationState, full_response, low_high_ratio
from dit_sr_kit.core import ConfigError, make_generator
from dit_sr_kit.explorers import (AdaFMExplorer, AttentionExplorer, DegradationExplorer, ScheduleCurves,
                                  ScheduleExplorer, SpectrumExplorer, TargetExplorer, TrajectoryExplorer, compare,
                                  schedule_curves, straight_curves)
from dit_sr_kit.explorers import fragment as shell
from dit_sr_kit.explorers import runs
from dit_sr_kit.explorers.degradation import describe_step, run_step, scaled_step
from dit_sr_kit.explorers.spectrum import BANDS, band_pass
from dit_sr_kit.explorers.targets import error_reach, target_weights
from dit_sr_kit.images import resize
from dit_sr_kit.real_degradations import RECIPES, Recipe, Round, degrade_real, replay
from dit_sr_kit.schedulers import DoSSRScheduler, ResShiftScheduler
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


def modulation(kind="adafm", steps=5, pictures=True, blocks=("encoder.0.layer.blocks.0", "middle.blocks.0"), p=8):
    "A captured run without a network: scales, features and pictures of two blocks."
    g = torch.Generator().manual_seed(2)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    state = ModulationState(kind, list(range(steps))[::-1], meta=dict(preset="toy </script>", seed=3))
    for unit in [(b, branch) for b in blocks for branch in ("msa", "mlp")]:
        before = randn(1, p, p).square().expand(steps, -1, -1) + 0.01
        before = before + before.flip(-1, -2).roll((1, 1), (-2, -1))  # point symmetric, as powers are
        if kind == "adafm": state.scales[unit] = randn(steps, p, p // 2 + 1)
        else: state.channels[unit] = 0.3 * randn(steps, 3, 12)
        state.windows[unit] = (before, before)
        state.windows[unit] = (before, before * state.response([unit])[unit].square())
        state.radial[unit] = (randn(steps, 6).square(), randn(steps, 6).square())
    if pictures:
        run = make(steps=steps)
        state.pictures, state.references = list(run.images()), dict(lr=run.lr, hr=run.hr)
    return state


def attention(steps=5, grid=(4, 4), blocks=("blocks.0.attn", "blocks.1.attn"), heads=(0, "mean"), pictures=True, text=3, streams=2):
    "Captured attention without a network."
    g = torch.Generator().manual_seed(4)
    total = streams * grid[0] * grid[1] + text
    maps = {(b, head, i): store_rows((2 * torch.randn(total, total, generator=g)).softmax(-1)) for b in blocks for head in heads for i in range(steps)}
    state = AttentionState(list(blocks), list(heads), list(range(steps)), [1000.0 - 200 * i for i in range(steps)], grid, maps,
                           meta=dict(weights="random </script>", seed=3))
    if pictures:
        run = make(steps=steps)
        state.pictures, state.references = list(run.images()), dict(lr=run.lr, hr=run.hr)
    return state


def toy_curves(run):
    "The process of `make`, as a table."
    noise = [r.coefficients["sigma"] for r in run][::-1]
    last = len(noise) - 1
    return ScheduleCurves("toy", [i / last for i in range(last + 1)], [1.0] * (last + 1), [0.0] * (last + 1), noise,
                          list(range(last + 1)))


ONE_ROUND = Recipe(rounds=(Round(resize_prob=(0.0, 1.0, 0.0)),))


@pytest.fixture(scope="module")
def explorers():
    "One explorer of each kind, with its fragment."
    run = make()
    made = dict(trajectory=TrajectoryExplorer(run), compared=compare(run, make(steps=3), labels=["five", "three <b>"]),
                spectrum=SpectrumExplorer(run))
    made["adafm"] = AdaFMExplorer(modulation(), modulation("adaln"), size=64)
    made["schedule"] = ScheduleExplorer([DoSSRScheduler(), toy_curves(run), ResShiftScheduler()], run, process="toy")
    made["attention"] = AttentionExplorer(attention())
    made["targets"] = TargetExplorer(picture(64, 64), generator=torch.Generator().manual_seed(5), steps=5)
    made["degradation"] = DegradationExplorer(picture(64, 64), ONE_ROUND, seed=3, factors=(0.0, 0.5, 1.0, 2.0, 3.0))
    return {k: (e, e.html()) for k, e in made.items()}


KINDS = ("trajectory", "compared", "spectrum", "adafm", "schedule", "attention", "targets", "degradation")


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
    (lambda: ScheduleExplorer([]), "1 to 6"),
    (lambda: TargetExplorer(picture(64, 64)[0]), r"\(3, 64, 64\), expected one picture"),
    (lambda: TargetExplorer(picture(64, 64), steps=1), "2 or more steps"),
    (lambda: TargetExplorer(picture(64, 64), noise_scale=0.0), "positive noise scale"),
    (lambda: TargetExplorer(picture(64, 64), error=0.7), "0 to 0.5"),
    (lambda: TargetExplorer(picture(64, 64), noise=torch.zeros(1, 3, 8, 8)), "shape"),
    (lambda: ScheduleExplorer([ResShiftScheduler(), ResShiftScheduler()]), "different names"),
    (lambda: ScheduleExplorer([ResShiftScheduler()], calls=0), "1 to 50"),
    (lambda: ScheduleExplorer([ResShiftScheduler()], process="DDPM"), "none of the processes: ResShift"),
    (lambda: ScheduleExplorer([DoSSRScheduler()], make(steps=2)), "does not belong to 'DoSSR'"),
    (lambda: schedule_curves(3), "no add_noise"),
    (lambda: ScheduleCurves("x", [0, 1], [1, 0], [0, 0], [0, 1, 2]), "one length"),
    (lambda: ScheduleCurves("x", [0, 0.5], [1, 0], [0, 0], [0, 1]), "Divide by the last"),
    (lambda: ScheduleCurves("x", [0, 1], [1, 0], [0, 0], [0, float("inf")]), "not finite"),
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


SCHEDULERS = [ResShiftScheduler(), ResShiftScheduler(num_train_timesteps=4, min_noise_level=0.2), ResShiftScheduler(kappa=0.7, power=1.3),
              ResShiftScheduler(timestep_spacing="leading", num_train_timesteps=40), DoSSRScheduler(),
              DoSSRScheduler(shift_schedule="trunc_13", beta_end=0.02), DoSSRScheduler(shift_schedule="trunc_23", num_train_timesteps=300),
              DoSSRScheduler(shift_schedule="none"), DoSSRScheduler(shift_schedule="none_12", beta_start=0.0005)]


def test_a_process_is_measured_without_knowing_its_formula():
    for scheduler in SCHEDULERS:
        curves = schedule_curves(scheduler)
        steps = torch.tensor(curves.timesteps).long()
        g = torch.Generator().manual_seed(0)
        x0, y, n = torch.randn(3, len(steps), 1, 2, 2, generator=g, dtype=torch.float64)
        weight = lambda v: torch.tensor(v, dtype=torch.float64)[:, None, None, None]
        mixed = weight(curves.signal) * x0 + weight(curves.shift) * y + weight(curves.noise) * n
        torch.testing.assert_close(scheduler.add_noise(x0, n, steps, y), mixed)
        scheduler.set_timesteps(3)
        last = scheduler.config.num_train_timesteps - 1
        assert curves.grids[3] == pytest.approx([int(t) / last for t in scheduler.timesteps])


def test_a_process_without_steps_is_measured_between_one_and_zero():
    class Flow:
        config = {}
        timesteps = torch.tensor([0.0, 0.5])

        def set_timesteps(self, n): self.timesteps = torch.arange(n) / n
        def add_noise(self, x0, noise, t, cond): return t[:, None, None, None] * x0 + (1 - t[:, None, None, None]) * noise

    curves = schedule_curves(Flow(), "flow", points=11)
    assert curves.t[0] == 0 and curves.signal[0] == 1 and curves.noise[-1] == 1 and curves.formula is None
    assert curves.grids[2] == [1.0, 0.5]
    run = Trajectory(meta={})
    for i, t in enumerate((0.0, 0.5)): run.record(i, t, torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), dict(sigma=1 - t))
    assert ScheduleExplorer([curves], run).times == [1.0, 0.5]


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


def test_adafm_numbers_are_those_of_the_state():
    state, twin = modulation(), modulation("adaln")
    data = AdaFMExplorer(state, twin).data
    for i, unit in enumerate(state.units):
        shown = data["rows"][0]["units"][i]
        response = full_response(state.scales[unit])
        assert shown["ratio"] == pytest.approx(low_high_ratio(response).tolist(), abs=1e-3)
        half = torch.tensor(shown["gains"]).reshape(5, 8, 5)
        torch.testing.assert_close(full_response(half).double(), response, atol=1e-3, rtol=0)
        assert shown["met"] == pytest.approx(shown["ratio"], abs=2e-3)  # features before times squared gain are features after
        assert max(map(abs, data["rows"][1]["units"][i]["ratio"])) == 0
        assert len(data["rows"][1]["units"][i]["gains"][0]) == 12
    assert data["stages"] == ["encoder 0", "middle"] and data["stepLabels"][0] == "step 1 of 5 · t = 4"


@pytest.mark.parametrize("state", [lambda: (modulation(pictures=False),), lambda: (modulation("adaln"),), lambda: (modulation(p=4), modulation("adaln", p=4)),
                                   lambda: (modulation(steps=1),), lambda: (modulation("adaln"), modulation())])
def test_incomplete_and_unusual_captures(state):
    explorer = AdaFMExplorer(*state())
    assert 10_000 < len(explorer.html()) < 1_500_000 and explorer.size_report()["module"] < 60_000


def test_adafm_budget_and_thinning():
    names = [f"encoder.{i}.layer.blocks.{j}" for i in range(3) for j in range(4)]
    explorer = AdaFMExplorer(modulation(steps=15, blocks=names), modulation("adaln", steps=15, blocks=names))
    assert explorer.size_report()["total"] <= 1_500_000
    data = AdaFMExplorer(modulation(steps=15), max_steps=4, block="encoder.0.layer.blocks.0").data
    assert data["count"] == 4 and data["x"] == [1, 6, 10, 15] and data["state"]["block"] == 0


@pytest.mark.parametrize("call, message", [
    (lambda: AdaFMExplorer(ModulationState("adafm", [])), "capture_modulation"),
    (lambda: AdaFMExplorer(modulation(), modulation(steps=4)), "differ"),
    (lambda: AdaFMExplorer(modulation(), block="nowhere"), "middle.blocks.0"),
    (lambda: AdaFMExplorer(modulation(), size=4), "at least 8"),
    (lambda: AdaFMExplorer(modulation(), max_steps=1), "2 steps"),
])
def test_adafm_errors_say_what_to_do(call, message):
    with pytest.raises(ConfigError, match=message): call()


def test_adafm_live():
    calls = []

    def compute(image, seed, steps, sampler, kappa):
        calls.append((image, seed, steps, sampler, kappa))
        return (modulation(steps=steps), modulation("adaln", steps=steps)) if image == "both" else modulation(steps=steps)

    view = AdaFMExplorer.live(compute, {"two": "both", "one": "single"}, max_steps=4, steps=3)
    widget = view.children[-1].children[0]
    assert calls == [("both", 0, 3, "ancestral", None)] and len(widget.data["rows"]) == 2 and widget.data["count"] == 3
    view.controls["image"].value = "one"
    assert calls[-1][0] == "single" and len(widget.data["rows"]) == 1


def test_attention_numbers_are_those_of_the_state():
    state = attention()
    data = AttentionExplorer(state).data
    assert len(data["maps"]) == 2 * 2 * 5 and data["state"] == dict(block=1, head=0, token=10)
    at = (1 * 2 + 1) * 5 + 3  # second block, "mean", fourth step
    weights, shown = state.weights("blocks.1.attn", "mean", 3), data["maps"][at]
    levels = np.frombuffer(base64.b64decode(shown["levels"]), np.uint8).reshape(32, 32)
    assert (levels.max(1) == 255).all()  # one scale for X -> X and X -> L, text left out
    part = weights[:32, :32]
    assert np.allclose((levels / 255.0) ** 2 * np.array(shown["top"])[:, None], part, atol=0.006 * float(part.max()))
    share = stream_share(weights, 16)
    assert shown["share"][1][:16] == pytest.approx(share["noise->lr"].tolist(), abs=6e-4)
    assert shown["share"][0][16:] == pytest.approx(share["lr->noise"].tolist(), abs=6e-4)
    charts = {c["title"]: c for c in data["charts"]}
    chained = rollout([state.weights(b, "mean", 3) for b in state.blocks])[1]
    assert charts["Rollout"]["series"][0]["table"][1][1][3] == pytest.approx(stream_share(chained, 16)["noise->lr"].mean().item(), rel=1e-4)
    far = attended_distance(weights[:16, 16:32], (4, 4)).mean().item()
    curves = {q["name"]: q for q in charts["Distance of what is looked at"]["series"]}
    assert set(curves) == {"X → X", "X → L", "L → X", "L → L"} and curves["X → L"]["table"][1][1][3] == pytest.approx(far, rel=1e-4)


@pytest.mark.parametrize("options", [dict(pictures=False), dict(steps=1), dict(steps=2, grid=(2, 6)), dict(streams=1, text=0), dict(text=0),
                                     dict(blocks=("blocks.0.attn",))], ids=str)
def test_unusual_attention(options):
    explorer = AttentionExplorer(attention(**options))
    assert 10_000 < len(explorer.html()) < 3_000_000 and explorer.size_report()["module"] < 60_000


@pytest.mark.parametrize("options", [dict(grid=(8, 8), blocks=("a", "b", "c")), dict(grid=(16, 16), blocks=("a", "b", "c"), heads=("mean",), steps=3)])
def test_attention_budget(options):
    explorer = AttentionExplorer(attention(**options))
    assert explorer.size_report()["total"] < 3_000_000 and explorer.data["count"] >= 2


@pytest.mark.parametrize("call, message", [
    (lambda: AttentionExplorer(AttentionState([], [], [], [], (4, 4), {})), "capture_attention"),
    (lambda: AttentionExplorer(attention(), token=(4, 0)), "grid of 4x4"),
    (lambda: AttentionExplorer(attention(), block="c"), "Layers: blocks.0"),
    (lambda: AttentionExplorer(attention(), max_steps=0), "1 step"),
    (lambda: AttentionExplorer(attention(grid=(16, 16), blocks=("a", "b"), heads=tuple(range(4)), steps=1)), "fewer layers or heads"),
])
def test_attention_errors_say_what_to_do(call, message):
    with pytest.raises(ConfigError, match=message): call()


# ---------------------------------------------------------------- targets

@pytest.mark.parametrize("options", [dict(steps=2), dict(noise_scale=2.0, error=0.0), dict(size=96), dict(floor=0.2, size=8)], ids=str)
def test_target_explorer_is_small_and_exact(options):
    given = torch.randn(1, 3, 48, 96, generator=torch.Generator().manual_seed(6)) if options.get("size") == 96 else None
    x = picture(48, 96) if given is not None else picture(130, 70)
    explorer = TargetExplorer(x, noise=given, **options)
    assert explorer.size_report()["total"] < 400_000
    data, k = explorer.data, options.get("noise_scale", 1.0)
    read = {name: np.frombuffer(base64.b64decode(data[name]), "<i2").reshape(3, data["height"], data["width"]) / data["unit"] for name in ("picture", "noise", "error")}
    side = min(options.get("size", 64), 130)
    assert read["picture"].shape[1:] == ((48, 96) if given is not None else (min(side, 130), min(side, 70)))
    if given is not None:
        assert np.abs(read["picture"] - (2 * x[0].numpy() - 1)).max() <= 0.501 / data["unit"] and np.abs(read["noise"] - given[0].numpy()).max() <= 0.501 / data["unit"]
    for t in (0.0, 0.4, 1.0):
        state = explorer.mixture(t, "flow", "state").numpy()
        assert np.allclose(state, t * read["picture"] + (1 - t) * k * read["noise"], atol=1e-12)


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


def test_blocks_and_branches_in_a_browser(browser, tmp_path, explorers):
    page, trouble = open_page(browser, explorers["adafm"][0].to_html(tmp_path / "a.html"))
    host = page.locator(".dit-sr-explorer")
    assert host.locator(".rowlabel").all_text_contents() == ["AdaFM", "AdaLN"] and host.locator("canvas").count() == 10
    host.locator("input.steps").focus()
    start = pixels(host)
    page.keyboard.press("ArrowRight")
    moved = pixels(host)
    assert all(a != b for i, (a, b) in enumerate(zip(start, moved)) if i not in (3, 8))  # features before do not change in the toy
    page.keyboard.press("ArrowLeft")
    assert pixels(host) == start
    page.keyboard.press("b")
    assert pixels(host)[1:3] != start[1:3] and pixels(host)[0] == start[0]
    page.keyboard.press("b")
    page.keyboard.press("ArrowUp")
    assert host.locator("select").input_value() == "0" and pixels(host)[1] != start[1]
    page.keyboard.press("ArrowDown")
    assert pixels(host) == start
    page.keyboard.down("h")
    assert pixels(host)[0] != start[0] and pixels(host)[1:5] == start[1:5]
    page.keyboard.up("h")
    host.locator("select").select_option("0")
    assert pixels(host)[1] != start[1] and not trouble


def test_tokens_blocks_and_heads_in_a_browser(browser, tmp_path, explorers):
    page, trouble = open_page(browser, explorers["attention"][0].to_html(tmp_path / "t.html"))
    host = page.locator(".dit-sr-explorer")
    assert host.locator(".rowlabel").all_text_contents() == ["Query: noise token", "Query: LR token"] and host.locator("canvas").count() == 6
    token, notes = host.locator("output.token"), lambda: host.locator(".panel .note").all_text_contents()
    assert token.text_content() == "row 3, column 3"
    start, said, curves = pixels(host), notes(), lambda: host.locator("path.curve").evaluate_all("all => all.map((p) => p.getAttribute('d'))")
    box = host.locator("canvas").nth(0).bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.1)
    assert token.text_content() == "row 1, column 4"
    assert all(a != b for a, b in zip(start, pixels(host))) and notes() != said
    for key, place in (("ArrowDown", "row 2, column 4"), ("ArrowLeft", "row 2, column 3"), ("s", "row 3, column 3")):  # the panel has the focus
        page.keyboard.press(key)
        assert token.text_content() == place, key
    page.mouse.move(0, 0)
    assert pixels(host) == start and notes() == said
    host.locator("input.steps").focus()
    before = curves()
    page.keyboard.press("ArrowRight")
    assert pixels(host)[1] != start[1] and curves() != before and host.locator("output.now").last.text_content().startswith("row 3")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    assert host.locator("select.block").input_value() == "0" and pixels(host)[1] != start[1]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("n")
    assert host.locator("select.head").input_value() == "1" and pixels(host)[1] != start[1] and pixels(host)[0] == start[0]
    page.keyboard.press("n")
    assert pixels(host) == start and not trouble


def test_formulas_of_the_browser_are_those_of_the_schedulers(browser, tmp_path):
    curves = [schedule_curves(s, f"{i}") for i, s in enumerate(SCHEDULERS)]
    curves += [straight_curves("f", 3.0, 1.5), straight_curves("g", from_lr=True)]
    path = tmp_path / "empty.html"
    path.write_text("<!DOCTYPE html><body></body>", encoding="utf-8")
    page = browser.new_context(offline=True).new_page()
    page.goto(path.as_uri())
    module = base64.b64encode(shell.explorer_module("schedule").encode()).decode()
    cases = [dict(c.formula, t=c.t, counts=sorted(c.grids)) for c in curves]
    answers = page.evaluate("""async ([module, cases]) => {
      const { kinds } = await import('data:text/javascript;charset=utf-8;base64,' + module);
      return cases.map((c) => { const f = kinds.schedule.formulas[c.kind](c.constants);
        return { values: c.t.map((u) => f.at(u)), grids: c.counts.map((n) => f.calls(n)) }; }); }""", [module, cases])
    for c, answer in zip(curves, answers):
        np.testing.assert_allclose(np.array(answer["values"]).T, [c.signal, c.shift, c.noise], atol=1e-12)
        for n, grid in zip(sorted(c.grids), answer["grids"]):
            np.testing.assert_allclose(grid, c.grids[n], atol=1e-12)


def test_targets_of_the_browser_are_those_of_python(browser, tmp_path):
    path = tmp_path / "empty.html"
    path.write_text("<!DOCTYPE html><body></body>", encoding="utf-8")
    page = browser.new_context(offline=True).new_page()
    page.goto(path.as_uri())
    module = base64.b64encode(shell.explorer_module("targets").encode()).decode()
    cases = [[t, k, f] for t in (0.0, 0.01, 0.3, 0.5, 0.99, 1.0) for k in (0.5, 1.0, 2.0) for f in (0.05, 0.2)]
    answers = page.evaluate("""async ([module, cases]) => {
      const { kinds } = await import('data:text/javascript;charset=utf-8;base64,' + module);
      return cases.map(([t, k, f]) => [kinds.targets.weights(t, k), kinds.targets.behind(t, k, f)]); }""", [module, cases])
    for (t, k, f), found in zip(cases, answers):
        for ours, theirs in zip((target_weights(t, k), error_reach(t, k, f)), found):
            assert set(theirs) == set(ours) == {"flow", "vp"}
            for how in ours:
                assert set(ours[how]) == set(theirs[how])
                for what in ours[how]: assert ours[how][what] == pytest.approx(theirs[how][what], abs=1e-12), (t, k, how, what)


def test_targets_move_in_a_browser(browser, tmp_path, explorers):
    page, trouble = open_page(browser, explorers["targets"][0].to_html(tmp_path / "g.html"))
    host = page.locator(".dit-sr-explorer")
    canvases = host.locator("canvas")
    assert canvases.count() == 12 and not host.locator("img").is_visible()
    host.locator("input.steps").focus()
    page.keyboard.press("Home")
    start, line = pixels(host), host.locator("output.pixel").text_content()
    page.keyboard.press("ArrowRight")
    moved = pixels(host)
    changed = [a != b for a, b in zip(start, moved)]
    assert changed[:8] == [True, False, False, False, True, False, False, True]  # a flow's targets are constant in time
    assert not changed[8] and not changed[9] and changed[10] and changed[11]     # noise and velocity: their errors shrink
    assert host.locator("output.pixel").text_content() != line
    page.keyboard.press("ArrowUp")
    more = pixels(host)
    assert more[:8] == moved[:8] and all(a != b for a, b in zip(more[8:], moved[8:]))
    page.keyboard.press("ArrowDown")
    assert pixels(host) == moved
    page.keyboard.press("c")
    other = pixels(host)
    assert other[:10] == moved[:10] and other[11] != moved[11]
    page.keyboard.press("c")
    page.keyboard.press("End")
    last = pixels(host)
    assert last[0] == last[1] == last[4] == last[5] and last[7] == last[6]       # at the end: state = picture, velocity = noise
    page.keyboard.press("+")
    assert all(a != b for a, b in zip(pixels(host)[:8], last[:8]))
    page.keyboard.press("0")
    box = canvases.nth(0).bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + 2)
    assert host.locator("output.pixel").text_content().startswith("Green of row 1, column 1:") and not trouble


def test_schedules_bend_in_a_browser(browser, tmp_path):
    processes = [ResShiftScheduler(), DoSSRScheduler(), schedule_curves(DoSSRScheduler(shift_schedule="none"), "DDPM"), straight_curves()]
    page, trouble = open_page(browser, ScheduleExplorer(processes).to_html(tmp_path / "s.html"))
    host = page.locator(".dit-sr-explorer")
    assert float(host.locator(".body").get_attribute("data-formula-error")) < 1e-5
    curves = lambda: host.locator("path.curve").evaluate_all("all => all.map((p) => p.getAttribute('d'))")
    numbers = lambda: host.locator("output.values").all_text_contents()
    ticks = lambda: host.locator("line.call").count()
    start, first, count = curves(), numbers(), ticks()
    assert len(start) == 4 * 5 and count == 4 * 5 and len(set(start)) > 8
    kappa = host.locator("input[data-constant='0.kappa']")
    kappa.focus()
    page.keyboard.press("ArrowRight")
    bent = curves()
    assert bent[8] != start[8] and bent[16] != start[16] and bent[1:4] == start[1:4] and bent[5:8] == start[5:8]  # ResShift alone
    assert numbers()[0] != first[0] and numbers()[1:] == first[1:]
    host.locator("button.reset").first.click()
    assert curves() == start
    host.locator("input.steps").focus()
    page.keyboard.press("ArrowUp")
    assert ticks() == count + 4
    page.keyboard.press("End")
    assert host.locator("output.now").first.text_content() == "time 0.00" and numbers() != first
    host.get_by_role("button", name="DDPM").focus()
    page.keyboard.press(" ")
    assert len(curves()) == 3 * 5 and host.locator("button.process[aria-pressed=false]").count() == 1
    page.keyboard.press("+")
    assert curves()[0] != start[0]  # the time axis is enlarged
    assert not trouble


def test_a_run_is_marked_on_its_process(browser, tmp_path, explorers):
    page, trouble = open_page(browser, explorers["schedule"][0].to_html(tmp_path / "r.html"))
    host = page.locator(".dit-sr-explorer")
    marks = host.locator(".charts figure").nth(2).locator("circle.mark")
    assert marks.count() == 5 and host.locator("canvas").count() == 2
    dot = lambda: host.locator(".charts figure").nth(2).locator("circle.dot").nth(1).get_attribute("cx")
    at = [float(m.get_attribute("cx")) for m in marks.all()]
    assert float(dot()) == pytest.approx(at[0])
    before = pixels(host)
    host.locator("input.steps").focus()
    page.keyboard.press("End")
    assert float(dot()) == pytest.approx(at[-1]) and pixels(host) != before and not trouble


def test_strengths_of_a_stage_are_what_they_say(explorers):
    explorer = explorers["degradation"][0]
    hr, record = explorer.hr, explorer.record
    assert torch.equal(explorer._run(hr, record["steps"])[-1], replay(hr, record))
    titles = [q["title"] for q in explorer.data["sliders"]]
    assert titles[:4] == ["blur", "resize", "noise", "JPEG"] and explorer.data["drawn"] == 2
    for q in explorer.data["sliders"]:
        assert q["notes"][0] == "left out" and q["notes"][2] == explorer.data["panels"][q["panel"]]["note"]
        assert q["scores"][2] == explorer.data["base"] and len(q["scores"][0]) == len(explorer.data["panels"])
    sinc = dict(op="blur", kernels=[dict(family="sinc", size=7, cutoff=2.0), None])
    scaled = scaled_step(sinc, 2.0, (8, 8))["kernels"]
    assert scaled[0]["cutoff"] == pytest.approx(4 - np.pi) and scaled[1] is None
    assert scaled_step(sinc, 9.0, (8, 8))["kernels"][0]["cutoff"] == 0.2 and scaled_step(sinc, 0.0, (8, 8)) is None
    assert scaled_step(dict(op="resize", size=[16, 4]), 2.0, (64, 64))["size"] == [4, 4]
    assert scaled_step(dict(op="jpeg", quality=[60.0]), 3.0, (8, 8))["quality"] == [5.0]
    x = picture(16, 16)
    half = run_step(x, scaled_step(dict(op="sharpen"), 0.5, (16, 16)))
    torch.testing.assert_close(half, (x + run_step(x, dict(op="sharpen"))) / 2)
    assert run_step(x, None) is x and describe_step(None) == "left out"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_explored(name):
    explorer = DegradationExplorer(picture(40, 50), name, seed=1, size=32, factors=(0.0, 1.0))
    assert explorer.data["width"] == 32 and len(explorer.html()) < 400_000
    hr = picture(32, 32)
    _, record = degrade_real(hr, name, make_generator(4))
    again = DegradationExplorer(hr, record=record, factors=(0.0, 1.0))
    assert torch.equal(again._run(hr, record["steps"])[-1], replay(hr, record)) and "given record" in again.data["facts"]


@pytest.mark.parametrize("call, message", [
    (lambda: DegradationExplorer(torch.rand(2, 3, 32, 32)), "expected one"),
    (lambda: DegradationExplorer(picture(32, 32), "esrgan"), "Did you mean"),
    (lambda: DegradationExplorer(picture(32, 32), factors=(1.0, 0.0)), "ascending"),
    (lambda: DegradationExplorer(picture(32, 32), factors=(0.0, 2.0)), "0 and 1"),
    (lambda: DegradationExplorer(picture(32, 32), size=8), "at least 16"),
    (lambda: DegradationExplorer(picture(32, 32), record=degrade_real(picture(16, 16), "dossr")[1]), "no record"),
])
def test_degradation_errors_say_what_to_do(call, message):
    with pytest.raises(ConfigError, match=message): call()


def test_degradation_live():
    view = DegradationExplorer.live({"a": picture(32, 32), "b": picture(32, 32, 1)}, recipes=("dossr", "gfpgan-face"), seed=2, factors=(0.0, 1.0))
    widget = view.children[-1].children[0]
    assert "dossr, seed 2" in widget.data["facts"]
    view.controls["sampler"].value = "gfpgan-face"
    assert "gfpgan-face, seed 2" in widget.data["facts"] and view.result.record["recipe"] == "gfpgan-face"


def test_one_stage_moves_in_a_browser(browser, tmp_path, explorers):
    page, trouble = open_page(browser, explorers["degradation"][0].to_html(tmp_path / "d.html"))
    host = page.locator(".dit-sr-explorer")
    panels = 1 + len(explorers["degradation"][0].data["panels"])
    assert host.locator("canvas").count() == panels
    positions = lambda: [e.input_value() for e in host.locator("input[data-stage]").all()]
    notes = lambda: host.locator(".panel .note").all_text_contents()
    start, said = pixels(host), notes()
    assert set(positions()) == {"2"}
    noise = host.locator("input[data-stage='2']")
    noise.focus()
    page.keyboard.press("ArrowRight")
    moved = pixels(host)
    assert moved[:3] == start[:3] and moved[3] != start[3] and moved[-1] != start[-1]  # HR, blur, resize | noise and what follows
    assert positions()[2] == "3" and positions()[0] == "2" and notes()[3] != said[3] and notes()[4] == said[4]
    assert host.locator(".panel.behind").count() == panels - 3
    host.locator("input.steps").focus()
    page.keyboard.press("Home")
    assert notes()[3] == "left out" and pixels(host)[3] == pixels(host)[2]
    page.keyboard.press("ArrowUp")
    assert pixels(host) == start and host.locator("button.stage[aria-pressed=true]").text_content() == "resize"
    page.keyboard.press("End")
    assert pixels(host)[1] == start[1] and pixels(host)[2] != start[2]
    page.keyboard.down("b")
    assert pixels(host)[-1] != start[-1] and "bicubic LR" in host.locator(".panel .title").last.text_content()
    page.keyboard.up("b")
    assert not trouble
