"ResShift and SinSR against numbers of the released code."
import pytest
import torch

from dit_sr_kit.schedulers import ResShiftScheduler
from dit_sr_kit.schedulers.resshift import ddim_coefficients, posterior_coefficients

DOUBLE, SINGLE = 1e-9, 5e-5
SCHEDULES = {"T15": ("T15_min0.04_k2.0_p0.3_end0.99", dict()),
             "T4": ("T4_min0.2_k2.0_p0.3_end0.99", dict(num_train_timesteps=4, min_noise_level=0.2))}
lengths = pytest.mark.parametrize("length", SCHEDULES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def tables(golden, length):
    _, header = golden("ditsr", "schedules")
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in header[SCHEDULES[length][0]].items()}


def one_by_one(call, t, *tensors):
    "Run a step that takes one timestep, sample by sample."
    return torch.cat([call(int(t[i]), *(x[i:i + 1] for x in tensors)) for i in range(len(t))])


@lengths
def test_schedule(golden, golden_report, length):
    expected = tables(golden, length)
    scheduler = ResShiftScheduler(**SCHEDULES[length][1])
    etas = scheduler.sqrt_etas**2
    weight_xt, weight_x0, variance = posterior_coefficients(etas, 2.0)
    k, m, j = ddim_coefficients(etas)
    one = torch.ones(len(etas), 1, 1, 1, dtype=torch.float64)
    every = torch.arange(len(etas))
    numbers = [scheduler.coefficients(t) for t in every]
    ours = dict(
        sqrt_etas=scheduler.sqrt_etas, etas=etas, alpha=torch.tensor([n["alpha"] for n in numbers], dtype=torch.float64),
        etas_prev=etas - torch.tensor([n["alpha"] for n in numbers], dtype=torch.float64), posterior_variance=variance,
        posterior_log_variance_clipped=scheduler.posterior(one, one, every)[1].flatten(),
        posterior_mean_coef1_xt=weight_xt, posterior_mean_coef2_x0=weight_x0, ddim_k_x0=k, ddim_m_xt=m, ddim_j_y=j,
        input_std=1 / scheduler.scale_model_input(one, every).flatten(),
        noise_std=torch.tensor([n["sigma"] for n in numbers], dtype=torch.float64))
    for name, values in ours.items():
        golden_report.check(f"schedules {length}", name, values, expected[name], DOUBLE)


@lengths
@dtypes
def test_one_step_quantities(golden, golden_report, length, dtype):
    tensors, _ = golden("ditsr", f"diffusion_{length}")
    fixture, options = f"diffusion_{length}", SCHEDULES[length][1]
    ancestral, ddim = ResShiftScheduler(**options), ResShiftScheduler(sampler="ddim", **options)
    x0, y, noise, x_t = (tensors[name].to(dtype) for name in ("x0", "y", "noise", "x_t"))
    t, t_up = tensors["t"], tensors["t_for_inverse"]
    mean, log_variance = ancestral.posterior(x_t, x0, t)
    ours = dict(
        x_t=ancestral.add_noise(x0, noise, t, y),
        q_mean=ancestral.add_noise(x0, torch.zeros_like(x0), t, y),
        post_mean=mean,
        post_logvar=log_variance.expand_as(x0),
        prior_T=ancestral.init_sample(y, noise=noise),
        scaled_input=ancestral.scale_model_input(x_t, t),
        ddim_prev=one_by_one(lambda i, a, b, c: ddim.step(a, i, b, cond=c).prev_sample, t, x0, x_t, y),
        ddim_inverse=one_by_one(lambda i, a, b, c: ddim.invert_step(a, i, b, c).prev_sample, t_up, x0, x_t, y),
    )
    for name, values in ours.items():
        assert values.dtype == dtype
        if dtype == torch.float32:
            golden_report.check(fixture, name, values, tensors[name], SINGLE)
        elif f"{name}_f64" in tensors:
            golden_report.check(fixture, name, values, tensors[f"{name}_f64"], DOUBLE)
    if dtype == torch.float32:
        stub = 0.9 * ours["scaled_input"] + 0.01 * t.view(-1, 1, 1, 1)
        golden_report.check(fixture, "train_mse_per_sample", (stub - x0).square().mean((1, 2, 3)),
                            tensors["train_mse_per_sample"], SINGLE)
        epsilon = ResShiftScheduler(prediction_type="epsilon", **options)
        # reading x0 out of the reference's noise divides by 1 - eta: compare where the noise itself lives
        back = epsilon.predict_original(tensors["eps_from_x0"], t, x_t, y)
        enlarged = (1 - (ancestral.sqrt_etas[t] ** 2)).view(-1, 1, 1, 1)
        golden_report.check(fixture, "eps_from_x0", back * enlarged, x0 * enlarged, SINGLE)


@lengths
def test_double_precision_from_the_tables(golden, golden_report, length):
    "Quantities without a float64 tensor: recomputed from the reference's float64 tables."
    tensors, _ = golden("ditsr", f"diffusion_{length}")
    table, options = tables(golden, length), SCHEDULES[length][1]
    ancestral, ddim = ResShiftScheduler(**options), ResShiftScheduler(sampler="ddim", **options)
    x0, y, noise, x_t = (tensors[name].double() for name in ("x0", "y", "noise", "x_t"))
    t, t_up = tensors["t"], tensors["t_for_inverse"]

    def at(name, times):
        return table[name][times].view(-1, 1, 1, 1)

    pairs = dict(
        prior_T=(ancestral.init_sample(y, noise=noise), y + table["noise_std"][-1] * noise),
        scaled_input=(ancestral.scale_model_input(x_t, t), x_t / at("input_std", t)),
        post_logvar=(ancestral.posterior(x_t, x0, t)[1], at("posterior_log_variance_clipped", t)),
        ddim_inverse=(one_by_one(lambda i, a, b, c: ddim.invert_step(a, i, b, c).prev_sample, t_up, x0, x_t, y),
                      (x_t - at("ddim_k_x0", t_up) * x0 - at("ddim_j_y", t_up) * y) / at("ddim_m_xt", t_up)),
        p_sample=(one_by_one(lambda i, a, b, c: ancestral.step(a, i, b, noise=c).prev_sample, t, x0, x_t, noise),
                  at("posterior_mean_coef1_xt", t) * x_t + at("posterior_mean_coef2_x0", t) * x0
                  + at("posterior_variance", t).sqrt() * noise),
    )
    for name, (ours, theirs) in pairs.items():
        golden_report.check(f"diffusion_{length} (tables)", name, ours, theirs, DOUBLE)


def test_sinsr_schedule_is_another_one(golden):
    "SinSR's own copy of the four-step schedule must not be ours."
    theirs, ours = tables(golden, "T4")["sqrt_etas_sinsr"], ResShiftScheduler(4, min_noise_level=0.2).sqrt_etas
    assert (theirs - ours).abs().max() > 0.05 and abs(theirs[-1] - ours[-1]) < 1e-12
