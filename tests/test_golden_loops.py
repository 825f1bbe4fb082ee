"Whole chains: the network of DiT-SR and the samplers together, against the released code."
import pytest
import torch

from dit_sr_kit.schedulers import ResShiftScheduler

SINGLE, DOUBLE = 5e-4, 1e-9
LOOPS = {"T15": dict(), "T4": dict(num_train_timesteps=4, min_noise_level=0.2)}
lengths = pytest.mark.parametrize("length", LOOPS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@pytest.fixture(scope="module")
def network(golden):
    "The denoiser of the fixtures, through the same door as released weights."
    checkpoints = pytest.importorskip("dit_sr_kit.checkpoints")
    tensors, header = golden("ditsr", "denoiser_adafm")
    weights = {name[2:]: value for name, value in tensors.items() if name.startswith("w.")}
    return checkpoints.load_official("dit-sr", weights, header["config"])


@torch.no_grad()
def chain(scheduler, network, cond, lq, noises):
    "The loop of the README; returns every state and the first and the last clean estimate."
    x = scheduler.init_sample(cond, noise=noises[0])
    states, estimates = [], []
    for t, noise in zip(scheduler.timesteps, noises[1:]):
        model_output = network(scheduler.scale_model_input(x, t), t, lq)
        result = scheduler.step(model_output, t, x, cond=cond, noise=noise)
        x = result.prev_sample
        states.append(x)
        estimates.append(result.pred_original_sample)
    return torch.stack(states), estimates


@pytest.fixture
def loop(golden, network, length, dtype):
    tensors, _ = golden("ditsr", f"loop_{length}")
    inputs = {name: tensors[name].to(dtype) for name in ("z_y", "lq", "noise_T", "noise_steps")}
    noises = [inputs["noise_T"], *inputs["noise_steps"]]
    yield tensors, lambda sampler, noises=noises: chain(ResShiftScheduler(sampler=sampler, **LOOPS[length]),
                                                        network.to(dtype), inputs["z_y"], inputs["lq"], noises), noises
    network.to(torch.float32)


@lengths
@dtypes
def test_stochastic_chain(loop, golden_report, length, dtype):
    tensors, run, noises = loop
    states, estimates = run("ancestral")
    fixture = f"loop_{length}"
    if dtype == torch.float64:
        golden_report.check(fixture, "p_samples, final", states[-1], tensors["p_samples_f64"], DOUBLE)
        return
    golden_report.check(fixture, "p_samples, all steps", states, tensors["p_samples_f32"], SINGLE)
    golden_report.check(fixture, "p_pred_xstart_last", estimates[-1], tensors["p_pred_xstart_last_f32"], SINGLE)
    golden_report.check(fixture, "one_step", estimates[0], tensors["one_step_f32"], SINGLE)
    if "p_noise_repeat_final_f32" in tensors:
        repeated = [noise[:1].expand_as(noise) for noise in noises]
        golden_report.check(fixture, "p_noise_repeat, final", run("ancestral", repeated)[0][-1],
                            tensors["p_noise_repeat_final_f32"], SINGLE)


@lengths
@dtypes
def test_deterministic_chain(loop, golden_report, length, dtype):
    tensors, run, _ = loop
    states, _ = run("ddim")
    fixture = f"loop_{length}"
    if dtype == torch.float64:
        golden_report.check(fixture, "ddim_samples, final", states[-1], tensors["ddim_samples_f64"], DOUBLE)
    else:
        golden_report.check(fixture, "ddim_samples, all steps", states, tensors["ddim_samples_f32"], SINGLE)


@pytest.mark.parametrize("length", LOOPS)
@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
def test_one_step_scheduler(loop, golden, golden_report, network, length, dtype):
    "One trailing step is SinSR's single step."
    tensors, _, noises = loop
    scheduler = ResShiftScheduler(sampler="ddim", timestep_spacing="trailing", **LOOPS[length])
    scheduler.set_timesteps(1)
    states, _ = chain(scheduler, network, tensors["z_y"], tensors["lq"], noises[:2])
    golden_report.check(f"loop_{length}", "one_step, trailing spacing", states[0], tensors["one_step_f32"], SINGLE)
