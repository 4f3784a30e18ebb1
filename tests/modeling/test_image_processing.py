"""Whatever an image is given as, it looks to the model as a viewer shows it."""

import base64
import http.server
import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from mqt_llava import MQTLlavaConfig, MQTLlavaImageProcessor
from tests.small_model import make_processor


SIDE = {"height": 30, "width": 30}


@pytest.fixture
def image_processor():
    return MQTLlavaImageProcessor(size=SIDE, crop_size=SIDE)


def pixels(image, **options):
    image_processor = MQTLlavaImageProcessor(size=SIDE, crop_size=SIDE)
    return image_processor(image, return_tensors="pt", **options)["pixel_values"]


def picture(mode="RGB"):
    """40 x 20, no two quarters alike."""
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (20, 40, 3), dtype=np.uint8))
    return image if mode == "RGB" else image.convert(mode)


GREY = np.asarray(picture("L"))

# The file's contents, and what a viewer shows
FILES = {}


def file(name):
    def register(make):
        FILES[name] = make
        return make

    return register


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@file("8 bit")
def _():
    return saved(picture(), "PNG"), picture()


@file("grey")
def _():
    return saved(picture("L"), "PNG"), picture("L").convert("RGB")


@file("grey, 16 bit")
def _():
    return saved(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"), picture("L").convert("RGB")


@file("grey, 32 bit")
def _():
    return saved(Image.fromarray((GREY.astype(np.uint32) * 0x1010101).view(np.int32)), "TIFF"), picture("L").convert(
        "RGB"
    )


@file("grey, floats to 1")
def _():
    return saved(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), picture("L").convert("RGB")


@file("grey, floats to 255")
def _():
    return saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"), picture("L").convert("RGB")


@file("palette")
def _():
    image = picture().quantize(16)
    return saved(image, "PNG"), image.convert("RGB")


@file("palette with a transparent colour")
def _():
    image = Image.new("P", (40, 20), 0)
    image.putpalette([200, 30, 40, 10, 20, 200])
    image.paste(1, (5, 5, 25, 15))
    shown = Image.new("RGB", (40, 20), "white")
    shown.paste((10, 20, 200), (5, 5, 25, 15))
    return saved(image, "PNG", transparency=0), shown


@file("black on transparent ground")
def _():
    image, shown = Image.new("RGBA", (40, 20), (0, 0, 0, 0)), Image.new("RGB", (40, 20), "white")
    image.paste((0, 0, 0, 255), (10, 5, 20, 15))
    shown.paste("black", (10, 5, 20, 15))
    return saved(image, "PNG"), shown


@file("grey with alpha")
def _():
    image = Image.merge("LA", (picture("L"), Image.new("L", (40, 20), 128)))
    white = np.full((20, 40), 255.0)
    levels = (GREY * (128 / 255) + white * (127 / 255)).round().astype(np.uint8)
    return saved(image, "PNG"), Image.fromarray(levels).convert("RGB")


@file("CMYK")
def _():
    image = picture().convert("CMYK")
    return saved(image, "TIFF"), image.convert("RGB")


@file("turned by EXIF")
def _():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: viewers turn the picture by 90 degrees to the right
    return saved(picture(), "PNG", exif=exif), picture().transpose(Image.Transpose.ROTATE_270)


@file("animation")
def _():
    frames = [picture(), Image.new("RGB", (40, 20), "blue")]
    return saved(frames[0], "PNG", save_all=True, append_images=frames[1:]), picture()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


WAYS = {
    "PIL": lambda content, path, url: Image.open(io.BytesIO(content)),
    "path": lambda content, path, url: str(path),
    "Path": lambda content, path, url: path,
    "URL": lambda content, path, url: url,
    "base64": lambda content, path, url: base64.b64encode(content).decode(),
    "data": lambda content, path, url: "data:image/png;base64," + base64.b64encode(content).decode(),
    "bytes": lambda content, path, url: content,
    "row of a dataset": lambda content, path, url: {"bytes": content, "path": None},
    "path in a dataset": lambda content, path, url: {"bytes": None, "path": str(path)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FILES)
def test_files_look_as_in_a_viewer(name, way, server, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    content, shown = FILES[name]()
    folder, address = server
    path = folder / f"{name.replace(' ', '_').replace(',', '')}.image"
    path.write_bytes(content)
    image = WAYS[way](content, path, f"{address}/{path.name}")
    torch.testing.assert_close(pixels(image), pixels(shown), atol=0.016, rtol=0)  # one level of 255


@pytest.mark.parametrize("name", ["grey, 16 bit", "black on transparent ground", "turned by EXIF"])
def test_all_ways_of_the_processor_agree(name, tmp_path):
    """In chats, by the processor, and as rows of images."""
    processor = make_processor()
    content, shown = FILES[name]()
    path = tmp_path / "image"
    path.write_bytes(content)
    expected = pixels(shown)
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for part in ({"path": str(path)}, {"url": str(path)}, {"image": str(path)}, {"image": Image.open(path)}):
        messages = [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "What?"}]}]
        found = processor.apply_chat_template(messages, **settings)["pixel_values"]
        torch.testing.assert_close(found, expected, atol=0.016, rtol=0)
    for images in (path, [path], [[str(path)]], [Image.open(path)]):
        found = processor(images=images, text=["<image>"], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, expected, atol=0.016, rtol=0)


