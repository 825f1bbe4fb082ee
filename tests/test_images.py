"Every kind of picture becomes a tensor (B,3,H,W) in [0,1], or one clear error."
import io

import numpy as np
import pytest
import torch
from PIL import Image

from dit_sr_kit import images
from dit_sr_kit.core import ConfigError, DitSrError, ImageError
from dit_sr_kit.images import (crop_to, load_image, pad_to_multiple, read_metadata, resize, sample_image, sample_names, save_image,
                               to_pil, to_signed, to_unit)

H, W = 6, 9


@pytest.fixture
def colours():
    return np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)


@pytest.fixture
def expected(colours):
    return torch.from_numpy(colours).permute(2, 0, 1)[None] / 255


def test_the_same_picture_from_every_source(tmp_path, colours, expected):
    path = tmp_path / "x.png"
    Image.fromarray(colours).save(path)
    chw = torch.from_numpy(colours).permute(2, 0, 1)
    for source in [path, str(path), Image.open(path), colours, chw, chw[None], expected, expected[0]]:
        x = load_image(source)
        assert x.shape == (1, 3, H, W) and x.dtype == torch.float32
        assert torch.equal(x, expected)
    assert load_image(torch.cat([expected] * 3)).shape == (3, 3, H, W)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "I", "F", "I;16"])
