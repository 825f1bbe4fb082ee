"SRPipeline: shapes, order, seeds, recording, saving, and what it says about bad folders and arguments."
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dit_sr_kit import CheckpointError, ConfigError, ImageError, SRPipeline, WeightsUnavailable
from dit_sr_kit.images import load_image, resize, to_signed, to_unit
from dit_sr_kit.models import DiTSR, VQAutoencoder
from dit_sr_kit.models.autoencoders import SpaceToDepth
from dit_sr_kit.parts import PARTS, part_class
from dit_sr_kit.presets import build, preset, presets
from dit_sr_kit.schedulers import ResShiftScheduler

STEPS = 2


def small_pipeline(**process):
    "The skeleton of dit-sr-tiny, one block deep, with random weights: its answers are wrong, and depend on everything."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build("dit-sr-tiny", depth=1, base_channels=32, hidden_size=32)
        torch.nn.init.normal_(model.conv_out.weight, std=0.02)
    return SRPipeline(model, ResShiftScheduler(**process), SpaceToDepth(4), 4, "small")


@pytest.fixture(scope="module")
def pipe():
    return small_pipeline()


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


def picture(height=12, width=10, seed=0):
    "A smooth photograph-like tensor, `(1,3,height,width)`."
    coarse = torch.rand(1, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    return resize(coarse, size=(height, width), mode="bilinear")


def restore(pipe, image, seed=3, **how):
    return pipe(image, **dict(dict(num_inference_steps=STEPS, seed=seed, progress=False), **how))


def numbers(images):
    return [np.asarray(im) for im in images]


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(numbers(a), numbers(b)))


# ---------------------------------------------------------------- sizes and inputs
@pytest.mark.parametrize("name", [name for name in presets() if preset(name).weights])
def test_every_small_model_restores(name):
    pipe = SRPipeline.from_preset(name, device="cpu")
    image = pipe(torch.full((1, 3, 8, 8), 0.5), num_inference_steps=1, seed=0, progress=False).images[0]
    assert image.size == (32, 32) and abs(np.asarray(image).mean() - 127.5) < 25  # grey stays grey, or nearly so


@pytest.mark.parametrize("height,width", [(16, 16), (12, 10), (17, 5), (1, 1), (1, 33)])
def test_every_size_comes_out_four_times_as_large(pipe, height, width):
    image, = restore(pipe, picture(height, width)).images
    assert image.size == (4 * width, 4 * height) and image.mode == "RGB"


def test_every_kind_of_picture_is_accepted(pipe, tmp_path):
    levels = (picture()[0].movedim(0, -1).numpy() * 255).round().astype(np.uint8)
    reference = restore(pipe, levels).images
    path = tmp_path / "photo.png"
    Image.fromarray(levels).save(path)
    opaque = np.dstack([levels, np.full(levels.shape[:2], 255, np.uint8)])
    for kind in (path, str(path), Image.fromarray(levels), Image.fromarray(opaque, "RGBA"),
                 torch.from_numpy(levels).movedim(-1, 0), levels.astype(np.float32) / 255, levels.astype(np.uint16) * 257):
        assert same(restore(pipe, kind).images, reference), type(kind)
    grey = Image.fromarray(levels[..., 0])
    deep = Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
    assert same(restore(pipe, grey).images, restore(pipe, np.dstack([levels[..., 0]] * 3)).images)
    assert same(restore(pipe, grey).images, restore(pipe, deep).images)
    clear = Image.fromarray(np.dstack([levels, np.zeros(levels.shape[:2], np.uint8)]), "RGBA")
    assert same(restore(pipe, clear).images, restore(pipe, np.full_like(levels, 255)).images)  # nothing on white


def test_a_float64_picture_is_restored_in_the_precision_of_the_network(pipe):
    exact = picture().double()
    assert same(restore(pipe, exact).images, restore(pipe, exact.float()).images)
    assert restore(pipe, exact[0].movedim(0, -1).numpy()).images[0].size == (40, 48)


def test_bad_pictures(pipe, tmp_path):
    (tmp_path / "no.png").write_text("not a picture")
    for bad, word in [(tmp_path / "none.png", "none.png"), (tmp_path / "no.png", "no.png"), (torch.zeros(3, 0, 4), "pixels"),
                      (picture() * 2, "expected"), (picture() * float("nan"), "NaN"), (7, "int")]:
        with pytest.raises(ImageError, match=word): restore(pipe, bad)


