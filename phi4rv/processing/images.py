"""Pictures to NaFlex patches: what the published image processor computes, without its padding.

The rule is that of the SigLIP2 NaFlex processor with the bounds that Phi-4-reasoning-vision-15B adds: a grid
of at most ``n`` patches that keeps the aspect ratio, Pillow's antialiased bilinear resize of the 8-bit
picture, mean and deviation 0.5, and row-major 16 x 16 patches.
"""

import io
import math
import os
import struct
from collections.abc import Callable
from typing import BinaryIO, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageFile

from phi4rv.errors import UserError

T = TypeVar("T")

PATCH_SIZE = 16
PATCH_DIM = PATCH_SIZE * PATCH_SIZE * 3
# Twice the number at which Pillow starts to warn, 512 MiB of RGB. Larger is a decompression bomb or a slip.
MAX_PIXELS = 178_956_970

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(source: str | os.PathLike | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """Any picture as a fully decoded, upright, 8-bit RGB image.

    ``source`` is a path, the bytes of a picture file, or a Pillow image; ``name`` is what errors call it. The
    argument's pixels are never changed; a Pillow image that is upright RGB already is returned as it is.

    - **1-bit, grey, palette, CMYK, YCbCr, HSV, LAB**: Pillow's ``convert("RGB")``, as published.
    - **Alpha** (RGBA, LA, PA, a palette's transparent colours) is dropped, not composited, as published:
      transparent pixels show the colour that the file stores for them. Premultiplied RGBa and La are divided
      out first.
    - **16-bit grey** (I;16 in any byte order): scaled, ``round(x / 257)``. Here and in the next two cases the
      published conversion clips at 255, which turns nearly every such picture white.
    - **32-bit integer** (I): as it is where all values lie in [0, 255]; as 16-bit where all lie in
      [0, 65535]; otherwise the picture's own range is stretched over [0, 255].
    - **Float** (F): [0, 1] is scaled by 255, [0, 255] is rounded, any other range is stretched over [0, 255].
    - **EXIF (or XMP) orientation** is applied wherever the picture carries one, Pillow images included, so
      that the same picture gives the same patches however it is handed over, and boxes refer to what a viewer
      shows. The published processor ignores it. The result carries no tag, so nothing is turned twice; a
      Pillow image that was turned by hand must have lost its tag. Metadata that cannot be parsed counts as no
      orientation.
    - **Animations**: the first frame; of a Pillow image, the frame it stands at.
    - **Large pictures** are decoded up to ``MAX_PIXELS``, checked against the header before decoding.

    Raises UserError, naming the source, if the file is missing, unreadable, empty, truncated, not a picture,
    larger than MAX_PIXELS or of zero size, or if a float picture holds values that are not finite.
    """
    return _read(source, name or _label(source), _decode)


def image_size(source: str | os.PathLike | bytes, name: str | None = None) -> tuple[int, int]:
    """Width and height that open_image would give, from the header; the same errors, damaged pixels aside."""
    return _read(source, name or _label(source), _upright_size)


def _read(source: object, label: str, reader: Callable[[Image.Image, str], T]) -> T:
    """``reader`` of the opened picture; whatever goes wrong is a UserError that begins with ``label``."""
    try:
        if isinstance(source, Image.Image):
            return reader(source, label)
        if isinstance(source, bytes):
            return _read_file(io.BytesIO(source), label, reader)
        with open(source, "rb") as file:  # type: ignore[call-overload]
            return _read_file(file, label, reader)
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{label}: not a picture in a format that can be read, such as PNG or JPEG") from error
    # Decoders meet damaged data with exceptions of nearly every type, and all mean the same to the caller.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{label}: cannot be read as an image: {' '.join(reason.split())}") from error


def _label(source: object) -> str:
    if isinstance(source, (str, os.PathLike)):
        return str(source) or "(empty path)"
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "")) or "image"
    raise UserError(f"an image must be a path, bytes or a PIL image, not {type(source).__name__}")


def _read_file(file: BinaryIO, label: str, reader: Callable[[Image.Image, str], T]) -> T:
    if not file.read(1):
        raise UserError(f"{label}: the image file is empty")
    with Image.open(file) as image:
        if image.format == "EPS":  # Pillow would run Ghostscript on it
            raise UserError(f"{label}: PostScript is a program, not a picture; convert it to PNG first")
        return reader(image, label)


def _decode(image: Image.Image, label: str) -> Image.Image:
    """Checks the size before anything is decoded; then decodes, converts to RGB and turns upright."""
    _check_size(image, label)
    from_file = image.fp is not None if isinstance(image, ImageFile.ImageFile) else False
    image.load()
    turn = _TRANSPOSE.get(_orientation(image))  # after load(), where Pillow itself turns TIFF upright
    rgb = _to_rgb(image, label)
    if turn is not None:
        rgb = rgb.transpose(turn)
    if rgb is image and from_file:
        rgb = rgb.copy()  # a file image keeps its file and decoder
    if rgb is not image:
        rgb.info.clear()
    return rgb


