#!/usr/bin/env bash
# datasets 5.2.0: adding a column with map() compresses the pictures again, if the function as much as looks at one.
#
# Expected: map() with a function that returns {"width": ...} adds a column and leaves the others as they are; the
#   dataset stores the encoded file, and Image is documented to decode when it is read.
# Instead: a row that has been decoded is written back from its PIL picture, by Pillow's JPEG encoder at its default
#   quality of 75. Every such map() loses more. The same function with input_columns=["image"], one that reads nothing,
#   and filter() keep the bytes, so a look at one row's code does not tell.
# Why it matters: a pipeline that notes sizes, hashes or token counts step by step degrades screenshots and documents,
#   small text first; the picture the model trains on is no longer the one it is tested on. Only pictures that lie in
#   the table as bytes are hit (Parquet, the usual form on a hub); with Image(decode=False) they are safe.
# Seen 2026-11-29 with datasets 5.2.0 and pillow 13.0.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${PYTHON:-}" ]; then
  python3 -m venv "$work/venv"
  PYTHON=$work/venv/bin/python
  "$PYTHON" -m pip install -qq --no-compile --disable-pip-version-check datasets==5.2.0 pillow==13.0.0 numpy==2.3.5
fi
HF_HOME=$work/home HF_HUB_OFFLINE=1 "$PYTHON" - <<'EOF'
import io

import datasets
import numpy as np
import PIL
from PIL import Image

datasets.disable_progress_bars()
squares = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).repeat(4, 0).repeat(4, 1)
file = io.BytesIO()
Image.fromarray(squares.astype(np.uint8)).save(file, "JPEG", quality=95)
features = datasets.Features(image=datasets.Image())
original = datasets.Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}]}, features=features)

def stored(table):
    return table.with_format("arrow")[0]["image"][0].as_py()["bytes"]

def pixels(table):
    return np.asarray(table[0]["image"]).astype(int)

widths = lambda row: {"width": row["image"].width}
untouched = {
    "map, nothing read": original.map(lambda row: {"one": 1}),
    "map, input_columns": original.map(lambda image: {"width": image.width}, input_columns=["image"]),
    "filter": original.filter(lambda row: row["image"].width > 0),
}
print(f"datasets {datasets.__version__}, pillow {PIL.__version__}")
for name, table in untouched.items():
    print(f"{name:20} bytes as before: {stored(table) == file.getvalue()}")
    assert stored(table) == file.getvalue()
table, errors = original, []
for times in range(1, 5):
    table = table.map(widths)
    errors.append(np.abs(pixels(table) - pixels(original)).mean())
    sizes = f"{len(file.getvalue())} bytes -> {len(stored(table))}"
    print(f"map, width added ({times}) {sizes}, mean change of a value {errors[-1]:.1f}")
assert len(stored(table)) < 0.7 * len(file.getvalue()) and errors[0] > 5 and errors[3] > 1.2 * errors[0]
EOF
