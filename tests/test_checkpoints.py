"Official files: every family maps both ways, nothing is executed, and an error says what is wrong."
import argparse
import hashlib
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from dit_sr_kit.checkpoints import (OFFICIAL_SYSTEMS, checkpoint_report, load_official, official_manifest,
                                    read_weights)
from dit_sr_kit.core import CheckpointError, ConfigError
from dit_sr_kit.models import DiTSR, ResShiftUNet
from dit_sr_kit.official.common import official_state, rename_keys
from dit_sr_kit.presets import build
from tests.goldens import golden_folders

DIT_SR = dict(image_size=16, in_channels=3, out_channels=3, model_channels=32, channel_mult=[1, 2],
              attention_resolutions=[16, 8], swin_depth=2, swin_embed_dim=32, num_head_channels=16,
              window_size=4, mlp_ratio=2, cond_lq=True, lq_size=16)
RESSHIFT = DIT_SR | dict(num_res_blocks=[1, 1], use_scale_shift_norm=True, resblock_updown=False)
CONFIGS = {"dit-sr": DIT_SR, "resshift": RESSHIFT}


def small(system, seed=0):
    "A small network and its weights under the authors' names."
    row = OFFICIAL_SYSTEMS[system]
    torch.manual_seed(seed)
    model = row.from_config(CONFIGS[system]).eval()
    for p in model.parameters():  # no layer may stay at zero
        if not p.any(): torch.nn.init.normal_(p, std=0.05)
    return model, {key: value.clone() for key, value in official_state(row, model).items()}


def inputs():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(1, 3, 16, 16, generator=generator), torch.tensor([5]),
            torch.randn(1, 3, 16, 16, generator=generator))


# ---- manifests -------------------------------------------------------------------------------------------------
PARAMS = dict(image_size=64, in_channels=3, model_channels=160, out_channels=3, attention_resolutions=[64, 32, 16, 8],
              dropout=0, channel_mult=[1, 2, 2, 4], num_res_blocks=[2, 2, 2, 2], conv_resample=True, dims=2,
              use_fp16=False, num_head_channels=32, use_scale_shift_norm=True, resblock_updown=False, swin_depth=2,
              swin_embed_dim=192, window_size=8, mlp_ratio=4, cond_lq=True, lq_size=64)
SINSR = {k: v for k, v in PARAMS.items() if k != "lq_size"} | dict(in_channels=6)
RELEASED = {  # configuration, parameters, keys
    "resshift_realsr_swinunet_realesrgan256": (PARAMS, 118_593_583, 564),
    "resshift_realsr_swinunet_realesrgan256_journal": (PARAMS, 118_593_583, 564),
    "resshift_bicx4_swinunet_lpips": (PARAMS, 118_593_583, 564),
    "sinsr_unetmodelswin": (SINSR, 118_593_583, 564),
    "resshift_faceir_gfpgan512_lpips": (PARAMS | dict(in_channels=8, out_channels=8, lq_size=512), 118_931_604, 576),
    "resshift_inpaint_lama256_imagenet": (PARAMS | dict(lq_size=256, cond_mask=True), 118_714_399, 572),
}
FINGERPRINTS = {  # SHA-256 of the sorted {key: shape} as JSON
    "resshift_realsr_swinunet_realesrgan256":
        "152214f081e6d02351792c6654d48d5ce56812f047a58f672880a532e7074558",
    "resshift_realsr_swinunet_realesrgan256_journal":
        "152214f081e6d02351792c6654d48d5ce56812f047a58f672880a532e7074558",
    "resshift_bicx4_swinunet_lpips":
        "152214f081e6d02351792c6654d48d5ce56812f047a58f672880a532e7074558",
    "sinsr_unetmodelswin":
        "152214f081e6d02351792c6654d48d5ce56812f047a58f672880a532e7074558",
    "resshift_faceir_gfpgan512_lpips":
        "d36739c8b2299fbb4411ce5b8e06be8648df7c55cef51a98b038fa5694cf73e7",
    "resshift_inpaint_lama256_imagenet":
        "0b25fc15a7a4f7f44bb69452eac12636eef760a3957e957214d1c5942a309d43",
}


