"Runs that are killed, shared, damaged or out of space; what they are fed, and what they show."
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_sr_kit import batches as batches_module
from dit_sr_kit import losses, presets, training
from dit_sr_kit.batches import PatchItems, batches, make_pool, make_source
from dit_sr_kit.cached_latents import cache_latents
from dit_sr_kit.cli import main
from dit_sr_kit.core import CheckpointError, ConfigError, WeightsUnavailable, make_generator
from dit_sr_kit.datasets import PatchDataset
from dit_sr_kit.images import save_image
from dit_sr_kit.losses import Batch, Rows, drawn, flow_match_loss, noise_loss, resshift_loss
from dit_sr_kit.models.autoencoders import SpaceToDepth
from dit_sr_kit.models.dit4sr import DiT4SR
from dit_sr_kit.parts import bundled_weights
from dit_sr_kit.presets import Preset
from dit_sr_kit.run_log import known_pictures, restoration_grid
from dit_sr_kit.run_state import checkpoints_of, checksum, latest_checkpoint, read_tensors, write_tensors
from dit_sr_kit.schedulers import FlowMatchScheduler, ResShiftScheduler
from dit_sr_kit.textures import TEXTURES, WordTable, texture
from dit_sr_kit.training import TrainConfig, fit, learning_rate, train_from_options
from tests.training_worker import config, small_preset

NAME = "checkpoint-{:08d}.safetensors"


@pytest.fixture(scope="module", autouse=True)
def add_small_presets():
    small_preset()
    presets._PRESETS["small-text"] = Preset(
        "a small DiT4SR", DiT4SR, dict(
            sample_size=16, patch_size=2, in_channels=12, out_channels=12, depth=2, num_heads=2,
            attention_head_dim=16, joint_attention_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
            dual_attention_layers=(), predicts="sample"),
        dict(shift=3.0), "SpaceToDepth", dict(patch_size=2), process=FlowMatchScheduler)
    yield
    for name in ("small", "small-text"): del presets._PRESETS[name]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "A run of six steps in one go, and its weights."
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(folder)


def run(out, dataset=None, **changes):
    return fit(config(out, **changes), progress=False, dataset=dataset)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def logged(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def worker(out, *launcher, more=(), **changes):
    "A run in processes of its own, with as many threads as this one has."
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", *launcher, "tests.training_worker", json.dumps(dict(out=str(out), **changes)), *more]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""},
                            stderr=subprocess.PIPE, text=True)


# ---------------------------------------------------------------- interrupted runs
def test_a_killed_run_ends_at_the_same_weights(tmp_path):
    "SIGKILL at a random moment; the file that was being written then must not count."
    seed = int(time.time())
    u = torch.rand(2, generator=make_generator(seed)).tolist()
    lines, delay = 1 + int(8 * u[0]), 0.1 * u[1]
    settings = dict(steps=12, checkpoint_every=1, log_every=1)
    killed = worker(tmp_path / "killed", **settings)
    log = tmp_path / "killed" / "log.jsonl"
    while killed.poll() is None and not (log.exists() and log.read_text().count("\n") >= lines): time.sleep(0.01)
    time.sleep(delay)
    killed.kill()
    error = killed.communicate()[1]
    assert killed.returncode == -signal.SIGKILL, f"seed {seed}: {error}"
    assert not (tmp_path / "killed" / "weights.safetensors").exists()
    for name in (".checkpoint-00000012.0123abcd.safetensors", ".tmpa1B2c3"):  # ours, and that of safetensors
        (tmp_path / "killed" / name).write_bytes(b"half a file")
    whole = run(tmp_path / "whole", **settings)
    assert same(whole, run(tmp_path / "killed", resume="latest", **settings)), f"seed {seed}"
    assert not list((tmp_path / "killed").glob(".*")) and len(logged(tmp_path / "killed")) == 12


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_asks_to_stop_loses_nothing(straight, tmp_path, monkeypatch, capsys, number):
    honest, calls = batches_module.PatchPool.draw, []

    def draw(self, n, generator):
        calls.append(n)
        if len(calls) == 3: os.kill(os.getpid(), number)
        return honest(self, n, generator)
    with monkeypatch.context() as patch:
        patch.setattr(batches_module.PatchPool, "draw", draw)
        before = signal.getsignal(number)
        with pytest.raises(KeyboardInterrupt): run(tmp_path, checkpoint_every=100)
        assert signal.getsignal(number) == before
    assert "stopped after step 3 of 6" in capsys.readouterr().err
    assert checkpoints_of(tmp_path) == [tmp_path / NAME.format(3)]
    assert same(run(tmp_path, checkpoint_every=100, resume="latest"), straight[1])


