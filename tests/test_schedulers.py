"One contract for every scheduler of the kit, and what is particular to each."
import copy
import inspect
import itertools
from dataclasses import dataclass, field
from typing import Callable, Optional, Sequence

import pytest
import torch

from dit_sr_kit.core import ConfigError, DitSrError
from dit_sr_kit.schedulers import (DoSSRScheduler, FlowMatchScheduler, JiTFlowScheduler, ResShiftScheduler, SchedulerStep,
                                   convert_prediction)
from dit_sr_kit.schedulers.dossr import kept_timesteps, marginal_coefficients, solver_coefficients
from dit_sr_kit.schedulers.flow import flow_to_vp, guide


@dataclass
class Case:
    "One configuration under the contract. New schedulers append theirs to CASES."
    name: str
    cls: type
    config: dict = field(default_factory=dict)
    steps: Optional[int] = None                     # what set_timesteps gets; None: the scheduler's own number
    evaluations: int = 15                           # length of `timesteps` after that
    ascending: bool = False                         # True where time runs up from noise to clean
    draws: int = 1                                  # random tensors per step; 0: deterministic
    needs_cond: bool = False                        # `step` refuses to work without cond
    impossible_steps: Sequence = (0, -1, 2.5)       # what set_timesteps refuses
    answer: Callable = lambda scheduler, clean, cond, sample, timestep: clean  # what a perfect network says
    lands: Optional[float] = 1e-9                   # distance to the clean sample at the end, float64; None: noise remains
    dtypes: Sequence = (torch.float32, torch.float64, torch.bfloat16)

    def build(self, device=None):
        scheduler = self.cls(**self.config)
        scheduler.set_timesteps(self.steps, device=device)
        return scheduler


def resshift_answer(scheduler, clean, cond, sample, timestep):
    "What a perfect network says for each prediction type, from the definition of the state."
    s, kappa = scheduler.sqrt_etas[int(timestep)].item(), scheduler.config.kappa
    noise = sample - clean - s**2 * (cond - clean)
    return {"sample": clean, "residual": cond - clean, "epsilon": noise / (kappa * s),
            "scaled_epsilon": noise}[scheduler.config.prediction_type]


def resshift_cases():
    T4 = dict(num_train_timesteps=4, min_noise_level=0.2)
    common = dict(cls=ResShiftScheduler, answer=resshift_answer, impossible_steps=(0, -1, 2.5, 16))
    for sampler in ("ancestral", "ddim"):
        draws, ddim = (1, False) if sampler == "ancestral" else (0, True)
        yield Case(f"resshift-{sampler}", config=dict(sampler=sampler), draws=draws, needs_cond=ddim, **common)
        yield Case(f"resshift-{sampler}-T4", config=dict(sampler=sampler, **T4), evaluations=4, draws=draws,
                   needs_cond=ddim, **common)
        yield Case(f"resshift-{sampler}-K5", config=dict(sampler=sampler), steps=5, evaluations=5, draws=draws,
                   needs_cond=ddim, **common)
        yield Case(f"resshift-{sampler}-one-step", config=dict(sampler=sampler, timestep_spacing="trailing"),
                   steps=1, evaluations=1, draws=draws, needs_cond=ddim, **common)
        yield Case(f"resshift-{sampler}-pixels", config=dict(sampler=sampler, latent=False, kappa=0.5), draws=draws,
                   needs_cond=ddim, **common)
    for kind in ("residual", "epsilon", "scaled_epsilon"):
        yield Case(f"resshift-{kind}", config=dict(prediction_type=kind), needs_cond=True, **common)
        yield Case(f"resshift-{kind}-ddim-K7", config=dict(prediction_type=kind, sampler="ddim"), steps=7,
                   evaluations=7, draws=0, needs_cond=True, **common)


def dossr_answer(scheduler, clean, cond, sample, timestep):
    "What a perfect network says for each prediction type, from the definition of the state."
    t, kind = int(timestep), scheduler.config.prediction_type
    abar, eta = scheduler.alphas_cumprod_full[t].item(), scheduler.etas_full[t].item()
    alpha, sigma = abar**0.5, (1 - abar) ** 0.5
    mean = alpha * (eta * cond + (1 - eta) * clean)
    return {"sample": clean, "epsilon": (sample - alpha * clean) / sigma, "paper_epsilon": (sample - mean) / sigma}[kind]


def dossr_cases():
    "The state at timestep 0 keeps a noise of 0.029, so a perfect network does not land on the clean sample."
    common = dict(cls=DoSSRScheduler, answer=dossr_answer, lands=None)
    shifted = dict(common, needs_cond=True, impossible_steps=(0, -1, 2.5, 500))
    for order in (1, 2, 3):
        yield Case(f"dossr-order{order}", config=dict(solver_order=order), evaluations=5, **shifted)
    yield Case("dossr-corrected-N20", config=dict(corrected_derivative=True), steps=20, evaluations=20, **shifted)
    yield Case("dossr-one-step", steps=1, evaluations=1, **shifted)
    yield Case("dossr-sample-no-final-noise", config=dict(prediction_type="sample", final_noise=False), steps=7,
               evaluations=7, **shifted)
    yield Case("dossr-paper-epsilon", config=dict(prediction_type="paper_epsilon"), evaluations=5, **shifted)
    yield Case("dossr-trunc_13-T400", config=dict(num_train_timesteps=400, shift_schedule="trunc_13"), evaluations=5,
               **dict(shifted, impossible_steps=(0, -1, 2.5, 133)))
    yield Case("dossr-trunc_23", config=dict(shift_schedule="trunc_23"), steps=4, evaluations=4,
               **dict(shifted, impossible_steps=(0, -1, 2.5, 666)))
    yield Case("dossr-none", config=dict(shift_schedule="none", solver_order=1), steps=10, evaluations=10,
               **dict(common, impossible_steps=(0, -1, 2.5, 1000)))
    yield Case("dossr-none_12", config=dict(shift_schedule="none_12"), steps=6, evaluations=6,
               **dict(common, impossible_steps=(0, -1, 2.5, 500)))


