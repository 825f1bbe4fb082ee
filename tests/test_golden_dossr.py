"DoSSR against numbers of the released code, and against integrals that mpmath evaluates."
import math
from functools import lru_cache

import mpmath
import pytest
import torch

from dit_sr_kit.color import adain, wavelet_split
from dit_sr_kit.schedulers import DoSSRScheduler
from dit_sr_kit.schedulers.dossr import SHIFT_SCHEDULES, solver_coefficients, truncation_step

RELATIVE, DOUBLE, SINGLE = 1e-12, 1e-10, 3e-5
NAMES = ("c_x", "c_lr", "c_0", "c_1", "c_2", "c_n")
STEPS, STUBS = (1, 5, 7, 20), ("affine", "gauss", "tanh")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def ratio(actual, expected):
    "Their quotient, so that a difference of the quotient from 1 is a relative difference."
    return torch.as_tensor(actual, dtype=torch.float64) / expected


def check_relative(report, fixture, name, actual, expected):
    report.check(fixture, f"{name}, relative", ratio(actual, expected), torch.ones_like(expected), RELATIVE)


def numbers_at(scheduler, t):
    abar, eta = scheduler.alphas_cumprod_full[t].item(), scheduler.etas_full[t].item()
    return math.sqrt(abar), math.sqrt(1 - abar), eta


def stub(name, constants, scheduler, x, t, lr):
    "The stand-in networks of the fixtures."
    p, t = constants[name], int(t)
    if name == "affine":
        return p["a"] * x + p["b"] * t / 1000 + p["c"]
    if name == "tanh":
        return p["p"] * torch.tanh(p["u"] * x + p["w"] * lr) + p["s"] * math.sin(0.01 * t)
    alpha, sigma, eta = numbers_at(scheduler, t)
    m = alpha * (1 - eta)
    clean = (sigma**2 * (p["g"] * lr + p["q"]) + m * p["v"] * (x - alpha * eta * lr)) / (m**2 * p["v"] + sigma**2)
    return (x - alpha * clean) / sigma


def trajectory(scheduler, lr, start, noises, network):
    x = scheduler.init_sample(lr, noise=start)
    states, estimates = [x], []
    for t, noise in zip(scheduler.timesteps, noises):
        result = scheduler.step(network(x, t), t, x, cond=lr, noise=noise)
        x = result.prev_sample
        states.append(x)
        estimates.append(result.pred_original_sample)
    return torch.stack(states), torch.stack(estimates)


def test_full_schedules(golden, golden_report):
    expected, _ = golden("dossr", "default_schedule")
    scheduler = DoSSRScheduler()
    for name in ("betas", "alphas_cumprod", "etas"):
        actual = getattr(scheduler, f"{name}_full")
        assert actual.dtype == torch.float64
        check_relative(golden_report, "dossr schedule", f"{name}_full", actual, expected[f"full_{name}"])


@pytest.mark.parametrize("steps", STEPS)
def test_kept_steps(golden, golden_report, steps):
    expected, _ = golden("dossr", "default_schedule")
    scheduler = DoSSRScheduler()
    scheduler.set_timesteps(steps)
    kept = expected[f"s{steps}_timesteps"]
    assert scheduler.grid.tolist() == kept.tolist() and scheduler.timesteps.tolist() == kept.tolist()[:0:-1]
    fixture = f"dossr schedule N={steps}"
    for name in ("alphas_cumprod", "etas", "lambdas"):
        actual = getattr(scheduler, name)
        assert actual.dtype == torch.float64
        check_relative(golden_report, fixture, name, actual, expected[f"s{steps}_{name}"])
    rows = [scheduler.coefficients(t) for t in scheduler.timesteps]
    for name in NAMES:
        check_relative(golden_report, fixture, name, [row[name] for row in rows], expected[f"s{steps}_coef_{name}"])
    for name in ("alpha", "sigma", "m", "kappa", "lambdas"):
        actual = [row[name.rstrip("s")] for row in rows]
        check_relative(golden_report, fixture, name, actual, expected[f"s{steps}_{name}"].flip(0)[:-1])


@dtypes
@pytest.mark.parametrize("order", (1, 2, 3))
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", STUBS)
def test_trajectories(golden, golden_report, name, steps, order, dtype):
    (expected, _), (inputs, _) = golden("dossr", f"default_traj_{name}"), golden("dossr", "default_inputs")
    _, header = golden("dossr", "default_meta")
    scheduler = DoSSRScheduler(solver_order=order)
    scheduler.set_timesteps(steps)
    lr, start, noises = (inputs[key].to(dtype) for key in ("xhat0", "noise_start", "noise_steps"))
    states, estimates = trajectory(scheduler, lr, start, noises,
                                   lambda x, t: stub(name, header["stubs"], scheduler, x, t, lr))
    assert states.dtype == estimates.dtype == dtype
    key = f"s{steps}_o{order if steps > 1 else 1}"  # with one update all orders are the same
    bits, tolerance = ("f64", DOUBLE) if dtype == torch.float64 else ("f32", SINGLE)
    fixture = f"dossr trajectory {name}"
    golden_report.check(fixture, f"N={steps} order {order}: states", states, expected[f"{key}_{bits}_states"], tolerance)
    golden_report.check(fixture, f"N={steps} order {order}: x0", estimates, expected[f"{key}_f64_x0"], tolerance)