def test_a_changed_bit_is_noticed(straight, tmp_path, capsys):
    for step in (4, 6): (tmp_path / NAME.format(step)).write_bytes((straight[0] / NAME.format(step)).read_bytes())
    content = bytearray((tmp_path / NAME.format(6)).read_bytes())
    content[-1000] ^= 4
    (tmp_path / NAME.format(6)).write_bytes(content)
    assert same(run(tmp_path, resume="latest", keep=1), straight[1])
    said = capsys.readouterr().err
    assert NAME.format(6) in said and "SHA-256" in said
    assert checkpoints_of(tmp_path) == [tmp_path / NAME.format(6)]  # written anew; the damaged one did not push it out
    assert same(load_file(tmp_path / NAME.format(6)), load_file(straight[0] / NAME.format(6)))


def test_a_full_disk(straight, tmp_path):
    "No file of this process may grow beyond what fits: the kernel refuses, as on a full disk."
    (tmp_path / NAME.format(4)).write_bytes((straight[0] / NAME.format(4)).read_bytes())
    size, limits = (tmp_path / NAME.format(4)).stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="00000006.* could not be written.*Free some space"):
            run(tmp_path, resume="latest")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.glob("*checkpoint*")] == [NAME.format(4)]
    assert latest_checkpoint(tmp_path) == tmp_path / NAME.format(4)
    assert same(run(tmp_path, resume="latest"), straight[1])


def test_how_many_are_kept(tmp_path):
    run(tmp_path, steps=3, checkpoint_every=1, keep=2)
    assert checkpoints_of(tmp_path) == [tmp_path / NAME.format(3), tmp_path / NAME.format(2)]


