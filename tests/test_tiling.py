"Tiles: coverage for many sizes, the mean of overlaps, a restorer without randomness, and seams in numbers."
import pytest
import torch

from dit_sr_kit.core import ConfigError, draw_noise
from dit_sr_kit.images import resize
from dit_sr_kit.tiling import NoiseField, TileNoise, blend_tiles, fit_tile, tile_boxes, tile_starts, tile_weights


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cut(x, boxes):
    return (x[..., top:bottom, left:right] for top, bottom, left, right in boxes)


@pytest.mark.parametrize("tile", range(1, 14))
def test_every_pixel_is_covered_and_no_tile_passes_the_border(tile):
    for length in range(1, 45):
        for stride in range(1, tile + 1):
            starts = tile_starts(length, tile, stride)
            assert starts[0] == 0 and starts == sorted(set(starts))
            assert starts[-1] == max(0, length - tile)
            assert all(b - a <= stride for a, b in zip(starts, starts[1:]))
            # the released rule: multiples of the stride; a tile that passes the border is moved back
            moved = [max(0, min(start, length - tile)) for start in range(0, length, stride)]
            assert starts == list(dict.fromkeys(moved))


@pytest.mark.parametrize("blend", ["uniform", "gaussian"])
@pytest.mark.parametrize("height, width, tile, stride", [(20, 33, 8, 7), (8, 8, 8, 7), (5, 40, 16, 8), (3, 2, 8, 8)])
def test_cutting_and_blending_is_the_identity(height, width, tile, stride, blend):
    x, boxes = randn(2, 3, height, width), tile_boxes(height, width, tile, stride)
    assert all(b - t == min(tile, height) and r - l == min(tile, width) for t, b, l, r in boxes)
    torch.testing.assert_close(blend_tiles(cut(x, boxes), boxes, height, width, blend), x)
    torch.testing.assert_close(blend_tiles(cut(x.float(), boxes), boxes, height, width, blend), x.float())


def test_overlaps_are_plain_means():
    boxes = [(0, 2, 0, 3), (0, 2, 1, 4), (1, 3, 0, 4)]
    values = [torch.full((1, 1, b - t, r - l), v) for (t, b, l, r), v in zip(boxes, (1.0, 2.0, 6.0))]
    want = torch.tensor([[1, 1.5, 1.5, 2], [3.5, 3, 3, 4], [6, 6, 6, 6]])
    torch.testing.assert_close(blend_tiles(values, boxes, 3, 4)[0, 0], want)


def test_a_local_restorer_differs_from_the_whole_only_in_overlaps():
    lr, boxes = randn(1, 3, 30, 44), tile_boxes(30, 44, 16, 12)
    large = [tuple(4 * side for side in box) for box in boxes]
    got = blend_tiles((resize(piece, scale=4) for piece in cut(lr, boxes)), large, 120, 176)
    count = sum(torch.nn.functional.pad(torch.ones(b - t, r - l), (l, 176 - r, t, 120 - b)) for t, b, l, r in large)
    error = (got - resize(lr, scale=4)).abs().amax((0, 1))
    assert error[count == 1].max() < 1e-12 < error[count > 1].max()


@pytest.mark.parametrize("stride, variance", [(8, 2.0), (7, 0.5), (4, 0.5)])
def test_overlap_halves_a_seam_and_no_more(stride, variance):
    width = 8 + 999 * stride
    boxes = tile_boxes(1, width, 8, stride)
    values = randn(len(boxes))
    row = blend_tiles((v.expand(1, 1, 1, 8) for v in values), boxes, 1, width).flatten()
    steps = row.diff()[row.diff().abs() > 1e-12]
    assert abs(steps.var() / variance - 1) < 0.25


def test_impossible_tilings_are_refused():
    for tile, stride in ((8, 9), (8, 0), (0, 0), (-3, 1)):
        with pytest.raises(ConfigError):
            tile_starts(100, tile, stride)
    boxes = tile_boxes(8, 15, 8, 7)
    for tiles in ([], [torch.zeros(1, 3, 8, 8)]):
        with pytest.raises(ConfigError, match="8x15"):
            blend_tiles(tiles, boxes, 8, 15)