def flow_match_answer(scheduler, clean, cond, sample, timestep):
    "SD3's velocity: from the picture to the noise."
    sigma = scheduler.sigmas[scheduler.timesteps.tolist().index(float(timestep))].item()
    return (sample - clean) / sigma


def flow_cases():
    "With more than 1 / t_eps = 20 intervals the guard keeps JiT from landing, unless the last interval returns the estimate."
    jit = dict(cls=JiTFlowScheduler, ascending=True, draws=0, impossible_steps=(0, -1, 2.5, 1001))
    yield Case("jit-heun", evaluations=99, **jit, lands=None)
    yield Case("jit-heun-S20", steps=20, evaluations=39, **jit)
    yield Case("jit-euler-S7", config=dict(method="euler", noise_scale=2.0), steps=7, evaluations=7, **jit)
    yield Case("jit-heun-S30-final", config=dict(final_estimate=True, default_steps=30), evaluations=59, **jit)
    yield Case("jit-one-step", steps=1, evaluations=1, **jit)
    match = dict(cls=FlowMatchScheduler, draws=0, answer=flow_match_answer, impossible_steps=(0, -1, 2.5, 1001))
    yield Case("flow-match", evaluations=40, **match)
    yield Case("flow-match-N4", steps=4, evaluations=4, **match)
    yield Case("flow-match-shift1", config=dict(shift=1.0), steps=10, evaluations=10, **match)


CASES = [*resshift_cases(), *dossr_cases(), *flow_cases()]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))])

SHAPE = (2, 3, 5, 7)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(seed, dtype=torch.float64, device="cpu", shape=SHAPE):
    "Numbers in [-0.9, 0.9]: inside the range that a pixel-space scheduler cuts to."
    return (torch.rand(shape, generator=generator(seed)) * 1.8 - 0.9).to(device=device, dtype=dtype)


def some_network(scaled, cond):
    "Not perfect, but deterministic and in the dtype of its input."
    return 0.5 * scaled + 0.1 * cond


def run_chain(scheduler, cond, generator=None, noises=None, network=some_network):
    "The four-line loop, with everything it sees collected."
    draws = iter(noises) if noises is not None else itertools.repeat(None)
    x = scheduler.init_sample(cond, generator=generator, noise=next(draws))
    states, estimates = [x], []
    for t in scheduler.timesteps:
        model_output = network(scheduler.scale_model_input(x, t), cond)
        result = scheduler.step(model_output, t, x, cond=cond, generator=generator, noise=next(draws))
        assert isinstance(result, SchedulerStep)
        x = result.prev_sample
        states.append(x)
        estimates.append(result.pred_original_sample)
    return states, estimates


# ---- the contract -------------------------------------------------------------------------------

@every_case
def test_signatures(case):
    expected = dict(set_timesteps=["num_inference_steps", "device"], init_sample=["cond", "generator", "noise"],
                    scale_model_input=["sample", "timestep"],
                    add_noise=["original_samples", "noise", "timesteps", "cond"],
                    step=["model_output", "timestep", "sample", "cond", "generator", "noise"])
    for name, arguments in expected.items():
        assert list(inspect.signature(getattr(case.cls, name)).parameters)[1:len(arguments) + 1] == arguments, name


@every_case
def test_config_round_trip(case, tmp_path):
    scheduler = case.build()
    scheduler.save_config(tmp_path)
    for other in (case.cls.from_config(scheduler.config), case.cls.from_pretrained(tmp_path)):
        other.set_timesteps(case.steps)
        assert {k: v for k, v in other.config.items() if not k.startswith("_")} == {
            k: v for k, v in scheduler.config.items() if not k.startswith("_")}
        assert torch.equal(other.timesteps, scheduler.timesteps)
        states, others = (run_chain(s, batch(1), generator(3))[0] for s in (scheduler, other))
        assert all(torch.equal(a, b) for a, b in zip(states, others))


@every_case
def test_deepcopy_is_independent(case):
    scheduler = case.build()
    other = copy.deepcopy(scheduler)
    other.set_timesteps(1)
    assert len(scheduler.timesteps) == case.evaluations


@every_case
def test_timesteps(case):
    scheduler = case.build()
    times = scheduler.timesteps
    assert times.ndim == 1 and len(times) == case.evaluations
    steps = times.double().diff() * (1 if case.ascending else -1)
    assert (steps >= 0).all(), "from noisy to clean"
    scheduler.set_timesteps(1)
    scheduler.set_timesteps(case.steps)
    assert torch.equal(scheduler.timesteps, times), "set_timesteps starts afresh"


@every_case
def test_usable_without_set_timesteps(case):
    fresh = case.cls(**case.config)
    fresh_times = fresh.timesteps.clone()
    fresh.set_timesteps()
    assert torch.equal(fresh_times, fresh.timesteps)


@every_case
@devices
def test_timesteps_follow_the_device(case, device):
    assert case.build(device=device).timesteps.device.type == device


