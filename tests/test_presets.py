"The table of presets: it builds, it is consistent, and nobody can change it by accident."
import pytest
import torch

from dit_sr_kit import ConfigError
from dit_sr_kit.models import autoencoders
from dit_sr_kit.presets import build, preset, presets
from dit_sr_kit.schedulers import ResShiftScheduler
from dit_sr_kit.schedulers.flow import FlowMatchScheduler, JiTFlowScheduler

NAMES = list(presets())


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_builds(name):
    model = build(name, device="meta")
    assert all(p.is_meta for p in model.parameters()) and not model.training
    row = preset(name)
    assert presets()[name] == row.description and "\n" not in row.description
    row.process(**row.scheduler)


@pytest.mark.parametrize("name", [n for n in NAMES if preset(n).autoencoder == "SpaceToDepth"])
def test_the_parts_of_a_preset_fit(name):
    row = preset(name)
    autoencoder = getattr(autoencoders, row.autoencoder)(**row.autoencoder_config)
    model, scheduler = build(name), row.process(**row.scheduler)
    side = model.size_multiple
    hr = torch.rand(1, 3, side * autoencoder.factor, side * autoencoder.factor)
    z = autoencoder.encode(hr)
    assert z.shape == (1, row.config["in_channels"], side, side)
    lr = torch.rand(1, 3, hr.shape[-2] // row.scale, hr.shape[-1] // row.scale)
    given = (lr,)
    if row.process is FlowMatchScheduler:  # reads the LR latent, and a text
        given = (z, torch.zeros(1, 4, 16), torch.zeros(1, 16))
    with torch.no_grad(): assert model(z, scheduler.timesteps[0], *given).shape == z.shape
    if row.process in (FlowMatchScheduler, JiTFlowScheduler): return
    known = row.config["preconditioning"]
    if row.process is ResShiftScheduler:
        assert known["sqrt_etas"] == scheduler.sqrt_etas.tolist() and known["kappa"] == scheduler.config.kappa
    else:
        assert known["alphas_cumprod"] == scheduler.alphas_cumprod_full.tolist()
        assert known["etas"] == scheduler.etas_full.tolist() and known["anchored"] == (name != "dossr-tiny-prior")
    assert known["scale"] == row.scale


def test_sizes_in_the_descriptions():
    for name in NAMES:
        words = presets()[name].split(" M parameters")[0].rsplit(" ", 1)
        if "M parameters" in presets()[name]:
            assert f"{sum(p.numel() for p in build(name, device='meta').parameters()) / 1e6:.1f}" == words[-1], name


def test_a_row_is_a_copy():
    row = preset("dit-sr-tiny")
    row.config["preconditioning"]["kappa"] = 9
    row.config["depth"] = 9
    row.scheduler["kappa"] = 9
    again = preset("dit-sr-tiny")
    assert again.config["preconditioning"]["kappa"] == again.scheduler["kappa"] == 2.0 and again.config["depth"] == 2
    with pytest.raises(AttributeError): row.scale = 2


def test_changes():
    assert build("dit-sr", device="meta", depth=3).config.depth == 3
    assert build("dit-sr-tiny", dropout=0.5).config.dropout == 0.5


@pytest.mark.parametrize("call,word", [
    (lambda: build("dit-sr-tinny"), "Did you mean 'dit-sr-tiny'"), (lambda: preset("unet"), "Known presets"),
    (lambda: build("dit-sr", device="meta", dept=3), "Did you mean 'depth'"), (lambda: build("dit-sr", device="tpu"), "tpu")])
def test_errors(call, word):
    with pytest.raises(ConfigError, match=word): call()
