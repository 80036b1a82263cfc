"""Pictures to patches on one core, beside transformers' Pillow-based SigLIP2 image processor.

``python -m benchmarks.images [--json FILE]``. Both sides start from a decoded RGB picture and end with the
same float32 values. The peer is timed as it would be used, at ``max_num_patches=3600``, where it enlarges a
small picture to 3600 patches, and held to ``n``, the number that the published model asks for. Three ratios:

- published: each as it serves the published model, the peer at 3600 and ours at n;
- same n:    both at n;
- same 3600: both at 3600.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from benchmarks.kernels.timing import relative_iqr
from benchmarks.options import json_option
from benchmarks.report.result_files import write_results
from benchmarks.report.rows import Row
from phi4rv.command_line import Parser, exit_status
from phi4rv.processing.images import PATCH_SIZE, image_to_patches

SIZES = [(1280, 720), (1024, 680), (300, 200), (3840, 2160)]
MIN_PATCHES, MAX_PATCHES = 256, 3600


def synthetic_image(width: int, height: int) -> Image.Image:
    """Smooth shapes with grain: neither side's time depends on the values, but caches see real traffic."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 16, 3), dtype=np.uint8)).resize((width, height))
    grain = rng.integers(0, 16, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(np.asarray(coarse) // 2 + grain)


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each variant; one call of each a round, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for variant in variants.values():
        variant()
    for _ in range(rounds):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def measure(width: int, height: int, rounds: int) -> dict:
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    image = synthetic_image(width, height)
    n = min(max((width // PATCH_SIZE) * (height // PATCH_SIZE), MIN_PATCHES), MAX_PATCHES)
    processor = Siglip2ImageProcessorPil()

    def peer(patches: int) -> torch.Tensor:
        return processor.preprocess(image, max_num_patches=patches, return_tensors="pt")["pixel_values"][0]

    patches, grid = image_to_patches(image, MIN_PATCHES, MAX_PATCHES)
    if not torch.equal(patches, peer(n)[: len(patches)]):
        raise RuntimeError(f"{width} x {height}: the two sides disagree, so their times mean nothing")
    times = interleaved(
        {
            "ours_n": lambda: image_to_patches(image, MIN_PATCHES, MAX_PATCHES),
            "peer_n": lambda: peer(n),
            "ours_3600": lambda: image_to_patches(image, MAX_PATCHES, MAX_PATCHES),
            "peer_3600": lambda: peer(MAX_PATCHES),
            "resize": lambda: image.resize((grid[1] * PATCH_SIZE, grid[0] * PATCH_SIZE), Image.Resampling.BILINEAR),
        },
        rounds,
    )
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "benchmark": "images",
        "size": [width, height],
        "grid": list(grid),
        **{f"{name}_ms": value for name, value in medians.items()},
        "ratio_published": medians["peer_3600"] / medians["ours_n"],
        "ratio_same_n": medians["peer_n"] / medians["ours_n"],
        "ratio_same_3600": medians["peer_3600"] / medians["ours_3600"],
        "spread": relative_iqr(times["ours_n"]),
    }


def run(rounds: int = 21) -> list[dict]:
    """One record a size: grid, median milliseconds of both sides, and the three ratios described above."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [measure(width, height, rounds) for width, height in SIZES]
    finally:
        torch.set_num_threads(threads)


def table_rows(records: list[dict]) -> list[Row]:
    """Of each size: the peer as published, and made to cut as many patches as we do."""
    found = []
    for record in records:
        size, noise = "x".join(map(str, record["size"])), record.get("spread")
        for what, peer in ((f"{size}, published", "peer_3600_ms"), (f"{size}, as many patches", "peer_n_ms")):
            found.append(
                Row(
                    "images", what, record["ours_n_ms"], "ms",
                    peer="transformers", peer_value=record[peer], noise=noise, headline=peer == "peer_n_ms",
                )
            )  # fmt: skip
    return found


def table(records: list[dict]) -> str:
    """The records as aligned text, with what each column means."""
    columns = ["ours_n_ms", "peer_n_ms", "ours_3600_ms", "peer_3600_ms", "resize_ms"]
    ratios = ["ratio_published", "ratio_same_n", "ratio_same_3600"]
    heads = ["ours n", "peer n", "ours 3600", "peer 3600", "resize n", "published", "same n", "same 3600"]
    lines = [f"{'size':>11} {'grid':>7} " + " ".join(f"{head:>9}" for head in heads)]
    for record in records:
        size, grid = ("x".join(map(str, record[key])) for key in ("size", "grid"))
        cells = [f"{record[key]:9.2f}" for key in columns] + [f"{record[key]:8.1f}x" for key in ratios]
        lines.append(f"{size:>11} {grid:>7} " + " ".join(cells))
    return "\n".join(
        [
            *lines,
            "milliseconds, median of interleaved calls, one thread; ratios are peer over ours",
            "published: peer at 3600 patches, ours at n; same n: both at n; same 3600: both at 3600",
            "resize n: what Pillow's resize to the grid takes by itself",
        ]
    )


def make_parser() -> Parser:
    parser = Parser("benchmarks.images", "Times pictures to patches, beside their peers.")
    json_option(parser.add)
    return parser


def command(args: argparse.Namespace) -> None:
    records = run()
    if args.json:
        write_results(args.json, {"images": records})
    print(table(records))


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: command(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
