"Distillation: three losses that vanish together, pairs that are computed once, runs that end at the same weights."
import json
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dit_sr_kit import SRPipeline, distillation, presets
from dit_sr_kit.batches import PatchPool
from dit_sr_kit.cli import main
from dit_sr_kit.core import CheckpointError, ConfigError, WeightsUnavailable, make_generator
from dit_sr_kit.degradations import bicubic_down
from dit_sr_kit.distillation import (DistillConfig, chain_end, distill, sinsr_losses, teacher_pairs, two_way,
                                     two_way_preconditioner)
from dit_sr_kit.images import resize, to_signed
from dit_sr_kit.layers.preconditioning import ResidualPreconditioner, linear_coefficients
from dit_sr_kit.models.autoencoders import SpaceToDepth
from dit_sr_kit.schedulers import ResShiftScheduler
from dit_sr_kit.schedulers.resshift import ddim_coefficients
from dit_sr_kit.training import TrainingError

NAME = "checkpoint-{:08d}.safetensors"
T15 = dict(num_train_timesteps=15, kappa=2.0, power=0.3, min_noise_level=0.04, etas_end=0.99)


@pytest.fixture(scope="module", autouse=True)
def small_presets():
    "Teacher and student: the skeleton of dit-sr-tiny, one block deep and half as wide."
    small = presets._tiny(depth=1, base_channels=32, hidden_size=32)
    presets._PRESETS["small"] = replace(presets.preset("dit-sr-tiny"), config=small, weights=None)
    presets._PRESETS["small-1step"] = replace(presets.preset("dit-sr-tiny-1step"), config=small, weights=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "_SHARD", 6)
        yield
    del presets._PRESETS["small"], presets._PRESETS["small-1step"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A file with random weights of the teacher."
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "weights.safetensors"
    save_file(presets.build("small").state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def run(weights):
    def call(out, **changes):
        return distill(make(out, weights, **changes), progress=False)
    return call


def make(out, weights, **changes):
    values = dict(preset="small-1step", teacher="small", teacher_weights=weights, out=str(out), pairs=4, held_out=2,
                  steps=6, batch_size=2, leaves=4, photo_share=0.0, warmup=2, checkpoint_every=2, log_every=1)
    return DistillConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(folder)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- the map and the losses
def gaussian(scheduler, s_r=0.14):
    "The perfect network for Gaussian pictures, and the factor of its whole chain."
    etas = scheduler.sqrt_etas**2
    w, _, _ = linear_coefficients(scheduler.sqrt_etas, scheduler.config.kappa, s_r)
    k, m, _ = ddim_coefficients(etas)
    return (lambda x, t, y: y - w[t] * (x * (4 * etas[t] + 1).sqrt() - y)), (m - k * w).prod()


@pytest.mark.parametrize("T, m", [(15, 0.04), (4, 0.2)])
def test_chain_of_a_gaussian(T, m):
    scheduler = ResShiftScheduler(num_train_timesteps=T, min_noise_level=m, sampler="ddim")
    model, factor = gaussian(scheduler)
    y, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64, generator=make_generator(0))
    torch.testing.assert_close(chain_end(model, scheduler, noise, y, y), y + factor * 1.98 * noise, atol=1e-12, rtol=0)


def test_a_stochastic_chain_is_no_map():
    with pytest.raises(ConfigError, match="sampler is 'ancestral'"):
        chain_end(None, ResShiftScheduler(), torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), None)


class Linear(torch.nn.Module):
    "Multiplies x - y by one number for the way back (index 0) and one for the way there."
    def __init__(self, back, there):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor([back, there], dtype=torch.float64))
        self.asked = []

    def forward(self, sample, timestep, y):
        self.asked.append((timestep.tolist(), sample.std().item()))
        return y + self.factor[(timestep > 0).long()].view(-1, 1, 1, 1) * (sample * (4 * 0.9801 + 1)**0.5 - y)


