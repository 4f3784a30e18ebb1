"""Image processor class for MQT-LLaVA"""

# isort: off
from .configuration_mqt_llava import OLDEST_TRANSFORMERS  # noqa: F401  first, since it checks the version of transformers
# isort: on

import base64
import binascii
import io
import os
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, LlavaImageProcessorPil
from transformers.image_utils import (
    ChannelDimension,
    ImageInput,
    infer_channel_dimension_format,
    is_scaled_image,
    is_valid_image,
    make_flat_list_of_images,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import logging


logger = logging.get_logger(__name__)

DOWNLOAD_TIMEOUT = 30  # seconds without receiving a byte
MAX_PIXELS = 2**28  # of an intermediate image, 0.8 GB: more than PIL's own limit for opening files
STRIP_PIXELS = 2**24
ORIENTATION = 0x0112  # EXIF tag


class MQTLlavaImageProcessorKwargs(ImagesKwargs, total=False):
    """
    num_visual_tokens (`int` or `list[int]`, *optional*):
        m, the number of visual tokens of every image or of each, from 1 to M. It doesn't affect the pixels. If the image
        processor has it, it is the processor's default.
    draft (`bool`, *optional*, defaults to `False`):
        Decode large JPEG files at a reduced size, at least twice that of the vision tower. Faster, but the pixels differ
        slightly. Has an effect only on images that are not decoded yet, as returned by `PIL.Image.open`.
    """

    num_visual_tokens: int | list[int] | None
    draft: bool | None


class MQTLlavaImageProcessor(LlavaImageProcessorPil):
    r"""
    Converts images to `pixel_values`: pads them to a square with the mean colour, resizes, rescales and normalizes them. The
    result equals that of [`LlavaImageProcessorPil`] bit for bit, but images are processed in several threads and the padded
    image is never held in full.

    All kinds of input are decoded the same way, as an image viewer shows them: rotated according to EXIF, transparent parts
    on white, 16-bit, 32-bit and float values scaled to 8 bits. Arrays and tensors hold values from 0 to 255, or floats from 0
    to 1, channels first or last.

    Args:
        num_visual_tokens (`int` or `list[int]`, *optional*):
            The processor's default for `num_visual_tokens`.
        draft (`bool`, *optional*, defaults to `False`):
            Decode large JPEG files at a reduced size, at least twice that of the vision tower. Faster, but the pixels differ
            slightly. Has an effect only on images that are not decoded yet, as returned by `PIL.Image.open`.
        kwargs:
            As for [`LlavaImageProcessorPil`]: `size`, `crop_size`, `do_pad`, `image_mean`, `image_std` ...
    """

    valid_kwargs = MQTLlavaImageProcessorKwargs
    size = {"height": 336, "width": 336}
    crop_size = {"height": 336, "width": 336}
    default_to_square = True
    do_pad = True
    do_center_crop = False
    num_visual_tokens = None
    draft = False

    def __init__(self, **kwargs: Unpack[MQTLlavaImageProcessorKwargs]):
        super().__init__(**kwargs)

    @property
    def side(self) -> int:
        """Height and width of `pixel_values` in pixels."""
        return (self.crop_size if self.do_center_crop else self.size)["height"]

    def fetch_images(self, image_url_or_urls):
        """Load anything that [`load_image`] accepts, in any nesting, which is kept. Files are not decoded yet."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        return load_image(image_url_or_urls)

    def preprocess(self, images: ImageInput, **kwargs: Unpack[MQTLlavaImageProcessorKwargs]) -> BatchFeature:
        """
        Args:
            images (`ImageInput`):
                An image, or a list of them: PIL images of any mode, arrays, tensors, paths, URLs, base64.

        Returns:
            [`BatchFeature`]: `pixel_values`, of shape `(num_images, 3, height, width)` if `return_tensors` is given, else a
            list of arrays of shape `(3, height, width)`.

        Raises:
            `ValueError`: for an image that cannot be read, with its index and file name, and for arguments that lead to another
                size than the vision tower's.
        """
        images = cast(list, make_flat_list_of_images(self.fetch_images(images)))
        settings = {name: getattr(self, name, None) for name in self.valid_kwargs.__annotations__}
        settings |= {name: value for name, value in kwargs.items() if value is not None}
        does_geometry = self._does_geometry(kwargs) and bool(settings["do_rescale"])
        self._check_shapes(images, kwargs, settings, does_geometry)
        background = tuple(int(mean * 255) for mean in self.image_mean)

        def prepare(indexed_image):
            index, image = indexed_image
            try:
                if settings["draft"]:
                    _decode_smaller(image, 2 * self.side)
                if isinstance(image, Image.Image) or settings["do_rescale"]:
                    image = to_rgb(image, settings.get("input_data_format"))
                return _pad_and_resize(image, self.side, background) if does_geometry else image
            except Exception as error:  # decoders raise all kinds of exceptions on damaged files
                name = getattr(image, "filename", "")
                raise ValueError(f"Image {index}{f' ({name})' if name else ''} cannot be used: {error}") from error

        # Each object once: two threads must not decode the same lazy file
        distinct = {id(image): (index, image) for index, image in reversed(list(enumerate(images)))}
        if len(distinct) > 1 and torch.get_num_threads() > 1:  # PIL releases the GIL
            with ThreadPoolExecutor(min(len(distinct), torch.get_num_threads())) as pool:
                prepared = dict(zip(distinct, pool.map(prepare, distinct.values())))
        else:
            prepared = dict(zip(distinct, map(prepare, distinct.values())))
        kwargs = {name: value for name, value in kwargs.items() if name not in ("draft", "num_visual_tokens")}
        if settings["do_rescale"]:
            kwargs.pop("input_data_format", None)
        if does_geometry:
            kwargs |= {"do_pad": False, "do_resize": False, "do_center_crop": False}
        processed = super().preprocess([prepared[id(image)] for image in images], **kwargs)
        shape = tuple(np.shape(processed["pixel_values"][0])[-2:])
        if shape != (self.side, self.side):
            raise ValueError(self._wrong_shape(f"these arguments give {shape[0]} x {shape[1]}: {kwargs}"))
        return processed

    def _does_geometry(self, kwargs) -> bool:
        """Whether to pad and resize with [`_pad_and_resize`] instead of transformers' slower steps."""
        arguments = {"do_pad", "do_resize", "do_center_crop", "size", "crop_size", "resample", "image_mean"}
        given = {name for name, value in kwargs.items() if value is not None}
        size = dict(self.size)
        is_square = size.get("height") is not None and size.get("height") == size.get("width")
        pads = self.do_pad and self.do_resize and not self.do_center_crop
        return not arguments & given and is_square and pads and self.resample == Image.Resampling.BICUBIC

    def _check_shapes(self, images, kwargs, settings, does_geometry: bool):
        """Refuse, before any work, what cannot become an image of the vision tower's size or would need too much memory: on a
        server, clients choose images and arguments."""
        for name in ("size", "crop_size", "pad_size"):
            given = kwargs.get(name)
            if given is not None and given not in (self.side, {"height": self.side, "width": self.side}):
                raise ValueError(self._wrong_shape(f"`{name}` is {given}"))
        for index, image in enumerate(images):
            if not isinstance(image, Image.Image):
                if 0 in image.shape:
                    raise ValueError(f"Image {index} is empty, of shape {tuple(image.shape)}.")
                continue
            width, height = image.size
            if not width or not height:
                raise ValueError(f"Image {index} is empty, {width} x {height} pixels.")
            if not (settings["do_resize"] or settings["do_center_crop"]) and image.size != (self.side, self.side):
                raise ValueError(self._wrong_shape(f"image {index} has {width} x {height} pixels and is not resized"))
            # transformers allocates the whole padded square
            longest = max(image.size)
            if longest * (self.side if does_geometry or not settings["do_pad"] else longest) > MAX_PIXELS:
                raise ValueError(f"Image {index}, of {width} x {height} pixels, is too long to be padded to a square.")

    def _wrong_shape(self, what: str) -> str:
        return f"The vision tower takes images of {self.side} x {self.side} pixels; {what}."


def load_image(image):
    """
    Load an image. Files are opened, but not decoded yet.

    Args:
        image: A PIL image, an array or a tensor; a path or an http(s) URL; base64, with or without the prefix
            `data:image/...;base64,`; the bytes of a file; a `dict` with `bytes` or `path`, as in `datasets`.

    Raises:
        `ValueError`: if there is no such image, or it cannot be read.
    """
    if is_valid_image(image):
        return image[None] if getattr(image, "ndim", 3) == 2 else image  # grayscale, with a channel dimension
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") else image.get("path")
    try:
        if isinstance(image, bytes):
            return Image.open(io.BytesIO(image))
        if isinstance(image, os.PathLike) or (isinstance(image, str) and os.path.isfile(image)):
            return Image.open(image)
        if isinstance(image, str):
            if image.startswith(("http://", "https://")):
                return Image.open(io.BytesIO(_download(image)))
            return Image.open(io.BytesIO(base64.b64decode(image.rpartition(",")[2], validate=True)))
    except binascii.Error:
        raise ValueError(f"{_shorten(image)} is neither an image file, a URL nor base64.") from None
    except Exception as error:  # decoders raise all kinds of exceptions on damaged files
        raise ValueError(f"Cannot read the image {_shorten(image)}: {error}") from error
    raise ValueError(
        f"An image must be a PIL image, an array, a tensor, a path, a URL, base64 or the bytes of a file; got {type(image)}."
    )


def _download(url: str) -> bytes:
    from huggingface_hub.utils import httpx  # the HTTP client of transformers

    return httpx.get(url, timeout=DOWNLOAD_TIMEOUT, follow_redirects=True).raise_for_status().content


def _shorten(source) -> str:
    return f"{source!r:.100}"


def to_rgb(image, input_data_format=None) -> Image.Image:
    """Convert a PIL image of any mode (the first frame of an animation), an array or a tensor to 8-bit RGB, as a viewer shows it.

    Raises:
        `ValueError`: for values whose scale is unknown: negative ones, and floats above 65535.
    """
    if not isinstance(image, Image.Image):
        image = _from_array(np.asarray(image.cpu() if isinstance(image, torch.Tensor) else image), input_data_format)
    elif _is_turned(image):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ORIENTATION, 1) != 1
    except Exception:  # don't refuse an image for damaged metadata
        return False


