"DiT-SR: counts, sizes, saving, and the translation of official files."
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from dit_sr_kit.checkpoints import OFFICIAL_SYSTEMS, load_official, official_manifest, read_weights
from dit_sr_kit.core import CheckpointError, ConfigError
from dit_sr_kit.models import DiTSR
from dit_sr_kit.models.dit_sr import AdaFMBlock, AdaLNBlock
from dit_sr_kit.official.dit_sr import dit_sr_key_map

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


# ---------------------------------------------------------------- prepared steps, compilation, half precision
def counted(model):
    "The model, and a list that grows by one whenever it computes a time embedding: the unprepared way."
    calls = []
    model.time_embedding.register_forward_hook(lambda *_: calls.append(1))
    return model, calls


@pytest.mark.parametrize("more", [{}, dict(time_conditioning="adaln"), dict(adafm_impl="fft"), dict(cond_size=64)])
@torch.no_grad()
def test_prepared_steps_give_the_same(more):
    model, (x, _, cond) = small(**more).double(), inputs(cond_ratio=more.get("cond_size", 16) // 16)
    x, cond = x.double(), cond.double()
    if "time_conditioning" in more:  # these start at zero and would hide an error
        for block in model.blocks(): torch.nn.init.normal_(block.modulation.linear.weight, std=0.1)
    keys = list(model.state_dict())
    want = {t: model(x, t, cond) for t in (0, 3, 14)}
    model, calls = counted(model)
    model.prepare(torch.arange(15))
    assert len(calls) == 1 and list(model.state_dict()) == keys
    for t in want:
        for given in (t, torch.tensor(t), torch.tensor([t, t])):
            torch.testing.assert_close(model(x, given, cond), want[t], atol=1e-12, rtol=0)
    model.prepare(range(15))
    model.prepare(7)
    assert len(calls) == 1                                          # nothing was computed again
    mixed = model(x, torch.tensor([0, 3]), cond)
    torch.testing.assert_close(mixed, torch.cat([want[0][:1], want[3][1:]]), atol=1e-12, rtol=0)
    model(x, 20, cond)
    assert len(calls) == 3                                          # mixed and unknown steps take the long way


WRITES = {
    "in place": lambda m: m.blocks()[3].scale_mlp.linear.bias.add_(1),
    "through .data": lambda m: m.blocks()[3].scale_mlp.linear.bias.data.add_(1),
    "time embedding": lambda m: m.time_embedding.linear_2.weight.mul_(2),
    "load_state_dict": lambda m: m.load_state_dict(small(1).state_dict()),
    "load_state_dict, assigned": lambda m: m.load_state_dict(small(1).state_dict(), assign=True),
    "another layer": lambda m: setattr(m.blocks()[0], "scale_msa", small(1).blocks()[0].scale_msa),
    "float64": lambda m: m.double(),
    "bfloat16 and back": lambda m: m.bfloat16().float(),
    "training": lambda m: m.train().eval(),
}


@pytest.mark.parametrize("change", WRITES)
@torch.no_grad()
def test_prepared_steps_are_never_stale(change):
    model, (x, _, cond) = small(), inputs()
    model.prepare(range(15))
    before = model(x, 3, cond)
    WRITES[change](model)
    model, calls = counted(model)
    x, cond = x.to(model.dtype), cond.to(model.dtype)
    got = model(x, 3, cond)
    assert calls, "the old steps were used"
    fresh = small().to(model.dtype)
    if change == "another layer": WRITES[change](fresh)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(got, fresh(x, 3, cond), atol=1e-6, rtol=0)
    model.prepare(range(15))
    torch.testing.assert_close(model(x, 3, cond), got, atol=1e-5, rtol=0)
    if change in ("in place", "time embedding", "load_state_dict"): assert not torch.allclose(got, before)


def test_gradients_and_training_do_not_use_prepared_steps():
    model, (x, _, cond) = small(), inputs()
    model.prepare([3])
    model(x, 3, cond).sum().backward()
    assert model.blocks()[0].scale_msa.linear.weight.grad is not None
    model.train().prepare([3])                                     # nothing to keep while weights move
    assert not model._prepared.steps


@torch.no_grad()
def test_copies_are_independent():
    import copy

    model, (x, _, cond) = small(), inputs()
    model.prepare([3])
    want = model(x, 3, cond)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x, 3, cond), want, atol=1e-5, rtol=0)
    twin.blocks()[0].scale_msa.linear.bias.add_(1)
    assert not torch.allclose(twin(x, 3, cond), want) and torch.equal(model(x, 3, cond), want)


COMPACT = dict(SMALL, sample_size=8, channel_mult=(1,), attention_resolutions=(8,), cond_size=8, depth=1)  # 4 blocks


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
@torch.no_grad()
def test_compiles_without_graph_breaks():
    model, (x, t, cond) = small(**COMPACT), inputs(8, 8)
    want = model(x, t, cond)
    whole = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(x, t, cond), want, atol=1e-5, rtol=0)
    shifted = AdaFMBlock(32, 2, 24, 16, shifted=True).eval()
    y, temb = torch.randn(2, 32, 16, 16), torch.randn(2, 24)
    compiled = torch.compile(shifted, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(y, temb), shifted(y, temb), atol=1e-5, rtol=0)
    want = [model(x, t, cond) for t in range(4)]
    model.prepare(range(4))
    model.denoise = torch.compile(model.denoise, fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    for t in range(4): torch.testing.assert_close(model(x, t, cond), want[t], atol=1e-5, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # one graph for all time steps


@pytest.mark.parametrize("prepared", [False, True])
@torch.no_grad()
def test_autocast_is_sound(prepared):
    "bfloat16 products, float32 spectra and norms: the error is that of rounding, also far from zero."
    model, (x, _, cond) = small(), inputs()
    want = model.double()(x.double(), 3, cond.double())
    model.float()
    seen = {}
    block = model.blocks()[0]
    block.adafm.register_forward_hook(lambda _, args, out: seen.update(adafm=args[0].dtype))
    if prepared: model.prepare([3])
    with torch.autocast("cpu", torch.bfloat16): half = model(x, 3, cond)
    assert half.isfinite().all() and (half.double() - want).std() < 0.02 * want.std()
    if prepared: assert all(m.dtype == torch.float32 for m in model._prepared.steps[3][0])


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
