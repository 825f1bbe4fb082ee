"Kernels, JPEG, colours and second-order degradations, against scipy, Pillow, OpenCV and torchvision."
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, special, stats

from dit_sr_kit.color_jitter import adjust, to_gray
from dit_sr_kit.core import ConfigError, ImageError, make_generator
from dit_sr_kit.degradations import degrade
from dit_sr_kit.images import sample_image
from dit_sr_kit.jpeg import dct_matrix, jpeg, quantisation_tables
from dit_sr_kit.kernels import (FAMILIES, KernelRecipe, blur_kernel, draw_choice, draw_kernel, filter2d, make_kernel,
                                sinc_kernel, usm_sharpen)
from dit_sr_kit.real_degradations import (RECIPES, STEPS, ColorRecipe, PairPool, Recipe, Round, degrade_real, draw_record, replay,
                                          replay_steps, training_target)


def rand(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=make_generator(seed))


# ---------------------------------------------------------------- kernels
@pytest.mark.parametrize("beta", [0.5, 1.0, 3.3])
@pytest.mark.parametrize("angle", [0.0, 0.9, -2.5])
def test_bells_follow_their_formula_with_an_inverted_matrix(beta, angle):
    U = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inverse = np.linalg.inv(U @ np.diag([2.0**2, 0.7**2]) @ U.T)
    u = np.stack(np.meshgrid(np.arange(13) - 6, np.arange(13) - 6), -1).astype(float)
    q = np.einsum("ijk,kl,ijl->ij", u, inverse, u)
    for profile, k in dict(gaussian=np.exp(-q / 2), generalized=np.exp(-q**beta / 2), plateau=1 / (1 + q**beta)).items():
        ours = blur_kernel(13, 2.0, 0.7, angle, profile, beta).numpy()
        np.testing.assert_allclose(ours, k / k.sum(), atol=1e-14)
        np.testing.assert_allclose(ours, ours[::-1, ::-1], atol=1e-14)


@pytest.mark.parametrize("size", [1, 3, 7, 21])
@pytest.mark.parametrize("cutoff", [0.3, math.pi / 3, math.pi])
def test_sinc_is_the_bessel_formula(size, cutoff):
    line = np.arange(size) - size // 2
    r = np.hypot(*np.meshgrid(line, line))
    k = np.where(r == 0, cutoff**2 / (4 * np.pi), cutoff * special.j1(cutoff * r) / (2 * np.pi * np.where(r == 0, 1, r)))
    np.testing.assert_allclose(sinc_kernel(size, cutoff).numpy(), k / k.sum(), atol=1e-13)


@pytest.mark.parametrize("shape", [(2, 3, 20, 33), (1, 3, 5, 2), (1, 1, 1, 1), (3, 3, 1, 9)])
def test_filter_is_scipys_correlation_with_mirrored_borders(shape):
    x = rand(*shape)
    kernels = torch.stack([make_kernel(draw_kernel(KernelRecipe(), make_generator(i)), 21) for i in range(shape[0])])
    ours = filter2d(x, kernels)
    for b in range(shape[0]):
        for c in range(shape[1]):
            wanted = ndimage.correlate(x[b, c].numpy(), kernels[b].numpy(), mode="mirror")
            np.testing.assert_allclose(ours[b, c].numpy(), wanted, atol=1e-12)


def test_filter_and_sharpening_are_opencvs():
    cv2 = pytest.importorskip("cv2")
    x = sample_image("astronaut")[..., :80, 150:240].double()
    picture = np.ascontiguousarray(x[0].permute(1, 2, 0).numpy())
    kernel = make_kernel(dict(family="aniso", size=15, sigma=3.0, sigma_y=1.0, rotation=0.5))
    theirs = cv2.filter2D(picture, -1, kernel.numpy(), borderType=cv2.BORDER_REFLECT_101)
    np.testing.assert_allclose(filter2d(x, kernel)[0].permute(1, 2, 0).numpy(), theirs, atol=1e-12)
    blur = lambda z: cv2.GaussianBlur(z, (51, 51), 0, borderType=cv2.BORDER_REFLECT_101)
    detail = picture - blur(picture)
    mask = blur((np.abs(detail) * 255 > 10).astype(np.float64))
    wanted = mask * np.clip(picture + 0.5 * detail, 0, 1) + (1 - mask) * picture
    np.testing.assert_allclose(usm_sharpen(x)[0].permute(1, 2, 0).numpy(), wanted, atol=1e-9)