def _from_array(levels: np.ndarray, input_data_format=None) -> Image.Image:
    if levels.ndim == 3:
        layout = input_data_format or infer_channel_dimension_format(levels, num_channels=(1, 2, 3, 4))
        if layout in (ChannelDimension.FIRST, "channels_first"):
            levels = np.moveaxis(levels, 0, -1)
        levels = levels[..., 0] if levels.shape[-1] == 1 else levels
    if levels.dtype == bool:
        levels = levels * np.uint8(255)
    elif levels.dtype != np.uint8:
        if is_scaled_image(levels) and np.issubdtype(levels.dtype, np.floating):
            logger.warning_once("Arrays of floats from 0 to 1 are treated as rescaled images, in which 1 is white.")
        mode = "F" if np.issubdtype(levels.dtype, np.floating) else "I;16" if levels.dtype == np.uint16 else "I"
        if mode == "I" and levels.min() < 0:
            raise ValueError(f"integer values must not be negative; the smallest is {levels.min()}")
        levels = _to_8_bits(levels, mode)
    return Image.fromarray(np.ascontiguousarray(levels))


def _to_8_bits(levels: np.ndarray, mode: str) -> np.ndarray:
    """Scale values of a PIL mode with more than 8 bits, which PIL itself would clip at 255."""
    if mode == "I" and levels.min(initial=0) < 0:  # PIL stores 32-bit unsigned values as signed ones
        levels = levels.astype(np.int64) & 0xFFFFFFFF
    lowest, highest = float(levels.min()), float(levels.max())
    if mode == "F":
        scale = 1 / 255 if highest <= 1 else 1 if highest <= 255 else 257
        if not (lowest >= 0 and highest <= 65535):  # NaN as well
            raise ValueError(f"float values must be from 0 to 1, to 255 or to 65535; got {lowest:g} to {highest:g}")
    elif mode == "I":
        scale = 1 if highest <= 255 else 257 if highest <= 65535 else 0x1010101
    else:
        scale = 257
    return (levels.astype(np.float64) / scale).round().clip(0, 255).astype(np.uint8)


