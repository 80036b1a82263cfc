"""The page pool, against a plain account of who holds what."""

import random

import pytest
import torch

from infer.engine.page_pool import NULL_PAGE, PagePool
from infer.requests.request import Request
from infer.requests.sampling_params import SamplingParams
from phi4rv import Prompt


def hashes(*contents: bytes) -> list[bytes]:
    request, made = Request(Prompt(""), SamplingParams(), torch.empty(0), [], None), [b""]
    for content in contents:
        made.append(request.page_hash(made[-1], torch.tensor(list(content)), 0, len(content)))
    return made[1:]


def test_a_hash_depends_on_all_that_precedes() -> None:
    assert hashes(b"a", b"b") == hashes(b"a", b"b")
    assert hashes(b"a", b"b")[1] != hashes(b"c", b"b")[1] != hashes(b"b")[0]
    assert hashes(b"ab", b"c")[1] != hashes(b"a", b"bc")[1]


def test_pages_run_out_and_come_back() -> None:
    pool = PagePool(5, 16)
    assert (pool.num_usable, pool.num_available, pool.num_used) == (4, 4, 0)
    first = pool.allocate(3)
    assert first is not None and NULL_PAGE not in first
    assert pool.allocate(2) is None, "none is given where not all are there"
    assert pool.num_used == 3
    pool.free(first[:1])
    second = pool.allocate(2)
    assert second is not None and not set(second) & set(first[1:])
    pool.check([first[1:], second])
    with pytest.raises(AssertionError):
        pool.check([first[1:]])


def test_a_cached_prefix_is_shared_and_survives_its_first_holder() -> None:
    pool = PagePool(6, 16)
    a, b, c = hashes(b"a", b"b", b"c")
    pages = pool.allocate(3)
    assert pages is not None
    for page, page_hash in zip(pages, (a, b, c), strict=True):
        pool.cache(page, page_hash)
    assert pool.match_prefix([a, b, *hashes(b"other")]) == pages[:2]
    pool.check([pages, pages[:2]])
    pool.free(pages)
    pool.free(pages[:2])
    assert (pool.num_used, pool.num_available) == (0, 5)
    assert pool.match_prefix([a, b, c]) == pages
    assert pool.match_prefix([hashes(b"b")[0]]) == []
    pool.free(pages)


def test_cached_pages_are_evicted_the_oldest_and_the_last_of_a_prefix_first() -> None:
    pool = PagePool(5, 16)
    old, new = hashes(b"a", b"b"), hashes(b"c", b"d")
    for run in (old, new):
        pages = pool.allocate(2)
        assert pages is not None
        for page, page_hash in zip(pages, run, strict=True):
            pool.cache(page, page_hash)
        pool.free(pages)
    taken = pool.allocate(1)
    assert taken is not None
    found = pool.match_prefix(old)
    assert len(found) == 1, "the second page of the older prefix went"
    assert len(pool.match_prefix(new)) == 2
    assert pool.allocate(1) is None


def test_without_a_prefix_cache_nothing_is_cached() -> None:
    pool = PagePool(3, 16, prefix_cache=False)
    pages = pool.allocate(2)
    assert pages is not None
    pool.cache(pages[0], hashes(b"a")[0])
    pool.free(pages)
    assert pool.match_prefix(hashes(b"a")) == []


def test_the_same_content_in_two_pages_is_cached_once() -> None:
    pool = PagePool(3, 16)
    [page_hash] = hashes(b"a")
    first, second = pool.allocate(1), pool.allocate(1)
    assert first and second
    pool.cache(first[0], page_hash)
    pool.cache(second[0], page_hash)
    assert pool.match_prefix([page_hash]) == first
    pool.free(first)
    pool.free(second)
    pool.check([first])


def test_random_lives() -> None:
    """Holders share prefixes, come and go; the pool is consistent after every move and no page has two contents."""
    rng, pool = random.Random(0), PagePool(40, 16)
    held: dict[int, list[int]] = {}
    content: dict[int, tuple[bytes, ...]] = {}
    for number in range(5000):
        if held and rng.random() < 0.5:
            pool.free(held.pop(rng.choice(list(held))))
        else:
            run = tuple(rng.choice([b"x", b"y"]) for _ in range(rng.randint(1, 8)))
            pages = pool.match_prefix(hashes(*run))
            for depth, page in enumerate(pages):
                assert content[page] == run[: depth + 1]
            more = pool.allocate(len(run) - len(pages))
            if more is None:
                pool.free(pages)
                continue
            for depth, page in enumerate(more, len(pages)):
                content[page] = run[: depth + 1]
                pool.cache(page, hashes(*run)[depth])
            held[number] = pages + more
        pool.check(list(held.values()))