def test_files_with_a_checksum(tmp_path):
    tensors = {"a": torch.arange(3), "b": torch.tensor(2.5), "c": torch.zeros(0, 2), "d": torch.ones(2, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "x.safetensors", tensors, step=3, words=["a", None])
    back, about = read_tensors(tmp_path / "x.safetensors")
    assert same(back, tensors) and about == dict(step=3, words=["a", None])
    values = {checksum(x) for x in (tensors, {**tensors, "a": torch.arange(3) + 1}, {**tensors, "b": torch.tensor([2.5])},
                                    {("e" if k == "a" else k): v for k, v in tensors.items()})}
    assert len(values) == 4


# ---------------------------------------------------------------- several processes
@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twenty")
    return folder, run(folder, **TWENTY)


TWENTY = dict(steps=20, batch_size=4, checkpoint_every=10)
LAUNCH = {"accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                         "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29731", "-m"),
          "torchrun": ("torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29732", "-m")}


def distance(a, b):
    "How far two sets of weights are apart, in lengths of one. AdamW moves a weight of no gradient by rounding errors."
    norm = lambda values: torch.stack([v.double().norm() for v in values]).norm()
    return (norm([a[k] - b[k] for k in b]) / norm(b.values())).item()


@pytest.mark.parametrize("launcher, more", [("accelerate", ()), ("torchrun", ("shard",))], ids=["shared", "sharded"])
def test_two_processes_share_a_batch(twenty, tmp_path, launcher, more):
    "The same steps as one process that has the whole batch: with copies of the weights, and with shards of them."
    process = worker(tmp_path, *LAUNCH[launcher], more=more, **TWENTY)
    error = process.communicate(timeout=1200)[1]
    assert process.returncode == 0, error[-2000:]
    one, two = logged(twenty[0]), logged(tmp_path)
    assert len(one) == len(two) == 20 and max(abs(a - b) for a, b in zip(one, two)) < 1e-5
    weights = load_file(tmp_path / "weights.safetensors")
    assert distance(weights, twenty[1]) < 0.01
    # the file holds whole tensors, so one process can go on with what two began
    (tmp_path / NAME.format(20)).unlink()
    continued = run(tmp_path, resume="latest", **TWENTY)
    assert distance(continued, twenty[1]) < 0.01


def test_processes_that_do_not_know_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("dit_sr_kit.processes.get_device", lambda: torch.device("cuda"))
    with pytest.raises(ConfigError, match="2 processes were started"): run(tmp_path)


@pytest.mark.parametrize("kind", ["pool", "items", "texts"])
def test_parts_of_a_batch_are_the_batch(kind):
    "What two processes with two parts each are shown and draw is what one is shown and draws."
    settings = config("unused", batch_size=8, steps=3, accumulate=2, patch=32, leaves=6)
    source = make_pool(settings, progress=False)
    words = WordTable() if kind == "texts" else None
    if kind == "items": source = PatchDataset(size=32, length=13, seed=3)
    collect = lambda n, step_parts: [(b, r) for parts in step_parts for b, r in parts]
    whole = collect(1, batches(replace(settings, accumulate=1), source, 1, words=words))
    shares = [list(batches(settings, source, 1, process=i, processes=2, words=words)) for i in range(2)]
    assert len(whole) == 2
    for step, (batch, rows) in enumerate(whole):
        parts = [part for share in shares for part in share[step]]
        assert torch.equal(batch.hr, torch.cat([part.hr for part, _ in parts])) and len(parts) == 4
        if batch.lr is not None: assert torch.equal(batch.lr, torch.cat([part.lr for part, _ in parts]))
        for i in range(len(batch.text)): assert torch.equal(batch.text[i], torch.cat([p.text[i] for p, _ in parts]))
        t, noise = drawn((8,), rows, below=15), drawn((8, 2, 2), rows)
        assert torch.equal(t, torch.cat([drawn((2,), r, below=15) for _, r in parts]))
        again = [r for _, r in [part for share in [list(batches(settings, source, 1, i, 2, words)) for i in range(2)]
                                for part in share[step]]]
        for r in again: drawn((2,), r, below=15)
        assert torch.equal(noise, torch.cat([drawn((2, 2, 2), r) for r in again]))


def test_a_batch_in_parts_takes_the_same_steps(straight, tmp_path):
    run(tmp_path, accumulate=2)
    assert max(abs(a - b) for a, b in zip(logged(straight[0]), logged(tmp_path))) < 1e-5
    with pytest.raises(ConfigError, match="batch_size=2 cannot be shared by 1 processes in 3 parts"):
        run(tmp_path / "odd", accumulate=3)


# ---------------------------------------------------------------- data
def test_every_item_comes_once():
    settings = config("unused", batch_size=4, steps=6)
    seen = [batch.hr[:, 0, 0, 0] for parts in batches(settings, Numbered(12), 0) for batch, _ in parts]
    epochs = torch.cat(seen).view(2, 12)
    assert all(torch.equal(row.sort().values, torch.arange(12.0)) for row in epochs) and not torch.equal(*epochs)
    later = [batch.hr[:, 0, 0, 0] for parts in batches(settings, Numbered(12), 4) for batch, _ in parts]
    assert torch.equal(torch.stack(later), torch.stack(seen[4:]))
    with pytest.raises(ValueError): next(batches(settings, Values(4), 0))


class Numbered(torch.utils.data.Dataset):
    "Item i is a grey picture of the value i."
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.full((3, 4, 4), float(i))


class Values(Numbered):
    def __getitem__(self, i): return (torch.zeros(1),) * 4


def test_folders_and_degradations(tmp_path):
    for i in range(2): save_image(texture(TEXTURES[i], 80, make_generator(i)), tmp_path / "pictures" / f"{i}.png")
    settings = config(tmp_path / "run", data=str(tmp_path / "pictures"), degradation="resshift", steps=2, patch=64, workers=0)
    source = make_source(settings, progress=False)
    assert isinstance(source, PatchItems)
    hr, lr = source[7]
    assert hr.shape == (3, 64, 64) and lr.shape == (3, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip((hr, lr), source[7])) and not torch.equal(hr, source[8][0])
    in_background = [b.hr for parts in batches(replace(settings, workers=1), source, 0) for b, _ in parts]
    here = [b.hr for parts in batches(settings, source, 0) for b, _ in parts]
    assert all(torch.equal(a, b) for a, b in zip(in_background, here))
    a = fit(settings, progress=False)
    assert same(a, fit(replace(settings, resume="latest"), progress=False))
    with pytest.raises(ConfigError, match="no degradation 'reshift'.*Did you mean 'resshift'"): replace(settings, degradation="reshift")
    with pytest.raises(ConfigError, match="factor 4"): run(tmp_path / "faces", degradation="gfpgan-face", steps=1)


def test_stored_latents(tmp_path):
    "Latents of pictures give the losses that the pictures give."
    pairs = PatchDataset(size=64, length=6, seed=1)
    cache = cache_latents(pairs, SpaceToDepth(4), tmp_path / "cache", dtype=torch.float32, progress=False)
    run(tmp_path / "a", dataset=Items(cache), steps=2)
    run(tmp_path / "b", dataset=Items(pairs), steps=2)
    assert max(abs(x - y) for x, y in zip(logged(tmp_path / "a"), logged(tmp_path / "b"))) < 0.02  # LR has 8 bits in the cache
    run(tmp_path / "c", dataset=cache, steps=1)
    assert len(logged(tmp_path / "c")) == 1
    with pytest.raises(ConfigError, match="stored latents bring none"):
        Perceptual(lambda *x: 0.0)(None, Batch(lr=torch.zeros(1), latents=(1, 2)))


class Items(torch.utils.data.Dataset):
    "The items of a data set, and nothing else that it can do."
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]