# ---------------------------------------------------------------- order and randomness
def test_a_list_gives_what_single_calls_give_in_the_same_order(pipe):
    pictures = [picture(12, 10, 1), picture(5, 20, 2), picture(16, 16, 3)]
    together = restore(pipe, pictures).images
    assert [im.size for im in together] == [(40, 48), (80, 20), (64, 64)]
    assert same(together, [restore(pipe, p).images[0] for p in pictures])
    assert same(restore(pipe, tuple(reversed(pictures))).images, together[::-1])
    assert restore(pipe, []).images == []


def test_a_batch_tensor_is_a_list(pipe):
    batch = torch.cat([picture(seed=1), picture(seed=2)])
    assert same(restore(pipe, batch).images, restore(pipe, list(batch)).images)


def test_seeds_and_generators(pipe):
    before = torch.random.get_rng_state()
    first = restore(pipe, picture()).images
    assert same(first, restore(pipe, picture()).images)
    assert not same(first, restore(pipe, picture(), seed=4).images)
    assert torch.equal(before, torch.random.get_rng_state())  # the global generator is not touched
    draw = lambda: torch.Generator().manual_seed(3)
    assert same(first, restore(pipe, picture(), seed=None, generator=draw()).images)
    running = draw()
    pair = restore(pipe, [picture()] * 2, seed=None, generator=running).images
    assert same(pair[:1], first) and not same(pair[1:], first)  # a generator runs on from picture to picture
    with pytest.raises(ConfigError, match="not both"): restore(pipe, picture(), generator=draw())


def test_the_pipeline_is_a_loop_of_four_lines(pipe):
    lr = picture(16, 16)
    record = restore(pipe, lr, num_inference_steps=3, record=True)
    g, scheduler = torch.Generator().manual_seed(3), ResShiftScheduler()
    scheduler.set_timesteps(3)
    cond = pipe.autoencoder.encode(to_signed(resize(lr, scale=4)))
    with torch.no_grad():
        x = scheduler.init_sample(cond, generator=g)
        for t in scheduler.timesteps:
            model_output = pipe.model(scheduler.scale_model_input(x, t), t, to_signed(lr))
            x = scheduler.step(model_output, t, x, cond=cond, generator=g).prev_sample
    assert torch.equal(to_unit(pipe.autoencoder.decode(x)).clamp(0, 1), record.trajectory.result)


def test_the_network_may_prepare_its_steps(pipe, monkeypatch):
    seen = []
    monkeypatch.setattr(type(pipe.model), "prepare", lambda self, timestep: seen.append(int(timestep)), raising=False)
    run = restore(pipe, picture(16, 16), record=True, num_inference_steps=3).trajectory
    assert seen == [r.timestep for r in run]


# ---------------------------------------------------------------- what a run leaves behind
def test_record(pipe):
    lr = picture(9, 7)
    out = restore(pipe, [lr, picture(8, 8)], record=True, num_inference_steps=3)
    run = out.trajectory
    assert len(run) == 3 and [r.index for r in run] == [0, 1, 2]
    assert [r.timestep for r in run] == sorted((r.timestep for r in run), reverse=True)
    assert torch.equal(run.lr, lr) and run.hr is None and run.scale == 4
    assert run.result.shape == (1, 3, 36, 28)
    assert same([out.images[0]], [Image.fromarray((run.result[0].movedim(0, -1) * 255).round().byte().numpy())])
    for r in run:
        assert r.sample.shape == r.pred_original_sample.shape == (1, 48, 16, 16)
        assert r.sample_image.shape == r.pred_image.shape == (1, 3, 36, 28)
        assert 0 <= r.pred_image.min() and r.pred_image.max() <= 1
        assert {"eta", "sigma", "snr"} <= set(r.coefficients)
    assert torch.equal(run[-1].pred_image, run.result)  # the last step ends at the last estimate
    assert run.meta["preset"] == "small" and run.meta["seed"] == 3 and run.meta["scheduler_config"]["kappa"] == 2.0
    json.dumps(run.meta)
    assert restore(pipe, lr).trajectory is None
    assert same(restore(pipe, lr, num_inference_steps=3).images, out.images[:1])  # looking changes nothing


def test_the_recorded_start_is_the_start(pipe):
    run = restore(pipe, picture(16, 16), record=True, num_inference_steps=3).trajectory
    scheduler = ResShiftScheduler()
    scheduler.set_timesteps(3)
    cond = pipe.autoencoder.encode(to_signed(resize(run.lr, scale=4)))
    assert torch.equal(run[0].sample, scheduler.init_sample(cond, generator=torch.Generator().manual_seed(3)))


