#!/usr/bin/env bash
# torch 2.13.0 (CPU): the chunked linear_cross_entropy in bfloat16 returns a loss of 4.0 where it is 8.7.
#
# Expected: torch.nn.LinearCrossEntropyOptions documents that with bfloat16 input `acc_dtype`, the "dtype for internal
#   accumulation", resolves to float32 on a CPU, and that acc_policy="accurate" makes the broadest use of it. So the
#   loss should be as good as that of options=None, whose logits are materialised.
# Instead: the loss is summed over chunks in bfloat16. Once the sum is 256 to 512 times a chunk's part, adding a part
#   changes nothing: many small chunks end at a round number, whatever the data. The gradient of the weight is 7.5 %
#   off too, against 0.2 % unchunked; that of the input is right. Naming acc_policy and acc_dtype does not help.
# Why it matters: the default heuristic takes about vocabulary / hidden size chunks, some 400 for a small language model
#   with a vocabulary of 256k. Training goes on, while the logged loss and its perplexity are of no use, and two runs
#   that differ only in chunk size cannot be compared.
# Seen 2026-11-29 with torch 2.13.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${PYTHON:-}" ]; then
  python3 -m venv "$work/venv"
  PYTHON=$work/venv/bin/python
  "$PYTHON" -m pip install -qq --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.3.5
fi
OMP_NUM_THREADS=1 "$PYTHON" - <<'EOF'
import torch
import torch.nn.functional as F
from torch.nn import LinearCrossEntropyOptions as Options

TOKENS, HIDDEN, VOCABULARY = 4096, 8, 4096
torch.manual_seed(0)
x = torch.randn(TOKENS, HIDDEN).bfloat16().requires_grad_()
weight = (0.3 * torch.randn(VOCABULARY, HIDDEN)).bfloat16().requires_grad_()
target = torch.randint(VOCABULARY, (TOKENS,))

x32, weight32 = x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
exact = F.cross_entropy(x32 @ weight32.T, target)
exact_grads = torch.autograd.grad(exact, (x32, weight32))
print(f"torch {torch.__version__}; {TOKENS} tokens, hidden size {HIDDEN}, vocabulary {VOCABULARY}, bfloat16")
print(f"{'float32, plain':34} loss {exact.item():.4f}")

seen = {}
for name, options in {
    "options=None": None,
    "Options()": Options(),
    "Options(accurate, float32)": Options(acc_policy="accurate", acc_dtype=torch.float32),
}.items():
    loss = F.linear_cross_entropy(x, weight, target, options=options)
    grads = torch.autograd.grad(loss, (x, weight))
    off = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(grads, exact_grads)]
    seen[name] = (loss.item(), *off)
    print(f"{name:34} loss {loss.item():.4f}  gradients off: input {off[0]:.2%}, weight {off[1]:.2%}")

assert abs(seen["options=None"][0] / exact.item() - 1) < 0.01 and seen["options=None"][2] < 0.005
for name in ("Options()", "Options(accurate, float32)"):
    loss, off_input, off_weight = seen[name]
    assert loss == 4.0 and off_input < 0.005 and off_weight > 0.03, name
EOF