# ---------------------------------------------------------------- options
def test_precision_second_average_and_schedule(straight, tmp_path):
    a = run(tmp_path, mixed_precision="bf16", ema2=0.15, schedule="constant")
    assert all(v.dtype == torch.float32 for v in a.values())
    second = load_file(tmp_path / "weights2.safetensors")
    assert second.keys() == a.keys() and not same(second, a)
    assert max(abs(x - y) for x, y in zip(logged(straight[0]), logged(tmp_path))) < 0.05 and logged(straight[0]) != logged(tmp_path)
    for name in (NAME.format(6), "weights.safetensors", "weights2.safetensors"): (tmp_path / name).unlink()
    assert same(run(tmp_path, mixed_precision="bf16", ema2=0.15, schedule="constant", resume="latest"), a)
    assert same(load_file(tmp_path / "weights2.safetensors"), second)
    settings = TrainConfig(steps=100, warmup=10, schedule="constant", lr=2.0)
    assert learning_rate(4, settings) == 1.0 and learning_rate(99, settings) == 2.0


@pytest.mark.parametrize("values, message", [
    (dict(mixed_precision="fp8"), "'no', 'bf16', 'fp16'"), (dict(schedule="linear"), "'cosine', 'constant'"),
    (dict(keep=0), "keep=0"), (dict(accumulate=0), "accumulate"), (dict(ema2=1.0), "ema2"), (dict(lpips=-1.0), "lpips"),
    (dict(trainable="adapter"), "'base'"), (dict(text_drop=2.0), "text_drop"), (dict(workers=-1), "workers")])
def test_impossible_entries(values, message):
    with pytest.raises(ConfigError, match=message): TrainConfig(**values)


def test_pictures_and_curves(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path, steps=2, sample_every=1, tensorboard=True)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-00000001.png", "step-00000002.png"]
    assert list((tmp_path / "tensorboard").iterdir())
    whole = run(tmp_path / "plain", steps=2)
    assert same(whole, load_file(tmp_path / "weights.safetensors"))  # looking changes nothing


def test_restoration_grid():
    hr = known_pictures(32)
    asked = []

    def ask(sample, timestep, lr, y):
        asked.append((float(timestep), lr.shape, y.shape))
        return SpaceToDepth(4).encode(2 * hr - 1)
    grid = restoration_grid(ask, ResShiftScheduler(), SpaceToDepth(4), hr)
    assert grid.shape == (1, 3, 96, 32 * len(hr)) and len(asked) == 15
    torch.testing.assert_close(grid[..., 32:64, :], grid[..., 64:, :], atol=1e-5, rtol=0)  # who knows the answer restores it
    assert known_pictures(700).shape[-2:] == (700, 700)


