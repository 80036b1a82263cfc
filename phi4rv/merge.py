"""``python -m phi4rv.merge --checkpoint DIR --adapter DIR --output DIR``: base and adapter as one folder in the
Hugging Face layout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from phi4rv.adapters.peft import merge_adapter
from phi4rv.checkpoint.huggingface import load, save
from phi4rv.command_line import Parser, exit_status
from phi4rv.errors import UserError


def run(argv: Sequence[str] | None) -> None:
    parser = Parser(prog="python -m phi4rv.merge", description="Merge a LoRA adapter into its base.")
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="the base, published layout")
    parser.add_argument("--adapter", required=True, type=Path, metavar="DIR", help="a LoRA adapter in PEFT's layout")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder, in the base's dtype")
    args = parser.parse_args(argv)
    if args.output.exists():
        raise UserError(f"--output: {args.output} exists already; name a new folder")
    model, processor = load(args.checkpoint, "cpu")
    merge_adapter(model, args.adapter)
    save(model, processor, args.output)
    print(f"written: {args.output}")


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