RGB = np.asarray(picture())
ARRAYS = {
    "uint8": RGB.copy(),
    "floats to 255": RGB.astype(np.float32),
    "floats to 1": RGB.astype(np.float32) / 255,
    "doubles to 1": RGB / 255,
    "integers": RGB.astype(np.int64),
    "uint16": RGB.astype(np.uint16) * 257,
    "channels first": np.moveaxis(RGB, -1, 0).copy(),
    "floats to 1, channels first": np.moveaxis(RGB, -1, 0).astype(np.float32) / 255,
    "opaque": np.concatenate([RGB, np.full((20, 40, 1), 255, np.uint8)], axis=-1),
}


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_and_tensors(name, kind):
    array = kind(ARRAYS[name])
    torch.testing.assert_close(pixels(array), pixels(picture()), atol=0.016, rtol=0)
    torch.testing.assert_close(pixels(array[None]), pixels(picture()), atol=0.016, rtol=0)  # a batch


def test_grey_and_black_and_white_arrays():
    torch.testing.assert_close(pixels(GREY), pixels(picture("L")))
    torch.testing.assert_close(pixels(GREY[..., None]), pixels(picture("L")))
    torch.testing.assert_close(pixels(GREY[None]), pixels(picture("L")))
    torch.testing.assert_close(pixels(GREY > 128), pixels(Image.fromarray(GREY > 128)))


def test_arrays_that_are_not_to_be_rescaled_stay_as_they_are():
    levels = np.random.default_rng(0).random((3, 30, 30), dtype=np.float32)
    found = pixels(levels, do_rescale=False, do_pad=False, do_resize=False)
    mean, std = (np.array(x, np.float32)[:, None, None] for x in make_mean_and_std())
    np.testing.assert_allclose(found[0].numpy(), (levels - mean) / std, atol=1e-5)


def make_mean_and_std():
    image_processor = MQTLlavaImageProcessor()
    return image_processor.image_mean, image_processor.image_std


def test_one_object_in_several_prompts_is_decoded_once(tmp_path, monkeypatch):
    """Threads that decode one lazy file at once read a closed or truncated one, or wrong pixels."""
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8))
    large.save(tmp_path / "large.webp", lossless=True)
    expected = pixels(large)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    processor = make_processor()
    for _ in range(30):
        image = Image.open(tmp_path / "large.webp")
        found = processor(images=[image] * 4, text=["<image>"] * 4, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, expected.expand(4, -1, -1, -1))


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_empty_images_are_refused(size):
    for empty in (Image.new("RGB", size), np.zeros((*size, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"Image 1 is empty"):
            pixels([picture(), empty])


def test_errors_name_the_image(tmp_path):
    content = saved(picture(), "PNG")
    (tmp_path / "cut.png").write_bytes(content[:-200])
    with pytest.raises(ValueError, match=r"Image 1 \(.*cut\.png\) cannot be used"):
        pixels([picture(), Image.open(tmp_path / "cut.png")])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"Cannot read the image .*text\.png"):
        pixels([picture(), str(tmp_path / "text.png")])
    with pytest.raises(ValueError, match=r"missing\.png.*is neither an image file, a URL nor base64"):
        pixels([picture(), str(tmp_path / "missing.png")])
    with pytest.raises(ValueError, match="An image must be a PIL image"):
        pixels([picture(), 5])
    for levels in (
        np.full((4, 4, 3), -0.5),
        np.full((4, 4, 3), np.nan),
        np.full((4, 4, 3), 1e6),
        np.full((4, 4, 3), -1),
    ):
        with pytest.raises(ValueError, match=r"Image 0 cannot be used: (float|integer) values must"):
            pixels(levels)


def test_damaged_metadata_are_no_reason_to_refuse_an_image(monkeypatch):
    def fail(self):
        raise SyntaxError("not a TIFF file")

    expected = pixels(picture())
    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert torch.equal(pixels(picture()), expected)


def test_none_is_no_image():
    """In rows of mixed data, as `datasets` and TRL have them."""
    processor, image = make_processor(), picture()
    settings = {"text": ["<image>a", "b"], "padding": True, "return_tensors": "pt"}
    expected = processor(images=[[image], []], **settings)
    for images in ([[image], None], [[image], [None]], [image, None], (image, None)):
        found = processor(images=images, **settings)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    for images in (None, [None, None], [[], None], []):
        assert "pixel_values" not in processor(images=images, text=["a", "b"], padding=True)


def test_save_and_load(image_processor, tmp_path):
    image_processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is MQTLlavaImageProcessor and loaded.to_dict() == image_processor.to_dict()
    MQTLlavaConfig().save_pretrained(tmp_path / "config")
    assert image_processor.side == 30 and MQTLlavaImageProcessor().side == 336


def test_older_checkpoints_name_the_image_processor_of_llava(tmp_path):
    processor = make_processor()
    processor.save_pretrained(tmp_path)
    path = Path(tmp_path, "processor_config.json")
    text = path.read_text().replace(
        '"image_processor_type": "MQTLlavaImageProcessor"', '"image_processor_type": "LlavaImageProcessor"'
    )
    path.write_text(
        text.replace('"image_token"', '"image_side": 30,\n  "image_token"').replace(
            '"AutoImageProcessor": "image_processing_mqt_llava.MQTLlavaImageProcessor",', ""
        )
    )
    loaded = type(processor).from_pretrained(tmp_path)
    assert type(loaded.image_processor) is MQTLlavaImageProcessor
    assert torch.equal(loaded.image_processor(picture(), return_tensors="pt")["pixel_values"], pixels(picture()))
