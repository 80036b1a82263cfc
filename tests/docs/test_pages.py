"""The documentation's pages: what they tell the reader to do works, and what they name exists."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs import pages
from tests.docs.pages import ROOT, Page, Wrong, read
from tests.small import mixed_records, picture, small_checkpoint, write_jsonl

PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PATHS += [p for p in (ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").rglob("*.md"))) if p.exists()]
PAGES = [read(path) for path in PATHS]
EVERY = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("model"), context=16384)


def prepare(page: Page, folder: Path, checkpoint: Path) -> None:
    """What the page says it is given."""
    makers: dict[str, Callable[[Path], object]] = {
        "checkpoint": lambda path: shutil.copytree(checkpoint, path),
        "records": lambda path: write_jsonl(path, mixed_records(path.parent, 30)),
        "picture": lambda path: picture(path.parent, path.name, 160, 90),
    }
    for kind, name in page.given:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        makers[kind](path)


@EVERY
def test_what_is_named_exists(page: Page) -> None:
    pages.check(page)


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.mark == "run" for b in p.blocks)], ids=lambda p: p.name)
def test_the_page_can_be_followed(
    page: Page, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(page, tmp_path, checkpoint)
    monkeypatch.chdir(tmp_path)
    assert pages.run(page, tmp_path)


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or f"]({path.name})" in index, path.name


BROKEN = {
    "option": ("```bash\npython -m train.plot out --colour red\n```", "--colour"),
    "missing option": ("```bash\npython -m infer.main --prompt Hi\n```", "--checkpoint"),
    "value": ("```bash\npython -m infer.main --checkpoint a --prompt b --mode loud\n```", "loud"),
    "module": ("```bash\npython -m train.fly\n```", "train.fly"),
    "script": ("```bash\ntorchrun train/fly.py\n```", "train.fly"),
    "torchrun": ("```bash\ntorchrun --gpus 8 train/main.py\n```", "--gpus"),
    "torchrun's script": ("```bash\ntorchrun train/main.py --stages 2\n```", "--stages"),
    "program": ("```bash\nfly\n```", "fly"),
    "target": ("```bash\nmake fly\n```", "make fly"),
    "argument": ("```bash\npython csrc/build.py --fast\n```", "--fast"),
    "syntax": ("```python\nif\n```", "invalid syntax"),
    "import": ("```python\nfrom phi4rv.batch import fly\n```", "phi4rv.batch.fly"),
    "attribute": ("```python\nimport phi4rv\nphi4rv.fly()\n```", "phi4rv.fly"),
    "keyword": ("```python\nimport phi4rv\nphi4rv.load('a', wings=2)\n```", "wings"),
    "link": ("[there](nowhere.md)", "nowhere.md"),
    "anchor": ("[there](#nowhere)", "#nowhere"),
    "picture": ('<img src="nowhere.png">', "nowhere.png"),
    "path": ("See `train/fly.py`.", "train/fly.py"),
    "name": ("See `phi4rv.fly`.", "phi4rv.fly"),
    "spoken option": ("Give `--wings 2`.", "--wings"),
    "spoken command": ("`python -m train.fly` flies.", "train.fly"),
}


@pytest.mark.parametrize("text", BROKEN)
def test_what_does_not_exist_is_found(text: str, tmp_path: Path) -> None:
    content, word = BROKEN[text]
    page = tmp_path / "page.md"
    mark = "<!-- not run: nothing of it works -->\n" if content.startswith("```") else ""
    page.write_text(f"# Page\n\n{mark}{content}\n")
    with pytest.raises(Wrong, match=rf"page\.md:[34]: .*{word}"):
        pages.check(read(page))


@pytest.mark.parametrize("mark", ["", "<!-- not run -->\n", "<!-- runs -->\n", "<!-- file -->\n"])
def test_a_block_says_whether_it_is_run(mark: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{mark}```bash\nmake test\n```\n")
    with pytest.raises(Wrong):
        pages.check(read(page))


def test_what_fails_when_it_is_run_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("<!-- run -->\n```bash\npython -m train.plot nowhere\n```\n")
    with pytest.raises(Wrong, match=r"page.md:2: train.plot ends with exit status 2"):
        pages.run(read(page), tmp_path)
    page.write_text("<!-- run -->\n```python\nx = 1\n```\n\n<!-- run -->\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        pages.run(read(page), tmp_path)
