"Folders, lists, streams and the queue: broken files are skipped and named, and no draw depends on its past."
import importlib.util
import io
import pickle
import sys

import pytest
import torch
from PIL import Image

from dit_sr_kit.core import ConfigError, ImageError, MissingExtra, make_generator
from dit_sr_kit.datasets import PatchDataset
from dit_sr_kit.folder_data import ImageFolderPool, PairQueue, StreamPool, open_stream, picture_list, row_picture
from dit_sr_kit.images import load_image, save_image

needs_datasets = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the extra train")


@pytest.fixture
def folder(tmp_path):
    "Two good pictures, one that is none, one cut short, one too small."
    for i, size in enumerate(((40, 50), (48, 40))):
        save_image(torch.rand(1, 3, *size, generator=make_generator(i)), tmp_path / f"good{i}.png")
    (tmp_path / "none.png").write_text("no picture")
    whole = (tmp_path / "good0.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[:len(whole) // 2])
    save_image(torch.rand(1, 3, 10, 60), tmp_path / "small.png")
    return tmp_path


def names(pool):
    return sorted(name.split("/")[-1] for name in pool.skipped)


def test_sources(folder):
    assert [p.name for p in picture_list(folder)] == ["broken.png", "good0.png", "good1.png", "none.png", "small.png"]
    (folder / "list.txt").write_text("# comment\n\n good1.png \nsub/absent.png\n", encoding="utf-8")
    assert picture_list(folder / "list.txt") == [folder / "good1.png", folder / "sub" / "absent.png"]
    assert picture_list([folder / "x.png"]) == [folder / "x.png"]
    (folder / "nothing.txt").write_text("# only this")
    (folder / "empty").mkdir()
    for wrong, message in [([], "empty"), (folder / "nothing.txt", "names no picture"), (folder / "absent.txt", "does not exist"),
                           (folder / "absent", "not a folder"), (folder / "empty", "holds no picture")]:
        with pytest.raises(ImageError, match=message):
            picture_list(wrong)


def test_broken_files_are_skipped_counted_and_named(folder, capsys):
    pool = ImageFolderPool(folder, patch=16)
    assert names(pool) == ["none.png", "small.png"] and len(pool) == 3
    x = pool.draw(60, make_generator(0))
    assert x.shape == (60, 3, 16, 16) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
    assert names(pool) == ["broken.png", "none.png", "small.png"]
    assert "3 skipped" in pool.report() and "truncated" in pool.report() and "10 x 60" in pool.report()
    said = capsys.readouterr().err
    assert all(said.count(name) == 1 for name in ("broken.png", "none.png", "small.png"))
    fresh = ImageFolderPool(folder, patch=16)
    assert fresh.check() == pool.skipped


def test_many_broken_files_are_counted_and_a_few_are_told(tmp_path, capsys):
    save_image(torch.rand(1, 3, 9, 9), tmp_path / "good.png")
    for i in range(30): (tmp_path / f"bad{i:02}.png").write_text("x")
    pool = ImageFolderPool(tmp_path, patch=8)
    assert len(pool.skipped) == 30 and capsys.readouterr().err.count("skipped") == 10
    assert pool.report().count("\n") == 11 and pool.report().endswith("...")


def test_a_draw_has_no_past(folder):
    used, new, forgetful = (ImageFolderPool(folder, 16, cache_mb=mb) for mb in (512, 512, 0))
    used.draw(50, make_generator(9))
    for seed in range(5):
        a, b, c = (pool.draw(7, make_generator(seed)) for pool in (used, new, forgetful))
        assert torch.equal(a, b) and torch.equal(a, c)
    assert len(forgetful._cache) == 1
    assert not torch.equal(new.draw(7, make_generator(0)), new.draw(7, make_generator(1)))
    before = torch.random.get_rng_state()
    new.draw(3, make_generator(0))
    assert torch.equal(before, torch.random.get_rng_state())


def test_patches_come_from_the_pictures(folder):
    pool = ImageFolderPool([folder / "good0.png"], 16, turn=False, mirror=False)
    picture = load_image(folder / "good0.png")
    places = picture.unfold(2, 16, 1).unfold(3, 16, 1)
    for patch in pool.draw(10, make_generator(0)):
        assert (places == patch[None, :, None, None]).flatten(4).all(-1).all(1).any()


def test_small_pictures(folder):
    paths = [folder / "small.png"]
    with pytest.raises(ImageError, match="small.png is too small: it has 10 x 60"):
        ImageFolderPool(paths, 16, small="error")
    with pytest.raises(ImageError, match="none of the 1 pictures"):
        ImageFolderPool(paths, 16)
    pool = ImageFolderPool(paths, 16, small="pad", turn=False, mirror=False)
    patch, picture = pool.draw(1, make_generator(0))[0], load_image(paths[0])[0]
    assert torch.equal(patch[:, 10:], patch[:, 3:9].flip(1))                       # reflected about row 9
    assert any(torch.equal(patch[:, :10], picture[:, :, i:i + 16]) for i in range(45))
    both = ImageFolderPool(paths, 64, small="pad").draw(2, make_generator(0))
    assert both.shape == (2, 3, 64, 64)


def test_nothing_but_broken_files(folder):
    with pytest.raises(ImageError, match="none.png"):
        ImageFolderPool([folder / "none.png", folder / "absent.png"], 16)
    with pytest.raises(ImageError, match="broken.png"):
        ImageFolderPool([folder / "broken.png"], 16).draw(1, make_generator(0))


def test_pool_arguments(folder):
    for wrong in (dict(patch=0), dict(patch=8, small="crop")):
        with pytest.raises(ConfigError):
            ImageFolderPool(folder, **wrong)


def test_every_mode_of_picture(tmp_path):
    for mode in ("L", "P", "RGBA", "I;16", "CMYK"):
        Image.new(mode, (20, 20)).save(tmp_path / f"{mode.replace(';', '')}.{'tif' if mode == 'CMYK' else 'png'}")
    pool = ImageFolderPool(tmp_path, 16)
    assert len(pool) == 5 and pool.draw(40, make_generator(0)).shape == (40, 3, 16, 16) and not pool.skipped


def test_workers_do_not_matter(folder):
    data = PatchDataset(ImageFolderPool(folder, 16), size=16, length=8, leaves=0.25)
    alone = torch.stack([data[i][0] for i in range(8)])
    for workers in (0, 1, 2):
        loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=workers)
        assert torch.equal(torch.cat([hr for hr, _ in loader]), alone)
    copy = pickle.loads(pickle.dumps(data))
    assert len(copy.pool._cache) == 0 and torch.equal(copy[5][0], alone[5])