def test_on_step_sees_every_step_of_every_picture(pipe):
    seen = []
    out = restore(pipe, [picture(), picture(8, 8)], on_step=lambda r: seen.append((r.index, tuple(r.pred_image.shape[-2:]))))
    assert seen == [(0, (48, 40)), (1, (48, 40)), (0, (32, 32)), (1, (32, 32))]
    assert out.trajectory is None

    def stop(record): raise RuntimeError("enough")
    with pytest.raises(RuntimeError, match="enough"): restore(pipe, picture(), on_step=stop)


def test_restore_known(pipe, tmp_path):
    from dit_sr_kit.degradations import bicubic_down

    hr, seen = picture(35, 33), []
    run = pipe.restore_known(hr, seed=3, steps=STEPS, progress=lambda *done: seen.append(done))
    assert torch.equal(run.hr, hr[..., :32, :32]) and run.lr.shape == (1, 3, 8, 8) and run.result.shape == run.hr.shape
    assert seen == [(1, 2), (2, 2)] and len(run) == STEPS
    direct = restore(pipe, bicubic_down(run.hr, 4).clamp(0, 1), record=True).trajectory
    assert torch.equal(direct.result, run.result)
    other = pipe.restore_known(hr, seed=3, steps=STEPS, sampler="ddim", kappa=1.0)
    assert other.meta["scheduler_config"]["kappa"] == 1.0 and not torch.equal(other.result, run.result)
    assert pipe.scheduler.config.kappa == 2.0
    board = (torch.arange(48)[:, None] // 6 + torch.arange(48)[None] // 6) % 2
    assert len(pipe.restore_known(board.expand(1, 3, -1, -1).float(), steps=1)) == 1  # shrinking it overshoots
    file = tmp_path / "hr.png"
    Image.new("RGB", (16, 16), "red").save(file)
    assert len(pipe.restore_known(file, steps=1)) == 1


def test_saved_trajectory(pipe, tmp_path):
    from dit_sr_kit.trajectory import Trajectory

    run = restore(pipe, picture(8, 8), record=True).trajectory
    again = Trajectory.load(run.save(tmp_path / "run.safetensors"))
    assert torch.equal(again.result, run.result) and torch.equal(again[1].sample, run[1].sample)
    assert again.meta == json.loads(json.dumps(run.meta))


# ---------------------------------------------------------------- tiles and colours
def test_tiles(pipe):
    wide = picture(10, 40)
    out = restore(pipe, wide, tile=16).images
    assert out[0].size == (160, 40) and same(out, restore(pipe, wide, tile=16).images)
    assert not same(out, restore(pipe, wide).images)
    small = picture(16, 16)
    assert same(restore(pipe, small, tile=16).images, restore(pipe, small).images)  # one tile is no tile
    assert restore(pipe, picture(3, 40), tile=16).images[0].size == (160, 12)
    for bad in (0, -4):
        with pytest.raises(ConfigError, match="[Tt]ile"): restore(pipe, wide, tile=bad)
    with pytest.raises(ConfigError, match="overlap"): restore(pipe, wide, tile=16, overlap=16)
    with pytest.raises(ConfigError, match="blend"): restore(pipe, wide, tile=16, blend="median")
    with pytest.raises(ConfigError, match="batch_size"): restore(pipe, wide, batch_size=0)
    for how in (dict(record=True), dict(on_step=print)):
        with pytest.raises(ConfigError, match="tile"): restore(pipe, wide, tile=16, **how)


def close(a, b, levels=1):
    return all(np.abs(x.astype(int) - y.astype(int)).max() <= levels for x, y in zip(numbers(a), numbers(b)))


def test_the_result_does_not_depend_on_how_many_tiles_go_at_once(pipe):
    wide = picture(20, 50)
    one, three = (restore(pipe, wide, tile=16, batch_size=n).images for n in (1, 3))
    assert close(one, three) and not same(one, restore(pipe, wide, tile=16, blend="uniform").images)
    draw = lambda: torch.Generator().manual_seed(3)
    assert same(one, restore(pipe, wide, seed=None, generator=draw(), tile=16).images)
    running = draw()
    pair = restore(pipe, [wide, wide], seed=None, generator=running, tile=16).images
    assert same(pair[:1], one) and not same(pair[1:], one)
    assert same(restore(pipe, [wide, wide], tile=16).images, one * 2)


def test_images_of_one_size_at_once(pipe):
    pictures = [picture(12, 10, 1), picture(12, 10, 2), picture(12, 10, 3), picture(5, 20, 4), picture(12, 10, 5)]
    calls, forward = [], pipe.model.forward
    alone = restore(pipe, pictures).images
    pipe.model.forward = lambda sample, *rest: (calls.append(len(sample)), forward(sample, *rest))[1]
    try:
        assert close(restore(pipe, pictures, batch_size=2).images, alone)
        assert calls == [n for n in (2, 1, 1, 1) for _ in range(STEPS)]
        calls.clear()
        run = restore(pipe, pictures[:2], batch_size=2, record=True)  # a recorded run goes image by image
        assert same(run.images, alone[:2]) and len(run.trajectory) == STEPS and set(calls) == {1}
    finally: del pipe.model.forward


def test_tiles_share_one_noise(pipe, monkeypatch):
    "Every tile sees its part of the noise that the whole picture would see, at every draw."
    from dit_sr_kit.schedulers.resshift import ResShiftScheduler as Scheduler
    from dit_sr_kit.tiling import NoiseField, TileNoise

    seen, real = [], TileNoise.draw
    monkeypatch.setattr(TileNoise, "draw", lambda self, shape: (seen.append((self.corners, self.count, real(self, shape))), seen[-1][2])[1])
    restore(pipe, picture(20, 50), tile=32, overlap=8)
    field = NoiseField(int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(3))))
    assert {corner for corners, *_ in seen for corner in corners} == {(0, 0), (0, 24), (0, 32)}
    assert {count for _, count, _ in seen} == set(range(STEPS + 1))  # the start, and each step
    for corners, count, noise in seen:
        assert torch.equal(noise[0], field.window(count, 48, *corners[0], 32, 32))