def test_training_quantities(golden, golden_report):
    tensors, _ = golden("dossr", "default_forward")
    t, x0, lr, noise = (tensors[key] for key in ("t", "x0", "xhat0", "noise"))
    scheduler, paper = DoSSRScheduler(), DoSSRScheduler(prediction_type="paper_epsilon")
    x_t = scheduler.add_noise(x0, noise, t, lr)
    pred = scheduler.predict_original(tensors["stub_eps"], t, x_t, lr)
    pairs = dict(x_t=x_t, eps_target=scheduler.training_target(x0, noise, t, lr), pred_x0=pred,
                 l1_loss=(pred - x0).abs().mean())
    for name, actual in pairs.items():
        golden_report.check("dossr forward", name, actual, tensors[name], DOUBLE)
    known = ~tensors["pred_x0_paper_param"].isnan().flatten(1).any(1)
    assert known.any() and not known.all()
    read = paper.predict_original(paper.training_target(x0, noise, t, lr)[known], t[known], x_t[known], lr[known])
    golden_report.check("dossr forward", "pred_x0_paper_param", read, tensors["pred_x0_paper_param"][known], DOUBLE)
    for name in ("kernel3", "kernel5"):
        at, *values = tensors[name].tolist()
        (a1, s1, e1), (a2, s2, e2) = (numbers_at(scheduler, int(at) - i) for i in (1, 0))
        keep = a2 / a1 if name == "kernel3" else a2 * (1 - e2) / (a1 * (1 - e1))
        shift = a2 * (e2 - e1) if name == "kernel3" else a2 * e2 - keep * a1 * e1
        ours = torch.tensor([keep, shift, s2**2 - keep**2 * s1**2], dtype=torch.float64)
        golden_report.check("dossr forward", name, ours, torch.tensor(values, dtype=torch.float64), DOUBLE)


@dtypes
def test_color_fix(golden, golden_report, dtype):
    "The released variance divides by n - 1 and ours by n; the quotient of two differs by the small constant alone."
    tensors, _ = golden("dossr", "default_colorfix")
    content, style = tensors["content"].to(dtype), tensors["style"].to(dtype)
    single = dtype == torch.float32
    wavelet = wavelet_split(content)[0] + wavelet_split(style)[1]
    golden_report.check("dossr colorfix", "wavelet", wavelet, tensors["wavelet_f64"], 1e-6 if single else 1e-12)
    golden_report.check("dossr colorfix", "adain", adain(content, style), tensors["adain_f64"], 1e-6 if single else 1e-8)


# ---- other schedules: nothing here calls the package but for the numbers under test -------------

CONFIGS = [("trunc_12", 1000, 5), ("trunc_12", 1000, 20), ("trunc_13", 1000, 7), ("trunc_23", 1000, 20),
           ("trunc_12", 400, 5), ("trunc_13", 400, 7), ("trunc_23", 400, 1), ("none", 400, 6), ("none_12", 1000, 5)]


def reference_rows(kind, T, N):
    """Kept steps and (alpha, sigma, eta), from the definitions.
    eta is formed in float64 as released: at the end 1 - eta is 2.5e-6, and one rounding moves lambda by 4.5e-11."""
    fraction = {"12": (1, 2), "13": (1, 3), "23": (2, 3)}.get(kind[-2:], (1, 1))
    t1 = T * fraction[0] // fraction[1]
    b0, b1 = mpmath.mpf("0.00085"), mpmath.mpf("0.012")
    abar, rows, place = mpmath.mpf(1), {}, 0.0
    kept = []
    for _ in range(N + 1):
        kept.append(int(round(place)))
        place += (t1 - 1) / N
    for i in range(t1):
        abar *= 1 - (mpmath.sqrt(b0) + (mpmath.sqrt(b1) - mpmath.sqrt(b0)) * i / (T - 1)) ** 2
        u = mpmath.mpf("0.001") + mpmath.mpf("0.998") * i / (t1 - 1)
        eta = mpmath.mpf((1 - float(mpmath.cos(mpmath.pi * u))) / 2) if kind.startswith("trunc") else mpmath.mpf(0)
        rows[i] = mpmath.sqrt(abar), mpmath.sqrt(1 - abar), eta
    return t1, kept, [rows[i] for i in kept]


def reference_coefficients(start, end):
    "The six coefficients with their integrals done by quadrature over log(lambda)."
    (a_s, s_s, e_s), (a_t, s_t, e_t) = start, end
    m_s, m_t = a_s * (1 - e_s), a_t * (1 - e_t)
    l_s, l_t, k_s, k_t = s_s / m_s, s_t / m_t, e_s / (1 - e_s), e_t / (1 - e_t)
    r2 = (l_t / l_s) ** 2

    def moment(n):  # 2 m_t l_t^2 times the integral of (l - l_s)^n / (n! l^3) dl
        points = mpmath.linspace(mpmath.log(l_t), mpmath.log(l_s), 5)
        return 2 * m_t * l_t**2 * mpmath.quad(
            lambda u: (mpmath.exp(u) - l_s) ** n / mpmath.factorial(n) * mpmath.exp(-2 * u), points)

    return dict(c_x=m_t / m_s * r2, c_lr=m_t * (k_t - r2 * k_s), c_0=moment(0), c_1=moment(1), c_2=moment(2),
                c_n=m_t * mpmath.sqrt(l_t**2 - l_t**4 / l_s**2))


