"DiT-SR: counts, sizes, saving, and the translation of official files."
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from dit_sr_kit.checkpoints import (OFFICIAL_SYSTEMS, dit_sr_key_map, load_official, official_manifest, read_weights)
from dit_sr_kit.core import CheckpointError, ConfigError
from dit_sr_kit.models import DiTSR
from dit_sr_kit.models.dit_sr import AdaFMBlock, AdaLNBlock

USHAPE = dict(hidden_size=None, num_heads=5, tail_depth=2, time_conditioning="adaln")
LITE = dict(base_channels=128, attention_resolutions=(64, 32, 16), depth=4, hidden_size=160)
SMALL = dict(sample_size=16, base_channels=32, channel_mult=(1, 2), attention_resolutions=(16, 8), depth=2,
             hidden_size=32, attention_head_dim=16, window_size=4, mlp_ratio=2.0, cond_size=16)
OFFICIAL = dict(image_size=16, in_channels=3, out_channels=3, model_channels=32, channel_mult=[1, 2],
                attention_resolutions=[16, 8], swin_depth=2, swin_embed_dim=32, num_head_channels=16,
                window_size=4, mlp_ratio=2, dropout=0.1, cond_lq=True, lq_size=16, conv_resample=True, dims=2,
                use_fp16=False)


def small(seed=0, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DiTSR(**{**SMALL, **changes}).eval()


def inputs(height=16, width=16, batch=2, cond_ratio=1):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(batch, 3, height, width, generator=g), torch.arange(batch),
            torch.randn(batch, 3, height * cond_ratio, width * cond_ratio, generator=g))


@pytest.mark.parametrize("config,count", [
    ({}, 60_789_631), (LITE, 30_894_862), (dict(in_channels=8, out_channels=8, cond_size=512), 61_127_652),
    (dict(time_conditioning="adaln"), 100_644_447), (USHAPE, 264_388_953), (dict(USHAPE, depth=4), 196_650_943),
    (dict(USHAPE, base_channels=144, num_heads=4), 214_198_059)],
    ids=["dit-sr", "lite", "face", "adaln", "ushape", "ushape-shallow", "ushape-narrow"])
def test_parameter_counts(config, count):
    with torch.device("meta"): model = DiTSR(**config)
    assert sum(p.numel() for p in model.parameters()) == count
    assert not list(model.buffers())


def test_dit_sr_has_58_blocks_and_their_windows():
    with torch.device("meta"): model = DiTSR()
    blocks = [m for m in model.modules() if isinstance(m, AdaFMBlock)]
    assert len(blocks) == 58
    assert {(b.attn.window_size, b.attn.num_heads, b.adafm.block_size) for b in blocks} == {(8, 6, 8)}
    assert [b.attn.shift_size for b in model.encoder[0].layer.blocks] == [0, 4, 0, 4, 0, 4]
    assert [b.attn.shift_size for b in model.middle.blocks] == [0] * 6
    assert model.size_multiple == 64


@pytest.mark.parametrize("size", [(16, 16), (32, 16), (48, 80)])
@pytest.mark.parametrize("conditioning", ["adafm", "adaln"])
def test_any_size_the_windows_tile(size, conditioning):
    model = small(time_conditioning=conditioning)
    with torch.no_grad(): assert model(*inputs(*size)).shape == (2, 3, *size)


def test_other_sizes_name_the_nearest():
    model = small()
    with pytest.raises(ConfigError) as e: model(*inputs(40, 21))
    assert "40x21" in str(e.value) and "multiples of 16" in str(e.value)
    assert "48x16" in str(e.value) and "48x32" in str(e.value)
    with pytest.raises(ConfigError, match="16x16"): model(*inputs(3, 5))
    x, t, cond = inputs()
    with pytest.raises(ConfigError, match="expected 16x16"): model(x, t, cond[..., :8])
    assert small(time_conditioning="adaln").size_multiple == 8  # windows of 4 at the second level; no FFT


