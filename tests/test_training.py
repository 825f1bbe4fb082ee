"Training: runs that are interrupted end at the same weights; what is wrong is said early."
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dit_sr_kit import presets
from dit_sr_kit.batches import PatchPool, make_pool
from dit_sr_kit.core import CheckpointError, ConfigError, DitSrError, make_generator
from dit_sr_kit.degradations import bicubic_down
from dit_sr_kit.images import resize
from dit_sr_kit.layers.preconditioning import ResidualPreconditioner
from dit_sr_kit.losses import ResShiftLoss, resshift_loss
from dit_sr_kit.models.autoencoders import SpaceToDepth
from dit_sr_kit.models.dit_sr import DiTSR
from dit_sr_kit.run_state import latest_checkpoint, load_checkpoint
from dit_sr_kit.schedulers import ResShiftScheduler
from dit_sr_kit.training import TrainConfig, TrainingError, fit, learning_rate
from tests.training_worker import config, small_preset

NAME = "checkpoint-{:08d}.safetensors"


@pytest.fixture(scope="module", autouse=True)
def add_small_preset():
    small_preset()
    yield
    del presets._PRESETS["small"]


def run(out, **changes):
    return fit(config(out, **changes), progress=False)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def steps_logged(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "A run of six steps in one go, and its weights."
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(folder)


def stop_at(monkeypatch, call):
    "The machine goes off when the batch of this call is drawn."
    draw, calls = PatchPool.draw, []

    def failing(self, n, generator):
        calls.append(n)
        if len(calls) == call: raise KeyboardInterrupt
        return draw(self, n, generator)
    monkeypatch.setattr(PatchPool, "draw", failing)


# ---------------------------------------------------------------- interrupted runs
def test_what_a_run_leaves(straight):
    folder, ema = straight
    assert sorted(p.name for p in folder.iterdir()) == [NAME.format(4), NAME.format(6), "config.json", "log.jsonl", "weights.safetensors"]
    assert steps_logged(folder) == [1, 2, 3, 4, 5, 6]
    assert same(load_file(folder / "weights.safetensors"), ema)
    model = presets.build("small")
    model.load_state_dict(ema)
    assert all(v.isfinite().all() for v in ema.values())


@pytest.mark.parametrize("call", [4, 6])
def test_an_interrupted_run_ends_at_the_same_weights(straight, tmp_path, monkeypatch, call):
    with monkeypatch.context() as patch:
        stop_at(patch, call)
        with pytest.raises(KeyboardInterrupt): run(tmp_path)
    assert not (tmp_path / "weights.safetensors").exists()
    assert steps_logged(tmp_path) == list(range(1, call))  # one line more than the checkpoint knows of
    torch.manual_seed(99)
    assert same(run(tmp_path, resume="latest"), straight[1])
    assert steps_logged(tmp_path) == [1, 2, 3, 4, 5, 6]
    for name in (NAME.format(6), "weights.safetensors"):  # optimiser state and averages too
        assert same(load_file(tmp_path / name), load_file(straight[0] / name))


def test_resume_without_a_checkpoint_starts(straight, tmp_path):
    assert same(run(tmp_path, resume="latest"), straight[1])


def test_a_finished_run_is_finished(straight, tmp_path):
    (tmp_path / NAME.format(6)).write_bytes((straight[0] / NAME.format(6)).read_bytes())
    assert same(run(tmp_path, resume="latest"), straight[1])


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_a_damaged_checkpoint_is_skipped(straight, tmp_path, capsys, damage):
    content = (straight[0] / NAME.format(6)).read_bytes()
    (tmp_path / NAME.format(4)).write_bytes((straight[0] / NAME.format(4)).read_bytes())
    newest = tmp_path / NAME.format(6)
    if damage == "foreign": newest.write_bytes((straight[0] / "weights.safetensors").read_bytes())
    else: newest.write_bytes(content[:len(content) // 2 if damage == "cut" else 0])
    assert latest_checkpoint(tmp_path) == tmp_path / NAME.format(4)
    out, err = capsys.readouterr()
    assert NAME.format(6) in err and out == ""
    if damage == "cut": assert same(run(tmp_path, resume="latest"), straight[1])


def test_a_run_begins_with_given_weights(straight, tmp_path):
    source = str(straight[0] / "weights.safetensors")
    assert not same(run(tmp_path / "a", steps=1, init=source), run(tmp_path / "b", steps=1))
    tiny = run(tmp_path / "c", steps=1, init=source, lr=1e-12, ema=0.0)
    for name, value in straight[1].items(): torch.testing.assert_close(tiny[name], value, atol=1e-9, rtol=1e-6)
    with pytest.raises(CheckpointError, match="init=.*do not fit the network"):
        run(tmp_path / "d", init=source, preset="dit-sr-tiny")
    with pytest.raises(CheckpointError, match="does not exist"): run(tmp_path / "e", init="nowhere.safetensors")


def test_another_seed_is_another_run(straight, tmp_path):
    assert not same(run(tmp_path, steps=1, seed=1), run(tmp_path / "zero", steps=1))


# ---------------------------------------------------------------- what is wrong is said
def test_misspelt_keys():
    with pytest.raises(ConfigError, match="'weigthing'.*Did you mean 'weighting'"): TrainConfig.from_dict({"weigthing": 2.0})
    assert TrainConfig.from_dict({"steps": 10}) == TrainConfig(steps=10)


@pytest.mark.parametrize("entry, value", [
    ("steps", 0), ("batch_size", 0), ("patch", 0), ("patch", 129), ("lr", 0.0), ("lr", float("nan")), ("warmup", -1),
    ("ema", 1.0), ("ema", -0.1), ("photo_share", 1.2), ("leaves", -1), ("leaves", 0), ("clip", 0), ("seed", -1),
    ("checkpoint_every", 0), ("log_every", 0), ("resume", "newest")])
def test_impossible_values(entry, value):
    with pytest.raises(ConfigError, match=entry): TrainConfig(**{entry: value})


def test_presets_that_cannot_be_trained(tmp_path):
    with pytest.raises(ConfigError, match="Trainable: .*dit-sr-tiny"): run(tmp_path / "a", preset="dit-sr")
    with pytest.raises(ConfigError, match="dit-sr-tiny"): run(tmp_path / "b", preset="dit-sr-tinny")


def test_a_used_folder_is_not_overwritten(straight):
    before = (straight[0] / NAME.format(6)).read_bytes()
    with pytest.raises(ConfigError, match="resume='latest'"): run(straight[0])
    with pytest.raises(ConfigError, match="lr: 0.001 then, 0.01 now"): run(straight[0], resume="latest", lr=0.01)
    assert (straight[0] / NAME.format(6)).read_bytes() == before and len(steps_logged(straight[0])) == 6


def test_checkpoint_of_another_network(straight):
    other = presets.build("small", hidden_size=64)
    optimizer = torch.optim.AdamW(other.parameters())
    with pytest.raises(CheckpointError, match="another network"):
        load_checkpoint(straight[0] / NAME.format(6), other, {}, optimizer)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(straight[0] / "absent.safetensors", other, {}, optimizer)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_that_diverges_stops(tmp_path, monkeypatch, what):
    calls = []

    def failing(*args, **more):
        loss, mse, t = resshift_loss(*args, **more)
        calls.append(1)
        if len(calls) < 4: return loss, mse, t
        if what == "loss": return loss * float("nan"), mse, t
        return loss + _Steep.apply(next(args[0].parameters())), mse, t
    monkeypatch.setattr(ResShiftLoss, "score", failing)
    with pytest.raises(TrainingError, match=f"{what} became .* at step 3") as error: run(tmp_path)
    assert isinstance(error.value, DitSrError) and isinstance(error.value, RuntimeError)
    assert latest_checkpoint(tmp_path) == tmp_path / NAME.format(2) and not (tmp_path / "weights.safetensors").exists()
    assert all(v.isfinite().all() for v in load_file(tmp_path / NAME.format(2)).values())


class _Steep(torch.autograd.Function):
    "0, with an infinite gradient."
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(ctx.saved_tensors[0], float("inf"))


# ---------------------------------------------------------------- parts
def test_pool_depends_on_the_generator_alone(tmp_path):
    settings = config(tmp_path, patch=32)
    a, b = make_pool(settings, progress=False), make_pool(settings, progress=False)
    torch.manual_seed(1)
    x = a.draw(3, make_generator(0))
    assert x.shape == (3, 3, 32, 32) and 0 <= x.min() and x.max() <= 1
    assert torch.equal(x, b.draw(3, make_generator(0))) and not torch.equal(x, b.draw(3, make_generator(1)))
    assert torch.equal(x[:2], b.draw(2, make_generator(0)))  # patch after patch
    other = make_pool(replace(settings, seed=1), progress=False)
    assert not torch.equal(x, other.draw(3, make_generator(0)))


def test_pool_sources():
    leaves, photo = torch.zeros(2, 3, 40, 40, dtype=torch.uint8), torch.ones(1, 3, 50, 45)
    share = lambda s: PatchPool([photo], leaves, 24, s).draw(200, make_generator(0)).mean().item()
    assert share(0.0) == 0 and share(1.0) == 1 and abs(share(0.3) - 0.3) < 0.13
    assert [tuple(p.shape[-2:]) for p in PatchPool([photo], leaves, 24).photos] == [(50, 45), (35, 31)]  # half size: too small
    assert PatchPool([], leaves, 24).draw(2, make_generator(0)).shape == (2, 3, 24, 24)


class Zero(torch.nn.Module):
    "A network that answers 0 behind a preconditioner."
    def __init__(self, residual_std):
        super().__init__()
        self.preconditioner = ResidualPreconditioner(ResShiftScheduler().sqrt_etas, 2.0, residual_std)

    def forward(self, sample, timestep, cond):
        return self.preconditioner.combine(torch.zeros_like(sample), sample, timestep, cond)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_loss_of_a_network_that_answers_zero(gamma):
    hr = (0.5 + 0.07 * torch.randn(64, 3, 32, 32, generator=make_generator(0))).clamp(0, 1)
    true = 2 * (resize(bicubic_down(hr), scale=4) - hr).square().mean().sqrt().item()
    loss, mse, t = resshift_loss(Zero(true), ResShiftScheduler(), SpaceToDepth(4), hr, make_generator(1), gamma)
    c = Zero(true).preconditioner.tables["c"]
    assert (mse / c[t]**2 - 1).abs().max() < 0.15  # each patch scores the linear error of its step
    if gamma == 0: return torch.testing.assert_close(loss, mse.mean())
    weight = c**-gamma / (c**(2 - gamma)).mean()
    torch.testing.assert_close(loss.double(), (weight[t] * mse).mean().double(), rtol=1e-5, atol=0)
    assert abs(loss / (weight[t] * c[t]**2).mean() - 1) < 0.02 and abs((weight * c**2).mean() - 1) < 1e-12


def test_loss_of_a_perfect_network():
    "The clean latent itself, and no preconditioner: the plain mean squared error, and it is 0."
    hr = torch.rand(2, 3, 32, 32, generator=make_generator(0))

    class Perfect(torch.nn.Module):
        preconditioner = None

        def forward(self, sample, timestep, cond):
            assert cond.min() >= -1.6 and cond.shape == (2, 3, 8, 8)
            return SpaceToDepth(4).encode(2 * hr - 1)
    loss, mse, t = resshift_loss(Perfect(), ResShiftScheduler(), SpaceToDepth(4), hr, make_generator(0))
    assert loss < 1e-12 and mse.shape == t.shape == (2,)


def test_learning_rate():
    settings = TrainConfig(steps=1000, warmup=100, lr=1.0)
    rates = [learning_rate(k, settings) for k in range(1000)]
    assert rates[0] == 0.01 and rates[99] == 1.0 and rates[100] == 1.0 and abs(rates[550] - 0.505) < 1e-12
    assert abs(rates[-1] - 0.01) < 1e-5 and max(rates) == 1.0
    assert all(a >= b for a, b in zip(rates[100:], rates[101:]))
    assert learning_rate(0, TrainConfig(warmup=0, steps=1)) == TrainConfig().lr


def test_the_small_preset_is_a_dit_sr():
    assert isinstance(presets.build("small"), DiTSR)