@lru_cache(maxsize=None)
def reference(kind, T, N):
    "As floats: t1, kept steps, and in the order of use places, lambdas and coefficients."
    with mpmath.workdps(26):
        t1, kept, rows = reference_rows(kind, T, N)
        rows = rows[::-1]
        updates = [{k: float(v) for k, v in reference_coefficients(s, t).items()} for s, t in zip(rows, rows[1:])]
        return t1, kept, [tuple(map(float, row)) for row in rows], [float(s / (a * (1 - e))) for a, s, e in rows], updates


@pytest.mark.parametrize("kind, T, N", CONFIGS)
def test_coefficients_are_the_integrals(golden_report, kind, T, N):
    t1, kept, _, lambdas, wanted = reference(kind, T, N)
    scheduler = DoSSRScheduler(num_train_timesteps=T, shift_schedule=kind)
    scheduler.set_timesteps(N)
    assert truncation_step(T, kind) == t1 == (scheduler.grid[-1] + 1) and scheduler.grid.tolist() == kept
    fixture = f"dossr {kind} T={T} N={N} (mpmath)"
    check_relative(golden_report, fixture, "lambdas", scheduler.lambdas.flip(0),
                   torch.tensor(lambdas, dtype=torch.float64))
    for name in NAMES:
        expected = torch.tensor([c[name] for c in wanted], dtype=torch.float64)
        actual = torch.tensor([scheduler.coefficients(t)[name] for t in scheduler.timesteps], dtype=torch.float64)
        if (expected == 0).all():
            assert (actual == 0).all(), name
        elif name == "c_lr":  # changes its sign along the chain: compare its size with 1, not with itself
            golden_report.check(fixture, name, actual, expected, RELATIVE)
        else:
            check_relative(golden_report, fixture, name, actual, expected)


@pytest.mark.parametrize("kind, T, N", CONFIGS)
@pytest.mark.parametrize("order", (1, 2, 3))
def test_trajectories_of_other_schedules(golden_report, kind, T, N, order):
    "A second, plain sampler: differences as printed, coefficients from mpmath, one scalar at a time."
    _, kept, places, lam, wanted = reference(kind, T, N)
    g = torch.Generator().manual_seed(7)
    lr, start, *noises = torch.randn(N + 2, 1, 2, 3, 3, generator=g, dtype=torch.float64)
    scheduler = DoSSRScheduler(num_train_timesteps=T, shift_schedule=kind, solver_order=order)
    scheduler.set_timesteps(N)

    def network(x, t):
        return 0.8 * torch.tanh(x - 0.3 * lr) + 0.1 * math.sin(0.02 * int(t))

    states, _ = trajectory(scheduler, lr, start, noises, network)
    x = start if kind == "none" else places[0][0] * lr + places[0][1] * start
    expected, estimates, slopes = [x], [], []
    for i, c in enumerate(wanted):
        alpha, sigma, _ = places[i]
        estimates.append((x - sigma * network(x, kept[::-1][i])) / alpha)
        after = c["c_x"] * x + c["c_lr"] * lr + c["c_0"] * estimates[i] + c["c_n"] * noises[i]
        if i >= 1:
            slopes.append((estimates[i] - estimates[i - 1]) / (lam[i] - lam[i - 1]))
            after = after + (c["c_1"] * slopes[-1] if order >= 2 else 0)
        if i >= 2 and order == 3:
            after = after + c["c_2"] * 2 * (slopes[-1] - slopes[-2]) / (lam[i] - lam[i - 2])
        x = after
        expected.append(x)
    golden_report.check(f"dossr {kind} T={T} N={N} (second sampler)", f"order {order}", states, torch.stack(expected), DOUBLE)


def test_shift_schedules_are_known():
    assert set(SHIFT_SCHEDULES) == {"trunc_12", "trunc_13", "trunc_23", "none", "none_12", "none_13", "none_23"}


def test_closed_forms_for_steps_of_any_size():
    "From a step of a thousandth to one over six orders of magnitude; c_2 cancels for small steps."
    for ratio_of_lambdas in (1 + 1e-3, 1.1, 3.0, 1e6):
        start, end = (1.0, ratio_of_lambdas, 0.0), (1.0, 1.0, 0.0)
        with mpmath.workdps(40):
            wanted = reference_coefficients(*([mpmath.mpf(v) for v in place] for place in (start, end)))
        ours = solver_coefficients(start, end)
        for name in ("c_x", "c_0", "c_1", "c_2", "c_n"):
            assert ours[name] == pytest.approx(float(wanted[name]), rel=1e-12, abs=1e-15), (name, ratio_of_lambdas)
