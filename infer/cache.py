"""Keys and values of running documents, packed: each document owns a stretch of rows of one buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from phi4rv.config import Config
from phi4rv.decoder import Attend
from phi4rv.ops import Operations


class KVCache:
    """(N, G, D) keys and values for each layer; document b holds rows starts[b] : starts[b] + lengths[b].

    ``capacities`` (B,): the rows each document may come to need, prompt and answer. Unused rows are room that is
    reserved, never read.
    """

    def __init__(self, config: Config, capacities: Tensor, dtype: torch.dtype, device: torch.device, ops: Operations):
        self.ops = ops
        ends = capacities.cumsum(0)
        self.starts = (ends - capacities).to(device)
        self.lengths = torch.zeros_like(self.starts)
        shape = (config.num_hidden_layers, int(ends[-1]), config.num_key_value_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)

    def prefill(self, cu_seqlens: Tensor, max_seqlen: int) -> Attend:
        """Attention of a packed row of whole prompts, one for each document, that fills the cache as it goes."""
        self.lengths = cu_seqlens.diff().to(self.starts)
        documents = torch.repeat_interleave(torch.arange(len(self.starts), device=self.starts.device), self.lengths)
        offsets = self.starts - cu_seqlens[:-1]
        rows = torch.arange(len(documents), device=self.starts.device) + offsets[documents]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer].index_copy_(0, rows, k)
            self.values[layer].index_copy_(0, rows, v)
            return self.ops.packed_attention(q, k, v, cu_seqlens, max_seqlen, causal=True)

        return attend

    def extend(self, documents: Tensor) -> Attend:
        """Attention of one new token for each of ``documents`` (B',) int64; their lengths grow by one."""
        rows = self.starts[documents] + self.lengths[documents]
        self.lengths = self.lengths.index_add(0, documents, torch.ones_like(documents))
        starts, lengths = self.starts[documents], self.lengths[documents]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys.index_copy_(0, rows, k)
            values.index_copy_(0, rows, v)
            return self.ops.decode_attention(q[:, None], keys, values, starts, lengths)[:, 0]

        return attend
