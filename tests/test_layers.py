"Embeddings, windows, modulation and AdaFM against independent statements of what they should do."
import copy
import math

import pytest
import torch

from dit_sr_kit.core import ConfigError
from dit_sr_kit.layers import (AdaFM, AdaLNModulation, FrequencyScale, MapNorm, TimestepEmbedder, WindowAttention,
                               adafm_kernel, adafm_matrix, modulate, timestep_embedding, window_attention_mask)
from dit_sr_kit.layers.adafm import symmetrise
from dit_sr_kit.layers.windows import merge_windows, partition_windows, relative_position_index


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------- embeddings
def test_embedding_has_cosines_first_and_pads_odd_lengths():
    got = timestep_embedding(torch.tensor([0, 3]), 7)
    want = [[math.cos(t * 10000 ** (-k / 3)) for k in range(3)] + [math.sin(t * 10000 ** (-k / 3)) for k in range(3)]
            + [0.0] for t in (0, 3)]
    torch.testing.assert_close(got, torch.tensor(want), atol=1e-6, rtol=0)
    assert got.dtype == torch.float32


def test_embedder_follows_the_dtype_of_its_weights():
    for dtype in (torch.float64, torch.bfloat16):
        assert TimestepEmbedder(8, 16).to(dtype)(torch.tensor([1, 2])).dtype == dtype


# ---------------------------------------------------------------- windows
def test_windows_are_cut_row_by_row():
    x = torch.arange(2 * 4 * 6).view(2, 1, 4, 6)
    tokens = partition_windows(x, 2)
    assert tokens.shape == (12, 4, 1)
    assert tokens[1, :, 0].tolist() == [2, 3, 8, 9]          # second window of the first row of windows
    assert tokens[3, :, 0].tolist() == [12, 13, 18, 19]      # first window of the second row
    assert torch.equal(merge_windows(tokens, 4, 6, 2), x)


def test_position_index_is_a_table_of_displacements():
    index = relative_position_index(3)
    for i in range(9):
        for j in range(9):
            assert index[i, j] == (i // 3 - j // 3 + 2) * 5 + (i % 3 - j % 3 + 2)


@pytest.mark.parametrize("height,width,window,shift", [(16, 16, 8, 4), (24, 16, 8, 4), (8, 24, 4, 2), (8, 8, 8, 3)])
def test_released_mask_separates_columns_of_the_bottom_row_only(height, width, window, shift):
    mask = window_attention_mask(height, width, window, shift)
    n_rows, n_cols = height // window, width // window
    assert mask.shape == (n_rows * n_cols, window**2, window**2) and mask.dtype == torch.float32
    for w in range(n_rows * n_cols):
        side = [int(i % window >= window - shift) for i in range(window**2)]
        for i in range(0, window**2, 5):
            for j in range(window**2):
                hidden = w // n_cols == n_rows - 1 and side[i] != side[j]
                assert mask[w, i, j] == (-100.0 if hidden else 0.0)


@pytest.mark.parametrize("height,width,window,shift", [(16, 16, 8, 4), (24, 16, 8, 2), (8, 24, 4, 3), (8, 8, 8, 3)])
def test_textbook_mask_separates_what_was_not_together_before_the_shift(height, width, window, shift):
    # after the roll, rows and columns below `shift` have come round from the other side of the map
    row = torch.arange(height).view(1, 1, -1, 1).expand(1, 1, height, width) < shift
    col = torch.arange(width).view(1, 1, 1, -1).expand(1, 1, height, width) < shift
    row, col = (partition_windows(v.roll((-shift, -shift), (2, 3)), window)[..., 0] for v in (row, col))
    together = (row[:, :, None] == row[:, None]) & (col[:, :, None] == col[:, None])
    assert torch.equal(window_attention_mask(height, width, window, shift, "textbook") == 0, together)


def test_no_shift_means_no_mask():
    for style in ("released", "textbook"):
        assert not window_attention_mask(16, 24, 8, 0, style).any()
    with pytest.raises(ConfigError, match="released"):
        window_attention_mask(8, 8, 8, 4, "swin")


@pytest.mark.parametrize("shift", [0, 2])
def test_fused_and_explicit_attention_agree(shift):
    fused = WindowAttention(12, 3, 4, shift).double()
    torch.nn.init.normal_(fused.bias_table)
    explicit = copy.deepcopy(fused)
    explicit.impl = "explicit"
    x = randn(2, 12, 8, 12).requires_grad_()
    torch.testing.assert_close(fused(x), explicit(x), atol=1e-12, rtol=0)
    one, two = (torch.autograd.grad(m(x).square().sum(), [x, m.bias_table, m.qkv.weight]) for m in (fused, explicit))
    for a, b in zip(one, two): torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    weights = fused.attention_weights(x)
    assert weights.shape == (2, 6, 3, 16, 16)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6, 3, 16, dtype=torch.float64))
    q, k, v = fused.windows_qkv(x)
    out = (weights @ v).transpose(2, 3).flatten(3).flatten(0, 1)
    out = merge_windows(fused.proj(out), 8, 12, 4).roll((shift, shift), (2, 3))
    torch.testing.assert_close(out, fused(x), atol=1e-12, rtol=0)


