"""Chats with a running server, and shows its answers as they are written, thoughts dimmed.

    python -m infer.serve --checkpoint DIR                # in one terminal
    python -m examples.chat_client [--url URL] [--effort none|low]    # in another

A line `/image shot.png` adds a picture to the next question; an empty line or Ctrl-D ends. A server's key is read from
PHI4RV_API_KEY. Nothing but Python's own library is used: this is all that the protocol needs.
"""

import argparse
import base64
import json
import mimetypes
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DIM, PLAIN = "\033[2m", "\033[0m"


def picture(path: str) -> dict[str, Any]:
    """A part of a message: the file as a data URL."""
    kind = mimetypes.guess_type(path)[0] or "image/png"
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


def stream(url: str, body: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """("reasoning_content" or "content", text) as the server sends them."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('PHI4RV_API_KEY', '')}"}
    data = json.dumps({**body, "stream": True}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", data, headers)
    try:
        with urllib.request.urlopen(request) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue  # a blank line between chunks, or [DONE]
                chunk = json.loads(line.removeprefix(b"data: "))
                if "error" in chunk:
                    raise SystemExit(f"error: {chunk['error']['message']}")
                for choice in chunk["choices"]:
                    yield from ((k, v) for k, v in choice["delta"].items() if k in ("reasoning_content", "content"))
    except urllib.error.HTTPError as error:
        raise SystemExit(f"error: {json.load(error)['error']['message']}") from None
    except OSError as error:
        raise SystemExit(f"error: {url} does not answer ({error}); start python -m infer.serve") from None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.chat_client", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--effort", help="none answers directly, low and above think; else the model decides")
    parser.add_argument("--max-tokens", type=int, default=1024, metavar="N")
    args = parser.parse_args(argv)
    body: dict[str, Any] = {"messages": [], "max_tokens": args.max_tokens}
    body |= {"reasoning_effort": args.effort} if args.effort else {}
    parts: list[dict[str, Any]] = []
    while line := (input("> ") if sys.stdin.isatty() else sys.stdin.readline()).strip():
        if line.startswith("/image "):
            parts.append(picture(line.removeprefix("/image ").strip()))
            continue
        body["messages"].append({"role": "user", "content": [*parts, {"type": "text", "text": line}]})
        parts, answer = [], ""
        for kind, text in stream(args.url, body):
            print(f"{DIM}{text}{PLAIN}" if kind == "reasoning_content" else text, end="", flush=True)
            answer += text if kind == "content" else ""
        print()
        body["messages"].append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