@pytest.fixture
def tensors():
    return torch.randn(4, 3, 2, 4, 4, dtype=torch.float64, generator=make_generator(1))


def test_losses_are_the_formulas(tensors):
    y, x_T, x0_teacher, x0 = tensors
    student = Linear(back=3.0, there=0.2)
    losses = sinsr_losses(student, ResShiftScheduler(), y, x_T, x0_teacher, x0)
    there, back = (lambda z: y + 0.2 * (z - y)), (lambda z: y + 3.0 * (z - y))
    torch.testing.assert_close(losses["distil"], (there(x_T) - x0_teacher).square().mean())
    torch.testing.assert_close(losses["inverse"], (back(x0_teacher) - x_T).square().mean())
    torch.testing.assert_close(losses["truth"], (there(back(x0)) - x0).square().mean())
    assert list(losses) == ["distil", "inverse", "truth"]
    assert [index[0] for index, _ in student.asked] == [14, 0, 0, 14]
    std = (4 * 0.9801 + 1)**0.5  # the scale of step T-1, also where the index is 0
    for (_, seen), value in zip(student.asked, (x_T, x0_teacher, x0, back(x0))): assert abs(seen - value.std().item() / std) < 1e-9


def test_the_truth_does_not_teach_the_way_back(tensors):
    y, x_T, x0_teacher, x0 = tensors
    student = Linear(back=3.0, there=0.2)
    grad, = torch.autograd.grad(sinsr_losses(student, ResShiftScheduler(), y, x_T, x0_teacher, x0)["truth"], student.factor)
    assert grad[0] == 0 and grad[1] != 0
    # d/da mean (a b e - e)^2 with b held: 2 (a b - 1) b mean e^2
    torch.testing.assert_close(grad[1], 2 * (0.2 * 3.0 - 1) * 3.0 * (x0 - y).square().mean())


def test_all_losses_vanish_at_the_chain(tensors):
    y, noise, _, x0 = tensors
    scheduler = ResShiftScheduler(sampler="ddim")
    model, factor = gaussian(scheduler)
    x0_teacher, x_T = chain_end(model, scheduler, noise, y, y), scheduler.init_sample(y, noise=noise)
    losses = sinsr_losses(Linear(1 / factor.item(), factor.item()), scheduler, y, x_T, x0_teacher, x0)
    assert max(losses.values()) < 1e-24
    assert min(sinsr_losses(Linear(1 / factor.item(), 1.1 * factor.item()), scheduler, y, x_T, x0_teacher, x0)[k]
               for k in ("distil", "truth")) > 1e-6


# ---------------------------------------------------------------- the preconditioner of a student
def test_two_way_preconditioner():
    arguments = presets.preset("small-1step").config["preconditioning"]
    pre, plain = two_way_preconditioner(arguments), ResidualPreconditioner(**arguments)
    lr = torch.rand(2, 3, 16, 16, generator=make_generator(0)) * 2 - 1
    z, output = torch.randn(2, 2, 48, 16, 16, generator=make_generator(1))
    y, std, index = pre.lr_latent(lr), (4 * 0.9801 + 1)**0.5, torch.zeros(2, dtype=torch.long)
    d = (z - y) / 0.14
    torch.testing.assert_close(pre.network_input(z / std, index, lr), d, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pre.combine(output, z / std, index, lr), y + 1.98 * (d + output), atol=1e-3, rtol=1e-4)
    for t in (1, 7, 14):
        t = torch.full((2,), t)
        assert torch.equal(pre.combine(output, z, t, lr), plain.combine(output, z, t, lr))
        assert torch.equal(pre.network_input(z, t, lr), plain.network_input(z, t, lr))


def test_two_way_shares_parameters():
    model = presets.build("small-1step")
    twin = two_way(model)
    assert twin is not model and all(a is b for a, b in zip(model.parameters(), twin.parameters()))
    assert model.preconditioner.tables["c"][0] < 0.04 and twin.preconditioner.tables["c"][0] == pytest.approx(1.98)
    plain = presets.build("dit-sr-tiny", preconditioning=None)
    assert two_way(plain) is plain