# ---------------------------------------------------------------- weights
def test_gaussian_weights():
    w = tile_weights(20, 40, "gaussian")
    assert w.shape == (20, 40) and w.min() > 0 and torch.equal(w, w.flip(0)) and torch.equal(w, w.flip(1))
    i = torch.arange(40, dtype=torch.float64)
    torch.testing.assert_close((w[10] / w[10].max()).double(), torch.exp(-((i - 19.5) ** 2 - 0.25) / (2 * 16)), rtol=1e-4, atol=0)
    assert tile_weights(3, 2).eq(1).all() and tile_weights(1, 1, "gaussian").item() == 1
    assert tile_weights(4096, 2, "gaussian").min() > 0
    with pytest.raises(ConfigError, match="gaussian"): tile_weights(4, 4, "gausian")


def test_gaussian_weights_hide_a_step_and_uniform_ones_do_not():
    "Two tiles of 64 that differ by a constant, with an overlap of an eighth: the largest step that is left."
    boxes = [(0, 1, 0, 64), (0, 1, 56, 120)]
    tiles = [torch.full((1, 1, 1, 64), value) for value in (0.0, 1.0)]
    step = {blend: blend_tiles(tiles, boxes, 1, 120, blend).diff().abs().max().item() for blend in ("uniform", "gaussian")}
    assert step["uniform"] == 0.5 and step["gaussian"] < 0.35


# ---------------------------------------------------------------- one noise
def test_a_window_shows_the_same_numbers_from_everywhere():
    field = NoiseField(5)
    large = field.window(2, 3, 0, 0, 100, 90)
    assert large.shape == (3, 100, 90) and large.dtype == torch.float32
    for top, left, height, width in [(0, 0, 1, 1), (31, 31, 2, 2), (32, 64, 32, 26), (7, 3, 90, 80), (99, 89, 1, 1)]:
        part = field.window(2, 3, top, left, height, width)
        assert torch.equal(part, large[:, top:top + height, left:left + width])
    assert torch.equal(NoiseField(5).window(2, 3, 0, 0, 100, 90), large)
    for other in (NoiseField(6).window(2, 3, 0, 0, 100, 90), field.window(1, 3, 0, 0, 100, 90)):
        assert (other - large).abs().min() > 0 or (other != large).float().mean() > 0.999


def test_the_field_is_white():
    x = NoiseField(2**63 - 1).window(0, 2, 0, 0, 256, 256).double()
    n = x.numel()
    assert abs(x.mean()) < 4 / n**0.5 and abs(x.var() - 1) < 4 * (2 / n)**0.5 and 4 < x.abs().max() < 6.5
    for a, b in ((x[:, 1:], x[:, :-1]), (x[..., 1:], x[..., :-1]), (x[0], x[1]), (x[..., 32:], x[..., :-32]),
                 (x, NoiseField(2**63 - 1).window(1, 2, 0, 0, 256, 256).double())):
        assert abs((a * b).mean()) < 4.5 / a.numel()**0.5


def test_tiles_draw_layer_after_layer():
    field = NoiseField(1)
    noise = TileNoise(field, [(0, 0), (5, 40)])
    first, second = draw_noise((2, 3, 8, 8), noise), draw_noise((2, 3, 8, 8), noise, dtype=torch.float64)
    assert torch.equal(first[1], field.window(0, 3, 5, 40, 8, 8)) and torch.equal(second[0].float(), field.window(1, 3, 0, 0, 8, 8))
    assert second.dtype == torch.float64
    for shape in ((1, 3, 8, 8), (2, 8, 8)):
        with pytest.raises(ConfigError, match="2 tiles"): noise.draw(shape)


@pytest.mark.parametrize("tile,overlap,multiple,grid,expected", [
    (512, None, 64, 1, (512, 448)), (64, None, 16, 1, (64, 48)), (64, None, 64, 1, (64, 56)), (17, None, 16, 1, (32, 28)),
    (64, 0, 16, 1, (64, 64)), (64, 63, 16, 1, (64, 16)), (16, 15, 16, 2, (16, 2)), (64, 1, 64, 2, (64, 62)), (1, None, 1, 1, (1, 1)),
    (100, 10, 1, 1, (100, 90))])
def test_fit_tile(tile, overlap, multiple, grid, expected):
    side, stride = fit_tile(tile, overlap, multiple, grid)
    assert (side, stride) == expected and side % multiple == stride % grid == 0
    tile_boxes(10 * side, 10 * side, side, stride)


def test_fit_tile_errors():
    for how in (dict(tile=0), dict(tile=-4), dict(tile=8, overlap=8), dict(tile=8, overlap=-1)):
        with pytest.raises(ConfigError): fit_tile(**how)