@every_case
@devices
def test_shapes_dtypes_devices(case, device):
    for dtype, shape in itertools.product(case.dtypes, (SHAPE, (1, 48, 4, 4))):
        scheduler, cond = case.build(device=device), batch(1, dtype, device, shape)
        states, estimates = run_chain(scheduler, cond, generator())
        noise, times = torch.randn(shape).to(cond), scheduler.timesteps[[0] * shape[0]]
        noisy = scheduler.add_noise(batch(2, dtype, device, shape), noise, times, cond)
        scaled = scheduler.scale_model_input(noisy, scheduler.timesteps[0])
        for tensor in (*states, *estimates, noisy, scaled):
            assert tensor.shape == shape and tensor.dtype == dtype and tensor.device.type == device
            assert torch.isfinite(tensor).all()


@every_case
def test_a_bfloat16_answer_keeps_the_dtype_of_the_state(case):
    scheduler, cond = case.build(), batch(1, torch.float32)
    x = scheduler.init_sample(cond, generator=generator())
    result = scheduler.step(cond.bfloat16(), scheduler.timesteps[0], x, cond=cond, generator=generator())
    assert result.prev_sample.dtype == result.pred_original_sample.dtype == torch.float32


@every_case
def test_clean_estimate_is_always_there(case):
    _, estimates = run_chain(case.build(), batch(1), generator())
    assert len(estimates) == case.evaluations and all(torch.is_tensor(e) for e in estimates)