# ---------------------------------------------------------------- the teacher's chains
def test_pairs(weights, tmp_path, monkeypatch):
    config = make(tmp_path, weights)
    pairs = teacher_pairs(config, progress=False)
    assert pairs["hr"].shape == (6, 3, 64, 64) and pairs["hr"].dtype == torch.uint8
    assert pairs["noise"].shape == pairs["x0"].shape == (6, 48, 16, 16)
    model = presets.build("small")
    model.load_state_dict(load_file(weights))
    hr = pairs["hr"].float() / 255
    lr = bicubic_down(hr).clamp(0, 1)
    y = SpaceToDepth(4).encode(to_signed(resize(lr, scale=4)))
    x0 = chain_end(model, ResShiftScheduler(sampler="ddim"), pairs["noise"], y, to_signed(lr))
    torch.testing.assert_close(x0, pairs["x0"], atol=1e-4, rtol=1e-4)
    # computed once; more pairs keep the first ones
    monkeypatch.setattr(distillation, "chain_end", lambda *args: pytest.fail("computed again"))
    assert same(teacher_pairs(config, progress=False), pairs)
    fewer = teacher_pairs(replace(config, pairs=3), progress=False)
    assert same({k: v[:5] for k, v in pairs.items()}, fewer)
    monkeypatch.undo()
    monkeypatch.setattr(distillation, "_SHARD", 6)
    more = teacher_pairs(replace(config, pairs=8), progress=False)
    assert same({k: v[:6] for k, v in more.items()}, pairs) and len(more["x0"]) == 10
    assert sorted(p.name for p in (tmp_path / "pairs").iterdir()) == ["000000.safetensors", "000006.safetensors"]


def test_pairs_of_another_teacher_and_damaged_ones(weights, tmp_path):
    pairs = teacher_pairs(make(tmp_path, weights), progress=False)
    with pytest.raises(ConfigError, match="seed: 0 then, 1 now"): teacher_pairs(make(tmp_path, weights, seed=1), progress=False)
    path = tmp_path / "pairs" / "000000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # one bit
    path.write_bytes(content)
    assert same(teacher_pairs(make(tmp_path, weights), progress=False), pairs)


def test_interrupted_pairs_go_on(weights, tmp_path, monkeypatch):
    honest, calls = distillation.chain_end, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return honest(*args)
    config = make(tmp_path / "a", weights, pairs=8)
    monkeypatch.setattr(distillation, "chain_end", failing)
    with pytest.raises(KeyboardInterrupt): teacher_pairs(config, progress=False)
    pairs = teacher_pairs(config, progress=False)
    assert len(calls) == 3 and len(pairs["x0"]) == 10
    assert same(pairs, teacher_pairs(make(tmp_path / "b", weights, pairs=8), progress=False))


