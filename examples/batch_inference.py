"""Answers a file of prompts with pictures: JSON Lines in, JSON Lines out, in the same order.

    python -m examples.batch_inference CHECKPOINT prompts.jsonl answers.jsonl

A line of prompts.jsonl: {"id": "a", "prompt": "<image>\\nWhere is Save?", "images": ["a.png"], "mode": "nothink"};
pictures lie relative to the file, "images" and "mode" may be left out. Prompts whose id stands in answers.jsonl are
skipped, so the same command goes on where an earlier one was stopped. A prompt that cannot be asked gets an "error".
"""

import argparse
import json
import os
from collections import deque
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import infer
import phi4rv

CONFIG = infer.EngineConfig(max_running=64)
AHEAD = 4 * CONFIG.max_running  # prompts that are prepared before the first of them is answered

Record = dict[str, Any]


def answered(path: Path) -> set[str]:
    """Ids that the file holds; a last line that was not written whole is cut off."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return {json.loads(line)["id"] for line in whole.splitlines()}


def answers(
    engine: infer.Engine, records: Iterator[Record], folder: Path, params: infer.SamplingParams
) -> Iterator[Record]:
    """An answer for each record, in their order; the engine always has as many requests as it takes."""
    order: deque[tuple[Record, int]] = deque()
    done: dict[int, Record] = {}
    failures = count(-1, -1)
    while True:
        while len(order) < AHEAD and (record := next(records, None)) is not None:
            images = [folder / name for name in record.get("images", [])]
            try:
                prompt = phi4rv.Prompt(record["prompt"], images, record.get("mode", "auto"))
                number = engine.submit(prompt, params)
            except phi4rv.UserError as error:
                number = next(failures)
                done[number] = {"error": str(error)}
            order.append((record, number))
        if not order:
            return
        for event in engine.step():
            if made := event.generation:
                told = {"thinking": made.thinking, "text": made.text, "finish_reason": made.finish_reason}
                done[event.request_id] = told
        while order and order[0][1] in done:
            record, number = order.popleft()
            yield {"id": record["id"], **done.pop(number)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.batch_inference", description=__doc__)
    for name in ("checkpoint", "prompts", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N")
    args = parser.parse_args(argv)
    known = answered(args.output)
    engine = infer.Engine(args.checkpoint, config=CONFIG)
    params = infer.SamplingParams(max_new_tokens=args.max_new_tokens)
    with args.prompts.open(encoding="utf-8") as lines, args.output.open("a", encoding="utf-8") as output:
        records = (record for line in lines if (record := json.loads(line))["id"] not in known)
        for answer in answers(engine, records, args.prompts.parent, params):
            output.write(json.dumps(answer, ensure_ascii=False) + "\n")
            output.flush()


if __name__ == "__main__":
    main()
