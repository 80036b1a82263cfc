"""The books of the paged cache, against a plain account of who holds what."""

import random

import pytest
import torch

from infer.engine.page_pool import SCRATCH, PagePool
from infer.requests.prepare import Request
from infer.requests.request import Options
from phi4rv import Prompt


def keys(*contents: bytes) -> list[bytes]:
    request, made = Request(Prompt(""), Options(), torch.empty(0), [], None), [b""]
    for content in contents:
        made.append(request.page_key(made[-1], torch.tensor(list(content)), 0, len(content)))
    return made[1:]


def test_a_key_depends_on_all_that_precedes() -> None:
    assert keys(b"a", b"b") == keys(b"a", b"b")
    assert keys(b"a", b"b")[1] != keys(b"c", b"b")[1] != keys(b"b")[0]
    assert keys(b"ab", b"c")[1] != keys(b"a", b"bc")[1]


def test_pages_run_out_and_come_back() -> None:
    pool = PagePool(5, 16)
    assert (pool.total, pool.available, pool.used) == (4, 4, 0)
    first = pool.take(3)
    assert first is not None and SCRATCH not in first
    assert pool.take(2) is None, "none is given where not all are there"
    assert pool.used == 3
    pool.release(first[:1])
    second = pool.take(2)
    assert second is not None and not set(second) & set(first[1:])
    pool.check([first[1:], second])
    with pytest.raises(AssertionError):
        pool.check([first[1:]])


def test_a_known_prefix_is_shared_and_survives_its_first_holder() -> None:
    pool = PagePool(6, 16)
    a, b, c = keys(b"a", b"b", b"c")
    pages = pool.take(3)
    assert pages is not None
    for page, key in zip(pages, (a, b, c), strict=True):
        pool.publish(page, key)
    assert pool.match([a, b, *keys(b"other")]) == pages[:2]
    pool.check([pages, pages[:2]])
    pool.release(pages)
    pool.release(pages[:2])
    assert (pool.used, pool.available) == (0, 5)
    assert pool.match([a, b, c]) == pages
    assert pool.match([keys(b"b")[0]]) == []
    pool.release(pages)


def test_kept_pages_are_forgotten_when_they_are_needed_the_oldest_and_the_last_of_a_prefix_first() -> None:
    pool = PagePool(5, 16)
    old, new = keys(b"a", b"b"), keys(b"c", b"d")
    for run in (old, new):
        pages = pool.take(2)
        assert pages is not None
        for page, key in zip(pages, run, strict=True):
            pool.publish(page, key)
        pool.release(pages)
    taken = pool.take(1)
    assert taken is not None
    found = pool.match(old)
    assert len(found) == 1, "the second page of the older prefix went"
    assert len(pool.match(new)) == 2
    assert pool.take(1) is None


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    pool = PagePool(3, 16, prefix_cache=False)
    pages = pool.take(2)
    assert pages is not None
    pool.publish(pages[0], keys(b"a")[0])
    pool.release(pages)
    assert pool.match(keys(b"a")) == []


def test_the_same_content_in_two_pages_is_known_once() -> None:
    pool = PagePool(3, 16)
    [key] = keys(b"a")
    first, second = pool.take(1), pool.take(1)
    assert first and second
    pool.publish(first[0], key)
    pool.publish(second[0], key)
    assert pool.match([key]) == first
    pool.release(first)
    pool.release(second)
    pool.check([first])


def test_random_lives() -> None:
    """Holders share prefixes, come and go; the books fit after every move and no page has two contents."""
    rng, pool = random.Random(0), PagePool(40, 16)
    held: dict[int, list[int]] = {}
    content: dict[int, tuple[bytes, ...]] = {}
    for number in range(5000):
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.choice(list(held))))
        else:
            run = tuple(rng.choice([b"x", b"y"]) for _ in range(rng.randint(1, 8)))
            pages = pool.match(keys(*run))
            for depth, page in enumerate(pages):
                assert content[page] == run[: depth + 1]
            more = pool.take(len(run) - len(pages))
            if more is None:
                pool.release(pages)
                continue
            for depth, page in enumerate(more, len(pages)):
                content[page] = run[: depth + 1]
                pool.publish(page, keys(*run)[depth])
            held[number] = pages + more
        pool.check(list(held.values()))