def packed(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return dict(bytes=file.getvalue(), path=None)


def rows(count=40):
    for i in range(count):
        yield dict(label=i, image=packed(torch.full((20, 24, 3), i, dtype=torch.uint8).numpy()))


def test_rows():
    row = next(iter(rows()))
    for found in (row_picture(row), row_picture(row, "image"), row_picture(row["image"]), row_picture(torch.zeros(1, 3, 20, 24))):
        assert found.shape == (1, 3, 20, 24) and not found.any()
    assert row_picture(dict(label=3, picture=Image.new("RGB", (4, 5)))).shape == (1, 3, 5, 4)
    for wrong in (dict(label=3), dict(image="x.png")):
        with pytest.raises(ConfigError, match="column"):
            row_picture(wrong)
    with pytest.raises(ConfigError, match="'label', 'image'"):
        row_picture(row, "picture")
    with pytest.raises(ImageError, match="no picture"):
        row_picture(dict(image=dict(bytes=b"x", path=None)))


def test_stream_pool_renews_and_repeats():
    make = lambda **more: StreamPool(list(rows()), patch=16, buffer=4, reuse=2, **more)
    a, b = make(), make()
    x = a.draw(10, make_generator(0))
    assert torch.equal(x, b.draw(10, make_generator(0))) and a.read == 4 + 5 and a.drawn == 10
    values = (x[:, 0, 0, 0] * 255).round().tolist()
    assert set(values) <= set(range(9)) and len(set(values)) > 3
    assert a.draw(200, make_generator(1)).shape[0] == 200 and a.read == 4 + 105   # more than one pass
    later = make(start=30)
    later.draw(1, make_generator(0))
    assert all(30 <= p.flatten()[0] < 35 for p in later.pictures)


def test_stream_pool_skips_broken_rows(capsys):
    bad = dict(label=0, image=dict(bytes=b"x", path=None))
    small = dict(label=0, image=packed(torch.zeros(3, 30, 3, dtype=torch.uint8).numpy()))
    pool = StreamPool([bad, small, *rows(3)], patch=16, buffer=2, reuse=1)
    pool.draw(4, make_generator(0))
    assert list(pool.skipped)[:2] == ["row 0", "row 1"] and "3 x 30" in pool.skipped["row 1"]
    with pytest.raises(ImageError, match="hold no usable picture"):
        StreamPool([bad], patch=16).draw(1, make_generator(0))
    with pytest.raises(ImageError, match="empty"):
        StreamPool([], patch=16).draw(1, make_generator(0))
    with pytest.raises(ImageError, match="row 1 is too small"):
        StreamPool([bad, small], patch=16, small="error").draw(1, make_generator(0))
    for wrong in (dict(buffer=0), dict(reuse=0)):
        with pytest.raises(ConfigError):
            StreamPool([], **wrong)


@needs_datasets
def test_streams_of_the_datasets_library(folder, monkeypatch):
    import datasets

    datasets.disable_progress_bars()
    pool = StreamPool(open_stream("imagefolder", data_dir=str(folder)), patch=16, buffer=2, reuse=1)
    assert pool.draw(12, make_generator(0)).shape == (12, 3, 16, 16)
    assert pool.read > 5 and {len(pool.skipped) % 3 == 0, len(pool.skipped) > 3} and len(pool.pictures) == 2
    table = datasets.Dataset.from_dict({"label": [0, 1], "photo": [str(folder / f"good{i}.png") for i in (0, 1)]})
    table.cast_column("photo", datasets.Image()).to_parquet(str(folder / "table.parquet"))
    stream = open_stream("parquet", seed=0, data_files=str(folder / "table.parquet"))
    found = [row_picture(row, "photo") for row in stream]
    wanted = [load_image(folder / f"good{i}.png") for i in (0, 1)]
    assert sorted(x.mean().item() for x in found) == sorted(x.mean().item() for x in wanted)

    def offline(*args, **options): raise ConnectionError("no network")
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ImageError, match="owner/name.*ConnectionError.*Expected an id"):
        open_stream("owner/name")