class Pointwise(torch.nn.Module):
    "A network that looks at one pixel."
    dtype, size_multiple = torch.float32, 1

    def forward(self, sample, timestep, cond): return 0.5 * sample.tanh()


@pytest.mark.parametrize("patch,multiple,tile", [(4, 1, 16), (8, 2, 17), (1, 1, 13)])
def test_a_network_that_looks_at_one_pixel_shows_no_tiles(patch, multiple, tile):
    "With shared noise, tiles of a pointwise network equal the whole picture, in latents of every size."
    from dit_sr_kit.tiling import NoiseField, TileNoise

    pipe = SRPipeline(Pointwise(), ResShiftScheduler(), SpaceToDepth(patch))
    assert pipe.lr_multiple == multiple
    flat = torch.full((1, 3, 21, 50), 0.4)  # the enlargement reaches two pixels; a flat picture hides that
    field = NoiseField(int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(3))))
    whole = pipe.sample(flat, STEPS, TileNoise(field, [(0, 0)]))
    for blend in ("gaussian", "uniform"):
        tiled = restore(pipe, flat, tile=tile, blend=blend, overlap=5).images
        assert np.abs(numbers(tiled)[0] - (whole[0].movedim(0, -1) * 255).round().numpy()).max() <= 1


def test_no_seams(pipe):
    "Gradients across tile borders, relative to a run without tiles and the same noise, are as elsewhere."
    from dit_sr_kit.tiling import NoiseField, TileNoise

    lr = picture(32, 80)
    field = NoiseField(int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(3))))
    whole = pipe.sample(lr, STEPS, TileNoise(field, [(0, 0)]))
    tiled = load_image(restore(pipe, lr, tile=32, overlap=4).images[0])
    across = lambda x: x.diff(dim=-1).abs().mean((0, 1, 2))
    ratio = across(tiled) / across(whole)
    borders = torch.tensor([4 * edge - 1 for edge in (28, 32, 48, 60)])  # columns where a tile starts or ends
    there, elsewhere = ratio[borders], ratio[[i for i in range(len(ratio)) if i not in borders.tolist()]]
    assert abs(there.mean() - elsewhere.mean()) < 4 * elsewhere.std() / len(borders)**0.5 + 0.01


