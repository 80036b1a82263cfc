#!/usr/bin/env bash
# transformers 5.23.0: whether packed documents are kept apart depends on use_cache, and so on gradient checkpointing.
#
# Expected: a row of several documents whose position ids start again at 0 is recognised as packed, and attention stays
#   within a document (transformers pull request 39194: eager, SDPA and flex attention build that mask). `use_cache` is
#   documented to say only whether the keys and values are returned.
# Instead: the check runs only when no cache exists. use_cache is True by default, in training mode too, so a cache is
#   made and the documents attend to each other without a word. use_cache=False keeps them apart, and so does turning
#   on gradient checkpointing, which switches the cache off: a saving of memory changes the loss.
# Why it matters: packed training without FlashAttention is silently contaminated, a parity test of packed against
#   unpacked fails or passes by an unrelated flag, and an evaluation differs from the training it belongs to.
# Seen 2026-11-29 with transformers 5.23.0 and torch 2.13.0.
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
import transformers
from transformers import Phi3Config, Phi3ForCausalLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=64)
heads = dict(num_attention_heads=4, num_key_value_heads=2)
config = Phi3Config(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3)
model = Phi3ForCausalLM(config).train()

first, second = torch.randint(3, 64, (1, 5)), torch.randint(3, 64, (1, 6))
row = torch.cat([first, second], 1)
positions = torch.tensor([[*range(5), *range(6)]])
alone = model(second, use_cache=False).logits

def error(**options):
    with torch.no_grad():
        return (model(row, position_ids=positions, **options).logits[:, 5:] - alone).abs().max().item()

print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("the second document of a packed row: largest difference of its logits from those it has alone")
for attention in ("eager", "sdpa"):
    model.set_attn_implementation(attention)
    default, no_cache = error(), error(use_cache=False)
    model.gradient_checkpointing_enable()
    checkpointing = error()
    model.gradient_checkpointing_disable()
    print(f"{attention}: default {default:.3g}; use_cache=False {no_cache:.1g}; checkpointing {checkpointing:.1g}")
    assert default > 0.5 and no_cache < 1e-4 and checkpointing < 1e-4
EOF
