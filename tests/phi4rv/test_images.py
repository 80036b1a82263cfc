"""Decoding of pictures: modes, orientation, animations, bombs and damaged files."""

import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from phi4rv.errors import UserError
from phi4rv.processing.images import MAX_PIXELS, image_size, image_to_patches, open_image, target_grid

PUBLISHED = (256, 3600)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def grey_levels(image: Image.Image) -> list[int]:
    values = pixels(image)
    assert (values == values[:, :, :1]).all()
    return values[:, :, 0].ravel().tolist()


# --- modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_8_bit_modes_are_plain_pillow_conversions(mode: str) -> None:
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (9, 13, bands) if bands > 1 else (9, 13)
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = Image.frombytes(mode, (13, 9), np.packbits(values > 127, axis=1) if mode == "1" else values)
    if mode == "PA":
        image.putpalette(bytes(range(256)) * 3)
    before = image.tobytes()
    assert np.array_equal(pixels(open_image(image)), np.asarray(image.convert("RGB")))
    assert image.tobytes() == before and image.mode == mode


def test_alpha_is_dropped_and_not_composited() -> None:
    red_but_invisible = Image.new("RGBA", (3, 2), (255, 0, 0, 0))
    for source in (red_but_invisible, encoded(red_but_invisible, "PNG")):
        assert (pixels(open_image(source)) == [255, 0, 0]).all()
    assert grey_levels(open_image(Image.new("LA", (1, 1), (9, 0)))) == [9]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128, 255])])
def test_palette_colours_survive_transparency(transparency: int | bytes | None) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    options = {} if transparency is None else {"transparency": transparency}
    opened = open_image(encoded(image, "PNG", **options))
    assert pixels(opened).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]


def test_premultiplied_alpha_is_divided_out() -> None:
    half = Image.frombytes("RGBa", (1, 1), bytes([100, 50, 0, 128]))
    assert pixels(open_image(half)).tolist() == [[[199, 99, 0]]]
    assert grey_levels(open_image(Image.frombytes("La", (1, 1), bytes([100, 128])))) == [199]


SIXTEEN = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], np.uint16)
SIXTEEN_AS_8 = [0, 0, 1, 1, 128, 254, 255, 255]  # round(x / 257)


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2")])
def test_16_bit_is_scaled_not_clipped(mode: str, dtype: str) -> None:
    image = Image.frombytes(mode, (8, 1), SIXTEEN.astype(dtype).tobytes())
    assert grey_levels(open_image(image)) == SIXTEEN_AS_8


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_files_are_scaled(format: str) -> None:
    assert grey_levels(open_image(encoded(Image.fromarray(SIXTEEN), format))) == SIXTEEN_AS_8


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 3, 255], [0, 3, 255]),
        ([0, 257, 65535], [0, 1, 255]),
        ([-100, 0, 155], [0, 100, 255]),
        ([0, 2**31 - 1, 2**30], [0, 255, 128]),
        ([70000, 70000, 70000], [0, 0, 0]),
    ],
)
def test_32_bit_integers(values: list[int], expected: list[int]) -> None:
    assert grey_levels(open_image(Image.fromarray(np.array([values], np.int32)))) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.5, 1], [0, 128, 255]),
        ([0, 2.6, 255], [0, 3, 255]),
        ([-1, 0, 1], [0, 128, 255]),
        ([0, 500, 1000], [0, 128, 255]),
        ([-3, -3, -3], [0, 0, 0]),
    ],
)
def test_floats(values: list[float], expected: list[int]) -> None:
    assert grey_levels(open_image(Image.fromarray(np.array([values], np.float32)))) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_floats_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"map\.tiff.*not finite"):
        open_image(Image.fromarray(np.array([[0, value]], np.float32)), "map.tiff")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM"])
def test_formats_from_path_and_bytes(format: str, tmp_path: Path) -> None:
    data = encoded(noise(40, 30), format)
    path = tmp_path / "no-extension"
    path.write_bytes(data)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    for source in (data, path, str(path)):
        opened = open_image(source)
        assert type(opened) is Image.Image and np.array_equal(pixels(opened), expected)


def test_open_image_returns_upright_rgb_as_it_is() -> None:
    image = noise(5, 4)
    assert open_image(image) is image


# --- orientation -----------------------------------------------------------------------------------------

CORNERS = np.array([[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[90, 90, 0], [0, 90, 90], [90, 0, 90]]], np.uint8)
# EXIF 2.32, tag 0x0112: how the stored rows and columns lie in the picture that a viewer shows.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(Image.fromarray(CORNERS), format, exif=exif, **options)
    expected = UPRIGHT[orientation](CORNERS)
    opened = open_image(data)
    assert np.array_equal(pixels(opened), expected)
    assert image_size(data) == opened.size
    assert open_image(opened) is opened  # no tag left to apply again
    with Image.open(io.BytesIO(data)) as lazy:
        assert np.array_equal(pixels(open_image(lazy)), expected)
        assert np.array_equal(pixels(open_image(lazy)), expected)