def test_automatic_tiles(pipe, monkeypatch):
    from dit_sr_kit import memory, pipelines

    free = lambda n: monkeypatch.setattr(memory, "free_memory", lambda device: n)
    lr = picture(20, 50)
    free(2**40)
    assert same(restore(pipe, lr, tile="auto").images, restore(pipe, lr).images)
    need = memory.memory_estimate(pipe, 20, 50, 32)
    free(2 * need.network + need.pictures)
    assert pipelines.auto_tile(pipe, 20, 50) == 32
    assert same(restore(pipe, lr, tile="auto").images, restore(pipe, lr, tile=32).images)
    free(1000)
    with pytest.raises(ConfigError, match="fit"): restore(pipe, lr, tile="auto")


def test_memory_estimate(pipe):
    from dit_sr_kit.memory import PeakMemory, free_memory, memory_estimate

    a, b, c = (memory_estimate(pipe, *size, tile) for size, tile in (((64, 64), None), ((128, 64), None), ((512, 512), 64)))
    assert a.weights == sum(p.numel() * 4 for p in pipe.model.parameters()) and a.network < b.network < 2.1 * a.network
    assert c.network == a.network and c.pictures > 3 * 4 * 2048**2 and c.total == c.weights + c.network + c.pictures
    assert "MiB" in str(c) and memory_estimate(pipe, 512, 512, 64, batch_size=2).network > 1.5 * c.network
    assert free_memory(torch.device("cpu")) > 2**20
    with PeakMemory() as memory:
        x = torch.zeros(1000)
        y = x[10:].add_(1).view(-1)
        for _ in range(3): z = x + 1
        del x, y
    assert memory.peak == 3 * 4000 and memory.now == 4000  # x and two z, for a moment; then one


# ---------------------------------------------------------------- precision, compilation
def test_half_of_the_bits():
    pipe, lr = small_pipeline(), picture(16, 16)
    full = numbers(restore(pipe, lr).images)[0].astype(int)
    assert pipe.to(dtype=torch.bfloat16) is pipe and pipe.model.dtype == torch.bfloat16
    run = restore(pipe, lr, record=True)
    assert run.trajectory[0].sample.dtype == torch.float32
    assert 0 < np.abs(numbers(run.images)[0] - full).mean() < 3
    exact = small_pipeline().to("cpu", torch.float64)
    assert restore(exact, lr, record=True).trajectory[0].sample.dtype == torch.float64
    assert np.abs(numbers(restore(exact, lr).images)[0] - full).max() <= 1


def test_compile(monkeypatch, tmp_path):
    pipe, lr = small_pipeline(), picture(16, 16)
    expected, seen = restore(pipe, lr).images, []
    assert pipe.compile(backend=lambda graph, inputs: (seen.append(1), graph.forward)[1]) is pipe
    assert close(restore(pipe, lr).images, expected) and seen
    pipe.save_pretrained(tmp_path)  # as it was before
    assert same(restore(SRPipeline.from_pretrained(tmp_path, device="cpu"), lr).images, expected)
    assert close(restore(pipe.with_process(sampler="ddim"), lr).images, restore(small_pipeline(sampler="ddim"), lr).images)


def test_times_are_kept_as_they_are(tmp_path):
    "Whole numbers stay whole; a flow's times between 0 and 1 are not rounded."
    from dit_sr_kit.schedulers import JiTFlowScheduler
    from dit_sr_kit.trajectory import Trajectory

    flow = restore(SRPipeline(Pointwise(), JiTFlowScheduler(), SpaceToDepth(4)), picture(8, 8), record=True, num_inference_steps=2)
    times = [r.timestep for r in flow.trajectory]
    assert times == pytest.approx([0, 0.5, 0.5]) and all(type(t) is float for t in times)
    assert [r.timestep for r in Trajectory.load(flow.trajectory.save(tmp_path / "run"))] == times
    process = restore(small_pipeline(), picture(8, 8), record=True).trajectory
    assert all(type(r.timestep) is int for r in process)


def test_color_fix(pipe):
    lr = picture(16, 16)
    plain, wavelet, adain = (numbers(restore(pipe, lr, color_fix=f).images)[0].astype(float) for f in (None, "wavelet", "adain"))
    target = np.asarray(resize(lr, scale=4).clamp(0, 1)[0].movedim(0, -1)) * 255
    error = lambda x: np.abs(x.mean((0, 1)) - target.mean((0, 1))).max()
    assert error(wavelet) < error(plain) and error(adain) < error(plain)
    calls = []
    with pytest.raises(ConfigError, match="sepia"): restore(pipe, lr, color_fix="sepia", on_step=calls.append)
    assert not calls, "a wrong name is found before the sampling, not after it"


