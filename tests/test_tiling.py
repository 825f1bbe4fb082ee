"Tiles: coverage for many sizes, the mean of overlaps, a restorer without randomness, and seams in numbers."
import pytest
import torch

from dit_sr_kit.core import ConfigError
from dit_sr_kit.images import resize
from dit_sr_kit.tiling import blend_tiles, tile_boxes, tile_starts


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


@pytest.mark.parametrize("height, width, tile, stride", [(20, 33, 8, 7), (8, 8, 8, 7), (5, 40, 16, 8), (3, 2, 8, 8)])
def test_cutting_and_blending_is_the_identity(height, width, tile, stride):
    x, boxes = randn(2, 3, height, width), tile_boxes(height, width, tile, stride)
    assert all(b - t == min(tile, height) and r - l == min(tile, width) for t, b, l, r in boxes)
    torch.testing.assert_close(blend_tiles(cut(x, boxes), boxes, height, width), x)


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