@every_case
def test_generator_repeats_and_leaves_the_global_one_alone(case):
    scheduler, before = case.build(), torch.get_rng_state()
    first, second, third = (run_chain(case.build(), batch(1), generator(seed))[0] for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not torch.equal(first[0], third[0])
    assert torch.equal(before, torch.get_rng_state())


@every_case
def test_generator_and_noise_agree(case):
    "One tensor for the start, then `draws` per step, the last one included."
    used = generator(5)
    by_generator, _ = run_chain(case.build(), batch(1), used)
    same = generator(5)
    noises = [torch.randn(SHAPE, generator=same) for _ in range(1 + case.draws * case.evaluations)]
    assert torch.equal(used.get_state(), same.get_state()), "the number of draws"
    noises += [None] * (1 + case.evaluations - len(noises))
    by_noise, _ = run_chain(case.build(), batch(1), noises=noises)
    assert all(torch.equal(a, b) for a, b in zip(by_generator, by_noise))


@every_case
def test_perfect_predictor(case):
    "A network that knows the answer: every estimate is the clean sample, and the chain lands on it."
    scheduler, clean, cond, g = case.build(), batch(2), batch(1), generator()
    x = scheduler.init_sample(cond, noise=torch.randn(SHAPE, generator=g).double())
    for t in scheduler.timesteps:
        noise = torch.randn(SHAPE, generator=g).double() if case.draws else None
        result = scheduler.step(case.answer(scheduler, clean, cond, x, t), t, x, cond=cond, noise=noise)
        assert (result.pred_original_sample - clean).abs().max() < 1e-9
        x = result.prev_sample
    if case.lands is not None:
        assert (x - clean).abs().max() < case.lands


@every_case
def test_float32_follows_float64(case):
    noises = [torch.randn(SHAPE, generator=generator(i)) for i in range(1 + case.evaluations)]
    noises = noises if case.draws else noises[:1] + [None] * case.evaluations
    single, _ = run_chain(case.build(), batch(1, torch.float32), noises=noises)
    double, _ = run_chain(case.build(), batch(1).float().double(), noises=noises)
    scale = max(x.abs().max() for x in double)
    assert all((a.double() - b).abs().max() < 2e-5 * scale for a, b in zip(single, double))


@every_case
def test_add_noise_takes_one_time_per_sample(case):
    scheduler, clean, cond = case.build(), batch(2), batch(1)
    noise = torch.randn(SHAPE, generator=generator()).double()
    times = scheduler.timesteps[[0, -1]]
    together = scheduler.add_noise(clean, noise, times, cond)
    for i in range(2):
        alone = scheduler.add_noise(clean[i:i + 1], noise[i:i + 1], times[i:i + 1], cond[i:i + 1])
        assert torch.equal(together[i:i + 1], alone)
    assert (together[1] - clean[1]).abs().mean() <= (together[0] - clean[0]).abs().mean() + 1 or case.evaluations == 1


@every_case
def test_scale_model_input_takes_one_time_per_sample(case):
    scheduler, x = case.build(), batch(2)
    times = scheduler.timesteps[[0, -1]]
    together = scheduler.scale_model_input(x, times)
    for i in range(2):
        assert torch.allclose(together[i:i + 1], scheduler.scale_model_input(x[i:i + 1], times[i]), atol=1e-15)


@every_case
def test_timestep_as_number_or_tensor(case):
    x, cond, noise = batch(3), batch(1), torch.randn(SHAPE, generator=generator()).double()
    results = []
    for convert in (lambda t: t, lambda t: t.item()):
        scheduler = case.build()
        t = convert(scheduler.timesteps[0])
        scaled = scheduler.scale_model_input(x, t)
        results.append((scaled, scheduler.step(scaled, t, x, cond=cond, noise=noise).prev_sample))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@every_case
def test_arguments_are_not_changed(case):
    scheduler, cond = case.build(), batch(1)
    x, noise, clean = batch(3), torch.randn(SHAPE, generator=generator()).double(), batch(2)
    kept = [v.clone() for v in (cond, x, noise, clean)]
    scheduler.init_sample(cond, noise=noise)
    scheduler.add_noise(clean, noise, scheduler.timesteps[[0, 0]], cond)
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    scheduler.step(clean, scheduler.timesteps[0], x, cond=cond, noise=noise)
    assert all(torch.equal(a, b) for a, b in zip(kept, (cond, x, noise, clean)))


@every_case
def test_gradients_pass(case):
    scheduler, cond, x = case.build(), batch(1), batch(3)
    out = batch(2).requires_grad_()
    result = scheduler.step(out, scheduler.timesteps[0], x, cond=cond, generator=generator())
    result.pred_original_sample.sum().backward()
    assert out.grad is not None and out.grad.abs().sum() > 0


@every_case
def test_coefficients_are_numbers(case):
    scheduler = case.build()
    for t in scheduler.timesteps:
        numbers = scheduler.coefficients(t)
        assert numbers and all(isinstance(v, float) and v == v for v in numbers.values())


@every_case
def test_errors(case):
    scheduler, x, cond = case.build(), batch(3), batch(1)
    first = scheduler.timesteps[0]
    wrong = [
        lambda: scheduler.init_sample(None),
        lambda: scheduler.init_sample(cond, noise=x[:1]),
        lambda: scheduler.add_noise(x, x[:1], scheduler.timesteps[[0, 0]], cond),
        lambda: scheduler.add_noise(x, x, scheduler.timesteps[[0, 0]], cond[:, :1]),
        lambda: scheduler.step(x[:1], first, x, cond=cond),
        lambda: scheduler.step(x, first, x, cond=cond[..., :3]) if case.needs_cond else scheduler.init_sample(None),
        lambda: scheduler.step(x, 12345, x, cond=cond),
        lambda: scheduler.step(x, first.repeat(2), x, cond=cond),
        *(lambda n=n: scheduler.set_timesteps(n) for n in case.impossible_steps),
    ]
    if case.needs_cond:
        wrong.append(lambda: scheduler.step(x, first, x))
    if case.draws:
        wrong.append(lambda: scheduler.step(x, first, x, cond=cond, noise=x[:1]))
    for i, call in enumerate(wrong):
        with pytest.raises(ConfigError) as caught:
            call()
        assert isinstance(caught.value, (ValueError, DitSrError)) and len(str(caught.value)) > 30, i


# ---- conversions --------------------------------------------------------------------------------

KINDS = {"vp": ("epsilon", "sample", "v_prediction"), "flow": ("noise", "sample", "flow")}


@pytest.mark.parametrize("convention", KINDS)
def test_conversions_agree_with_the_definitions(convention):
    clean, noise = batch(1), torch.randn(SHAPE, generator=generator()).double()
    alpha = torch.tensor([0.3, 0.8], dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt() if convention == "vp" else 1 - alpha
    a, s = (v.view(-1, 1, 1, 1) for v in (alpha, sigma))
    state = a * clean + s * noise
    truth = dict(sample=clean, epsilon=noise, noise=noise, v_prediction=a * noise - s * clean, flow=clean - noise)
    for src, dst in itertools.product(KINDS[convention], repeat=2):
        together = convert_prediction(truth[src], src, dst, state, alpha, sigma, convention)
        assert torch.allclose(together, truth[dst], atol=1e-12), (src, dst)
        for i in range(2):
            one = convert_prediction(truth[src][i:i + 1], src, dst, state[i:i + 1], alpha[i].item(), sigma[i], convention)
            assert torch.allclose(one, together[i:i + 1], atol=1e-12)


def test_v_prediction_without_unit_power():
    "The formulas hold where alpha^2 + sigma^2 is not 1."
    clean, noise = batch(1), batch(2)
    state, v = 0.9 * clean + 0.8 * noise, 0.9 * noise - 0.8 * clean
    assert torch.allclose(convert_prediction(v, "v_prediction", "sample", state, 0.9, 0.8), clean)
    assert torch.allclose(convert_prediction(clean, "sample", "v_prediction", state, 0.9, 0.8), v)
    assert torch.allclose(convert_prediction(noise, "epsilon", "v_prediction", state, 0.9, 0.8), v)


def test_velocity_signs():
    "VP points to the noise; flow points to the data."
    clean, noise = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    assert convert_prediction(noise, "epsilon", "v_prediction", 0.8 * noise, 0.6, 0.8) > 0
    assert convert_prediction(noise, "noise", "flow", 0.8 * noise, 0.2, 0.8, "flow") < 0


@pytest.mark.parametrize("arguments", [
    ("epsilon", "sample", 0.0, 1.0, "vp"), ("sample", "epsilon", 1.0, 0.0, "vp"),
    ("noise", "sample", 0.0, 1.0, "flow"), ("sample", "flow", 1.0, 0.0, "flow"),
    ("epsilon", "flow", 0.6, 0.8, "vp"), ("v_prediction", "sample", 0.6, 0.8, "flow"),
    ("eps", "sample", 0.6, 0.8, "vp"), ("epsilon", "sample", 0.6, 0.8, "edm"),
    ("epsilon", "sample", torch.ones(5), 0.8, "vp"),
])
def test_conversion_errors(arguments):
    src, dst, alpha, sigma, convention = arguments
    with pytest.raises(ConfigError):
        convert_prediction(batch(1), src, dst, batch(2), alpha, sigma, convention)


# ---- ResShift ------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [
    dict(sampler="ddpm"), dict(prediction_type="eps"), dict(timestep_spacing="linspace"), dict(num_train_timesteps=1),
    dict(num_train_timesteps=7.5), dict(kappa=0.0), dict(power=-1.0), dict(min_noise_level=0.0), dict(etas_end=1.0),
    dict(etas_end=0.01),
])
def test_resshift_refuses(change):
    with pytest.raises(ConfigError, match=next(iter(change)) if "sampler" not in change else "sampler"):
        ResShiftScheduler(**change)