# ---------------------------------------------------------------- the process
@pytest.mark.parametrize("steps", [0, -1, 16, 2.5, "3"])
def test_wrong_number_of_steps(pipe, steps):
    with pytest.raises(ConfigError, match="from 1 to 15"): restore(pipe, picture(), num_inference_steps=steps)


def test_with_process(pipe):
    quiet = pipe.with_process(sampler="ddim")
    assert quiet.scheduler.config.sampler == "ddim" and pipe.scheduler.config.sampler == "ancestral"
    assert not same(restore(quiet, picture()).images, restore(pipe, picture()).images)
    other = pipe.with_process(kappa=1.0)
    assert other.model.preconditioner.kappa == 1.0 and pipe.model.preconditioner.kappa == 2.0
    assert next(other.model.parameters()) is next(pipe.model.parameters())  # no copy of the weights
    with pytest.raises(ConfigError, match="kappa"): pipe.with_process(kapa=1.0)
    with pytest.raises(ConfigError, match="euler"): pipe.with_process(sampler="euler")


def test_unknown_names():
    with pytest.raises(ConfigError, match="dit-sr-tiny"): SRPipeline.from_preset("dit-sr-tinny")
    with pytest.raises(WeightsUnavailable, match="no bundled weights"): SRPipeline.from_preset("dit-sr")
    with pytest.raises(ConfigError, match="tpu"): small_pipeline().to("tpu")


def test_progress_is_shown_only_when_asked_for(pipe, capfd):
    restore(pipe, picture(), progress=False)
    assert capfd.readouterr() == ("", "")
    restore(pipe, picture(), progress=True)
    captured = capfd.readouterr()
    assert captured.out == "" and "denoising" in captured.err


# ---------------------------------------------------------------- saving and loading
def test_save_and_load_bit_for_bit(pipe, saved):
    again = SRPipeline.from_pretrained(saved, device="cpu")
    for (name, a), (other, b) in zip(pipe.model.state_dict().items(), again.model.state_dict().items()):
        assert name == other and torch.equal(a, b), name
    assert same(restore(again, picture()).images, restore(pipe, picture()).images)
    assert again.scale == 4 and again.name == "small" and not again.model.training
    strict = small_pipeline(sampler="ddim", kappa=1.5)
    strict.save_pretrained(saved.parent / "ddim")
    loaded = SRPipeline.from_pretrained(str(saved.parent / "ddim"))
    assert (loaded.scheduler.config.sampler, loaded.scheduler.config.kappa) == ("ddim", 1.5)


def test_a_pipeline_under_another_process_is_saved_as_it_is(pipe, tmp_path):
    other = pipe.with_process(kappa=1.0, sampler="ddim")
    other.save_pretrained(tmp_path)
    again = SRPipeline.from_pretrained(tmp_path, device="cpu")
    assert same(restore(again, picture()).images, restore(other, picture()).images)


def edit(name, change):
    "Damage: change a JSON file of a saved pipeline."
    def run(folder):
        content = json.loads((folder / name).read_text())
        content = change(content) or content
        (folder / name).write_text(json.dumps(content))
    return run


def weights(change):
    "Damage: change the weights of a saved pipeline."
    def run(folder):
        path = folder / "model" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    return run


def shorten(name, keep=0.5):
    def run(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:int(len(content) * keep)])
    return run


def pickled(folder):
    path = folder / "model" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), folder / "model" / "diffusion_pytorch_model.bin")
    path.unlink()