# ---------------------------------------------------------------- runs
def test_what_a_run_leaves(straight):
    folder, ema = straight
    assert sorted(p.name for p in folder.iterdir()) == [NAME.format(4), NAME.format(6), "log.jsonl", "pairs", "weights.safetensors"]
    log = lines(folder)
    assert [line["step"] for line in log] == list(range(7))
    assert [line["step"] for line in log if "held_out" in line] == [0, 2, 4, 6]
    for line in log[1:]:
        total = line["distil"] + 0.005 * line["inverse"] + line["truth"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert same(load_file(folder / "weights.safetensors"), ema) and all(v.isfinite().all() for v in ema.values())


def test_the_held_out_figure(straight, weights):
    "Step 0 is the teacher asked once; the last line is the student that was saved."
    folder, ema = straight
    pairs = {k: v[:2] for k, v in teacher_pairs(make(folder, weights), progress=False).items()}
    scheduler = ResShiftScheduler()
    lr = bicubic_down(pairs["hr"].float() / 255).clamp(0, 1)
    x_T = scheduler.init_sample(SpaceToDepth(4).encode(to_signed(resize(lr, scale=4))), noise=pairs["noise"])
    for state, line in ((load_file(weights), lines(folder)[0]), (ema, lines(folder)[-1])):
        model = presets.build("small-1step")
        model.load_state_dict(state)
        with torch.no_grad(): answer = model(scheduler.scale_model_input(x_T, 14), 14, to_signed(lr))
        assert line["held_out"] == pytest.approx(F.mse_loss(answer, pairs["x0"]).item(), rel=1e-4)


@pytest.mark.parametrize("call", [4, 6])
def test_an_interrupted_run_ends_at_the_same_weights(run, straight, tmp_path, monkeypatch, call):
    honest, calls = distillation.sinsr_losses, []

    def failing(*args):
        calls.append(1)
        if len(calls) == call: raise KeyboardInterrupt
        return honest(*args)
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "sinsr_losses", failing)
        with pytest.raises(KeyboardInterrupt): run(tmp_path)
    assert not (tmp_path / "weights.safetensors").exists()
    torch.manual_seed(99)
    assert same(run(tmp_path, resume="latest"), straight[1])
    assert [line["step"] for line in lines(tmp_path)] == list(range(7))
    for name in (NAME.format(6), "weights.safetensors"): assert same(load_file(tmp_path / name), load_file(straight[0] / name))


def test_a_student_learns_its_pairs(run, tmp_path):
    "From random weights, the distance to the ends of four chains shrinks."
    run(tmp_path, steps=40, lr=3e-3, ema=0.5, inverse_weight=0.0, truth_weight=0.0, checkpoint_every=40)
    log = lines(tmp_path)
    assert log[-1]["distil"] < 0.7 * log[1]["distil"]


def test_a_signal_saves_and_stops(run, straight, tmp_path, monkeypatch, capsys):
    honest, calls = distillation.sinsr_losses, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3: signal.raise_signal(signal.SIGTERM)
        return honest(*args)
    monkeypatch.setattr(distillation, "sinsr_losses", interrupted)
    with pytest.raises(KeyboardInterrupt): run(tmp_path)
    assert "stopped after step 3 of 6" in capsys.readouterr().err and (tmp_path / NAME.format(3)).is_file()
    assert same(run(tmp_path, resume="latest"), straight[1])


def test_a_run_that_diverges_stops(run, tmp_path):
    with pytest.raises(TrainingError, match="at step"): run(tmp_path, lr=1e30, clip=1e30)
    assert not (tmp_path / "weights.safetensors").exists()


def test_a_used_folder_is_not_overwritten(run, straight):
    with pytest.raises(ConfigError, match="resume='latest'"): run(straight[0])
    with pytest.raises(ConfigError, match="lr: 0.001 then, 0.01 now"): run(straight[0], resume="latest", lr=0.01)


# ---------------------------------------------------------------- what is wrong is said
@pytest.mark.parametrize("entry, value", [
    ("pairs", 0), ("held_out", 0), ("steps", 0), ("batch_size", 0), ("lr", 0.0), ("clip", -1), ("warmup", -1), ("ema", 1.0),
    ("inverse_weight", -1), ("truth_weight", float("nan")), ("resume", "newest"), ("patch", 0), ("photo_share", 2), ("seed", -1)])
def test_impossible_values(entry, value):
    with pytest.raises(ConfigError, match=entry): DistillConfig(**{entry: value})


def test_misspelt_keys():
    with pytest.raises(ConfigError, match="'inverse_wieght'.*Did you mean 'inverse_weight'"): DistillConfig.from_dict({"inverse_wieght": 1})


