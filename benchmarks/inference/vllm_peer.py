"""vLLM, where it is installed: not measured yet, on any machine.

With random weights it reads the decoder alone, as a Phi-3 that needs no code beside the weights. A published folder it
reads whole, with the code that lies in the folder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.inference.roofline import Record
from benchmarks.inference.workload import Workload, random_prompt
from benchmarks.models import Transformers


class VLLM:
    """In this process, which ends with all that it holds; nothing is remembered of earlier requests."""

    def __init__(self, folder: Path, **options: Any):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self.llm = LLM(model=str(folder), dtype="bfloat16", enable_prefix_caching=False, **options)

    def answer(self, prompts: Sequence[dict[str, Any]], new: int, ignore_eos: bool = False) -> list[list[int]]:
        """Greedy token ids of each of ``prompts``, vLLM's dicts."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=ignore_eos, detokenize=False)
        outputs = self.llm.generate(list(prompts), sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def measure(workload: Workload, folder: Path) -> dict[str, Record]:
    """Decoding, by the time of a long answer without that of a short one, and many requests at once."""
    Transformers(workload.config, workload.device, workload.dtype, workload.model("torch")).decoder.save_pretrained(
        folder
    )
    torch.cuda.empty_cache()
    s = workload.shapes
    peer = VLLM(folder, skip_tokenizer_init=True, max_model_len=s.context + s.new, max_num_seqs=s.many)

    def seconds(count: int, tokens: int, new: int) -> float:
        prompts = [random_prompt(workload, tokens, seed=n) for n in range(count)]
        asked = [{"prompt_token_ids": workload.processor([prompt]).input_ids.tolist()} for prompt in prompts]
        peer.answer(asked, new, ignore_eos=True)
        begun = time.perf_counter()
        peer.answer(asked, new, ignore_eos=True)
        return time.perf_counter() - begun

    prompt = s.context - s.new // 2
    step = (seconds(1, prompt, s.new + 1) - seconds(1, prompt, 1)) / s.new
    together, alone = (count * s.answer / seconds(count, s.prompt, s.answer) for count in (s.many, 1))
    return {
        "decode": {"seconds": step, "between": None, "joules": None},
        "at once": {"tokens_per_second": together, "one": alone, "requests": s.many},
    }
