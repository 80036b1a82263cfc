"""Drafts by prompt lookup against a search by hand, and when drafting is worth it."""

import random

import torch

from infer.engine.speculative_decoding import RETRY_INTERVAL, DynamicSpeculation, propose_draft


def by_hand(tokens: list[int], count: int) -> list[int] | None:
    """What followed the latest earlier place of the last three tokens, else of the last two, over and over."""
    for size in (3, 2):
        tail = tokens[-size:]
        if len(tokens) < size:
            continue
        for at in range(len(tokens) - size - 1, -1, -1):
            if tokens[at : at + size] == tail:
                repeated = tokens[at + size :]
                return [repeated[i % len(repeated)] for i in range(count)]
    return None


def test_drafts_are_what_a_search_finds() -> None:
    rng = random.Random(1)
    rows = [[rng.randrange(4) for _ in range(rng.randint(1, 30))] for _ in range(300)]
    history = torch.full((len(rows), 40), 99, dtype=torch.int32)  # what lies behind a document is never read
    for n, row in enumerate(rows):
        history[n, : len(row)] = torch.tensor(row)
    found = propose_draft(history, torch.tensor([len(row) for row in rows]), 5).tolist()
    expected = [by_hand(row, 5) for row in rows]
    assert sum(e is not None for e in expected) > 100
    assert sum(e is None for e in expected) > 20
    for row, e, f in zip(rows, expected, found, strict=True):
        assert e is None or f == e, row


def test_draft_at_the_end_of_the_history() -> None:
    history = torch.tensor([[5, 6, 7, 5, 6, 7]], dtype=torch.int32)
    assert propose_draft(history, torch.tensor([6]), 4).tolist() == [[5, 6, 7, 5]]


def test_drafts_go_on_only_while_they_pay() -> None:
    for gain in (0.5, 2.0):
        speculation, chosen = DynamicSpeculation(), []
        for _ in range(3 * RETRY_INTERVAL):
            drafts = speculation.should_draft(8)
            speculation.record(8, drafts, 8, 1 / gain if drafts else 1.0)
            chosen.append(drafts)
        assert sum(chosen) / len(chosen) > 0.9 if gain > 1 else sum(chosen) / len(chosen) < 0.1
        assert {True, False} == set(chosen[-RETRY_INTERVAL:]), "the other way is tried now and then"


def test_each_batch_size_decides_for_itself() -> None:
    speculation = DynamicSpeculation()
    for _ in range(20):
        for batch_size, gain in ((1, 2.0), (64, 0.5)):
            drafts = speculation.should_draft(batch_size)
            speculation.record(batch_size, drafts, 1, 1 / gain if drafts else 1.0)
    assert speculation.should_draft(1) and not speculation.should_draft(64)


def test_what_pays_may_change() -> None:
    speculation = DynamicSpeculation()
    last: list[bool] = []
    for step in range(20 * RETRY_INTERVAL):
        drafts = speculation.should_draft(1)
        gain = 2.0 if step < 5 * RETRY_INTERVAL else 0.5
        speculation.record(1, drafts, 1, 1 / gain if drafts else 1.0)
        last = [*last[-RETRY_INTERVAL:], drafts]
    assert sum(last) < len(last) / 4
