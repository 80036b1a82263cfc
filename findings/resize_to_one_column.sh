#!/usr/bin/env bash
# torch 2.13.0 (CPU): an antialiased resize to one column copies the first row into all others.
#
# Expected: interpolate(mode="bilinear", antialias=True) resizes each axis by itself; its result depends on the values,
#   not on how the tensor lies in memory, and a resize of the transposed input is the transposed resize.
# Instead: where the height grows and the width becomes 1, every row is the first row. One row, two columns, or an input
#   that was copied to channels_last give the right values; float32 and float64 are alike. SigLIP2 in transformers
#   resizes its position table by this call: the rows of a strip one patch wide all get the same position.
# Why it matters: a strip of 16 pixels by 1024 (a scroll bar, a ruler, a tall crop) loses its vertical positions on a
#   CPU, where golden values are often made.
# Seen 2026-11-29 with torch 2.13.0 and transformers 5.23.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${PYTHON:-}" ]; then
  python3 -m venv "$work/venv"
  PYTHON=$work/venv/bin/python
  "$PYTHON" -m pip install -qq --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.3.5
fi
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$PYTHON" -W ignore - <<'EOF'
import torch
import torch.nn.functional as F
import transformers
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

def weights(old, new):
    """(new, old): a triangle over each new pixel's centre, as wide as the larger of the two pixels."""
    wide = max(old / new, 1)
    centres = (torch.arange(new)[:, None] + 0.5) * old / new
    triangle = (1 - (torch.arange(old) + 0.5 - centres).abs() / wide).clamp(min=0)
    return triangle / triangle.sum(1, keepdim=True)

def resize(table, size):
    return F.interpolate(table, size=size, mode="bilinear", antialias=True)

print(f"torch {torch.__version__}, transformers {transformers.__version__}; largest error of 16 x 16 resized to")
torch.manual_seed(0)
table = torch.randn(1, 8, 16, 16)
for size in ((64, 1), (1, 64), (64, 2)):
    right = weights(16, size[0]) @ table @ weights(16, size[1]).T
    found = {
        "contiguous": resize(table, size),
        "channels_last": resize(table.contiguous(memory_format=torch.channels_last), size),
        "SigLIP2": Siglip2VisionEmbeddings.resize_positional_embeddings(
            table[0].permute(1, 2, 0).contiguous(), torch.tensor([size]), size[0] * size[1]
        ).mT.reshape(1, 8, *size),
    }
    errors = {name: (value - right).abs().max().item() for name, value in found.items()}
    print(size, ", ".join(f"{name} {error:.1g}" for name, error in errors.items()))
    for name, error in errors.items():
        wrong = size == (64, 1) and name != "channels_last"
        assert error > 0.1 if wrong else error < 1e-5, (size, name)
        assert not wrong or found[name].eq(found[name][:, :, :1]).all(), "rows differ"
EOF