def test_resshift_defaults():
    scheduler = ResShiftScheduler()
    assert scheduler.sqrt_etas.dtype == torch.float64 and scheduler.sqrt_etas.shape == (15,)
    assert scheduler.sqrt_etas[-1] == pytest.approx(0.99) and scheduler.sqrt_etas[0] == pytest.approx(0.02)
    assert scheduler.timesteps.tolist() == list(range(14, -1, -1)) and not scheduler.timesteps.is_floating_point()


@pytest.mark.parametrize("steps", range(1, 16))
def test_resshift_respacing(steps):
    scheduler = ResShiftScheduler()
    scheduler.set_timesteps(steps)
    kept = [int(15 / steps * i) for i in range(steps)]
    assert scheduler.timesteps.tolist() == kept[::-1]
    etas = scheduler.sqrt_etas[kept] ** 2
    previous = torch.cat([torch.zeros(1, dtype=torch.float64), etas[:-1]])
    for i, t in enumerate(kept):
        numbers = scheduler.coefficients(t)
        assert numbers["alpha"] == pytest.approx((etas[i] - previous[i]).item(), abs=1e-15)
        mean, _ = scheduler.posterior(torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double(), t)
        assert mean.item() == pytest.approx((previous[i] / etas[i]).item(), abs=1e-15)
    noise = torch.ones(1, 1, 1, 1).double()
    assert scheduler.init_sample(0 * noise, noise=noise).item() == pytest.approx(2 * etas[-1].sqrt().item())
    for t in set(range(15)) - set(kept):
        with pytest.raises(ConfigError, match="not in the current timesteps"):
            scheduler.step(noise, t, noise)


def test_resshift_trailing_starts_at_the_end():
    scheduler = ResShiftScheduler(timestep_spacing="trailing")
    for steps in range(1, 16):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps[0] == 14 and len(scheduler.timesteps.unique()) == steps


def test_resshift_ignores_the_draw_at_the_end():
    scheduler, x = ResShiftScheduler(), batch(3)
    ends = [scheduler.step(batch(2), 0, x, noise=torch.full(SHAPE, value)).prev_sample for value in (0.0, 1e6)]
    assert torch.equal(*ends) and torch.equal(ends[0], batch(2))


def test_resshift_posterior_log_variance_is_clipped():
    scheduler, x = ResShiftScheduler(), batch(3)
    first, second = (scheduler.posterior(x, x, t)[1] for t in (0, 1))
    assert first == second and first.exp().item() == pytest.approx(0.00155338, abs=1e-8)


def test_resshift_pixel_space():
    scheduler, x = ResShiftScheduler(latent=False), batch(3)
    s = scheduler.sqrt_etas[9]
    assert torch.allclose(scheduler.scale_model_input(x, 9), x / (6 * s + 1))
    result = scheduler.step(torch.full(SHAPE, 3.0).double(), 14, x, generator=generator())
    assert (result.pred_original_sample == 1).all()
    latent = ResShiftScheduler()
    assert torch.allclose(latent.scale_model_input(x, 9), x / (4 * s**2 + 1).sqrt())
    assert (latent.step(torch.full(SHAPE, 3.0).double(), 14, x, generator=generator()).pred_original_sample == 3).all()


@pytest.mark.parametrize("steps", [None, 5])
@pytest.mark.parametrize("kind", ["sample", "residual"])
def test_resshift_inversion(steps, kind):
    scheduler, clean, cond = ResShiftScheduler(sampler="ddim", prediction_type=kind), batch(2), batch(1)
    scheduler.set_timesteps(steps)
    answer = resshift_answer(scheduler, clean, cond, clean, 0)
    x = start = batch(3)
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(answer, t, x, cond=cond).prev_sample
    for t in scheduler.timesteps[:-1].flip(0):
        result = scheduler.invert_step(answer, t, x, cond)
        assert torch.allclose(result.pred_original_sample, clean)
        x = result.prev_sample
    assert torch.allclose(x, start, atol=1e-12)
    with pytest.raises(ConfigError, match="no inverse"):
        scheduler.invert_step(answer, 0, x, cond)
    with pytest.raises(ConfigError, match="cond"):
        scheduler.invert_step(answer, scheduler.timesteps[0], x, None)


@pytest.mark.parametrize("timestep", [-1, 15, 0.5, torch.tensor([0, 15])])
def test_resshift_raw_indices(timestep):
    with pytest.raises(ConfigError, match="0 to 14"):
        ResShiftScheduler().add_noise(batch(1), batch(2), timestep, batch(3))
    with pytest.raises(ConfigError, match="0 to 14"):
        ResShiftScheduler().scale_model_input(batch(1), timestep)