DAMAGE = {
    "no pipeline.json": lambda f: (f / "pipeline.json").unlink(),
    "pipeline.json cut": shorten("pipeline.json"),
    "pipeline.json is a list": edit("pipeline.json", lambda c: [1]),
    "pipeline.json is binary": lambda f: (f / "pipeline.json").write_bytes(b"\xff\xfe\x00"),
    "no scale": edit("pipeline.json", lambda c: c.pop("scale") and None),
    "no classes": edit("pipeline.json", lambda c: c.pop("classes") and None),
    "unknown class": edit("pipeline.json", lambda c: c["classes"].update(model="Nothing")),
    "a function for a class": edit("pipeline.json", lambda c: c["classes"].update(autoencoder="rearrange")),
    "another part's class": edit("pipeline.json", lambda c: c["classes"].update(model="ConfigMixin")),
    "no model": lambda f: shutil.rmtree(f / "model"),
    "no scheduler": lambda f: shutil.rmtree(f / "scheduler"),
    "no weights": lambda f: (f / "model" / "diffusion_pytorch_model.safetensors").unlink(),
    "weights are a pickle": pickled,
    "weights cut": shorten("model/diffusion_pytorch_model.safetensors"),
    "weights missing one": weights(lambda t: t.pop("conv_in.weight") is None),
    "weights one too many": weights(lambda t: t.update(more=torch.zeros(3))),
    "weights of another shape": weights(lambda t: t.update({"conv_in.bias": torch.zeros(7)})),
    "model config cut": shorten("model/config.json"),
    "impossible model": edit("model/config.json", lambda c: c.update(time_conditioning="film")),
    "impossible scheduler": edit("scheduler/scheduler_config.json", lambda c: c.update(kappa=-1)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders(damage, saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    DAMAGE[damage](folder)
    with pytest.raises(CheckpointError) as error: SRPipeline.from_pretrained(folder)
    assert str(folder) in str(error.value)


def test_foreign_folders(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(CheckpointError, match="pipeline.json"): SRPipeline.from_pretrained(tmp_path)
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError): SRPipeline.from_pretrained(file)


def test_nothing_is_written_on_standard_output(saved, capfd):
    SRPipeline.from_pretrained(saved)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", ["nobody/has-this", "/nowhere/at/all"])
def test_what_the_hub_does_not_have(name, monkeypatch, capsys):
    import huggingface_hub

    def offline(*args, **kwargs): raise ConnectionError("no network")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(WeightsUnavailable, match=name): SRPipeline.from_pretrained(name)
    assert capsys.readouterr().out == "", "progress belongs on standard error"


# ---------------------------------------------------------------- classes, and learned autoencoders
@pytest.mark.parametrize("part,name", [(part, name) for part in PARTS for name in PARTS[part]])
def test_every_class_of_the_table_is_there(part, name):
    assert part_class(part, name).__name__ == name


def test_classes_that_are_not_in_the_table(pipe, tmp_path):
    class Standardised(SpaceToDepth): pass
    with pytest.raises(ConfigError, match="Standardised.*PARTS"):
        SRPipeline(pipe.model, pipe.scheduler, Standardised(4)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="SpaceToDepth"): part_class("autoencoder", "SpaceToDept")


SMALL = dict(base_channels=32, channel_mult=(1, 2), attention_resolutions=(16, 8), depth=1, hidden_size=32,
             attention_head_dim=16, mlp_ratio=1.0, sample_size=16)
LATENT_SPACES = {  # preset, changes of the network, autoencoder
    "f4": ("dit-sr", dict(SMALL, cond_size=16), dict(base_channels=32, channel_mult=(1, 1, 1), num_res_blocks=1, num_codes=64)),
    "f8": ("dit-sr-face", dict(SMALL, cond_size=128), dict(
        base_channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=(1, 1, 1, 2), num_codes=64, latent_channels=8)),
}


def latent_pipeline(space):
    "A released pipeline at small size with random weights."
    name, changes, autoencoder = LATENT_SPACES[space]
    row = preset(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = build(name, **changes), row.process(**row.scheduler), VQAutoencoder(**autoencoder)
        torch.nn.init.normal_(parts[2].quantizer.codebook, std=0.3)
    return SRPipeline(*parts, row.scale, name)


@pytest.mark.parametrize("space,multiple", [("f4", 16), ("f8", 128)])
def test_a_pipeline_in_a_learned_latent_space(space, multiple, tmp_path):
    pipe = latent_pipeline(space)
    assert pipe.lr_multiple == multiple and preset(pipe.name).scale == pipe.scale
    lr = picture(20, 9) if space == "f4" else picture(70, 40)
    out = restore(pipe, lr, record=True)
    assert out.images[0].size == (lr.shape[-1] * pipe.scale, lr.shape[-2] * pipe.scale)
    assert out.trajectory[0].sample.shape[1] == pipe.autoencoder.latent_channels
    pipe.save_pretrained(tmp_path)
    again = SRPipeline.from_pretrained(tmp_path, device="cpu")
    assert type(again.autoencoder) is VQAutoencoder and not again.autoencoder.training
    for (name, a), (other, b) in zip(pipe.autoencoder.state_dict().items(), again.autoencoder.state_dict().items()):
        assert name == other and torch.equal(a, b), name
    assert same(restore(again, lr).images, out.images)
    file = tmp_path / "autoencoder" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="autoencoder"): SRPipeline.from_pretrained(tmp_path)


def test_the_condition_is_the_encoded_enlargement_without_clamp():
    "Pad by reflection, enlarge with overshoot, encode without quantisation; the network sees the LR image itself."
    pipe = latent_pipeline("f4")
    board = ((torch.arange(20)[:, None] + torch.arange(20)[None]) // 4 % 2).expand(1, 3, -1, -1).float()
    seen = {}
    pipe.model.register_forward_hook(lambda module, args, out: seen.update(cond=args[2]))
    pipe.autoencoder.encoder.register_forward_hook(lambda module, args, out: seen.update(images=args[0]))
    restore(pipe, board, num_inference_steps=1)
    padded = torch.nn.functional.pad(board, (0, 12, 0, 12), mode="reflect")
    assert torch.equal(seen["cond"], to_signed(padded))
    torch.testing.assert_close(seen["images"], to_signed(resize(padded, scale=4)))
    assert seen["images"].abs().max() > 1.05


@pytest.mark.parametrize("multiple,factor,scale,expected", [(64, 4, 4, 64), (64, 8, 1, 512), (16, 4, 4, 16), (6, 1, 4, 3), (2, 1, 4, 1)])
def test_lr_multiple(multiple, factor, scale, expected):
    from types import SimpleNamespace as Names

    model = Names(size_multiple=multiple)
    model.eval = lambda: model
    assert SRPipeline(model, None, Names(factor=factor), scale).lr_multiple == expected


def test_known_ground_truth_needs_an_enlargement():
    with pytest.raises(ConfigError, match="scale 1"): latent_pipeline("f8").restore_known(picture(16, 16))


def official(model, key_map):
    state = model.state_dict()
    return {"module." + theirs: state[ours] for ours, theirs in key_map(model).items()}


def test_from_official(monkeypatch):
    "Point at two files: here mappings with the authors' names, of a preset shrunk for the test."
    import dataclasses

    from dit_sr_kit import parts, pipelines, presets
    from dit_sr_kit.official.vqgan import vqgan_key_map

    for space in LATENT_SPACES:
        name, changes, autoencoder = LATENT_SPACES[space]
        row = presets.preset(name)
        small = dataclasses.replace(row, config={**row.config, **changes}, autoencoder_config=autoencoder)
        monkeypatch.setitem(presets._PRESETS, name, small)
        pipe = latent_pipeline(space)
        network = official(pipe.model, pipelines.OFFICIAL_SYSTEMS["dit-sr"].key_map)
        first_stage = {"state_dict": official(pipe.autoencoder, vqgan_key_map)}
        again = SRPipeline.from_official(name, network, first_stage, device="cpu")
        assert type(again.autoencoder) is VQAutoencoder and again.scale == row.scale and again.name == name
        assert again.scheduler.config.num_train_timesteps == (15 if space == "f4" else 4)
        lr = picture(16, 16)
        expected = restore(pipe, lr).images
        assert same(restore(again, lr).images, expected)
        other = SRPipeline.from_official(name, network, autoencoder=pipe.autoencoder, device="cpu")
        assert same(restore(other, lr).images, expected)
        with pytest.raises(WeightsUnavailable, match="autoencoder_weights"): SRPipeline.from_official(name, network)
        with pytest.raises(ConfigError, match="not both"):
            SRPipeline.from_official(name, network, first_stage, pipe.autoencoder)
        with pytest.raises(ConfigError, match="48 channels"):
            SRPipeline.from_official(name, network, autoencoder=SpaceToDepth(4))
        with pytest.raises(CheckpointError, match="missing"): SRPipeline.from_official(name, {}, first_stage)
    assert parts.PARTS["model"]["DiTSR"] == "models.dit_sr" and isinstance(again.model, DiTSR)


@pytest.mark.skipif("DIT_SR_SLOW" not in os.environ, reason="20 s of CPU and 1.6 GB; set DIT_SR_SLOW to run it")
def test_the_full_pipeline_end_to_end():
    "dit-sr and its f4 autoencoder at full size, random weights, 64 x 64 to 256 x 256."
    row = preset("dit-sr")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = SRPipeline(build("dit-sr"), row.process(**row.scheduler), VQAutoencoder(**row.autoencoder_config), row.scale, "dit-sr")
    assert pipe.lr_multiple == 64
    image, = restore(pipe, picture(64, 64), num_inference_steps=1).images
    assert image.size == (256, 256)