def test_lpips(tmp_path, monkeypatch):
    def unreachable(name, device): raise WeightsUnavailable("the weights of the metric 'lpips' are not on this machine")
    with monkeypatch.context() as patch:
        patch.setattr(losses, "pyiqa_metric", unreachable)
        with pytest.raises(WeightsUnavailable, match="lpips"): run(tmp_path / "a", lpips=0.1)
    seen = []

    def distance(a, b):
        seen.append((a.shape, b.shape, a.requires_grad, a.detach().min().item() >= 0))
        return (a - b).abs().mean()
    monkeypatch.setattr(losses, "_lpips", lambda device: distance)
    plain, more = run(tmp_path / "b", steps=1), run(tmp_path / "c", steps=1, lpips=0.5)
    assert seen == [((2, 3, 64, 64), (2, 3, 64, 64), True, True)] and not same(plain, more)
    assert 0.01 < logged(tmp_path / "c")[0] - logged(tmp_path / "b")[0] < 0.5


class Perceptual(losses.ResShiftLoss):
    def __init__(self, lpips): self.lpips, self.autoencoder, self.config = lpips, None, TrainConfig(lpips=1.0)
    def __call__(self, estimate, batch): return self._perceptual(estimate, batch)


# ---------------------------------------------------------------- networks that read
TEXT = dict(preset="small-text", patch=32, steps=4, batch_size=4)


def test_base_then_control(tmp_path):
    base = run(tmp_path / "base", trainable="base", sample_every=4, **TEXT)
    model = presets.build("small-text")
    added = model.control_parameters().keys()
    source = str(tmp_path / "base" / "weights.safetensors")
    control = run(tmp_path / "control", trainable="control", init=source, ema=0.0, **TEXT)
    assert control.keys() == base.keys() == model.state_dict().keys()
    assert all(torch.equal(control[k], base[k]) for k in base if k not in added)
    assert not all(torch.equal(control[k], base[k]) for k in added)
    (tmp_path / "control" / NAME.format(4)).unlink()
    assert same(run(tmp_path / "control", trainable="control", init=source, ema=0.0, resume="latest", **TEXT), control)
    with pytest.raises(ConfigError, match="DiTSR has none"): run(tmp_path / "d", trainable="base")


@pytest.mark.parametrize("injection", [None, "linear"])
def test_an_ablation_begins_with_the_same_base(tmp_path, monkeypatch, injection):
    whole = presets.build("small-text")
    source = tmp_path / "base.safetensors"
    save_file(whole.state_dict(), source)
    row = presets.preset("small-text")
    monkeypatch.setitem(presets._PRESETS, "other", replace(row, config=dict(row.config, lr_injection=injection)))
    found = run(tmp_path / "a", trainable="control", init=str(source), **dict(TEXT, preset="other"))
    base = {k: v for k, v in whole.state_dict().items() if not whole.is_control(k)}
    assert found.keys() == presets.build("other").state_dict().keys() and base.keys() < found.keys()
    assert all(torch.equal(found[k], v) for k, v in base.items())
    del base[next(iter(base))]
    save_file(base, source)
    with pytest.raises(CheckpointError, match="missing"):
        run(tmp_path / "b", trainable="control", init=str(source), **dict(TEXT, preset="other"))


def test_bundled_weights_as_a_start(tmp_path):
    "By name; the text that is stored with them is not the network's."
    found = run(tmp_path, trainable="control", init="dit4sr-tiny", **dict(TEXT, preset="dit4sr-tiny", steps=1))
    stored, model = bundled_weights("dit4sr-tiny"), presets.build("dit4sr-tiny")
    assert all(torch.equal(found[k], stored[k]) for k in found if not model.is_control(k))
    with pytest.raises(CheckpointError, match="does not exist"): run(tmp_path / "b", init="dit-sr", steps=1)


