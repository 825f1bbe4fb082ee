"The explorers: size, time to build, and the latency of a step in a browser."
import statistics
import tempfile
import time
from pathlib import Path

from tests.bench import milliseconds

# A press moves the step, or the token where one is chosen. It is answered synchronously; reading a pixel back
# forces the drawing to be finished. The second number waits for the frame in which the press becomes visible,
# so it contains the wait for the screen.
STEP = """async (element, presses) => {
  const root = element.shadowRoot, target = root.querySelector('canvas[role=application]') ?? root.querySelector('.explorer');
  const canvases = [...root.querySelectorAll('canvas')];
  const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  const drawn = [], seen = [];
  for (let i = 0; i < presses; i++) {
    await frame();
    const key = Math.floor(i / 4) % 2 ? 'ArrowLeft' : 'ArrowRight', start = performance.now();
    target.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
    for (const c of canvases) c.getContext('2d').getImageData(0, 0, 1, 1);
    drawn.push(performance.now() - start);
    await frame();
    seen.push(performance.now() - start);
  }
  return [drawn, seen];
}"""


def _run(quick):
    "A recorded restoration: 15 steps at 128 px."
    from dit_sr_kit.degradations import bicubic_down
    from dit_sr_kit.images import sample_image
    from tests.bench.network import tiny_pipeline

    hr = sample_image("chelsea")[..., 80:208, 140:268]
    run = tiny_pipeline()[0](bicubic_down(hr, 4), num_inference_steps=3 if quick else 15, seed=0, record=True,
                             progress=False).trajectory
    run.hr = hr
    return run


def _looks(quick):
    "The joint attention of a small network: all blocks, two heads, tiles of 8 x 8 tokens."
    from dit_sr_kit import SRPipeline
    from dit_sr_kit.attention_captures import capture_attention
    from dit_sr_kit.images import sample_image

    pipe, tile = SRPipeline.from_preset("dit4sr-tiny", device="cpu"), sample_image("chelsea")[..., 80:112, 140:172]
    return capture_attention(pipe.model, lambda: pipe.restore_known(tile, seed=0, steps=3 if quick else 6), heads=("mean", 0))


def _made(quick):
    from dit_sr_kit import explorers

    run = _run(quick)
    for name in ("TrajectoryExplorer", "SpectrumExplorer"): yield name, getattr(explorers, name), run
    yield "AttentionExplorer", explorers.AttentionExplorer, _looks(quick)


def build(quick):
    "Size of the fragment, and the time from a trajectory to HTML."
    for name, kind, run in _made(quick):
        kind(run).html()  # the first one reads the assets
        start = time.perf_counter()
        explorer = kind(run)
        explorer.html()
        taken = time.perf_counter() - start
        parts = explorer.size_report()
        yield f"{name}, {explorer.data['count']} steps", f"{parts['total'] / 1e6:.2f} MB in {taken:.2f} s", \
            f"frames {sum(parts['frames'].values()) / 1e6:.2f} MB, film strip {parts['film_strip'] / 1e3:.0f} kB, " \
            f"script and style {parts['module'] / 1e3:.0f} kB"


def step(quick):
    "Latency of a press in headless Chromium."
    from tests.tools.browser import chromium

    with chromium() as browser, tempfile.TemporaryDirectory() as folder:
        for name, kind, run in _made(quick):
            page = browser.new_page(viewport=dict(width=1200, height=900))
            page.goto(kind(run).to_html(Path(folder) / f"{name}.html").as_uri())
            element = page.locator(".dit-sr-explorer[data-ready=true]")
            element.wait_for(timeout=60_000)
            drawn, seen = (sorted(times) for times in element.evaluate(STEP, 14 if quick else 140))
            p90 = drawn[int(0.9 * (len(drawn) - 1))] / 1e3
            yield f"{name}, one press", milliseconds(statistics.median(drawn) / 1e3), \
                f"median until drawn, p90 {milliseconds(p90)}; until visible {milliseconds(statistics.median(seen) / 1e3)}"
            page.close()