def test_masks_are_not_state_and_survive_inference_mode():
    attention = WindowAttention(8, 2, 4, 2)
    x = torch.randn(1, 8, 8, 8)
    with torch.inference_mode(): attention(x)
    assert sorted(attention.state_dict()) == ["bias_table", "proj.bias", "proj.weight", "qkv.bias", "qkv.weight"]
    attention(x).sum().backward()
    assert attention.bias_table.grad.abs().sum() > 0


def test_window_errors_say_what_to_do():
    with pytest.raises(ConfigError, match="multiple of 4"): WindowAttention(8, 2, 4)(torch.zeros(1, 8, 6, 8))
    with pytest.raises(ConfigError, match="num_heads"): WindowAttention(8, 3, 4)
    with pytest.raises(ConfigError, match="shift_size"): WindowAttention(8, 2, 4, 4)
    with pytest.raises(ConfigError, match="impl"): WindowAttention(8, 2, 4, impl="flash")


# ---------------------------------------------------------------- modulation
def test_map_norm_uses_whole_map_statistics():
    norm = MapNorm(64).double()
    x = randn(2, 64, 4, 6)
    groups = x.view(2, 32, -1)
    want = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), want.view_as(x), atol=1e-12, rtol=0)
    assert MapNorm(144).num_groups == 16 and MapNorm(7).num_groups == 1


def test_map_norm_computes_half_precision_in_float32():
    x = (randn(1, 32, 8, 8, dtype=torch.float32) + 300).half()
    norm = MapNorm(32).half()
    want = torch.nn.functional.group_norm(x.float(), 32).half()
    assert norm(x).dtype == torch.float16
    torch.testing.assert_close(norm(x), want)


@pytest.mark.parametrize("offset", [0, 30, 1000])
def test_map_norm_is_sound_for_channels_last(offset):
    "PyTorch's own kernel for this layout is wrong by 7e-3 at 30 and by far more at 1000."
    x = randn(2, 64, 32, 32, dtype=torch.float32) + offset
    norm = MapNorm(64)
    torch.nn.init.normal_(norm.weight)
    want = torch.nn.functional.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double())
    for layout in (torch.contiguous_format, torch.channels_last):
        got = norm(x.contiguous(memory_format=layout))
        assert got.is_contiguous(memory_format=layout)
        assert (got.double() - want).abs().max() < 5e-6 + 1e-6 * offset
    with torch.no_grad(): half = norm.bfloat16()(x.bfloat16().contiguous(memory_format=torch.channels_last))
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_adaln_chunks_in_order_and_starts_at_zero():
    layer = AdaLNModulation(4, 3)
    assert all(not chunk.any() for chunk in layer(torch.randn(2, 4)))
    with torch.no_grad(): layer.linear.bias.copy_(torch.arange(18.0))
    chunks = layer(torch.randn(2, 4))
    assert [chunk[0].tolist() for chunk in chunks] == [[3.0 * i, 3 * i + 1, 3 * i + 2] for i in range(6)]
    assert len(AdaLNModulation(4, 3, num_chunks=2, zero_init=False)(torch.randn(1, 4))) == 2


def test_modulate_works_on_tokens_and_maps():
    shift, scale = randn(2, 3, seed=1), randn(2, 3, seed=2)
    tokens, maps = randn(2, 5, 3), randn(2, 3, 4, 4)
    torch.testing.assert_close(modulate(tokens, shift, scale)[1, 4], tokens[1, 4] * (1 + scale[1]) + shift[1])
    torch.testing.assert_close(modulate(maps, shift, scale)[1, :, 2, 3], maps[1, :, 2, 3] * (1 + scale[1]) + shift[1])
    with pytest.raises(ConfigError): modulate(randn(2, 3), shift, scale)


