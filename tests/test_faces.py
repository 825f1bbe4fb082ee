"The pipeline for faces at small size, its published structure, and the metrics with stand-ins."
import importlib.util
import math
import os
import sys
import types
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn

from dit_sr_kit import presets
from dit_sr_kit.checkpoints import OFFICIAL_SYSTEMS
from dit_sr_kit.core import CheckpointError, ConfigError, ImageError, MissingExtra, WeightsUnavailable, make_generator
from dit_sr_kit.faces import (arcface, face_crop, fan_landmarks, heatmap_points, identity_angle, identity_similarity,
                              landmark_distance)
from dit_sr_kit.images import to_signed, to_unit
from dit_sr_kit.models import DiTSR, VQAutoencoder
from dit_sr_kit.official.vqgan import vqgan_key_map
from dit_sr_kit.pipelines import SRPipeline
from dit_sr_kit.presets import build, preset
from dit_sr_kit.real_degradations import degrade_real

SMALL = dict(base_channels=32, channel_mult=(1, 2), attention_resolutions=(16, 8), depth=1, hidden_size=32, attention_head_dim=16,
             mlp_ratio=1.0, sample_size=16, cond_size=128)
STAGE = dict(base_channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=(1, 1, 1, 1), num_codes=16, sample_size=128)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Two files with the authors' names and random numbers, and the parts they came from."
    torch.manual_seed(0)
    row = preset("dit-sr-face")
    stage_config = {**row.autoencoder_config, **STAGE}
    network, stage = DiTSR(**{**row.config, **SMALL}).eval(), VQAutoencoder(**stage_config).eval()
    nn.init.normal_(stage.quantizer.codebook, std=0.3)
    official = lambda model, key_map: {"module." + theirs: model.state_dict()[ours] for ours, theirs in key_map(model).items()}
    folder = tmp_path_factory.mktemp("faces")
    torch.save(official(network, OFFICIAL_SYSTEMS["dit-sr"].key_map), folder / "network.pth")
    torch.save({"state_dict": official(stage, vqgan_key_map)}, folder / "stage.pth")
    small = replace(row, config={**row.config, **SMALL}, autoencoder_config=stage_config)
    return folder, small, network, stage


@pytest.fixture(scope="module")
def pipe(files):
    folder, small, *_ = files
    with mock.patch.dict(presets._PRESETS, {"dit-sr-face": small}):
        return SRPipeline.from_official("dit-sr-face", folder / "network.pth", folder / "stage.pth", device="cpu")


def test_from_the_authors_files(files, pipe):
    _, _, network, stage = files
    for ours, theirs in ((network, pipe.model), (stage, pipe.autoencoder)):
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    assert pipe.scale == 1 and pipe.autoencoder.factor == 8 and pipe.name == "dit-sr-face" and pipe.lr_multiple == 128
    torch.testing.assert_close(pipe.scheduler.sqrt_etas, torch.tensor([0.1, 0.5200963722, 0.7613819906, 0.99], dtype=torch.float64),
                               rtol=0, atol=1e-9)


def test_four_evaluations_and_no_enlargement(pipe):
    face = degrade_real(torch.rand(1, 3, 128, 128, generator=make_generator(0)), "resshift-face", make_generator(4))[0]
    assert face.shape == (1, 3, 128, 128)
    out = pipe(face, seed=0, record=True, progress=False)
    assert out.images[0].size == (128, 128) and [r.timestep for r in out.trajectory] == [3, 2, 1, 0]
    assert all(r.sample.shape == (1, 8, 16, 16) for r in out.trajectory)
    again = pipe(face, seed=0, progress=False).images[0]
    assert again.tobytes() == out.images[0].tobytes()
    assert pipe(face[..., :100, :90], seed=0, num_inference_steps=1, progress=False).images[0].size == (90, 100)


def test_who_knows_the_answer_gets_it(pipe):
    hr, lr = torch.rand(2, 1, 3, 128, 128, generator=make_generator(1))
    with torch.no_grad():
        truth, cond = (pipe.autoencoder.encode(to_signed(x)) for x in (hr, lr))
        wanted = to_unit(pipe.autoencoder.decode(truth)).clamp(0, 1)
    states = []
    with mock.patch.object(pipe.model, "forward", lambda sample, timestep, given: truth):
        got = pipe.sample(lr, generator=make_generator(0), on_step=lambda i, t, x, step, to_image: states.append((int(t), x)))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    for t, x in states:                                                        # the marginals: mean and spread
        eta = pipe.scheduler.sqrt_etas[t].item() ** 2
        spread = (x - truth - eta * (cond - truth)).std().item() / (2 * eta**0.5)
        assert abs(spread - 1) < 0.1