def test_impossible_configurations():
    for changes, word in [(dict(time_conditioning="film"), "adafm"), (dict(sample_size=15), "halved"),
                          (dict(cond_size=24), "power of two"), (dict(adafm_impl="dct"), "matrix"),
                          (dict(num_heads=5), "divisor")]:
        with pytest.raises(ConfigError, match=word): small(**changes)


def test_implementations_agree_and_samples_do_not_mix():
    x, t, cond = inputs()
    with torch.no_grad():
        want = small()(x, t, cond)
        torch.testing.assert_close(small(adafm_impl="fft")(x, t, cond), want, atol=1e-5, rtol=0)
        torch.testing.assert_close(small()(x[1:], t[1:], cond[1:]), want[1:], atol=1e-5, rtol=0)
        torch.testing.assert_close(small()(x[1:], 1, cond[1:]), want[1:], atol=1e-5, rtol=0)


def test_a_larger_condition_is_brought_to_size():
    model = small(cond_size=64)
    assert [tuple(s["down"].weight.shape[:2]) for s in model.cond_extractor.stages] == [(32, 16), (64, 32)]
    with torch.no_grad(): assert model(*inputs(cond_ratio=4)).shape == (2, 3, 16, 16)


def test_level_without_attention_still_has_a_middle():
    model = small(attention_resolutions=(16,))
    assert model.encoder[1].layer is None and model.decoder[0].layer is None and len(model.middle.blocks) == 2
    with torch.no_grad(): model(*inputs())


def test_new_adaln_blocks_are_the_identity():
    model = small(time_conditioning="adaln")
    block = next(m for m in model.modules() if isinstance(m, AdaLNBlock))
    x = torch.randn(1, 32, 8, 8)
    assert torch.equal(block(x, torch.randn(1, 128)), x)


def test_dropout_is_off_in_eval_and_construction_is_reproducible():
    a, b, args = small(3), small(3), inputs()
    with torch.no_grad():
        assert torch.equal(a(*args), b(*args))
        assert not torch.equal(a.train()(*args), b(*args))


def test_float64_and_autocast_run():
    x, t, cond = inputs()
    model = small().double()
    with torch.no_grad():
        want = model(x.double(), t, cond.double())
        assert want.dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16): half = model.float()(x, t, cond)
    assert (half.double() - want).abs().max() < 0.05 * want.std() + 0.05


def test_save_and_load(tmp_path):
    model, args = small(hidden_size=None, num_heads=2, tail_depth=2), inputs()
    model.save_pretrained(tmp_path)
    again = DiTSR.from_pretrained(tmp_path)
    with torch.no_grad(): assert torch.equal(model(*args), again(*args))
    assert again.config.hidden_size is None and again.config.tail_depth == 2


def test_preconditioning_starts_at_the_linear_estimate():
    etas = torch.linspace(0.02, 0.99, 15).tolist()
    model = small(in_channels=48, out_channels=48, preconditioning=dict(sqrt_etas=etas))
    x, t, cond = torch.randn(2, 48, 16, 16), torch.tensor([0, 14]), torch.randn(2, 3, 16, 16)
    torch.nn.init.zeros_(model.conv_out.weight)
    torch.nn.init.zeros_(model.conv_out.bias)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, cond), model.preconditioner.linear_estimate(x, t, cond))
    assert not any("preconditioner" in key for key in model.state_dict())
    DiTSR.from_config(json.loads(model.to_json_string()))


# ---------------------------------------------------------------- official files
def official(model):
    return {theirs: model.state_dict()[ours] for ours, theirs in dit_sr_key_map(model).items()}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_wrappers_come_off(prefix, wrapped):
    model, args = small(), inputs()
    weights = {prefix + key: value for key, value in official(model).items()}
    if wrapped: weights = {"iters_start": 3, "log_step": {}, "state_dict": weights}
    loaded = load_official("dit-sr", weights, OFFICIAL)
    with torch.no_grad(): assert torch.equal(loaded(*args), model(*args))
    assert not loaded.training