def test_streams_need_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"dit_sr_kit\[train\]"):
        open_stream("owner/name")


def test_the_queue_loses_nothing():
    queue, generator, given, returned = PairQueue(6), make_generator(0), [], []
    for call in range(30):
        batch = torch.arange(2.0).add(2 * call).view(2, 1, 1, 1)
        hr, lr = queue.swap(batch, batch + 1000, generator)
        assert torch.equal(lr, hr + 1000)                                          # pairs stay pairs
        given += batch.flatten().tolist()
        if call < 3: assert torch.equal(hr, batch)                                 # while it fills
        else: returned += hr.flatten().tolist()
    assert sorted(returned + queue.hr.flatten().tolist()) == given
    mixed = [abs(a - b) > 1 for a, b in zip(returned[::2], returned[1::2])]
    assert sum(mixed) > len(mixed) / 2
    again, generator = PairQueue(6), make_generator(0)
    first = [again.swap(torch.full((2, 1, 1, 1), float(i)), torch.zeros(2, 1, 1, 1), generator)[0] for i in range(9)]
    again, generator = PairQueue(6), make_generator(0)
    assert all(torch.equal(x, again.swap(torch.full((2, 1, 1, 1), float(i)), torch.zeros(2, 1, 1, 1), generator)[0])
               for i, x in enumerate(first))


def test_queue_errors():
    with pytest.raises(ConfigError):
        PairQueue(0)
    with pytest.raises(ConfigError, match="Use size=12"):
        PairQueue(10).swap(torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 2, 2), make_generator(0))