def test_loss_of_the_stored_training_step(golden, monkeypatch):
    "Weights, latents, noise and noise levels of a step of the released training code: the same loss."
    from tests.test_golden_dit4sr import Fixture
    fixture, (g, about) = Fixture(golden, "a_dual_rms"), golden("dit4sr", "t_train_step.io")
    batch = Batch(lr=torch.zeros(1), latents=(g["in.z0"], fixture.inputs[2]), text=tuple(fixture.inputs[3:]))
    monkeypatch.setattr(losses, "flow_match_sigmas", lambda *x: g["sigma"].flatten())
    monkeypatch.setattr(losses, "drawn", lambda *x: g["in.noise"])
    for version in ("v1", "r1"):
        loss, error, sigma = flow_match_loss(fixture.model(version=version), FlowMatchScheduler(shift=3.0), None, batch,
                                             None, weighting=0.0)
        torch.testing.assert_close(loss, g[f"{version}.loss"].reshape(()), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sigma * 1000, g["timestep"].flatten(), atol=1e-3, rtol=1e-5)


def test_losses_take_rows_of_a_batch():
    hr = torch.rand(6, 3, 32, 32, generator=make_generator(0))

    class Half(torch.nn.Module):
        preconditioner = None
        def forward(self, sample, timestep, cond): return 0.5 * sample
    score = lambda hr, generator: resshift_loss(Half(), ResShiftScheduler(), SpaceToDepth(4), hr, generator)
    _, whole, t = score(hr, make_generator(1))
    parts = [score(Batch(hr[i:i + 2]), Rows(make_generator(1), 6, i, 2)) for i in (0, 2, 4)]
    torch.testing.assert_close(whole, torch.cat([p[1] for p in parts]), atol=1e-6, rtol=0)
    assert torch.equal(t, torch.cat([p[2] for p in parts]))
    lr = torch.zeros(6, 3, 8, 8)
    assert not torch.allclose(score(Batch(hr, lr), make_generator(1))[1], whole)
    with pytest.raises(ConfigError, match="autoencoder"): resshift_loss(Half(), ResShiftScheduler(), None, hr, make_generator(1))


# ---------------------------------------------------------------- from a shell
def test_train_from_options(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(dict(preset="small", steps=9, leaves=4, photo_share=0.0, warmup=2, batch_size=4)))
    out = str(tmp_path / "run")
    settings = ("lr=0.0005", "checkpoint_every=1", "log_every=1")
    used = train_from_options(file=str(file), out=out, steps=2, batch_size=2, settings=settings, progress=False)
    assert (used.steps, used.batch_size, used.lr, used.preset) == (2, 2, 0.0005, "small")
    (tmp_path / "run" / NAME.format(2)).unlink()
    again = train_from_options(out=out, resume=True, progress=False)  # the folder knows the rest
    assert again == replace(used, resume="latest")
    for wrong, message in ((dict(settings=("lr",)), "entry=value"), (dict(settings=("stpes=1",)), "Did you mean 'steps'"),
                           (dict(file=str(tmp_path / "absent.json")), "cannot be read as JSON")):
        with pytest.raises(ConfigError, match=message): train_from_options(**{"out": str(tmp_path / "new"), **wrong}, progress=False)
    file.write_text("[1]")
    with pytest.raises(ConfigError, match="holds a list"): train_from_options(file=str(file))


def test_command(tmp_path, capsys):
    out = str(tmp_path / "run")
    small = ["train", "--preset", "small", "--out", out, "--batch-size", "1", "--set", "leaves=2", "--set", "photo_share=0"]
    assert main([*small, "--steps", "1", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == dict(weights=f"{out}/weights.safetensors", steps=1) and load_file(answer["weights"])
    assert main([*small, "--steps", "1"]) == 2 and "resume='latest'" in capsys.readouterr().err
    assert main(["train", "--out", out, "--resume"]) == 0 and "after 1 steps" in capsys.readouterr().err
    assert main(["train", "--out", out + "2", "--set", "stpes=1"]) == 2 and "Did you mean 'steps'" in capsys.readouterr().err
    assert main([*small[:3], "--out", out + "3", "--data", str(tmp_path / "absent")]) == 1
    assert "absent" in capsys.readouterr().err and main(["train", "--steps", "0"]) == 2