def test_missing_files(files):
    folder, small, *_ = files
    with mock.patch.dict(presets._PRESETS, {"dit-sr-face": small}):
        with pytest.raises(WeightsUnavailable, match="autoencoder_weights"):
            SRPipeline.from_official("dit-sr-face", folder / "network.pth")
    with pytest.raises(WeightsUnavailable, match="from_official"):
        SRPipeline.from_preset("dit-sr-face")


def test_published_structure():
    row = preset("dit-sr-face")
    with torch.device("meta"), torch.no_grad():
        network, stage = build("dit-sr-face", "meta"), VQAutoencoder(**row.autoencoder_config).eval()
        face = torch.zeros(1, 3, 512, 512)
        latent = stage.encode(face)
        assert latent.shape == (1, 8, 64, 64)
        assert network(latent, torch.zeros(1, dtype=torch.long), face).shape == latent.shape
        assert stage.decode(latent, quantize=False).shape == face.shape
    assert sum(p.numel() for p in network.parameters()) == 61_127_652
    assert sum(p.numel() for p in stage.parameters()) == 77_009_115
    assert SRPipeline(network, row.process(**row.scheduler), stage, row.scale).lr_multiple == 512


def unit(x):
    flat = x.flatten(1).double()
    return nn.functional.normalize(flat - flat.mean(1, keepdim=True), dim=1)


def test_identity():
    x = torch.rand(3, 3, 16, 16, generator=make_generator(0))
    torch.testing.assert_close(identity_similarity(x, x, unit), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(identity_similarity(1 - x, x, unit), -torch.ones(3, dtype=torch.float64))
    assert identity_angle(x, x, unit).max() < 1e-3 and identity_angle(1 - x, x, unit).min() > 179.9
    turned = lambda angle: lambda x: torch.tensor([[math.cos(angle * x[0, 0, 0, 0]), math.sin(angle * x[0, 0, 0, 0])]])
    assert abs(identity_angle(torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1), turned(0.5)).item() - math.degrees(0.5)) < 1e-3
    with pytest.raises(ImageError, match="one size"):
        identity_similarity(x, x[..., :8, :8], unit)
    with pytest.raises(ConfigError, match="length 1"):
        identity_similarity(x, x, lambda x: x.flatten(1))


def test_landmarks():
    at = lambda x: x[:, :, 0, :2].reshape(len(x), 3, 2) * 10
    a = torch.zeros(2, 3, 4, 4)
    b = a.clone()
    b[0, :, 0, 0], b[0, :, 0, 1], b[1, 0, 0, 0] = 0.3, 0.4, 0.9
    torch.testing.assert_close(landmark_distance(a, b, at), torch.tensor([5.0, 3.0]))
    with pytest.raises(ImageError, match="one size"):
        landmark_distance(a, b[..., :2], at)


def test_face_crop():
    x = torch.rand(2, 3, 256, 256, generator=make_generator(0))
    torch.testing.assert_close(face_crop(x, 188), x[..., 35:223, 32:220])
    torch.testing.assert_close(face_crop(x, 94), nn.functional.avg_pool2d(x[..., 35:223, 32:220], 2))
    large = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(face_crop(large, 94), face_crop(x, 94))
    with pytest.raises(ImageError):
        face_crop(x[:, :1])


def test_heatmap_points():
    grid = torch.arange(64.0)
    bell = lambda x, y: torch.exp(-((grid[None, :] - x) ** 2 + (grid[:, None] - y) ** 2) / 8)
    points = torch.tensor([[[20.3, 41.2], [5.0, 60.7]], [[0.0, 0.0], [63.0, 31.5]]])
    found = heatmap_points(torch.stack([torch.stack([bell(x, y) for x, y in face]) for face in points]))
    assert (found - points).abs().max() <= 0.5 and found[0, 0].tolist() == [20.25, 41.25]
    assert found[1, 0].tolist() == [0, 0]                                       # no step over the border