def test_resshift_marginal_by_composition():
    "Walking all transitions gives the closed form, for many copies of one pixel."
    scheduler, copies, g = ResShiftScheduler(), 100_000, generator(1)
    etas = scheduler.sqrt_etas**2
    x = torch.full((copies,), -0.5, dtype=torch.float64)
    for alpha in etas.diff(prepend=etas.new_zeros(1)):
        x = x + alpha + 2 * alpha.sqrt() * torch.randn(copies, generator=g, dtype=torch.float64)  # residual 1
    assert abs(x.mean() - (-0.5 + etas[-1])) < 4 * 1.98 / copies**0.5
    assert abs(x.std() - 1.98) < 4 * 1.98 / (2 * copies) ** 0.5


# ---- DoSSR --------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, said", [
    (dict(num_train_timesteps=5), "num_train_timesteps"), (dict(num_train_timesteps=100.0), "num_train_timesteps"),
    (dict(beta_start=0.0), "beta_start"), (dict(beta_start=0.02), "beta_end"), (dict(beta_end=1.0), "beta_end"),
    (dict(shift_schedule="trunc_21"), "Did you mean 'trunc_2?1?"), (dict(solver_order=4), "solver_order"),
    (dict(solver_order=0), "solver_order"), (dict(prediction_type="v_prediction"), "prediction_type"),
])
def test_dossr_refuses(change, said):
    with pytest.raises(ConfigError, match=said):
        DoSSRScheduler(**change)


def test_dossr_defaults():
    scheduler = DoSSRScheduler()
    assert scheduler.timesteps.tolist() == [499, 399, 299, 200, 100] and scheduler.grid.tolist() == [0, 100, 200, 299, 399, 499]
    assert scheduler.lambdas.tolist() == pytest.approx(
        [0.0291672301, 0.380630386, 0.875426885, 2.39162128, 12.0370979, 653678.691], rel=1e-8)
    assert len(scheduler) == 1000 and (scheduler.etas_full[500:] == 1).all() and scheduler.etas_full[499] < 1


@pytest.mark.parametrize("t1", [2, 3, 133, 333, 500, 666])
def test_dossr_kept_steps(t1):
    for steps in range(1, t1):
        kept = kept_timesteps(t1, steps)
        assert len(set(kept)) == steps + 1 and kept == sorted(kept) and (kept[0], kept[-1]) == (0, t1 - 1)


def test_dossr_too_many_steps():
    scheduler = DoSSRScheduler(shift_schedule="trunc_13")
    scheduler.set_timesteps(332)
    with pytest.raises(ConfigError, match="1 to 332"):
        scheduler.set_timesteps(333)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_dossr_stops_at_a_bad_answer(bad):
    scheduler, cond = DoSSRScheduler(), batch(1)
    x = scheduler.init_sample(cond, generator=generator())
    x = scheduler.step(cond, 499, x, cond=cond, generator=generator()).prev_sample
    out = batch(2)
    out[1, 2, 3, 4] = bad
    with pytest.raises(ConfigError, match=r"timestep 399 \(evaluation 2 of 5\)"):
        scheduler.step(out, 399, x, cond=cond, generator=generator())
    a = scheduler.step(cond, 399, x, cond=cond, noise=cond).prev_sample  # the refused call left no trace
    assert torch.isfinite(a).all()


def dossr_update(scheduler, i, cond):
    return scheduler.step(batch(20 + i), scheduler.timesteps[i], batch(10 + i), cond=cond, noise=batch(30 + i)).prev_sample


def test_dossr_history():
    "Orders 2 and 3 use the evaluations right before; whatever breaks the row restarts at order 1."
    cond, plain, scheduler = batch(1), DoSSRScheduler(solver_order=1), DoSSRScheduler()
    first_order = [dossr_update(plain, i, cond) for i in range(5)]
    third_order = [dossr_update(scheduler, i, cond) for i in range(5)]
    same = [torch.equal(a, b) for a, b in zip(first_order, third_order)]
    assert same == [True, False, False, False, False]
    assert all(torch.equal(dossr_update(scheduler, i, cond), third_order[i]) for i in range(5)), "a second run"
    for i in (0, 1, 2, 2, 2, 3):  # repeating a step changes nothing
        again = dossr_update(scheduler, i, cond)
        assert torch.equal(again, third_order[i])
    assert torch.equal(dossr_update(scheduler, 1, cond), first_order[1]), "going back"
    assert torch.equal(dossr_update(scheduler, 4, cond), first_order[4]), "skipping"
    for forget in (lambda: scheduler.init_sample(cond), lambda: scheduler.set_timesteps(5)):
        for i in (0, 1):
            dossr_update(scheduler, i, cond)
        forget()
        assert torch.equal(dossr_update(scheduler, 2, cond), first_order[2]), "starting in the middle"
    dossr_update(scheduler, 2, cond)
    small = scheduler.step(batch(5)[:1], 200, batch(6)[:1], cond=cond[:1], noise=batch(7)[:1]).prev_sample
    expected = plain.step(batch(5)[:1], 200, batch(6)[:1], cond=cond[:1], noise=batch(7)[:1]).prev_sample
    assert torch.equal(small, expected), "another batch"


def test_dossr_last_noise():
    ends = []
    for final_noise in (True, False):
        scheduler = DoSSRScheduler(final_noise=final_noise)
        ends.append([scheduler.step(batch(2), 100, batch(3), cond=batch(1), noise=n).prev_sample
                     for n in (torch.zeros(SHAPE).double(), batch(4))])
    assert not torch.equal(*ends[0]) and torch.equal(*ends[1]) and torch.equal(ends[0][0], ends[1][0])
    assert torch.allclose(ends[0][1] - ends[0][0], 0.02906904 * batch(4), atol=1e-8)


