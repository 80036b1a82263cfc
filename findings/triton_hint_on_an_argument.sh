#!/usr/bin/env bash
# triton 3.9.0: multiple_of on a kernel's stride does nothing; on the product with it, loads become eight times as wide.
#
# Expected: tl.multiple_of is documented to let the compiler know of a divisor, for vectorised memory accesses, and
#   tl.assume to let it take a condition as true. A row stride that is a multiple of 8 is enough for rows of bfloat16
#   to be read by 16 bytes.
# Instead: hints on the argument itself are dropped without a word, and the rows are read element by element. The hint
#   counts on the product of row and stride. Arithmetic that says the same, s // 8 * 8, works as well, and so does a
#   literal. Triton sees by itself only divisors of 16, so strides such as 72 (a head dimension) fall between.
# Why it matters: vision towers have head dimensions such as 72, and a strided view of q, k or v gets a stride of 72 at
#   run time. Results are right either way; only the PTX shows that memory is read by 2 bytes.
# Seen 2026-11-29 with triton 3.9.0 (and 3.6.0). No GPU is needed: the kernels are compiled for sm_90, not run.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${PYTHON:-}" ]; then
  python3 -m venv "$work/venv"
  PYTHON=$work/venv/bin/python
  "$PYTHON" -m pip install -qq --no-compile --disable-pip-version-check triton==3.9.0
fi
cat > "$work/kernel.py" <<'EOF'
import re
from collections import Counter

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def read_rows(x, y, stride, HOW: tl.constexpr):
    rows, columns = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    if HOW == "no hint":
        starts = rows * stride
    elif HOW == "multiple_of(stride)":
        starts = rows * tl.multiple_of(stride, 8)
    elif HOW == "assume(stride % 8 == 0)":
        tl.assume(stride % 8 == 0)
        starts = rows * stride
    elif HOW == "multiple_of(rows * stride)":
        starts = tl.multiple_of(rows * stride, [1, 8])
    elif HOW == "stride // 8 * 8":
        starts = rows * (stride // 8 * 8)
    tl.store(y + rows * 64 + columns, tl.load(x + starts + columns))

print(f"triton {triton.__version__}; 64 rows of 64 bfloat16, loads of one thread")
types = {"x": "*bf16", "y": "*bf16", "stride": "i32", "HOW": "constexpr"}
aligned = {(place,): [["tt.divisibility", 16]] for place in (0, 1)}
for how, wide in (
    ("no hint", False), ("multiple_of(stride)", False), ("assume(stride % 8 == 0)", False),
    ("multiple_of(rows * stride)", True), ("stride // 8 * 8", True),
):
    source = ASTSource(read_rows, types, constexprs={(3,): how}, attrs=aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    loads = Counter(re.findall(r"ld\.global\S*", ptx))
    print(f"{how:28} {dict(loads)}")
    assert loads == ({"ld.global.v4.b32": 4} if wide else {"ld.global.b16": 32}), how
EOF
TRITON_CACHE_DIR=$work/cache "$PYTHON" -W ignore "$work/kernel.py"
