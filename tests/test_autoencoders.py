"The autoencoders without weights and the KL adapter: shapes, order, losslessness, scaling, saving, errors."
import pytest
import torch
import torch.nn.functional as F

from dit_sr_kit.core import ConfigError, ImageError
from dit_sr_kit.models.autoencoders import IdentityAutoencoder, SpaceToDepth
from dit_sr_kit.schedulers import ResShiftScheduler


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("patch", [1, 2, 3, 4, 8])
def test_space_to_depth_is_pixel_unshuffle_and_lossless(patch):
    autoencoder, x = SpaceToDepth(patch), randn(2, 3, 3 * patch, 5 * patch)
    z = autoencoder.encode(x)
    assert (autoencoder.factor, autoencoder.latent_channels) == (patch, 3 * patch**2)
    assert z.shape == (2, autoencoder.latent_channels, 3, 5)
    assert torch.equal(z, F.pixel_unshuffle(x, patch)) and torch.equal(autoencoder.decode(z), x)


def test_identity_returns_its_argument():
    autoencoder, x = IdentityAutoencoder(), randn(1, 3, 5, 7)
    assert autoencoder.encode(x) is x and autoencoder.decode(x) is x
    assert (autoencoder.factor, autoencoder.latent_channels) == (1, 3)


def test_diffusion_of_the_code_is_the_code_of_the_diffusion():
    autoencoder, scheduler = SpaceToDepth(4), ResShiftScheduler()
    x0, y, noise = (randn(1, 3, 8, 8, seed=s) for s in range(3))
    code = autoencoder.encode
    for t in (0, 7, 14):
        x_t = scheduler.add_noise(x0, noise, t, y)
        assert torch.equal(scheduler.add_noise(code(x0), code(noise), t, code(y)), code(x_t))
        step = scheduler.step(x0, t, x_t, noise=noise).prev_sample
        assert torch.equal(scheduler.step(code(x0), t, code(x_t), noise=code(noise)).prev_sample, code(step))


@pytest.mark.parametrize("autoencoder", [IdentityAutoencoder(), SpaceToDepth(2)], ids=["identity", "space-to-depth"])
def test_saving_and_loading(autoencoder, tmp_path):
    autoencoder.save_pretrained(tmp_path / "part")
    again = type(autoencoder).from_pretrained(tmp_path / "part", use_safetensors=True)
    x = randn(1, 3, 4, 6)
    assert again.to("cpu") is again
    assert torch.equal(again.encode(x), autoencoder.encode(x)) and again.factor == autoencoder.factor


def test_errors_say_what_to_do():
    with pytest.raises(ImageError, match="190x192.*multiples of 4.*pad_to_multiple"):
        SpaceToDepth(4).encode(torch.zeros(1, 3, 190, 192))
    with pytest.raises(ImageError, match="16 channels.*48"):
        SpaceToDepth(4).decode(torch.zeros(1, 16, 8, 8))
    with pytest.raises(ConfigError, match="patch_size=0"):
        SpaceToDepth(0)


# ---------------------------------------------------------------- diffusers' AutoencoderKL
KINDS = {
    "like Stable Diffusion 2.1": dict(),
    "like Stable Diffusion 3": dict(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
}


@pytest.fixture(params=KINDS)
def theirs(request):
    "A tiny AutoencoderKL of diffusers."
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
                             up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16,
                             **KINDS[request.param]).double().eval()


def test_kl_autoencoder_scales_and_shifts(theirs, tmp_path):
    from dit_sr_kit.models.kl_autoencoder import KLAutoencoder

    theirs.save_pretrained(tmp_path / "theirs")  # a folder of diffusers loads as it is
    ours, x = KLAutoencoder.from_pretrained(tmp_path / "theirs", torch_dtype=torch.float64), randn(2, 3, 16, 24)
    scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor or 0.0
    assert (ours.factor, ours.latent_channels) == (2, 4) and not ours.training
    draw = lambda: torch.Generator().manual_seed(7)
    with torch.no_grad():
        cloud = theirs.encode(x).latent_dist
        z = ours.encode(x)
        assert z.shape == (2, 4, 8, 12)
        torch.testing.assert_close(z, (cloud.mean - shift) * scale)
        torch.testing.assert_close(ours.encode(x, draw()), (cloud.sample(draw()) - shift) * scale)
        assert not torch.equal(ours.encode(x, draw()), z)
        torch.testing.assert_close(ours.decode(z), theirs.decode(cloud.mean).sample)
        torch.testing.assert_close(ours(x), ours.decode(z))
        ours.save_pretrained(tmp_path / "ours")
        assert torch.equal(KLAutoencoder.from_pretrained(tmp_path / "ours", torch_dtype=torch.float64)(x), ours(x))
    before = torch.random.get_rng_state()
    with torch.no_grad(): ours.encode(x)
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(ImageError, match="15x16.*multiples of 2"): ours.encode(x[..., :15, :16])
    with pytest.raises(ImageError, match="3 channels.*4"): ours.decode(randn(1, 3, 8, 8))