def test_dossr_start_is_exact_lr():
    "eta is taken as exactly 1 at the start."
    scheduler, cond, noise = DoSSRScheduler(), batch(1), batch(2)
    assert torch.allclose(scheduler.init_sample(cond, noise=noise), 0.526943688 * cond + 0.849900200 * noise, atol=1e-8)
    assert torch.equal(DoSSRScheduler(shift_schedule="none_12").init_sample(cond, noise=noise), scheduler.init_sample(cond, noise=noise))
    assert torch.equal(DoSSRScheduler(shift_schedule="none").init_sample(cond, noise=noise), noise)


def test_dossr_beyond_the_turning_point():
    "Training covers every step; from t1 on the state holds nothing of x0."
    scheduler, noise, cond = DoSSRScheduler(), batch(3), batch(1)
    states = [scheduler.add_noise(batch(s), noise, 700, cond) for s in (4, 5)]
    assert torch.equal(*states)
    target = scheduler.training_target(batch(4), noise, 999, cond)
    read = scheduler.predict_original(target, 999, scheduler.add_noise(batch(4), noise, 999, cond))
    assert torch.allclose(read, batch(4), atol=1e-12)
    with pytest.raises(ConfigError, match="below 500"):
        DoSSRScheduler(prediction_type="paper_epsilon").predict_original(noise, 700, states[0], cond)
    for t in (-1, 1000, 0.5):
        with pytest.raises(ConfigError, match="0 to 999"):
            scheduler.add_noise(batch(4), noise, t, cond)


@pytest.mark.parametrize("kind", DoSSRScheduler.prediction_types)
def test_dossr_training_target_is_read_back(kind):
    scheduler, clean, noise, cond = DoSSRScheduler(prediction_type=kind), batch(4), batch(3), batch(1)
    times = torch.tensor([3, 250])
    x_t, target = scheduler.add_noise(clean, noise, times, cond), scheduler.training_target(clean, noise, times, cond)
    assert torch.allclose(scheduler.predict_original(target, times, x_t, cond), clean, atol=1e-12)


def test_dossr_without_shift_is_diffusers_ddpm():
    from diffusers import DDPMScheduler

    ours = DoSSRScheduler(shift_schedule="none", solver_order=1)
    ours.set_timesteps(999)
    theirs = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False)
    theirs.set_timesteps(1000)
    for t in (999, 640, 2):
        x, out, same = batch(1), batch(2), []
        for mean_only in (True, False):  # diffusers draws its own noise: compare means, then the noise's weight
            noise = torch.zeros(SHAPE).double() if mean_only else batch(3)
            same.append(ours.step(out, t, x, noise=noise).prev_sample)
        g = generator(9)
        expected = theirs.step(out, t, x, generator=g).prev_sample
        drawn = torch.randn(SHAPE, generator=generator(9), dtype=torch.float64)
        assert torch.allclose(expected, same[0] + ours.coefficients(t)["c_n"] * drawn, atol=2e-6)  # float32 tables there
        assert torch.allclose(same[1] - same[0], ours.coefficients(t)["c_n"] * batch(3))


def test_dossr_family_preserves_the_marginal():
    scheduler = DoSSRScheduler()
    for start, end in zip(scheduler._places, scheduler._places[1:]):
        (a_s, s_s, e_s), (a_t, s_t, e_t) = start, end
        for c_x in (0.0, 0.3 * s_t / s_s, s_t / s_s, -s_t / s_s, solver_coefficients(start, end)["c_x"]):
            c = marginal_coefficients(c_x, start, end)
            mean_x0 = c["c_x"] * a_s * (1 - e_s) + c["c_0"]
            mean_lr = c["c_x"] * a_s * e_s + c["c_lr"]
            variance = c["c_x"] ** 2 * s_s**2 + c["c_n"] ** 2
            assert (mean_x0, mean_lr, variance) == pytest.approx((a_t * (1 - e_t), a_t * e_t, s_t**2), abs=1e-14)
        with pytest.raises(ConfigError, match="keeps more noise"):
            marginal_coefficients(1.01 * s_t / s_s, start, end)


# ---- flows ---------------------------------------------------------------------------------------

def test_jit_timesteps_list_every_evaluation():
    scheduler = JiTFlowScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75] and scheduler.timesteps.dtype == torch.float32
    scheduler.set_timesteps(4, t_start=0.5)
    assert scheduler.timesteps.tolist() == [0.5, 0.625, 0.625, 0.75, 0.75, 0.875, 0.875]
    scheduler = JiTFlowScheduler(method="euler")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [0, 0.25, 0.5, 0.75] and len(JiTFlowScheduler().timesteps) == 99


@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("method", ["heun", "euler"])
def test_jit_against_two_plain_loops(method, steps):
    "The state machine of `step` against a loop that holds both evaluations in its hands."
    scheduler, x = JiTFlowScheduler(method=method), batch(3)
    scheduler.set_timesteps(steps)
    network = lambda z, t: torch.tanh(1.3 * z + t)
    velocity = lambda z, t: (network(z, t) - z) / max(1 - t, 0.05)
    z = x
    for i in range(steps):
        t, following = i / steps, (i + 1) / steps
        v = velocity(z, t)
        if method == "heun" and i < steps - 1: v = (v + velocity(z + (following - t) * v, following)) / 2
        z = z + (following - t) * v
    y = scheduler.init_sample(x, noise=x)
    for t in scheduler.timesteps: y = scheduler.step(network(y, round(t.item() * steps) / steps), t, y).prev_sample
    assert (y - z).abs().max() < 1e-12