def test_every_pil_mode(mode, colours):
    if mode == "I;16":
        image = Image.fromarray(colours[..., 0].astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(colours[..., 0].astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(colours[..., 0].astype(np.float32) / 255)
    elif mode == "LAB":
        image = Image.frombytes("LAB", (W, H), colours.tobytes())
    else:
        image = Image.fromarray(colours).convert(mode)
    x = load_image(image)
    assert x.shape == (1, 3, H, W) and 0 <= x.min() and x.max() <= 1
    if mode in ("I", "F", "I;16"):
        np.testing.assert_allclose(x[0, 0].numpy(), colours[..., 0] / 255, atol=1e-6)


def test_sixteen_bit_png_keeps_all_levels(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "deep.png")
    x = load_image(tmp_path / "deep.png")
    assert x.unique().numel() == 65536 and x.min() == 0 and x.max() == 1
    assert torch.equal(load_image(values), x) and torch.equal(load_image(values.astype(">u2")), x)


def test_alpha_is_composited_on_white(tmp_path, colours, expected):
    image = Image.fromarray(colours)
    for alpha, wanted in [(0, torch.ones_like(expected)), (255, expected), (51, expected * 0.2 + 0.8)]:
        image.putalpha(alpha)
        image.save(tmp_path / "a.png")
        torch.testing.assert_close(load_image(tmp_path / "a.png"), wanted)
    torch.testing.assert_close(load_image(torch.tensor([0.0, 0.25]).reshape(2, 1, 1)), torch.full((1, 3, 1, 1), 0.75))


def test_transparent_palette_entry(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "p.png", transparency=0)
    x = load_image(tmp_path / "p.png")
    assert x[0, :, 0, 0].tolist() == [0, 1, 0] and x[0, :, 1, 1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("orientation, turn", [
    (1, lambda x: x), (2, lambda x: x.flip(-1)), (3, lambda x: x.rot90(2, (2, 3))), (4, lambda x: x.flip(-2)),
    (5, lambda x: x.transpose(2, 3)), (6, lambda x: x.rot90(-1, (2, 3))), (7, lambda x: x.rot90(2, (2, 3)).transpose(2, 3)),
    (8, lambda x: x.rot90(1, (2, 3)))])
def test_exif_orientation(tmp_path, colours, expected, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(colours).save(tmp_path / "x.png", exif=exif)
    assert torch.equal(load_image(tmp_path / "x.png"), turn(expected))


def test_grey_is_repeated(colours):
    x = load_image(colours[..., 0])
    assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])
    assert torch.equal(load_image(colours[..., :1]), x) and torch.equal(load_image(torch.from_numpy(colours[..., 0])[None]), x)


@pytest.mark.parametrize("dtype, wanted", [(torch.float64, torch.float64), (torch.float16, torch.float32),
                                           (torch.bfloat16, torch.float32), (torch.uint16, torch.float32),
                                           (torch.bool, torch.float32)])
def test_tensor_dtypes(dtype, wanted):
    x = load_image(torch.ones(3, 2, 2).to(dtype))
    assert x.dtype == wanted and 0 < x.max() <= 1


def test_what_else_is_in_a_file(tmp_path, colours):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tags = Image.Exif()
    tags[0x0112], tags[0x013B], tags[0x0100], tags[0x0201] = 6, "Ann", 77, 5
    tags.get_ifd(0x8769).update({0x9003: "2020:01:02 03:04:05", 0xA002: 9})
    tags.get_ifd(0x8825)[1] = "N"
    for suffix in (".jpg", ".png", ".webp"):
        Image.fromarray(colours).save(tmp_path / f"x{suffix}", exif=tags, icc_profile=profile)
        found = read_metadata(tmp_path / f"x{suffix}")
        copy = load_image(tmp_path / f"x{suffix}")
        for other in (".jpg", ".png", ".webp", ".tif", ".bmp"):
            path = save_image(copy, tmp_path / f"copy{other}", found)
            assert load_image(path).shape == copy.shape == (1, 3, W, H)  # turned once
            if other == ".bmp": continue
            with Image.open(path) as image:
                kept = image.getexif()
                assert image.info["icc_profile"] == profile and kept[0x013B] == "Ann" and 0x0112 not in kept
                assert dict(kept.get_ifd(0x8769)) == {0x9003: "2020:01:02 03:04:05"} and dict(kept.get_ifd(0x8825)) == {1: "N"}
    Image.fromarray(colours).save(tmp_path / "plain.png")
    assert read_metadata(tmp_path / "plain.png") == {} == read_metadata(tmp_path / "absent.png")
    Image.fromarray(colours[..., 0]).save(tmp_path / "grey.png", icc_profile=profile[:16] + b"GRAY" + profile[20:])
    Image.fromarray(colours).save(tmp_path / "odd.png", exif=b"Exif\0\0nonsense", icc_profile=b"short")
    assert read_metadata(tmp_path / "grey.png") == {} == read_metadata(tmp_path / "odd.png")


def test_sixteen_bits_of_colour_are_read(tmp_path):
    "Pillow keeps eight of the sixteen; the picture is the right one to half a level of 255."
    import struct
    import zlib

    values = np.random.default_rng(3).integers(0, 65536, (H, W, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows))
    (tmp_path / "deep.png").write_bytes(png + chunk(b"IEND", b""))
    x = load_image(tmp_path / "deep.png")
    assert (x[0].movedim(0, -1).numpy() - values / 65535).__abs__().max() < 1.01 / 255


def test_rounding_is_forgiven_and_more_is_not():
    assert load_image(torch.full((3, 2, 2), 1.0005)).max() == 1
    with pytest.raises(ImageError, match="to_unit"):
        load_image(torch.full((3, 2, 2), 1.01))


BAD = {
    "none": None, "number": 3, "bytes": b"abc", "list": [1, 2],
    "array of 0 dimensions": np.zeros(()), "array of 1": np.zeros(3), "array of 4": np.zeros((2, 4, 4, 3)),
    "five channels": np.zeros((8, 8, 5)), "channels first": np.zeros((3, 20, 20)), "complex": np.zeros((4, 4), complex),
    "text": np.array([["a"]]), "int64 array": np.zeros((4, 4), int), "0..255 floats": np.full((4, 4), 200.0),
    "nan array": np.full((4, 4), np.nan), "no rows": np.zeros((0, 4)), "no channels": np.zeros((4, 4, 0)),
    "tensor of 1": torch.zeros(4), "tensor of 2": torch.zeros(4, 4), "tensor of 5": torch.zeros(1, 1, 3, 4, 4),
    "channels last": torch.zeros(20, 20, 3), "int tensor": torch.zeros(3, 4, 4, dtype=torch.int64),
    "signed": torch.full((3, 4, 4), -1.0), "infinite": torch.full((3, 4, 4), float("inf")), "nan": torch.full((3, 4, 4), float("nan")),
    "empty": torch.zeros(1, 3, 0, 4), "no samples": torch.zeros(0, 3, 4, 4), "PIL without pixels": Image.new("RGB", (0, 4)),
    "32 bits": Image.fromarray(np.full((4, 4), 100_000, np.int32)), "float PIL": Image.fromarray(np.full((4, 4), 7, np.float32)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    with pytest.raises(ImageError) as caught:
        load_image(BAD[name])
    assert len(str(caught.value)) > 20


def test_bad_files(tmp_path, colours):
    good = tmp_path / "good.png"
    Image.fromarray(colours).save(good)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:70])
    for name, hint in [("absent.png", "does not exist"), ("text.png", "not a picture"), ("empty.png", "not a picture"),
                       ("cut.png", "cannot be decoded")]:
        with pytest.raises(ImageError, match=hint) as caught:
            load_image(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(ImageError):
        load_image(tmp_path)
    with pytest.raises(ImageError):
        load_image("")
    with pytest.raises(ImageError):
        load_image("a\0b")
    with pytest.raises(ValueError):       # the builtin works too
        load_image(tmp_path / "absent.png")


@pytest.mark.parametrize("suffix, options", [("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("TIFF", {"compression": "tiff_lzw"}),
                                             ("BMP", {}), ("GIF", {}), ("PPM", {})])
def test_damaged_files_give_an_image_or_an_image_error(tmp_path, suffix, options):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, suffix, **options)
    data, rng = buffer.getvalue(), np.random.default_rng(2)
    for i in range(60):
        damaged = bytearray(data)
        if i % 2:
            damaged = damaged[:rng.integers(len(data))]
        else:
            for place in rng.integers(0, min(len(data), 400), 4):
                damaged[place] = rng.integers(256)
        path = tmp_path / f"d.{suffix.lower()}"
        path.write_bytes(damaged)
        try:
            x = load_image(path)
            assert x.shape[:2] == (1, 3) and torch.isfinite(x).all()
        except DitSrError:
            pass


def test_truncated_pil_image(tmp_path, colours):
    path = tmp_path / "x.bmp"
    Image.fromarray(colours).save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ImageError, match="the PIL image"):
        load_image(Image.open(path))


def test_to_pil_rounds_and_clamps():
    x = torch.tensor([-0.5, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 1.5]).reshape(1, 1, 1, 5).repeat(1, 3, 1, 1)
    assert np.asarray(to_pil(x)[0])[0, :, 0].tolist() == [0, 0, 1, 255, 255]
    assert [p.size for p in to_pil(torch.rand(2, 3, 4, 7))] == [(7, 4)] * 2
    for bad in [torch.rand(3, 4, 4), torch.full((1, 3, 2, 2), float("nan")), torch.rand(1, 1, 4, 4)]:
        with pytest.raises(ImageError):
            to_pil(bad)


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".webp", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg"])
def test_save_and_load(tmp_path, expected, suffix):
    path = save_image(expected, str(tmp_path / "deep" / "er" / f"x{suffix}"))
    back = load_image(path)
    assert list(path.parent.iterdir()) == [path]
    if suffix.startswith(".jp"):
        assert (back - expected).abs().mean() < 0.03
    else:
        assert torch.equal(back, expected)


def test_save_errors_leave_nothing_behind(tmp_path, expected):
    old = save_image(expected, tmp_path / "x.png")
    before = old.read_bytes()
    for x, path in [(expected, tmp_path / "x.xyz"), (expected, tmp_path / "x"), (torch.cat([expected] * 2), old),
                    (expected * float("nan"), old), (expected[0], old), (Image.new("RGBA", (2, 2)), tmp_path / "x.jpg"),
                    (expected, tmp_path / "x.png" / "y.png")]:
        with pytest.raises(ImageError):
            save_image(x, path)
    assert list(tmp_path.iterdir()) == [old] and old.read_bytes() == before
    assert load_image(save_image(Image.new("RGB", (3, 2), "white"), tmp_path / "white.png")).eq(1).all()


def test_resize_is_torch_bicubic_and_does_not_clamp():
    x = torch.rand(2, 3, 5, 6, dtype=torch.float64)
    wanted = torch.nn.functional.interpolate(x, scale_factor=4, mode="bicubic", align_corners=False)
    assert torch.equal(resize(x, scale=4), wanted) and torch.equal(resize(x, size=(20, 24)), wanted)
    edge = torch.tensor([0.0, 0, 0, 1, 1, 1]).reshape(1, 1, 1, 6)
    assert resize(edge, scale=4).max() > 1.02 and resize(edge, scale=4).min() < -0.02
    assert resize(x, scale=1.5).shape == (2, 3, 8, 9)
    for mode in images._MODES:
        assert resize(x, size=(7, 3), mode=mode).shape == (2, 3, 7, 3)


def test_resize_errors():
    x = torch.rand(1, 3, 4, 4)
    for wrong in [dict(), dict(scale=2, size=(8, 8)), dict(scale=0.01), dict(scale=-2), dict(size=(0, 3)),
                  dict(scale=2, mode="cubic")]:
        with pytest.raises(ConfigError):
            resize(x, **wrong)
    for wrong in [x[0], x[..., :0]]:
        with pytest.raises(ImageError):
            resize(wrong, scale=2)


def test_signed_and_unit():
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(to_unit(to_signed(x)), x)
    assert to_signed(torch.tensor(0.0)) == -1 and to_signed(torch.tensor(1.0)) == 1


@pytest.mark.parametrize("height, width, multiple", [(5, 7, 8), (1, 1, 8), (1, 5, 64), (2, 3, 16), (8, 16, 8), (3, 3, 1), (9, 65, 64)])
def test_pad_is_numpys_reflection(height, width, multiple):
    x = torch.rand(2, 3, height, width)
    padded = pad_to_multiple(x, multiple)
    target = [-(-n // multiple) * multiple for n in (height, width)]
    wanted = np.pad(x.numpy(), ((0, 0), (0, 0), (0, target[0] - height), (0, target[1] - width)), mode="reflect")
    assert np.array_equal(padded.numpy(), wanted)
    assert torch.equal(crop_to(padded, height, width), x)


def test_pad_is_differentiable_and_keeps_the_dtype():
    x = torch.rand(1, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    y = pad_to_multiple(x, 8)
    y.sum().backward()
    assert y.dtype == torch.float64 and x.grad.sum() == 3 * 64


def test_pad_and_crop_errors():
    x = torch.rand(1, 3, 4, 4)
    for multiple in (0, -8, 2.5):
        with pytest.raises(ConfigError):
            pad_to_multiple(x, multiple)
    with pytest.raises(ImageError):
        pad_to_multiple(x[..., :0], 8)
    for size in [(5, 4), (4, 5), (0, 4)]:
        with pytest.raises(ImageError):
            crop_to(x, *size)


def test_sample_images():
    assert sample_names() == ["astronaut", "chelsea", "coffee"]
    for name in sample_names():
        x = sample_image(name)
        assert x.shape[:2] == (1, 3) and max(x.shape) <= 512 and x.shape[2] % 16 == x.shape[3] % 16 == 0
        assert x.std() > 0.1
    with pytest.raises(ImageError, match="Did you mean 'coffee'"):
        sample_image("cofee")


def test_sample_images_are_the_originals_cropped():
    data = pytest.importorskip("skimage.data")
    for name, tolerance in [("chelsea", 0), ("astronaut", 0.02), ("coffee", 0.02)]:
        original, ours = load_image(getattr(data, name)()), sample_image(name)
        top, left = ((a - b) // 2 for a, b in zip(original.shape[2:], ours.shape[2:]))
        crop = original[..., top:top + ours.shape[2], left:left + ours.shape[3]]
        assert (crop - ours).abs().mean() <= tolerance


def test_sample_files_are_small_and_licensed():
    folder = images.resources.files("dit_sr_kit") / "assets" / "images"
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(files) == {"LICENSES.md", *images._SAMPLES.values()}
    assert sum(map(len, files.values())) < 600_000
    assert all(name in files["LICENSES.md"].decode() for name in images._SAMPLES.values())