def test_files_of_every_kind(tmp_path):
    model, args = small(), inputs()
    weights = {key: value.contiguous() for key, value in official(model).items()}
    save_file(weights, tmp_path / "one.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "two.pth")
    shards = tmp_path / "shards"
    shards.mkdir()
    keys = sorted(weights)
    for name, part in (("a", keys[:40]), ("b", keys[40:])):
        save_file({k: weights[k] for k in part}, shards / f"{name}.safetensors")
    with torch.no_grad():
        for path in (tmp_path / "one.safetensors", str(tmp_path / "two.pth"), shards):
            assert torch.equal(load_official("dit-sr", path, OFFICIAL)(*args), model(*args))


def test_loading_shares_no_memory_with_the_mapping():
    weights = official(small())
    before = {key: value.clone() for key, value in weights.items()}
    loaded = load_official("dit-sr", weights, OFFICIAL)
    with torch.no_grad():
        for p in loaded.parameters(): p.add_(1)
    assert all(torch.equal(weights[key], before[key]) for key in weights)
    assert all(p.requires_grad for p in loaded.parameters())


class Evil:
    def __reduce__(self):
        return os.system, ("echo should not run",)


def test_a_file_cannot_run_code(tmp_path, capfd):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="safetensors"): read_weights(tmp_path / "evil.pth")
    with open(tmp_path / "plain.pth", "wb") as f: pickle.dump(Evil(), f)
    with pytest.raises(CheckpointError): read_weights(tmp_path / "plain.pth")
    assert "should not run" not in capfd.readouterr().out


def test_unreadable_files(tmp_path):
    for name in ("broken.safetensors", "broken.pth"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(CheckpointError, match="broken"): read_weights(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    for path in (tmp_path / "list.pth", tmp_path / "absent.pth", tmp_path):
        with pytest.raises(CheckpointError): read_weights(path)


def test_every_key_that_does_not_fit_is_named():
    weights = official(small())
    del weights["time_embed.0.bias"]
    weights["out.9.weight"] = torch.zeros(1)
    weights["out.2.bias"] = torch.zeros(4)
    with pytest.raises(CheckpointError) as e: load_official("dit-sr", weights, OFFICIAL)
    message = str(e.value)
    assert "missing (1):\n  time_embed.0.bias" in message and "left over (1):\n  out.9.weight" in message
    assert "out.2.bias: (4,), expected (3,)" in message


def test_buffers_may_be_there_and_are_compared():
    model = small()
    buffers = OFFICIAL_SYSTEMS["dit-sr"].buffers(model)
    assert len(buffers) == 17 and sum(key.endswith("attn_mask") for key in buffers) == 5
    load_official("dit-sr", official(model) | buffers, OFFICIAL)
    averaged = {key: value * 0.99999 if key.endswith("mask") else value for key, value in buffers.items()}
    load_official("dit-sr", official(model) | averaged, OFFICIAL)
    key = "input_blocks.1.0.blocks.1.attn_mask"
    with pytest.raises(CheckpointError, match="expected \\(16, 16, 16\\)"):
        load_official("dit-sr", official(model) | {key: buffers[key][:1]}, OFFICIAL)
    with pytest.raises(CheckpointError, match=f"{key}: its values"):
        load_official("dit-sr", official(model) | {key: buffers[key].flip(0)}, OFFICIAL)


def test_manifest_is_a_bijection():
    with torch.device("meta"): model = DiTSR(**SMALL)
    keys = dit_sr_key_map(model)
    assert set(keys) == set(model.state_dict()) and len(set(keys.values())) == len(keys)
    assert len(official_manifest("dit-sr", OFFICIAL)) == len(keys) + 17


def test_unknown_names_get_a_hint():
    with pytest.raises(ConfigError, match="swin_depth"): load_official("dit-sr", {}, OFFICIAL | {"swin_dept": 2})
    with pytest.raises(ConfigError, match="dit-sr"): load_official("ditsr", {}, OFFICIAL)
    with pytest.raises(ConfigError, match="cond_lq"): load_official("dit-sr", {}, OFFICIAL | {"cond_lq": False})