def test_jit_heun_starts_afresh_after_a_jump():
    scheduler, x, network = JiTFlowScheduler(), batch(3), lambda z: torch.tanh(z)
    scheduler.set_timesteps(4)
    alone = scheduler.step(network(x), 0.5, x).prev_sample
    scheduler.step(network(x), 0.0, x)
    assert torch.equal(scheduler.step(network(x), 0.5, x).prev_sample, alone), "0.5 does not end the interval from 0"
    scheduler.step(network(x), 0.0, x)
    scheduler.init_sample(x, noise=x)
    first = scheduler.step(network(x), 0.25, x).prev_sample
    assert torch.equal(first, x + 0.25 * (network(x) - x) / 0.75)


@pytest.mark.parametrize("steps,euler,heun", [(20, 0, 0), (25, 0.0080, 0.0088), (50, 0.0144, 0.0171), (100, 0.0164, 0.0181)])
def test_jit_guard_leaves_noise(steps, euler, heun):
    for method, fraction in (("euler", euler), ("heun", heun)):
        scheduler, clean = JiTFlowScheduler(method=method), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        scheduler.set_timesteps(steps)
        z = scheduler.init_sample(clean, noise=torch.ones_like(clean))
        for t in scheduler.timesteps: z = scheduler.step(clean, t, z).prev_sample
        assert z.item() == pytest.approx(fraction, abs=5e-5)


@pytest.mark.parametrize("change", [dict(method="rk4"), dict(t_eps=0.0), dict(t_eps=1.0), dict(noise_scale=0.0),
                                    dict(default_steps=0)])
def test_jit_refuses(change):
    with pytest.raises(ConfigError): JiTFlowScheduler(**change)


@pytest.mark.parametrize("scheduler,wrong", [(JiTFlowScheduler(), (-0.1, 1.5, float("nan"))), (FlowMatchScheduler(), (-1.0, 1001.0))])
def test_flow_times(scheduler, wrong):
    x = batch(3)
    for t in wrong:
        with pytest.raises(ConfigError, match="not possible"): scheduler.add_noise(x, x, torch.tensor([t, 0.5]), x)
    with pytest.raises(ConfigError, match="t_start"): JiTFlowScheduler().set_timesteps(4, t_start=1.0)


def test_jit_starts_in_the_middle():
    scheduler, lr, noise = JiTFlowScheduler(noise_scale=2.0), batch(1), batch(2)
    scheduler.set_timesteps(5, t_start=0.4)
    assert torch.allclose(scheduler.init_sample(lr, noise=noise), 0.4 * lr + 0.6 * 2 * noise)
    assert torch.equal(scheduler.init_sample(lr, noise=noise), scheduler.add_noise(lr, noise, scheduler.t_start, lr))
    scheduler.set_timesteps(5)
    assert torch.equal(scheduler.init_sample(lr, noise=noise), 2 * noise)


def test_guidance():
    a, b = batch(1), batch(2)
    for t, interval, applies in ((0.0, (0.0, 1.0), True), (0.1, (0.1, 1.0), False), (0.5, (0.1, 0.5), False), (0.3, (0.1, 0.5), True)):
        expected = b + 3 * (a - b) if applies else a
        assert torch.allclose(guide(a, b, t, 3.0, interval), expected)
    with pytest.raises(ConfigError, match="interval"): guide(a, b, 0.5, 3.0, (0.5, 0.5))


def test_flow_to_vp():
    t, k, x, e = 0.3, 2.0, batch(1), batch(2)
    alpha, sigma, R = flow_to_vp(t, k)
    assert alpha**2 + sigma**2 == pytest.approx(1) and alpha / sigma == pytest.approx(t / (k * (1 - t)))
    state = JiTFlowScheduler(noise_scale=k).add_noise(x, e, t, x) / R
    assert torch.allclose(state, alpha * x + sigma * e)


def test_flow_match_is_diffusers():
    "The same table, the same noise and, in float32, the same bits of every step."
    from diffusers import FlowMatchEulerDiscreteScheduler
    ours, theirs = FlowMatchScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert isinstance(ours, FlowMatchEulerDiscreteScheduler)
    assert {k: v for k, v in ours.config.items() if k[0] != "_"} == {k: v for k, v in theirs.config.items() if k[0] != "_"}
    assert FlowMatchScheduler.from_config(theirs.config).config.shift == 3.0
    assert FlowMatchEulerDiscreteScheduler.from_config(ours.config).config.shift == 3.0
    assert torch.equal(ours.train_sigmas, theirs.sigmas)
    for steps in (4, 28):
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        assert torch.equal(ours.timesteps, theirs.timesteps) and torch.equal(ours.sigmas, theirs.sigmas)
        x = y = batch(3, torch.float32)
        t = ours.timesteps[[0, 2]]
        assert torch.allclose(ours.add_noise(x, batch(1, torch.float32), t, x), theirs.scale_noise(x, t, batch(1, torch.float32)))
        for t in ours.timesteps:
            x = ours.step(torch.tanh(x), t, x).prev_sample
            y = theirs.step(torch.tanh(y), t, y).prev_sample
            assert (x - y).abs().max() < 2e-6


@pytest.mark.parametrize("change", [dict(use_dynamic_shifting=True), dict(invert_sigmas=True)])
def test_flow_match_refuses(change):
    with pytest.raises(ConfigError, match="diffusers"): FlowMatchScheduler(**change)