def _decode_smaller(image, side: int):
    """Set a JPEG file that is not decoded yet to be decoded at 1/2, 1/4 or 1/8 of its size, but with at least `side` pixels."""
    if getattr(image, "format", None) == "JPEG":
        scale = side / max(image.size)
        if scale < 1:
            image.draft("RGB", tuple(max(1, round(length * scale)) for length in image.size))


def _pad_and_resize(image: Image.Image, side: int, background: tuple[int, ...]) -> Image.Image:
    """Pad an RGB image to a square with the background colour and resize it, bit for bit as the reference does.

    PIL resizes horizontally first, then vertically. So the horizontal pass can run strip by strip and skip rows of padding,
    and the padded image is never held in full.
    """
    width, height = image.size
    longest = max(width, height)
    left, top = (longest - width) // 2, (longest - height) // 2
    strip_height = max(1, STRIP_PIXELS // longest)
    rows = Image.new("RGB", (side, longest), background)
    for first in range(0, height, strip_height):
        last = min(first + strip_height, height)
        box: tuple[int, int, int, int] | None = (0, first, width, last)
        strip, size = image, (side, last - first)
        if width < longest:
            strip = Image.new("RGB", (longest, size[1]), background)
            strip.paste(image.crop(box), (left, 0))
            box = None
        rows.paste(strip.resize(size, Image.Resampling.BICUBIC, box), (0, top + first))
    return rows.resize((side, side), Image.Resampling.BICUBIC)


MQTLlavaImageProcessor.register_for_auto_class()

__all__ = ["MQTLlavaImageProcessor"]