def test_orientation_of_jpeg_and_of_other_modes() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = noise(64, 32).convert("L")
    opened = open_image(encoded(image, "JPEG", exif=exif))
    with Image.open(io.BytesIO(encoded(image, "JPEG"))) as flat:
        assert np.array_equal(pixels(opened), np.rot90(np.asarray(flat.convert("RGB")), -1))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_undefined_orientations_turn_nothing(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    data = encoded(Image.fromarray(CORNERS), "PNG", exif=exif)
    assert np.array_equal(pixels(open_image(data)), CORNERS)
    assert image_size(data) == (3, 2)


def test_unreadable_metadata_is_no_orientation() -> None:
    data = encoded(Image.fromarray(CORNERS), "PNG", exif=b"Exif\0\0 this is no TIFF header")
    assert np.array_equal(pixels(open_image(data)), CORNERS)


# --- animations and large pictures -----------------------------------------------------------------------


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_first_frame_of_an_animation(format: str, options: dict) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    opened = open_image(data)
    assert type(opened) is Image.Image and (pixels(opened) == [255, 0, 0]).all()
    with Image.open(io.BytesIO(data)) as animation:
        assert animation.n_frames == 3
        animation.seek(2)
        assert (pixels(open_image(animation)) == [0, 0, 255]).all()


def test_an_enormous_picture_is_decoded() -> None:
    patches, grid = image_to_patches(open_image(encoded(Image.new("1", (7000, 4000), 1), "PNG")))
    assert grid == target_grid(7000, 4000, *PUBLISHED) and (patches == 1).all()


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("pillow_limit", [Image.MAX_IMAGE_PIXELS, None])
@pytest.mark.parametrize("size", [(MAX_PIXELS + 1, 1), (13378, 13378), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_whatever_pillow_is_set_to(
    size: tuple[int, int], pillow_limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    with pytest.raises(UserError, match=r"^bomb\.png: .*(pixels|too large)"):
        open_image(png_header(*size), "bomb.png")


# --- bad files -------------------------------------------------------------------------------------------


def refused(source: object, pattern: str, name: str | None = None) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        open_image(source, name)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    refused(tmp_path / "absent.png", r"absent\.png: .*No such file")
    refused(tmp_path, f"{tmp_path.name}: .*directory")
    refused("", r"\(empty path\)")
    refused("a\0b", "null")
    for name, data, pattern in [
        ("empty.png", b"", "empty"),
        ("text.png", b"hello, this is not a picture\n", "not a picture"),
        ("one.png", b"\x89", "not a picture"),
        ("program.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "PostScript"),
    ]:
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, rf"{name}: .*{pattern}")
        refused(data, rf"^{name}: .*{pattern}", name)
    refused(b"", "image of 0 bytes: the image file is empty")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(noise(4, 4), "PNG"))
    path.chmod(0)
    refused(path, r"secret\.png: .*denied")


@pytest.mark.parametrize("source", [None, 3, np.zeros((4, 4, 3), np.uint8), ["a.png"]])
def test_other_types_are_refused(source: object) -> None:
    refused(source, f"not {type(source).__name__}")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.3, 0.7])
def test_truncated_files_are_refused(format: str, kept: float, tmp_path: Path) -> None:
    data = encoded(noise(64, 64), format)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: int(len(data) * kept)])
    refused(path, r"cut\.img: ")
    with open(path, "rb") as file:  # a Pillow image whose file turns out damaged only when it is decoded
        try:
            lazy = Image.open(file)
        except OSError:
            return
        refused(lazy, r"^cut: ", "cut")


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_open_or_are_refused_and_nothing_else() -> None:
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for format in ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]:
        original = encoded(noise(16, 16), format, **({} if format in ("GIF", "BMP") else {"exif": exif}))
        for _ in range(150):
            data = bytearray(original)
            for _ in range(rng.choice([1, 4, 16])):
                data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
            try:
                assert open_image(bytes(data)).mode == "RGB"
            except UserError as error:
                assert "\n" not in str(error)


def test_an_image_without_pixels_is_refused() -> None:
    refused(Image.new("RGB", (0, 5)), "no pixels")
    one_pixel = encoded(Image.new("L", (1, 1)), "BMP")
    refused(one_pixel.replace(struct.pack("<ii", 1, 1), bytes(8)), "not a picture")