class FakeBackbone(nn.Module):
    def __init__(self, layers, drop, mode):
        super().__init__()
        self.linear = nn.Linear(3 * 112 * 112, 4)
    def forward(self, x):
        assert x.shape[1:] == (3, 112, 112) and -1 <= x.min() and x.max() <= 1
        return self.linear(x.flatten(1))


class FakeFAN(nn.Module):
    "One bell per channel, at places that are its weights; the last channel is the outline."
    def __init__(self, num_modules, num_landmarks, device):
        super().__init__()
        self.places = nn.Parameter(torch.zeros(num_landmarks, 2))
    def forward(self, x):
        assert x.shape[1:] == (3, 256, 256)
        grid = torch.arange(64.0)
        maps = [torch.exp(-((grid[None, :] - u) ** 2 + (grid[:, None] - v) ** 2) / 8) for u, v in self.places]
        return [None, torch.stack([*maps, 2 * maps[0]])[None].expand(len(x), -1, -1, -1)], None


@pytest.fixture
def facexlib(monkeypatch):
    "Modules with the names of facexlib's."
    for name, members in (("facexlib", {}), ("facexlib.recognition", {}), ("facexlib.alignment", {}),
                          ("facexlib.recognition.arcface_arch", dict(Backbone=FakeBackbone)),
                          ("facexlib.alignment.awing_arch", dict(FAN=FakeFAN))):
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)


def test_arcface_adapter(facexlib, tmp_path):
    weights = FakeBackbone(50, 0.6, "ir_se").state_dict()
    torch.save(weights, tmp_path / "arcface.pth")
    embed = arcface(tmp_path / "arcface.pth", device="cpu")
    x = torch.rand(2, 3, 64, 64, generator=make_generator(0))
    e = embed(x)
    wanted = nn.functional.linear(to_signed(face_crop(x)).flatten(1), weights["linear.weight"], weights["linear.bias"])
    torch.testing.assert_close(e, nn.functional.normalize(wanted, dim=1))
    torch.testing.assert_close(identity_similarity(x, x, embed), torch.ones(2))
    torch.testing.assert_close(arcface(weights, "cpu")(x), e)
    with pytest.raises(CheckpointError, match="do not fit FakeBackbone"):
        arcface({"other": torch.zeros(1)}, "cpu")
    with pytest.raises(CheckpointError, match="does not exist"):
        arcface(tmp_path / "absent.pth", "cpu")


def test_landmark_adapter(facexlib):
    places = torch.stack([torch.arange(98.0) % 60, torch.arange(98.0) / 2], dim=1)
    landmarks = fan_landmarks({"state_dict": {"places": places}}, device="cpu")
    found = landmarks(torch.rand(2, 3, 128, 512))
    assert found.shape == (2, 98, 2)
    assert (found[0] / torch.tensor([8.0, 2.0]) - places).abs().max() <= 0.5    # cells to pixels, each side by its own factor


def test_weights_that_cannot_be_had(facexlib, monkeypatch, tmp_path):
    def offline(url, path, progress): raise OSError("no network")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for adapter, name in ((arcface, "recognition_arcface_ir_se50.pth"), (fan_landmarks, "alignment_WFLW_4HG.pth")):
        with pytest.raises(WeightsUnavailable, match=name):
            adapter(device="cpu")

    def download(url, path, progress): torch.save(FakeBackbone(50, 0.6, "ir_se").state_dict(), path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    arcface(device="cpu")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    arcface(device="cpu")                                                       # the file is there now


def test_missing_extra(monkeypatch):
    for name in list(sys.modules):
        if name == "facexlib" or name.startswith("facexlib."): monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "facexlib", None)
    for adapter in (arcface, fan_landmarks):
        with pytest.raises(MissingExtra, match=r"dit_sr_kit\[metrics\]"):
            adapter(device="cpu")


@pytest.mark.skipif(not os.environ.get("DIT_SR_SLOW") or importlib.util.find_spec("facexlib") is None, reason="slow, and needs the extra metrics")
def test_the_real_classes_with_random_weights():
    from facexlib.alignment.awing_arch import FAN
    from facexlib.recognition.arcface_arch import Backbone

    x = torch.rand(1, 3, 512, 512, generator=make_generator(0))
    assert arcface(Backbone(50, 0.6, "ir_se").state_dict(), "cpu")(x).shape == (1, 512)
    assert fan_landmarks(FAN(num_modules=4, num_landmarks=98, device="cpu").state_dict(), "cpu")(x).shape == (1, 98, 2)