def _check_size(image: Image.Image, label: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{label}: {width} x {height} pixels; at most {MAX_PIXELS} in all are accepted")
    if width * height < 1:
        raise UserError(f"{label}: the image has no pixels ({width} x {height})")


def _upright_size(image: Image.Image, label: str) -> tuple[int, int]:
    _check_size(image, label)
    width, height = image.size
    # 5 to 8 exchange the sides, which Pillow has done by itself in a TIFF's size.
    swapped = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
    return (height, width) if swapped else (width, height)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    # Metadata that cannot be parsed states no orientation; the pixels are still good.
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, struct.error):
        return 1


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        grey = _rescale_to_uint8(np.asarray(image), 0, 65535)
    elif image.mode in ("I", "F"):
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError(f"{label}: the float image holds values that are not finite")
        usual = (1, 255) if image.mode == "F" else (255, 65535)
        top = next((top for top in usual if low >= 0 and high <= top), None)
        grey = _rescale_to_uint8(values, low, high) if top is None else _rescale_to_uint8(values, 0, top)
    else:
        # Pillow converts La only to LA, and warns where a palette with partial alpha skips RGBA.
        straight = {"La": "LA", "RGBa": "RGBA", "P": "RGBA"}.get(image.mode)
        return (image.convert(straight) if straight else image).convert("RGB")
    return Image.fromarray(grey).convert("RGB")


def _rescale_to_uint8(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """[low, high] onto uint8 [0, 255], rounded to nearest; float64 holds every integer and float exactly."""
    return np.rint((values.astype(np.float64) - low) * (255 / ((high - low) or 1))).astype(np.uint8)


def target_grid(width: int, height: int, min_patches: int, max_patches: int) -> tuple[int, int]:
    """The published grid (rows, columns) of 16 x 16 patches for a picture of ``width`` x ``height`` pixels.

    ``n = max(1, (width // 16) * (height // 16))`` is clamped to [min_patches, max_patches]; the grid is that
    of the largest scale whose sides, each rounded up to whole patches, give at most ``n``. The scale is
    bisected on [1e-6, 100] to 1e-5 and its lower end taken, so the float arithmetic is part of the
    definition: it is that of ``get_image_size_for_max_num_patches`` in transformers' SigLIP2. A tiny picture
    may therefore get fewer than ``min_patches`` (scale 100 is the end), and one with a side of many millions
    of pixels more than ``max_patches`` (so is 1e-6). Raises UserError unless all arguments are positive and
    min_patches <= max_patches.
    """
    if width < 1 or height < 1:
        raise UserError(f"image size must be at least 1 x 1 pixels, got {width} x {height}")
    if not 1 <= min_patches <= max_patches:
        raise UserError(f"patch bounds must be 1 <= min <= max, got min {min_patches}, max {max_patches}")
    n = min(max(1, (width // PATCH_SIZE) * (height // PATCH_SIZE), min_patches), max_patches)

    def grid(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(height * scale / PATCH_SIZE)), max(1, math.ceil(width * scale / PATCH_SIZE))

    low, high = 1e-5 / 10, 100.0
    while high - low >= 1e-5:
        scale = (low + high) / 2
        rows, cols = grid(scale)
        if rows * cols <= n:
            low = scale
        else:
            high = scale
    return grid(low)


def patchify(image: Image.Image, rows: int, cols: int) -> torch.Tensor:
    """An RGB image, resized to ``rows`` x ``cols`` patches, as (rows * cols, 768) float32 in [-1, 1].

    Patches are row-major; each is flattened as (row, column, channel). The resize gives the bytes of Pillow's
    antialiased bilinear one, and the values are the published ones to the last bit. Raises UserError if the
    image is not RGB or the grid has no patches.
    """
    if image.mode != "RGB":
        raise UserError(f"patches are cut from RGB images, got mode {image.mode}; use open_image")
    if rows < 1 or cols < 1:
        raise UserError(f"the grid must be at least 1 x 1 patches, got {rows} x {cols}")
    pixels = _resize(image, cols * PATCH_SIZE, rows * PATCH_SIZE).reshape(rows, PATCH_SIZE, cols, PATCH_SIZE * 3)
    patches = np.empty((rows, cols, PATCH_SIZE, PATCH_SIZE * 3), np.float32)
    # One row of patches at a time stays in the cache.
    for source, target in zip(pixels, patches, strict=True):
        target[...] = source.transpose(1, 0, 2)
        # (x / 255 - 0.5) / 0.5 to the last bit: moving a factor of two past a rounding does not change it.
        target /= np.float32(127.5)
        target -= np.float32(1)
    return torch.from_numpy(patches.reshape(rows * cols, PATCH_DIM))


def _resize(image: Image.Image, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8, equal to Pillow's bilinear resize."""
    if image.size == (width, height):
        return np.asarray(image)
    if _torch_resize_is_exact(image.width, width) and _torch_resize_is_exact(image.height, height):
        pixels = torch.from_dlpack(np.asarray(image))[None].permute(0, 3, 1, 2)
        shrunk = F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True)
        return shrunk[0].permute(1, 2, 0).contiguous().numpy()
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def _torch_resize_is_exact(size: int, target: int) -> bool:
    """Whether PyTorch's antialiased resize, the faster one, provably rounds every byte as Pillow's does.

    Both filter along rows, then columns, in fixed point: Pillow with 22 bits for a weight, PyTorch with 15,
    which in general moves some bytes by one. At the ratios here, those of 1080, 1440 and 2160 lines to 720,
    the weights of a pixel are multiples of 1/8, exact in both, or of 1/7 or 1/9, so that its sum stays 1/18
    away from where rounding turns; 15 bits err by at most 6 weights * 255 / 2**16 = 0.024.
    """
    return size * 2 in (target * 2, target * 3, target * 4, target * 6)


def image_to_patches(
    image: Image.Image, min_patches: int = 256, max_patches: int = 3600
) -> tuple[torch.Tensor, tuple[int, int]]:
    """A picture's patches, (rows * cols, 768) float32 in [-1, 1], and its grid (rows, cols).

    Images that are not upright RGB go through open_image first. See target_grid and patchify.
    """
    image = open_image(image)
    rows, cols = target_grid(image.width, image.height, min_patches, max_patches)
    return patchify(image, rows, cols), (rows, cols)