def test_kernel_draws_follow_their_recipe():
    recipe = KernelRecipe(sizes=(3, 19), probabilities=(0.1, 0.2, 0.3, 0.1, 0.2, 0.1), sigma=(0.5, 2.0), sinc_prob=0.25)
    g = make_generator(3)
    many = [draw_kernel(recipe, g) for _ in range(3000)]
    bells = [r for r in many if r["family"] != "sinc"]
    counts = [sum(r["family"] == f for r in bells) for f in FAMILIES]
    assert stats.chisquare(counts, np.array(recipe.probabilities) * len(bells)).pvalue > 1e-3
    assert stats.chisquare(np.bincount([(r["size"] - 3) // 2 for r in many])).pvalue > 1e-3
    assert stats.binomtest(len(many) - len(bells), len(many), 0.25).pvalue > 1e-3
    assert stats.kstest([r["sigma"] for r in bells], stats.uniform(0.5, 1.5).cdf).pvalue > 1e-3
    assert all(("sigma_y" in r) == r["family"].endswith("aniso") for r in bells)
    for r in many[:50]:
        k = make_kernel(json.loads(json.dumps(r)), 21)
        assert k.shape == (21, 21) and abs(k.sum() - 1) < 1e-12
    assert draw_choice((0.0, 1.0, 0.0), g) == 1


# ---------------------------------------------------------------- JPEG
@pytest.mark.parametrize("quality", [1, 7, 30, 49, 50, 51, 77, 95, 100])
def test_tables_are_libjpegs(quality):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=quality)
    tables = Image.open(buffer).quantization
    assert quantisation_tables(quality).int().reshape(2, 64).tolist() == [list(tables[0]), list(tables[1])]


@pytest.mark.parametrize("height, width", [(64, 64), (37, 61), (1, 1), (9, 17)])
@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
def test_codec_is_pillows_within_rounding(height, width, subsampling):
    x = torch.cat([sample_image(n)[..., 50:50 + height, 150:150 + width] for n in ("chelsea", "coffee")]).double()
    quality = [90, 40]
    ours, theirs = (jpeg(x, quality, codec, subsampling) for codec in ("torch", "pillow"))
    assert ours.shape == x.shape and ours.dtype == x.dtype
    torch.testing.assert_close((ours * 255).round() / 255, ours)
    difference = ((ours - theirs) * 255).abs()
    assert difference.mean() < 1 and (difference <= 3.01).double().mean() > 0.95
    torch.testing.assert_close(jpeg(x[:1], 90, subsampling=subsampling), ours[:1])


def test_jpeg_has_a_gradient_and_its_cosines_are_orthogonal():
    D = dct_matrix()
    torch.testing.assert_close(D @ D.T, torch.eye(8, dtype=torch.float64))
    x = (0.3 + 0.4 * rand(1, 3, 32, 32)).requires_grad_()
    jpeg(x, 60).square().sum().backward()
    assert x.grad.abs().mean() > 0.1 and x.grad.isfinite().all()


# ---------------------------------------------------------------- colours
@pytest.mark.parametrize("kind, factor", [("brightness", 0.5), ("brightness", 1.5), ("contrast", 0.5), ("contrast", 1.5),
                                          ("saturation", 0.0), ("saturation", 1.5), ("hue", -0.1), ("hue", 0.3)])
def test_adjustments_are_torchvisions(kind, factor):
    functional = pytest.importorskip("torchvision.transforms.functional")
    x = torch.cat([sample_image("coffee")[..., :40, :50], rand(1, 3, 40, 50).float()]).double()
    x[0, :, :5] = 0.4
    x[0, :, 5:8] = 0.0
    wanted = getattr(functional, f"adjust_{kind}")(x, factor)
    torch.testing.assert_close(adjust(x, kind, factor), wanted, atol=2e-6, rtol=0)


# ---------------------------------------------------------------- the pipeline
@pytest.fixture(scope="module")
def hr():
    return torch.cat([sample_image(n)[..., 60:124, 150:230] for n in ("chelsea", "coffee", "astronaut")])


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("codec", ["torch", "pillow"])
def test_replay_is_equal_to_the_last_bit(hr, name, codec):
    lr, record = degrade_real(hr, name, make_generator(4), codec=codec)
    scale = RECIPES[name].scale
    assert lr.shape == (3, 3, 64 // scale, 80 // scale) and record["scale"] == scale and record["recipe"] == name
    assert torch.equal(replay(hr, json.loads(json.dumps(record))), lr)
    assert torch.equal((lr * 255).round() / 255, lr) and 0 <= lr.min() and lr.max() <= 1
    again, same = degrade_real(hr, name, make_generator(4), codec=codec)
    assert torch.equal(again, lr) and same == record
    assert not torch.equal(degrade_real(hr, name, make_generator(5), codec=codec)[0], lr)
    assert [s for s, _ in replay_steps(hr, record)] == record["steps"]


def test_pictures_of_a_batch_do_not_touch(hr):
    _, record = degrade_real(hr, "real-esrgan", make_generator(1))
    other = hr.clone()
    other[1:] = 0.5
    for step in record["steps"]:  # each step alone: the first picture does not notice the others
        torch.testing.assert_close(STEPS[step["op"]](hr, step)[0], STEPS[step["op"]](other, step)[0])
    assert replay(hr.double(), record).dtype == torch.float64


def flat(level, batch=8, side=96):
    return torch.full((batch, 3, side, side), level, dtype=torch.float64)


def noise_step(kind, level, gray, batch=8):
    return dict(part="round 1", op="noise", kind=kind, level=[level] * batch, gray=gray, seed=11, device="cpu")


@pytest.mark.parametrize("gray", [False, True])
def test_gaussian_noise_has_its_level(gray):
    noise = STEPS["noise"](flat(0.5), noise_step("gaussian", 20.0, [gray] * 8)) - 0.5
    assert abs(noise.std() * 255 / 20 - 1) < 0.02 and abs(noise.mean()) < 1e-3
    if gray: assert torch.equal(noise[:, 0], noise[:, 2])
    else: assert abs(np.corrcoef(noise[:, 0].flatten(), noise[:, 2].flatten())[0, 1]) < 0.02


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("level", [0.5, 1.5])
def test_poisson_noise_has_its_variance(gray, level):
    columns = (torch.arange(96, dtype=torch.float64) * 2 + 40).round() / 255  # 96 levels: 128 values
    x = columns.expand(8, 3, 96, 96)
    noise = STEPS["noise"](x, noise_step("poisson", level, [gray] * 8)) - x
    inner = slice(20, 70)  # nothing is clamped there
    wanted = level**2 * columns / 128
    measured = (noise[..., inner] ** 2).mean((0, 1, 2))
    ratio = (measured / wanted[inner]).mean()
    assert abs(ratio - 1) < 0.03 and noise[..., inner].mean().abs() < 2e-3
    slope = np.polyfit(columns[inner], measured, 1)[0]
    assert abs(slope / (level**2 / 128) - 1) < 0.15


def test_one_flat_colour_counts_single_photons():
    noisy = STEPS["noise"](flat(128 / 255, 1), noise_step("poisson", 1.0, [False], 1))
    assert set(noisy.unique().tolist()) <= {0.0, 1.0}


def test_draws_follow_the_recipe():
    g, records = make_generator(7), []
    for _ in range(600):
        records.append(draw_record("resshift", (2, 3, 256, 256), g))
    first = [[s for s in r["steps"] if s["part"] == "round 1"] for r in records]
    resizes = [next(s for s in steps if s["op"] == "resize") for steps in first]
    shares = np.array([[s["size"][0] > 256, s["size"][0] < 256, s["size"][0] == 256] for s in resizes]).sum(0)
    assert stats.chisquare(shares, np.array([0.2, 0.7, 0.1]) * 600).pvalue > 1e-3
    down = [s["size"][0] / 256 for s in resizes if s["size"][0] < 256]
    assert stats.kstest(down, stats.uniform(0.15, 0.85).cdf).pvalue > 1e-3
    assert stats.chisquare([sum(s["mode"] == m for s in resizes) for m in ("area", "bilinear", "bicubic")]).pvalue > 1e-3
    noise = [next(s for s in steps if s["op"] == "noise") for steps in first]
    gaussian = [v for s in noise if s["kind"] == "gaussian" for v in s["level"]]
    poisson = [v for s in noise if s["kind"] == "poisson" for v in s["level"]]
    assert stats.binomtest(len(gaussian), 1200, 0.5).pvalue > 1e-4
    assert stats.kstest(gaussian, stats.uniform(1, 29).cdf).pvalue > 1e-3
    assert stats.kstest(poisson, stats.uniform(0.05, 2.95).cdf).pvalue > 1e-3
    assert stats.binomtest(sum(v for s in noise for v in s["gray"]), 1200, 0.4).pvalue > 1e-3
    second = sum(any(s["part"] == "round 2" for s in r["steps"]) for r in records)
    assert stats.binomtest(second, 600, 0.5).pvalue > 1e-3
    last = [[s["op"] for s in r["steps"] if s["part"] == "end"] for r in records]
    assert stats.binomtest(sum(ops[0] == "resize" for ops in last), 600, 0.5).pvalue > 1e-3
    ends = [s for r in records for s in r["steps"] if s["part"] == "end"]
    assert all(s["size"] == [64, 64] for s in ends if s["op"] == "resize")
    sincs = [k for s in ends if s["op"] == "blur" for k in s["kernels"]]
    assert stats.binomtest(sum(k is not None for k in sincs) , 1200, 0.8).pvalue > 1e-3
    assert {k["family"] for k in sincs if k} == {"sinc"} and max(k["size"] for k in sincs if k) <= 13


def test_recipes_hold_the_published_numbers():
    a, b = RECIPES["dossr"].rounds
    assert a.blur.sizes == b.blur.sizes == (7, 21) and a.blur.sigma == (0.2, 3.0) and b.blur.sigma == (0.2, 1.5)
    assert b.blur_prob == 0.8 and b.resize_prob == (0.3, 0.4, 0.3) and b.resize_range == (0.3, 1.2) and b.relative_to == "lr"
    assert (b.gaussian_range, b.poisson_range, b.jpeg_range) == ((1, 25), (0.05, 2.5), None)
    assert RECIPES["real-esrgan"].sharpen and RECIPES["dit4sr"].sharpen and not RECIPES["dossr"].sharpen
    assert RECIPES["dit4sr"].rounds[1].blur.sizes == (7, 11) and RECIPES["resshift"].rounds[1].prob == 0.5
    face, strong = RECIPES["gfpgan-face"], RECIPES["resshift-face"]
    assert face.rounds[0].divisor == (0.8, 8) and strong.rounds[0].divisor == (0.8, 32) and strong.color.gray_target
    assert face.rounds[0].blur.sigma == (0.1, 10) and strong.rounds[0].blur.sigma == (0.1, 15) and face.scale == 1


def test_faces_lose_colours_and_the_target_may_too(hr):
    color = ColorRecipe(shift_prob=1.0, gray_prob=1.0, gray_target=True, jitter_prob=1.0)
    lr, record = degrade_real(hr, replace(RECIPES["gfpgan-face"], color=color), make_generator(0))
    assert [s["op"] for s in record["steps"] if s["part"] == "colour"] == ["shift", "gray", "jitter"]
    assert lr.shape == hr.shape and all(len(a) == 4 for s in record["steps"] if s["op"] == "jitter" for a in s["adjustments"])
    target = training_target(hr, record)
    torch.testing.assert_close(target, to_gray(hr).expand_as(hr))
    assert torch.equal(training_target(hr, degrade_real(hr, "dossr", make_generator(0))[1]), hr)
    assert torch.equal(training_target(hr, degrade_real(hr, "dit4sr", make_generator(0))[1]), usm_sharpen(hr))


def test_degrade_leads_to_the_recipes_by_name(hr):
    lr, record = degrade(hr, 4, "real-esrgan", generator=make_generator(2))
    assert torch.equal(lr, degrade_real(hr, "real-esrgan", make_generator(2))[0]) and record["recipe"] == "real-esrgan"
    assert degrade(hr, 2, "dossr", generator=make_generator(2))[0].shape == (3, 3, 32, 40)
    with pytest.raises(ConfigError, match="Did you mean 'real-esrgan'"): degrade(hr, kernel="realesrgan")
    with pytest.raises(ConfigError, match="noise_std"): degrade(hr, kernel="dossr", noise_std=(0.1, 0.2))


def test_a_tiny_picture_survives():
    for seed in range(4):
        lr, _ = degrade_real(torch.rand(1, 3, 4, 8, generator=make_generator(seed)), "real-esrgan", make_generator(seed))
        assert lr.shape == (1, 3, 1, 2) and lr.isfinite().all()


def test_back_to_the_size_of_hr(hr):
    lr, record = degrade_real(hr, replace(RECIPES["dossr"], resize_back=True), make_generator(0))
    assert lr.shape == hr.shape and torch.equal((lr * 255).round() / 255, lr) and record["recipe"] == "custom"


def test_a_pool_keeps_every_pair_and_mixes_batches():
    pool, seen = PairPool(8, make_generator(0)), []
    for i in range(12):
        lr = torch.arange(4 * i, 4 * i + 4.0).reshape(4, 1, 1, 1).expand(4, 3, 1, 1).clone()
        a, b = pool(lr, lr + 100)
        assert torch.equal(a + 100, b)
        seen += a[:, 0, 0, 0].int().tolist()
    fresh = seen[8:]  # the first two batches come back while the pool fills, and once more later
    assert len(set(fresh)) == len(fresh) and fresh != sorted(fresh) and len(pool.pairs[0]) == 8
    kept = pool.pairs[0][:, 0, 0, 0].int().tolist()
    assert sorted(fresh + kept) == list(range(48))


@pytest.mark.parametrize("call", [
    lambda: PairPool(6)(rand(4, 3, 8, 8), rand(4, 3, 8, 8)),
    lambda: blur_kernel(4, 1.0), lambda: blur_kernel(5, 0.0), lambda: blur_kernel(5, 1.0, profile="box"), lambda: sinc_kernel(5, 0),
    lambda: sinc_kernel(5, 3.2), lambda: filter2d(rand(1, 3, 8, 8), torch.ones(4, 4)), lambda: filter2d(rand(1, 3, 8, 8), torch.ones(2, 3, 3)),
    lambda: KernelRecipe(sizes=(7, 6)), lambda: KernelRecipe(probabilities=(1.0,)), lambda: KernelRecipe(sigma=(0, 1)),
    lambda: KernelRecipe(beta_plateau=(2, 3)), lambda: KernelRecipe(sinc_prob=2), lambda: KernelRecipe(sinc_low=(0, 4)),
    lambda: make_kernel({}), lambda: make_kernel(dict(family="iso", size=9, sigma=1.0), 7), lambda: usm_sharpen(rand(1, 3, 8, 8), radius=0),
    lambda: jpeg(rand(1, 3, 8, 8), 101), lambda: jpeg(rand(1, 3, 8, 8), [50, 50]), lambda: jpeg(rand(1, 3, 8, 8), 50, "cv2"),
    lambda: jpeg(rand(1, 3, 8, 8), 50, subsampling="4:1:1"), lambda: adjust(rand(1, 3, 8, 8), "gamma", 1), lambda: adjust(rand(1, 3, 8, 8), "hue", 1),
    lambda: Round(prob=2), lambda: Round(resize_prob=(0.5, 0.5, 0.5)), lambda: Round(resize_range=(0.2, 0.9)), lambda: Round(modes=("nearest",)),
    lambda: Round(gaussian_range=(5, 1)), lambda: Round(jpeg_range=(0, 50)), lambda: Round(relative_to="hr"), lambda: Round(divisor=(0, 2)),
    lambda: Recipe(scale=2.5), lambda: Recipe(final_orders=("sinc",)), lambda: Recipe(final_modes=()), lambda: ColorRecipe(hue=(-1, 1)),
    lambda: degrade_real(rand(1, 3, 8, 8), "esrgan"), lambda: degrade_real(rand(1, 3, 8, 8), 3), lambda: degrade_real(rand(1, 3, 8, 8), codec="gif")])
def test_wrong_parameters_are_named(call):
    with pytest.raises(ConfigError) as error:
        call()
    assert "xpected" in str(error.value) or "cannot" in str(error.value) or "no centre" in str(error.value)


def test_wrong_pictures_are_named(hr):
    _, record = degrade_real(hr, "dossr", make_generator(0))
    for call in (lambda: degrade_real(hr[..., :63]), lambda: degrade_real(hr[0]), lambda: replay(hr[:2], record), lambda: usm_sharpen(hr[0])):
        with pytest.raises(ImageError): call()
    with pytest.raises(ConfigError, match="sharpen"):
        replay(hr, dict(record, steps=[dict(part="end", op="sharp")]))