# ---------------------------------------------------------------- AdaFM
@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 8])
def test_adafm_forms_agree(p):
    x, scale = randn(2, 3, 2 * p, 3 * p), randn(2, p, p // 2 + 1, seed=1).requires_grad_()
    matrix, fft = AdaFM(impl="matrix")(x, scale), AdaFM(impl="fft")(x, scale)
    torch.testing.assert_close(matrix, fft, atol=1e-12, rtol=0)
    one, two = (torch.autograd.grad(y.square().sum(), scale)[0] for y in (matrix, fft))
    torch.testing.assert_close(one, two, atol=1e-9, rtol=0)


@pytest.mark.parametrize("p", [2, 3, 8])
def test_adafm_from_the_definition(p):
    "With the two-dimensional discrete Fourier transform written as sums."
    scale, x = randn(1, p, p // 2 + 1), randn(1, 1, p, p, seed=1)
    full = torch.zeros(p, p, dtype=torch.float64)
    for k in range(p):
        for c in range(p):
            inside = c <= p // 2
            own, twin = ((k, c), (-k % p, -c % p)) if inside else ((-k % p, -c % p), (-k % p, -c % p))
            if twin[1] <= p // 2 and inside: full[k, c] = (scale[0][own] + scale[0][twin]) / 2
            else: full[k, c] = scale[0][own]
    wave = torch.exp(2j * math.pi * torch.arange(p, dtype=torch.float64)[:, None] * torch.arange(p) / p)
    spectrum = wave.conj() @ x[0, 0].to(torch.complex128) @ wave.conj().T
    want = (wave @ (spectrum * full) @ wave.T) / p**2
    assert want.imag.abs().max() < 1e-12
    torch.testing.assert_close(AdaFM()(x, scale)[0, 0], want.real, atol=1e-12, rtol=0)


@pytest.mark.parametrize("p", [1, 4, 8])
def test_adafm_in_both_memory_layouts_and_with_a_prepared_matrix(p):
    x, scale = randn(2, 3, 2 * p, 3 * p), randn(2, p, p // 2 + 1, seed=1)
    layer = AdaFM(p)
    want, made = AdaFM(p, "fft")(x, scale), layer.matrix(scale)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=layout)
        for matrix in (None, made):
            got = layer(given, scale, matrix)
            torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
            assert got.is_contiguous(memory_format=layout)
    assert AdaFM(p, "fft").matrix(scale) is None
    with torch.autocast("cpu", torch.bfloat16): assert layer.matrix(scale.float()).dtype == torch.float32
    assert layer.matrix(scale.bfloat16()).dtype == torch.float32


def test_adafm_of_ones_is_the_identity():
    x = randn(2, 3, 16, 8)
    torch.testing.assert_close(AdaFM()(x, torch.ones(2, 8, 5, dtype=torch.float64)), x, atol=1e-12, rtol=0)


def test_adafm_matrix_is_a_symmetric_circular_convolution():
    scale = randn(1, 8, 5)
    matrix, kernel = adafm_matrix(scale)[0], adafm_kernel(scale)[0]
    torch.testing.assert_close(matrix, matrix.T, atol=1e-12, rtol=0)      # a real spectrum has an even kernel
    for out, inp in ((0, 0), (13, 62), (63, 1)):
        a, b, c, d = out // 8, out % 8, inp // 8, inp % 8
        assert matrix[out, inp] == kernel[(a - c) % 8, (b - d) % 8]
    torch.testing.assert_close(kernel, torch.fft.irfft2(symmetrise(scale), s=(8, 8))[0], atol=1e-12, rtol=0)
    assert torch.linalg.matrix_rank(randn(40, 40) @ adafm_kernel(torch.eye(40, dtype=torch.float64)
                                                                 .view(40, 8, 5)).flatten(1)) == 34


def test_only_the_symmetric_part_of_the_scale_matters():
    scale, x = randn(1, 8, 5), randn(1, 2, 8, 8, seed=1)
    assert torch.equal(symmetrise(symmetrise(scale)), symmetrise(scale))
    for impl in ("matrix", "fft"):
        torch.testing.assert_close(AdaFM(impl=impl)(x, scale), AdaFM(impl=impl)(x, symmetrise(scale)),
                                   atol=1e-12, rtol=0)


@pytest.mark.parametrize("impl", ["matrix", "fft"])
def test_adafm_keeps_float32_inside_autocast(impl):
    x, scale = randn(1, 4, 16, 16, dtype=torch.float32), randn(1, 8, 5, dtype=torch.float32, seed=1)
    with torch.autocast("cpu", torch.bfloat16): inside = AdaFM(impl=impl)(x, scale)
    assert torch.equal(inside, AdaFM(impl=impl)(x, scale))
    half = AdaFM(impl=impl)(x.bfloat16(), scale.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, AdaFM(impl=impl)(x.bfloat16().float(), scale.bfloat16().float()).bfloat16())


def test_frequency_scale_rows_are_vertical_frequencies():
    layer = FrequencyScale(6, 4)
    with torch.no_grad():
        layer.linear.weight.zero_()
        layer.linear.bias.copy_(torch.arange(12.0))
    assert layer(torch.randn(2, 6))[1].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_adafm_errors_say_what_to_do():
    scale = torch.ones(1, 8, 5)
    with pytest.raises(ConfigError, match="multiple of 8"): AdaFM()(torch.zeros(1, 2, 12, 8), scale)
    with pytest.raises(ConfigError, match="p//2"): AdaFM()(torch.zeros(1, 2, 8, 8), torch.ones(1, 8, 8))
    with pytest.raises(ConfigError, match="p//2"): adafm_matrix(torch.ones(8, 5))
    with pytest.raises(ConfigError, match="block_size 4"): AdaFM(4)(torch.zeros(1, 2, 8, 8), scale)
    with pytest.raises(ConfigError, match="one scale per sample"): AdaFM()(torch.zeros(2, 2, 8, 8), scale)
    with pytest.raises(ConfigError, match="matrix"): AdaFM(impl="dct")
