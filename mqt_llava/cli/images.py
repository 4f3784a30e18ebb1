"""Images from files, http(s) URLs and stdin."""

import re
import sys
import warnings
from io import BytesIO

from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import UsageError


DOWNLOAD_TIMEOUT = 30  # seconds without a byte
MAX_DOWNLOAD_BYTES = 256 * 2**20
MAX_SIDE = 8192  # pixels; the processor pads to a square, so the cost grows with the square of the longer side


def is_url(source: str) -> bool:
    return re.fullmatch(r"https?://\S+", source, re.IGNORECASE) is not None


def load_image(source: str) -> Image.Image:
    """Load an image from a file, an http(s) URL or stdin (`-`), and turn it upright."""
    name = "the image on stdin" if source == "-" else source
    try:
        file: BytesIO | str = source
        if source == "-":
            file = BytesIO(sys.stdin.buffer.read())
        elif is_url(source):
            file = BytesIO(download(source))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata that does not matter
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                image.load()
                upright = ImageOps.exif_transpose(image)
            if max(upright.size) > MAX_SIDE:
                upright.thumbnail((MAX_SIDE, MAX_SIDE))
            return upright
    except UsageError:
        raise
    except FileNotFoundError:
        raise UsageError(f"file not found: {name}") from None
    except IsADirectoryError:
        raise UsageError(f"not an image but a directory: {name}") from None
    except PermissionError:
        raise UsageError(f"no permission to read {name}") from None
    except UnidentifiedImageError:
        raise UsageError(f"not an image in any format that Pillow reads: {name}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UsageError(f"too many pixels, more than {Image.MAX_IMAGE_PIXELS}: {name}") from None
    except Exception as error:  # decoders may raise anything for a damaged file
        raise UsageError(f"damaged or truncated image: {name} ({error})") from None


def download(url: str) -> bytes:
    from huggingface_hub.utils import httpx  # the one that transformers uses

    from .. import __version__

    content = bytearray()
    headers = {"User-Agent": f"mqt-llava/{__version__}"}
    try:
        with httpx.stream("GET", url, headers=headers, timeout=DOWNLOAD_TIMEOUT, follow_redirects=True) as response:
            if response.is_error:
                raise UsageError(f"cannot download {url}: HTTP {response.status_code} {response.reason_phrase}")
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_DOWNLOAD_BYTES:
                    raise UsageError(f"cannot download {url}: more than {MAX_DOWNLOAD_BYTES} bytes")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UsageError(f"cannot download {url}: {error or type(error).__name__}") from None
    return bytes(content)