def test_teachers_that_cannot_teach(run, weights, tmp_path):
    for teacher in ("dit-sr", "dossr-tiny", "jit-sr-b16"):
        with pytest.raises(ConfigError, match="cannot be a teacher.*dit-sr-tiny"): run(tmp_path, teacher=teacher)
    with pytest.raises(WeightsUnavailable, match="teacher_weights"): run(tmp_path, teacher_weights=None)
    with pytest.raises(CheckpointError, match="do not fit the network"): run(tmp_path, teacher="dit-sr-tiny")
    presets._PRESETS["other"] = replace(presets.preset("small-1step"), scheduler=dict(T15, kappa=1.0))
    try:
        with pytest.raises(ConfigError, match="noise schedules"): run(tmp_path, preset="other")
    finally: del presets._PRESETS["other"]


def test_command_line(weights, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(distillation, "distill", lambda config, progress: calls.append((config, progress)))
    assert main(["distill"]) == 0 and calls.pop() == (DistillConfig(), False)
    words = "--teacher small --preset small-1step --out here --pairs 4 --steps 3 --batch-size 2 --seed 1 --resume --json"
    assert main(["distill", "--teacher-weights", weights, *words.split()]) == 0
    expected = DistillConfig(teacher="small", preset="small-1step", teacher_weights=weights, out="here", pairs=4, steps=3, batch_size=2,
                             seed=1, resume="latest")
    assert calls.pop() == (expected, False)
    capsys.readouterr()
    assert main(["distill", "--out", "here", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == dict(weights="here/weights.safetensors", steps=DistillConfig().steps)
    assert main(["distill", "--steps", "0"]) == 2
    monkeypatch.undo()
    assert main(["distill", "--teacher", "dit-sr", "--out", str(tmp_path / "x")]) == 2
    assert main(["distill", "--teacher", "small", "--out", str(tmp_path / "y")]) == 1
    assert "teacher_weights" in capsys.readouterr().err


# ---------------------------------------------------------------- the preset
def test_one_step_is_the_default():
    row = presets.preset("dit-sr-tiny-1step")
    scheduler = row.process(**row.scheduler)
    assert scheduler.timesteps.tolist() == [14]
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [14, 11, 7, 3]
    scheduler.set_timesteps()
    assert scheduler.timesteps.tolist() == [14]
    again = ResShiftScheduler.from_config(scheduler.config)
    assert again.timesteps.tolist() == [14]
    y, noise, answer = torch.randn(3, 1, 3, 4, 4, generator=make_generator(0))
    x = scheduler.init_sample(y, noise=noise)
    torch.testing.assert_close(x, y + 1.98 * noise)
    step = scheduler.step(answer, 14, x, cond=y)
    assert torch.equal(step.prev_sample, answer) and torch.equal(step.pred_original_sample, answer)
    with pytest.raises(ConfigError): ResShiftScheduler(default_steps=16)
    with pytest.raises(ConfigError): ResShiftScheduler(default_steps=0)


def test_the_bundled_student(tmp_path):
    "One evaluation; sharper than the teacher's first answer; the same after saving."
    student = SRPipeline.from_preset("dit-sr-tiny-1step", device="cpu")
    teacher = SRPipeline.from_preset("dit-sr-tiny", device="cpu").with_process(sampler="ddim", timestep_spacing="trailing")
    hr = resize(torch.rand(1, 3, 16, 16, generator=make_generator(0)), scale=4).clamp(0, 1)
    lr = bicubic_down(hr).clamp(0, 1)
    out = student(lr, seed=0, record=True, progress=False)
    assert len(out.trajectory) == 1 and out.trajectory[0].timestep == 14
    chain, once, mine = (pipe.sample(lr, steps, make_generator(0)) for pipe, steps in ((teacher, 15), (teacher, 1), (student, None)))
    assert F.mse_loss(mine, chain) < F.mse_loss(once, chain)
    student.save_pretrained(tmp_path / "saved")
    again = SRPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert torch.equal(again.sample(lr, None, make_generator(0)), mine)
