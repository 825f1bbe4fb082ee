"Figures: what a notebook gets, and what is refused."
import base64
import io
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dit_sr_kit import viz
from dit_sr_kit.core import ConfigError, ImageError


def decode(view):
    "The picture inside the HTML of a figure."
    kind, data = re.search(r'src="data:image/(\w+);base64,([^"]+)"', view.to_html()).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format.lower() == kind
    return image


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 24, 32, generator=generator)


@pytest.mark.parametrize("as_input", [
    lambda x: x, lambda x: list(x), lambda x: [p[None].double() for p in x], lambda x: [p.half() for p in x],
    lambda x: [p.permute(1, 2, 0).numpy() for p in x],
    lambda x: [Image.fromarray((p.permute(1, 2, 0) * 255).byte().numpy()) for p in x],
    lambda x: [p[0] for p in x], lambda x: [p[:1] for p in x], lambda x: dict(zip("abc", x)),
])
def test_every_kind_of_picture_is_drawn(pictures, as_input):
    view = viz.show_images(as_input(pictures), zoom=(0.2, 0.2, 0.3))
    assert set(view._repr_mimebundle_()) == {"text/html", "text/plain"}
    assert decode(view).width == view.width


def test_a_batch_and_a_list_give_the_same_figure(pictures):
    assert viz.show_images(pictures).data == viz.show_images([p for p in pictures]).data


def test_the_pixels_arrive():
    "A red picture is red in the figure, values outside [0,1] are clipped, and the input stays as it is."
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1.7
    array = np.asarray(decode(viz.show_images([red], imsize=1)).convert("RGB")).reshape(-1, 3).astype(int)
    assert (np.abs(array - [255, 0, 0]).max(1) < 12).mean() > 0.7
    assert red.max() == pytest.approx(1.7)


def test_html_is_escaped_and_complete(pictures):
    view = viz.show_images(pictures[:1], alt='a "quoted" <b>', caption="1 < 2 & 3")
    page = view.to_html()
    assert 'alt="a &quot;quoted&quot; &lt;b&gt;"' in page
    assert "<figcaption>1 &lt; 2 &amp; 3</figcaption>" in page
    assert "<b>" not in page and "<script" not in page
    assert view._repr_mimebundle_()["text/plain"] == 'a "quoted" <b>' == repr(view)


def test_alt_text_is_never_empty(pictures):
    assert viz.show_images(pictures, ["LR", "SR", "HR"]).alt == "Pictures: LR; SR; HR"
    assert viz.show_images(pictures).alt
    with pytest.raises(ConfigError, match="alt text"):
        viz.show_figure(viz.new_figure()[0], alt="")


def test_maps_share_one_scale():
    "The darker of two maps stays dark: it is not stretched to a scale of its own."
    low, high = torch.full((8, 8), 0.1), torch.linspace(0, 1, 64).reshape(8, 8)
    shared = np.asarray(decode(viz.show_maps([low, high])).convert("RGB")).astype(int)
    height, width = shared.shape[:2]
    left = shared[height // 2, width // 5]
    viridis = np.array([0x48, 0x24, 0x75])  # about a tenth of the way
    assert np.abs(left - viridis).max() < 25


def test_signed_maps_and_axes():
    data = torch.linspace(-1, 3, 64).reshape(1, 8, 8)
    for options in (dict(signed=True), dict(extent=(-0.5, 0.5, 0.5, -0.5)), dict(limits=(0, 1), label="x")):
        assert decode(viz.show_maps(data, **options)).width > 100


def test_differences(pictures):
    view = viz.show_differences({"same": pictures[:1], "other": pictures[1:2]}, pictures[:1])
    assert view.alt == "Difference maps on one scale: same; other"
    assert viz.show_differences([pictures[:1]], pictures[:1]).data  # no error at all is no error
    with pytest.raises(ImageError, match="cannot compare picture 0"):
        viz.show_differences([pictures[:1, :, ::2, ::2]], pictures[:1])


def test_curves():
    view = viz.show_curves({"a": torch.arange(5), "b": ([1, 2, 4], [1.0, 2.0, 0.5])},
                           bands={"top": (1, 2)}, marker="o", ylim=(0, 5))
    assert view.mime == "image/png" and decode(view).size == (450, 270)
    with pytest.raises(ConfigError, match="'a'"):
        viz.show_curves({"a": ([1, 2], [1, 2, 3])})
    with pytest.raises(ConfigError, match="no curve"):
        viz.show_curves({})


@pytest.mark.parametrize("call, error", [
    (lambda: viz.show_images([]), ConfigError),
    (lambda: viz.show_images([np.zeros((2, 3, 4, 5))]), ImageError),
    (lambda: viz.show_images([np.zeros((8, 8), dtype=np.int64)]), ImageError),
    (lambda: viz.show_images([np.zeros((8, 8))], titles=["a", "b"]), ConfigError),
    (lambda: viz.show_images([np.zeros((8, 8))], zoom=(10, 10, 4)), ConfigError),
    (lambda: viz.show_maps([np.zeros((3, 8, 8))]), ImageError),
])
def test_refused(call, error):
    with pytest.raises(error):
        call()


def test_nothing_global_is_touched():
    "Drawing imports no pyplot, so no window system is chosen and no figure stays open."
    code = ("import sys, numpy as np; from dit_sr_kit import viz; viz.show_images([np.zeros((8, 8))]); "
            "viz.show_curves({'a': [1, 2]}); assert 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)
