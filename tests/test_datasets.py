"Dead leaves, photographs and pairs: all of them functions of a seed."
import importlib.util
import math
import pickle
import sys

import pytest
import torch

from dit_sr_kit.core import ConfigError, ImageError, MissingExtra, make_generator
from dit_sr_kit.datasets import (HELD_OUT_PHOTOS, TRAIN_PHOTOS, PatchDataset, centre_crop, dead_leaves, held_out_crops,
                                 image_paths, item_generator, leaf_radii, photograph, random_crop)
from dit_sr_kit.degradations import bicubic_down, degrade
from dit_sr_kit.images import save_image

needs_photos = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("skimage", "sklearn"))), reason="needs the extra train")


@pytest.mark.parametrize("size", [1, 7, 64, 128])
def test_dead_leaves_are_pictures(size):
    x = dead_leaves(size, make_generator(0), min_radius=min(2.0, size / 2))
    assert x.shape == (1, 3, size, size) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1


def test_dead_leaves_depend_on_the_seed_alone():
    a, b, c = (dead_leaves(64, make_generator(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    before = torch.random.get_rng_state()
    dead_leaves(32, make_generator(0))
    assert torch.equal(before, torch.random.get_rng_state())
    g = make_generator(0)
    assert not torch.equal(dead_leaves(64, g), dead_leaves(64, g))


def test_dead_leaves_have_edges_shading_and_variety():
    x = torch.cat([dead_leaves(64, make_generator(i)) for i in range(20)])
    gradient = (x[..., 1:] - x[..., :-1]).abs()
    assert (gradient > 0.1).float().mean() > 0.02            # edges
    assert ((gradient > 0) & (gradient < 0.02)).float().mean() > 0.3      # shaded surfaces
    assert x.mean((1, 2, 3)).std() > 0.03 and 0.3 < x.mean() < 0.7
    flat = dead_leaves(64, make_generator(0), shading=0.0)
    assert (flat[..., 1:] == flat[..., :-1]).float().mean() > 0.5


def test_no_leaves_is_the_ground():
    x = dead_leaves(32, make_generator(0), coverage=0, shading=0)
    assert x.flatten(2).unique(dim=2).shape[-1] == 1


def test_leaf_radii_follow_the_law():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    r = leaf_radii(u, 2, 64)
    assert abs(r.min() - 2) < 1e-3 and r.max() <= 64
    expected = 2 * math.pi * math.log(32) / (2**-2 - 64**-2)
    assert abs((math.pi * r**2).mean() / expected - 1) < 0.01
    assert leaf_radii(torch.tensor(0.0), 2, 64) == 2 and abs(leaf_radii(torch.tensor(1.0), 2, 64) - 64) < 1e-3


@pytest.mark.parametrize("wrong", [dict(size=0), dict(min_radius=0), dict(min_radius=-1), dict(min_radius=64), dict(coverage=-1)])
def test_dead_leaves_errors(wrong):
    with pytest.raises(ConfigError):
        dead_leaves(**(dict(size=64) | wrong))


def test_the_split_is_disjoint():
    assert not set(TRAIN_PHOTOS) & set(HELD_OUT_PHOTOS)
    assert HELD_OUT_PHOTOS == ("astronaut", "camera", "chelsea", "coffee", "rocket", "coins")


@needs_photos
@pytest.mark.parametrize("name", TRAIN_PHOTOS + HELD_OUT_PHOTOS)
def test_photographs(name):
    x = photograph(name)
    assert x.shape[:2] == (1, 3) and min(x.shape[2:]) >= 256 and x.std() > 0.05
    if name in ("camera", "coins", "brick", "grass", "gravel"):
        assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 1], x[:, 2])


@needs_photos
def test_held_out_crops_are_fixed():
    crops = held_out_crops()
    assert list(crops) == list(HELD_OUT_PHOTOS)
    for name, x in crops.items():
        assert x.shape == (1, 3, 256, 256)
        assert torch.equal(x, centre_crop(photograph(name), 256))
    means = {name: round(x.double().mean().item(), 4) for name, x in crops.items()}
    assert means == dict(astronaut=0.4755, camera=0.4072, chelsea=0.4242, coffee=0.3806, rocket=0.3052, coins=0.3771)


def test_photograph_errors(monkeypatch):
    with pytest.raises(ImageError, match="Did you mean 'chelsea'"):
        photograph("chelsee")
    for package, name in [("skimage", "camera"), ("sklearn", "china")]:
        for module in [m for m in sys.modules if m == package or m.startswith(package + ".")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtra, match=r"dit_sr_kit\[train\]"):
            photograph(name)
    with pytest.raises(MissingExtra):
        held_out_crops()


def test_centre_crop():
    x = torch.arange(35.0).reshape(1, 1, 5, 7)
    assert torch.equal(centre_crop(x, 3), x[..., 1:4, 2:5])
    for size in (0, 6):
        with pytest.raises(ImageError):
            centre_crop(x, size)


def test_image_paths(tmp_path):
    with pytest.raises(ImageError, match="no picture"):
        image_paths(tmp_path)
    with pytest.raises(ImageError, match="not a folder"):
        image_paths(tmp_path / "absent")
    x = torch.rand(1, 3, 8, 8)
    paths = [save_image(x, tmp_path / name) for name in ("b.png", "a.JPG", "sub/c.webp")]
    (tmp_path / "notes.txt").write_text("")
    assert image_paths(str(tmp_path)) == sorted(paths)


def test_item_generators_differ():
    draws = {torch.rand((), generator=item_generator(seed, index)).item() for seed in range(20) for index in range(20)}
    assert len(draws) == 400
    assert torch.equal(torch.rand(3, generator=item_generator(1, 2)), torch.rand(3, generator=item_generator(1, 2)))


def test_random_crop_covers_all_turns_and_places():
    x = torch.zeros(1, 3, 8, 8)
    x[..., 0, 1] = 1
    places = {random_crop(x, 8, make_generator(i))[0, 0].flatten().argmax().item() for i in range(200)}
    assert len(places) == 8
    numbered = torch.arange(30.0).reshape(1, 1, 5, 6).expand(1, 3, 5, 6)
    corners = {random_crop(numbered, 4, make_generator(i)).min().item() for i in range(200)}
    assert corners == {0, 1, 2, 6, 7, 8}
    with pytest.raises(ImageError, match="cannot cut 9 x 9"):
        random_crop(x, 9, make_generator(0))


def make_noisy(hr, generator):
    return degrade(hr, noise_std=(0.0, 0.1), generator=generator)[0]


@pytest.mark.parametrize("degradation", [None, make_noisy])
def test_items_depend_on_seed_and_index_alone(degradation):
    photos = [torch.rand(1, 3, 40, 50)]
    data = PatchDataset(photos, size=16, length=12, seed=3, degradation=degradation)
    items = [data[i] for i in range(12)]
    again = PatchDataset(photos, size=16, length=12, seed=3, degradation=degradation)
    for i in reversed(range(12)):
        hr, lr = again[i]
        assert torch.equal(hr, items[i][0]) and torch.equal(lr, items[i][1])
        assert hr.shape == (3, 16, 16) and lr.shape == (3, 4, 4)
        if degradation is None:
            torch.testing.assert_close(lr, bicubic_down(hr[None])[0].clamp(0, 1), rtol=0, atol=0)
    assert not torch.equal(PatchDataset(photos, size=16, length=12, seed=4)[0][0], items[0][0])


def test_workers_do_not_matter():
    data = PatchDataset(size=16, length=8, seed=0)
    alone = torch.stack([data[i][0] for i in range(8)])
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2)
    assert torch.equal(torch.cat([hr for hr, _ in loader]), alone)
    assert torch.equal(pickle.loads(pickle.dumps(data))[5][0], alone[5])


