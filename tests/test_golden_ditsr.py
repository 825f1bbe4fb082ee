"DiT-SR against stored results of the official code (weights and inputs are seeded random numbers)."
import hashlib
import json

import pytest
import torch

from dit_sr_kit.checkpoints import load_official, official_manifest
from dit_sr_kit.layers import AdaFM, adafm_kernel, adafm_matrix, window_attention_mask
from dit_sr_kit.layers.adafm import symmetrise
from dit_sr_kit.models.dit_sr import AdaFMBlock
from tests.goldens import golden_folders

TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-9}
BLOCK_KEYS = {"scale_msa.linear.": "adaLN_scale_msa.1.", "scale_mlp.linear.": "adaLN_scale_mlp.1.",
              "attn.bias_table": "attn.relative_position_bias_table"}


@pytest.fixture
def load(golden):
    "Tensors and description of one fixture."
    return lambda name: golden("ditsr", name)


@pytest.fixture
def check(golden_report):
    "Compare within the tolerance of the dtype."
    return lambda fixture, quantity, got, want: golden_report.check(fixture, quantity, got, want,
                                                                    TOLERANCE[want.dtype])


def weights_of(tensors):
    return {key[2:]: value for key, value in tensors.items() if key.startswith("w.")}


@pytest.mark.parametrize("impl", ["matrix", "fft"])
def test_adafm(load, check, impl):
    g, _ = load("adafm_module")
    check("adafm_module", f"y, {impl}", AdaFM(impl=impl)(g["x"], g["scale"]), g["y"])
    x, scale = g["x"].double(), g["scale"].double()
    check("adafm_module", f"y, {impl}", AdaFM(impl=impl)(x, scale), g["y_f64"])
    check("adafm_module", "kernel", adafm_kernel(scale), g["kernel_f64"])
    check("adafm_module", "matrix", adafm_matrix(scale), g["matrix_f64"])
    check("adafm_module", "symmetrised scale", symmetrise(g["scale"]), g["scale_symmetrised"])


@pytest.mark.parametrize("name", ["block_noshift", "block_shift", "block_res_eq_window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block(load, check, name, dtype):
    g, about = load(name)
    config = about["config"]
    block = AdaFMBlock(config["dim"], config["num_heads"], config["emb_channels"], config["input_resolution"][0],
                       config["window_size"], config["shift_size"] > 0, config["mlp_ratio"]).eval()
    weights, state = weights_of(g), {}
    for ours in block.state_dict():
        theirs = ours
        for a, b in BLOCK_KEYS.items(): theirs = theirs.replace(a, b)
        state[ours] = weights[theirs]
    block.load_state_dict(state)
    block.to(dtype)
    effective = about["effective"]
    assert block.attn.window_size == effective["window_size"] and block.attn.shift_size == effective["shift_size"]
    assert block.adafm.block_size == effective["fft_patch_size"]
    suffix = "" if dtype == torch.float32 else "_f64"
    for i in (0, 1):
        x, emb = g[f"io{i}.x"].to(dtype), g[f"io{i}.emb"].to(dtype)
        with torch.no_grad():
            check(name, f"io{i}.out", block(x, emb), g[f"io{i}.out{suffix}"])
            if not suffix: check(name, f"io{i}.scale_msa", block.scale_msa(emb), g[f"io{i}.scale_msa"])
        mask = window_attention_mask(*x.shape[-2:], block.attn.window_size, block.attn.shift_size)
        assert torch.equal(mask, g[f"io{i}.mask_used"].float())


@pytest.mark.parametrize("name,more", [("denoiser_adafm", {}), ("denoiser_adaln", {"time_conditioning": "adaln"})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("adafm_impl,attention_impl", [("matrix", "sdpa"), ("fft", "explicit")])
def test_denoiser(load, check, name, more, dtype, adafm_impl, attention_impl):
    g, about = load(name)
    model = load_official("dit-sr", weights_of(g), about["config"] | more).to(dtype)
    for module in model.modules():
        impl = getattr(module, "impl", None)
        if impl: module.impl = adafm_impl if impl == "matrix" else attention_impl
    suffix = "" if dtype == torch.float32 else "_f64"
    for i in (0, 1):
        if f"io{i}.x" not in g: continue
        x, t, lq = g[f"io{i}.x"].to(dtype), g[f"io{i}.t"], g[f"io{i}.lq"].to(dtype)
        with torch.no_grad(): out = model(x, t, lq)
        check(name, f"io{i}.out, {adafm_impl}, {attention_impl}", out, g[f"io{i}.out{suffix}"])


@pytest.mark.parametrize("name,more", [("denoiser_adafm", {}), ("denoiser_adaln", {"time_conditioning": "adaln"})])
def test_denoiser_inside(load, check, name, more):
    "Intermediate maps, so that a difference can be placed."
    g, about = load(name)
    model = load_official("dit-sr", weights_of(g), about["config"] | more)
    seen = {}
    inside = {"time_embed": model.time_embedding, "input_blocks.0": model.conv_in,
              "input_blocks.1": model.encoder[0].layer, "middle_block": model.middle,
              "output_blocks.0": model.decoder[0], "output_blocks.1": model.decoder[1]}
    for key, module in inside.items():
        module.register_forward_hook(lambda _, args, out, key=key: seen.update({key: out}))
    with torch.no_grad(): model(g["io0.x"][:1], g["io0.t"][:1], g["io0.lq"][:1])
    for key in inside: check(name, key, seen[key], g[f"trace.{key}"])


MANIFESTS = {  # preset: official configuration, number of keys, SHA-256 of the sorted {key: shape} as JSON
    "dit-sr": ("ditsr_realsr_DiT", 1152, "60eeb0b7fde7dc4ab6deb861756be006f2986dce1a48982cf84386631a96dbad"),
    "dit-sr-lite": ("ditsr_realsr_DiT_Lite", 648, "1420b34e5ccb918de48101fbfb1b17228d9e99de90879defb35f0455cc0a0903"),
    "dit-sr-face": ("ditsr_faceir_DiT", 1164, "a58091dd77835161602382dea273c7c31f814478f97aa6f6a110fc0720cba507"),
}


@pytest.mark.parametrize("preset", MANIFESTS)
def test_manifest(preset):
    "Keys and shapes of the official state: by fingerprint, and key by key where the list is at hand."
    name, count, fingerprint = MANIFESTS[preset]
    ours = official_manifest("dit-sr", preset)
    for folder in [path for f in golden_folders() for path in (f, f.parent)]:
        path = folder / "manifests" / "ditsr" / f"{name}.json"
        if path.exists():
            listed = json.loads(path.read_text())
            assert ours == {key: tuple(shape) for key, shape, *_ in listed["keys"]}
            assert ours == official_manifest("dit-sr", listed["constructor_params"])
    text = json.dumps({key: list(shape) for key, shape in ours.items()}, sort_keys=True)
    assert len(ours) == count and hashlib.sha256(text.encode()).hexdigest() == fingerprint
