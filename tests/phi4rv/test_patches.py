"""The published grid and the published patches."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from phi4rv.errors import UserError
from phi4rv.processing.images import MAX_PIXELS, PATCH_DIM, image_to_patches, open_image, patchify, target_grid

DATA = Path(__file__).parents[1] / "data"
TINY = DATA / "tiny-checkpoint"
PICTURES = DATA / "images"
PUBLISHED = (256, 3600)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def transformers_siglip2():
    return pytest.importorskip(
        "transformers.models.siglip2.image_processing_pil_siglip2", reason="transformers is not installed"
    )


# --- the published values --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [1, 2, 3])
def test_patches_equal_the_published_ones(case: int) -> None:
    record = json.loads((TINY / "expected/cases.json").read_text())[case]
    bounds = json.loads((TINY / "preprocessor_config.json").read_text())
    expected = load_file(TINY / f"expected/case{case}.safetensors")["patches"]
    results = [
        image_to_patches(
            open_image(TINY / "images" / Path(name).name),
            bounds["min_num_patches"],
            bounds["max_num_patches"],
        )
        for name in record["images"]
    ]
    assert [list(grid) for _, grid in results] == record["grids"]
    patches = torch.cat([patches for patches, _ in results])
    assert patches.dtype == torch.float32 and patches.shape == expected.shape
    assert torch.equal(patches, expected)


@pytest.mark.parametrize(
    ("width", "height"), [(300, 200), (1280, 720), (1024, 680), (1366, 768), (2000, 333), (16, 16), (7, 90)]
)
def test_patches_equal_those_of_transformers(width: int, height: int) -> None:
    processor = transformers_siglip2().Siglip2ImageProcessorPil()
    image = noise(width, height)
    patches, (rows, cols) = image_to_patches(image)
    n = min(max((width // 16) * (height // 16), PUBLISHED[0]), PUBLISHED[1])
    peer = processor(images=image, max_num_patches=n, return_tensors="pt")
    assert peer["spatial_shapes"].tolist() == [[rows, cols]]
    torch.testing.assert_close(patches, peer["pixel_values"][0, : rows * cols], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["photo.jpg", "screenshot.png"])
def test_real_pictures_equal_transformers_at_3600_patches(name: str) -> None:
    processor = transformers_siglip2().Siglip2ImageProcessorPil(max_num_patches=3600)
    with Image.open(PICTURES / name) as file:
        peer = processor(images=file.convert("RGB"), return_tensors="pt")
    patches, (rows, cols) = image_to_patches(open_image(PICTURES / name), 3600, 3600)
    assert peer["spatial_shapes"].tolist() == [[rows, cols]]
    assert torch.equal(patches, peer["pixel_values"][0, : rows * cols])


def test_patch_layout_is_row_column_channel() -> None:
    image = noise(48, 32)
    patches = patchify(image, 2, 3)
    values = (patches.double() * 0.5 + 0.5) * 255
    for index in range(6):
        row, col = divmod(index, 3)
        crop = image.crop((col * 16, row * 16, col * 16 + 16, row * 16 + 16))
        assert values[index].round().int().tolist() == np.asarray(crop).ravel().tolist()


RATIOS = [(1, 1), (3, 2), (2, 1), (3, 1), (4, 3), (5, 4), (1, 2)]  # picture over grid


@pytest.mark.parametrize("across", RATIOS)
@pytest.mark.parametrize("down", RATIOS)
def test_resize_equals_pillow_at_simple_ratios(across: tuple[int, int], down: tuple[int, int]) -> None:
    rows, cols = 12, 24
    size = (cols * 16 * across[0] // across[1], rows * 16 * down[0] // down[1])
    extremes = noise(*size).point(lambda value: 255 if value > 127 else 0)  # where rounded weights err most
    for image in (noise(*size), extremes):
        resized = image.resize((cols * 16, rows * 16), Image.Resampling.BILINEAR)
        assert torch.equal(patchify(image, rows, cols), patchify(resized, rows, cols))


def test_patches_are_owned_writable_and_leave_the_image_alone() -> None:
    for size in [(256, 256), (200, 120)]:
        image = noise(*size)
        before = image.tobytes()
        patches, (rows, cols) = image_to_patches(image)
        assert patches.shape == (rows * cols, PATCH_DIM) and patches.is_contiguous()
        patches.fill_(7)
        assert image.tobytes() == before and image.size == size


# --- the grid --------------------------------------------------------------------------------------------


def test_grid_equals_transformers_on_many_sizes() -> None:
    reference = transformers_siglip2().get_image_size_for_max_num_patches
    rng = random.Random(0)
    sizes = [(1, 1), (16, 16), (17, 15), (1, 5000), (5000, 1), (10000, 10000), (1, 100_000), (1, MAX_PIXELS)]
    sizes += [(int(2 ** rng.uniform(0, 14)), int(2 ** rng.uniform(0, 14))) for _ in range(1500)]
    for width, height in sizes:
        for low, high in [PUBLISHED, (16, 64), (1, 1), (3600, 3600)]:
            n = min(max(1, (width // 16) * (height // 16), low), high)
            rows, cols = target_grid(width, height, low, high)
            assert (rows * 16, cols * 16) == reference(height, width, 16, n), (width, height, low, high)


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (1, 1, (7, 7)),  # the scale ends at 100: 100 x 100 pixels
        (16, 16, (16, 16)),
        (1280, 720, (45, 80)),
        (3840, 2160, (45, 80)),
        (10000, 10000, (60, 60)),
        (1, 5000, (256, 1)),
        (5000, 1, (1, 256)),
    ],
)
def test_grid_by_hand(width: int, height: int, grid: tuple[int, int]) -> None:
    assert target_grid(width, height, *PUBLISHED) == grid


@pytest.mark.parametrize("arguments", [(0, 5, 1, 2), (5, -1, 1, 2), (5, 5, 0, 2), (5, 5, 3, 2)])
def test_grid_refuses_nonsense(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(UserError, match=r"must be"):
        target_grid(*arguments)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (1, 100_000)])
def test_absurd_aspect_ratios_give_patches(size: tuple[int, int]) -> None:
    patches, (rows, cols) = image_to_patches(Image.new("RGB", size, (255, 0, 0)))
    assert (rows, cols) == target_grid(*size, *PUBLISHED)
    assert torch.equal(patches.view(-1, 3), torch.tensor([1.0, -1.0, -1.0]).expand(rows * cols * 256, 3))


def test_patchify_refuses_wrong_arguments() -> None:
    with pytest.raises(UserError, match="mode L"):
        patchify(Image.new("L", (16, 16)), 1, 1)
    with pytest.raises(UserError, match="0 x 1"):
        patchify(Image.new("RGB", (16, 16)), 0, 1)