def fingerprint(manifest):
    text = json.dumps({key: list(shape) for key, shape in manifest.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("name", RELEASED)
def test_released_resshift_networks(name):
    "Keys and shapes of the official state: by fingerprint, and key by key where the list is at hand."
    config, parameters, count = RELEASED[name]
    ours = official_manifest("resshift", config)
    assert len(ours) == count and fingerprint(ours) == FINGERPRINTS[name]
    with torch.device("meta"): model = OFFICIAL_SYSTEMS["resshift"].from_config(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    back = OFFICIAL_SYSTEMS["resshift"].key_map(model)
    assert set(back) == set(model.state_dict()) and len(set(back.values())) == len(back) and set(back.values()) < set(ours)
    for folder in [path for f in golden_folders() for path in (f, f.parent)]:
        path = folder / "manifests" / "ditsr" / f"{name}.json"
        if path.exists():
            listed = json.loads(path.read_text())
            assert listed["constructor_params"] == config
            assert ours == {key: tuple(shape) for key, shape, *_ in listed["keys"]}


def test_the_preset_is_the_released_network():
    assert official_manifest("resshift", "resshift") == official_manifest("resshift", PARAMS)


def test_the_condition_among_the_input_channels():
    "SinSR's class counts 3 + 3 input channels where ResShift's counts 3: the same network."
    with torch.device("meta"):
        models = [OFFICIAL_SYSTEMS["resshift"].from_config(config) for config in (PARAMS, SINSR)]
    assert [m.config.in_channels for m in models] == [3, 3]
    assert models[0].conv_in.weight.shape == models[1].conv_in.weight.shape == (160, 6, 3, 3)


# ---- loading ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("system", CONFIGS)
@pytest.mark.parametrize("form", ["mapping", "safetensors", "pth", "old pth", "training pth", "shards", "half"])
def test_every_form_of_file(system, form, tmp_path):
    model, weights = small(system)
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors": save_file(weights, path)
    if form == "pth": torch.save(weights, path)
    if form == "old pth": torch.save(weights, path, _use_new_zipfile_serialization=False)
    if form == "training pth":
        inner = {"module._orig_mod." + key: value for key, value in weights.items()}
        torch.save({"iters_start": 5, "log_step": {"train": 1}, "amp_scaler": {}, "state_dict": inner}, path)
    if form == "shards":
        path = tmp_path / "shards"
        path.mkdir()
        keys = list(weights)
        for i, part in enumerate((keys[::2], keys[1::2])):
            save_file({k: weights[k] for k in part}, path / f"model-{i + 1}-of-2.safetensors")
        index = {k: f"model-{i % 2 + 1}-of-2.safetensors" for i, k in enumerate(keys)}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    source = weights if form == "mapping" else path
    if form == "half": source = {key: value.half() for key, value in weights.items()}
    loaded = load_official(system, source, CONFIGS[system])
    assert not loaded.training and loaded.dtype == torch.float32 and type(loaded) is type(model)
    if form != "half":
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    with torch.no_grad(): difference = (loaded(*inputs()) - model(*inputs())).abs().max()
    assert difference < (0.1 if form == "half" else 1e-5)  # files lie in memory otherwise than fresh tensors


@pytest.mark.parametrize("system", CONFIGS)
def test_there_and_back(system):
    "Our state under official names, loaded again, is our state."
    model, weights = small(system)
    again = load_official(system, weights, CONFIGS[system])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    again_official = official_state(OFFICIAL_SYSTEMS[system], again)
    assert list(again_official) == list(weights)
    weights["out.2.bias"].zero_()  # what we pass in stays ours
    assert torch.equal(again.conv_out.bias, model.conv_out.bias)


def test_report():
    model, weights = small("resshift")
    buffers = OFFICIAL_SYSTEMS["resshift"].buffers(model)
    report = checkpoint_report("resshift", {"state_dict": {"module." + k: v.half() for k, v in (weights | buffers).items()}},
                               RESSHIFT)
    assert report.fits and report.wrappers == ("state_dict", "module.") and report.dtypes == ("float16",)
    assert len(report.mapped) == len(weights) and set(report.buffers) == set(buffers) and report.network == "ResShiftUNet"
    assert report.parameters == sum(p.numel() for p in model.parameters())
    text = str(report)
    for word in ("fit", "float16", "state_dict, module.", f"{report.parameters:,}", f"{len(buffers)} in the file"): assert word in text


def test_a_level_of_a_training_checkpoint(tmp_path):
    first, second = (small("resshift", seed)[1] for seed in (0, 1))
    path = tmp_path / "training.pth"
    torch.save({"model": first, "model_ema1": second, "epoch": 3, "args": argparse.Namespace(lr=1e-4)}, path)
    for which, weights in (("model", first), ("model_ema1", second)):
        loaded = load_official("resshift", path, RESSHIFT, which=which)
        assert torch.equal(loaded.conv_out.weight, weights["out.2.weight"])
    with pytest.raises(CheckpointError, match="Did you mean 'model_ema1'.*model, model_ema1"):
        load_official("resshift", path, RESSHIFT, which="model_ema2")
    with pytest.raises(CheckpointError, match="one bare state"): read_weights(first, which="model")
    with pytest.raises(CheckpointError, match="twice"): read_weights({"module.a": torch.zeros(1), "a": torch.zeros(1)})


# ---- what does not fit -----------------------------------------------------------------------------------------
def test_another_system_is_named():
    with torch.device("meta"): lite = build("dit-sr-lite", device="meta")
    shapes = {k: torch.zeros(s.shape, device="meta") for k, s in official_state(OFFICIAL_SYSTEMS["dit-sr"], lite).items()}
    with pytest.raises(CheckpointError, match="They fit preset 'dit-sr-lite' of system 'dit-sr'"):
        load_official("dit-sr", shapes, "dit-sr")
    with pytest.raises(CheckpointError, match="They fit preset 'dit-sr-lite' of system 'dit-sr'"):
        load_official("resshift", shapes, "resshift")
    ours = {key: value for key, value in small("dit-sr")[0].state_dict().items()}
    with pytest.raises(CheckpointError, match="DiTSR.from_pretrained"): load_official("dit-sr", ours, DIT_SR)
    with pytest.raises(CheckpointError, match="look like system 'resshift'"):
        load_official("dit-sr", {k: torch.zeros(1) for k in official_manifest("resshift", "resshift")}, "dit-sr")


@pytest.mark.parametrize("system", CONFIGS)
def test_every_misfit_is_listed(system):
    _, weights = small(system)
    del weights["time_embed.0.bias"]
    weights["out.9.weight"], weights["out.2.bias"] = torch.zeros(1), torch.zeros(4)
    weights["out.0.weight"] = torch.full_like(weights["out.0.weight"], torch.nan)
    weights["out.0.bias"] = torch.zeros(weights["out.0.bias"].shape, dtype=torch.int8)
    weights["time_embed.2.bias"] = "text"
    report = checkpoint_report(system, weights, CONFIGS[system])
    assert not report.fits and report.missing == ("time_embed.0.bias",) and report.left_over == ("out.9.weight",)
    assert len(report.wrong) == 4
    with pytest.raises(CheckpointError) as error: load_official(system, weights, CONFIGS[system])
    for word in ("missing (1)", "time_embed.0.bias", "left over (1)", "out.9.weight", "out.2.bias: (4,), expected (3,)",
                 "NaN", "int8", "a str"):
        assert word in str(error.value)
    assert str(error.value) == str(report)


def test_configurations_that_we_refuse():
    for change, word in ((dict(use_scale_shift_norm=False), "use_scale_shift_norm is False"),
                         (dict(resblock_updown=True), "resblock_updown is True"), (dict(cond_lq=False), "cond_lq"),
                         (dict(swin_dept=2), "Did you mean 'swin_depth'"), (dict(num_res_blocks=[1, 1, 1]), "num_res_blocks")):
        with pytest.raises(ConfigError, match=word): official_manifest("resshift", RESSHIFT | change)
    with pytest.raises(ConfigError, match="needs a ResShiftUNet"): official_manifest("resshift", "dit-sr-lite")
    with pytest.raises(CheckpointError, match="no official name"): rename_keys(["new.weight"], {"old": "x"}, {})


# ---- files that are not what they seem -------------------------------------------------------------------------
class Canary:
    "A pickle that makes a folder when it is opened the old way."

    def __init__(self, path): self.path = str(path)

    def __reduce__(self): return os.mkdir, (self.path,)


@pytest.mark.parametrize("where", ["state", "beside", "inside", "alone", "plain pickle", "old format"])
def test_nothing_is_executed(where, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "weights.pth"
    _, weights = small("resshift")
    content = {"state": {"state_dict": Canary(canary)}, "beside": {"state_dict": weights, "extra": Canary(canary)},
               "inside": weights | {"out.2.bias": Canary(canary)}}.get(where, Canary(canary))
    if where == "plain pickle": path.write_bytes(pickle.dumps(content, protocol=2))
    else: torch.save(content, path, _use_new_zipfile_serialization=where != "old format")
    with pytest.raises(CheckpointError, match="it asks for (posix|nt).mkdir.*do not run"): load_official("resshift", path, RESSHIFT)
    assert not canary.exists()
    if where == "alone":  # the canary does sing when it is let
        torch.load(path, weights_only=False)
        assert canary.exists()


def test_the_error_does_not_advise_to_run_it(tmp_path):
    torch.save(Canary(tmp_path / "canary"), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError) as error: read_weights(tmp_path / "weights.pth")
    assert "weights_only" not in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize("content,word", [
    (b"", "empty"), (b"<!DOCTYPE html><html>404</html>", "web page"), (b"\n<html>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "LFS pointer"), (b"PK\x03\x04 cut", "cannot be read"),
    (b"nonsense", "cannot be read"), (b"\x80\x02}q\x00.", "cannot be read|holds")])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files(content, word, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=word): load_official("dit-sr", path, DIT_SR)


@pytest.mark.parametrize("form", ["pth", "old pth", "safetensors"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_download_that_broke_off(form, part, tmp_path):
    _, weights = small("dit-sr")
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors": save_file(weights, path)
    else: torch.save(weights, path, _use_new_zipfile_serialization=form == "pth")
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * part)])
    with pytest.raises(CheckpointError, match="w.*cannot be read.*download is complete"): read_weights(path)


def test_folders(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"): read_weights(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="holds no .safetensors"): read_weights(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{")
    with pytest.raises(CheckpointError, match="index.json cannot be read"): read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match="lacks outside.safetensors"): read_weights(tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"): read_weights(tmp_path / "list.pth")


# ---- sizes -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", [DiTSR, ResShiftUNet])
def test_a_size_that_the_network_cannot_take(model):
    "Both networks halve three times and then need a window of eight: multiples of 64."
    with torch.device("meta"):
        network = model()
        assert network.size_multiple == 64
        with pytest.raises(ConfigError, match="multiples of 64.*Nearest valid size: 128x64.*by padding: 128x128"):
            network(torch.zeros(1, 3, 100, 70), torch.tensor([0]), torch.zeros(1, 3, 100, 70))
        with pytest.raises(ConfigError, match="Nearest valid size: 64x64"):
            network(torch.zeros(1, 3, 1, 64), torch.tensor([0]), torch.zeros(1, 3, 1, 64))
        with pytest.raises(ConfigError, match="condition is 32x64; expected 64x64"):
            network(torch.zeros(1, 3, 64, 64), torch.tensor([0]), torch.zeros(1, 3, 32, 64))
