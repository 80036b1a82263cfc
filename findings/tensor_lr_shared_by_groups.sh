#!/usr/bin/env bash
# torch 2.13.0: with a tensor as learning rate, all parameter groups get the schedule of the last one.
#
# Expected: LambdaLR documents a list of functions, "one for each group in optimizer.param_groups"; and PyTorch's recipe
#   on compiled optimizers with a scheduler tells the user to wrap the learning rate in a tensor, to avoid recompiling.
# Instead: the groups hold the very same tensor, and a scheduler fills it in place, group after group. A vision tower
#   that is to learn at a tenth of the rate, or not yet, moves at the full one, or everything moves at its rate. The
#   caller's own tensor changes too, so a second optimizer built from it begins at the rate where the first one stands.
# Why it matters: towers, projectors and decoders are trained at different rates by such lists. Nothing warns, and
#   changing `1e-3` to `torch.tensor(1e-3)` for torch.compile or a CUDA graph undoes it.
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
from torch.optim.lr_scheduler import LambdaLR

def train(rate):
    """How far a parameter of each group moves in three steps of SGD with a gradient of 1, and the rates at the end."""
    tower, decoder = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [tower]}, {"params": [decoder]}], lr=rate)
    scheduler = LambdaLR(optimizer, [lambda step: 0.0, lambda step: 1.0])  # the tower is frozen by its schedule
    for _ in range(3):
        tower.grad, decoder.grad = torch.ones(1), torch.ones(1)
        optimizer.step()
        scheduler.step()
    return abs(tower.item()), abs(decoder.item()), [float(group["lr"]) for group in optimizer.param_groups]

print(f"torch {torch.__version__}")
for rate, seen in ((0.5, (0.0, 1.5, [0.0, 0.5])), (torch.tensor(0.5), (1.5, 1.5, [0.5, 0.5]))):
    tower, decoder, rates = train(rate)
    print(f"lr={rate!r}: tower moved {tower}, decoder moved {decoder}; rates at the end {rates}")
    assert (tower, decoder, rates) == seen

rate = torch.tensor(0.5)
optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
LambdaLR(optimizer, lambda step: 0.125)
print(f"the caller's tensor of 0.5 after a scheduler was made: {rate.item()}")
assert rate.item() == 0.0625
EOF