def test_the_share_of_leaves():
    white = torch.ones(1, 3, 16, 16)
    data = PatchDataset([white], size=8, length=400, leaves=0.25)
    photos = sum(bool(data[i][0].eq(1).all()) for i in range(400)) / 400
    assert abs(photos - 0.75) < 4 * (0.75 * 0.25 / 400) ** 0.5
    assert all(PatchDataset([white], size=8, leaves=0.0)[i][0].eq(1).all() for i in range(5))
    assert PatchDataset(size=8).leaves == 1.0


def test_paths_and_small_pictures(tmp_path):
    path = save_image(torch.rand(1, 3, 20, 30), tmp_path / "p.png")
    assert PatchDataset([path], size=16, leaves=0)[0][0].shape == (3, 16, 16)
    with pytest.raises(ImageError, match="p.png"):
        PatchDataset([path], size=24, leaves=0)[0]
    with pytest.raises(ImageError, match="picture 0"):
        PatchDataset([torch.rand(1, 3, 20, 30)], size=24, leaves=0)[0]


def test_crops_without_turns_or_mirrors():
    x = torch.arange(35.0).reshape(1, 1, 5, 7).expand(1, 3, 5, 7)
    for i in range(30):
        plain = random_crop(x, 4, make_generator(i), turn=False, mirror=False)
        assert torch.equal(plain - plain.min(), x[..., :4, :4])             # upright, and not reflected
        full = random_crop(x, 4, make_generator(i))
        assert full.min() == plain.min()                                    # the same place: the stream is the same
    leftmost = {random_crop(x, 4, make_generator(i), turn=False)[0, 0, 0].diff()[0].item() for i in range(30)}
    assert leftmost == {1, -1}                                              # mirrored, and never turned


class OnePicture:
    "The smallest pool."
    patch = 8

    def draw(self, n, generator):
        return torch.rand(n, 3, 8, 8, generator=generator)


def test_a_pool_in_place_of_pictures():
    data = PatchDataset(OnePicture(), size=8, length=5, leaves=0.5)
    assert torch.equal(data[3][0], PatchDataset(OnePicture(), size=8, length=5, leaves=0.5)[3][0])
    only = PatchDataset(OnePicture(), size=8, leaves=0.0)
    generator = item_generator(0, 2)
    torch.rand((), generator=generator)
    assert torch.equal(only[2][0], torch.rand(1, 3, 8, 8, generator=generator)[0])
    with pytest.raises(ConfigError, match="the pool draws patches of 8"):
        PatchDataset(OnePicture(), size=16)


def test_dataset_errors():
    data = PatchDataset(size=8, length=3)
    assert len(data) == 3 and len(list(data)) == 3
    for index in (3, -1):
        with pytest.raises(IndexError):
            data[index]
    for wrong in [dict(size=6), dict(size=0), dict(leaves=1.5), dict(leaves=-0.1), dict(seed=-1)]:
        with pytest.raises(ConfigError):
            PatchDataset(**wrong)
    with pytest.raises(ImageError):
        PatchDataset([torch.rand(1, 3, 8, 8) * 255])
