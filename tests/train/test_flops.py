"""The operations of a sample against PyTorch's own count of the products that the model runs."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from phi4rv.batch import NO_LABEL, Sample, pack
from phi4rv.config import Config
from tests.small import small_model
from train.data.flops import Flops, flops, flops_by_part
from train.recipe import STAGES, stage
from train.trainable import set_trainable

GRIDS = [(2, 3), (3, 4)]


def sample(words: int, grids: list[tuple[int, int]], labelled: int) -> Sample:
    """``words`` tokens behind the images', the last ``labelled`` of them with labels."""
    patches = sum(rows * cols for rows, cols in grids)
    generator = torch.Generator().manual_seed(words)
    ids = torch.randint(1000, (patches + words,), generator=generator)
    labels = torch.full_like(ids, NO_LABEL)
    labels[-labelled:] = ids[-labelled:]
    pixels = torch.rand(patches, 768, generator=generator)
    return Sample(ids, labels, pixels, torch.tensor(grids, dtype=torch.int32).view(-1, 2), torch.arange(patches))


def counted(trains: tuple[str, ...], samples: list[Sample]) -> tuple[dict[str, int], dict[str, int]]:
    """PyTorch's forward and backward operations, by operator: plain attention, so that its products show too."""
    model, _ = small_model()
    set_trainable(model, stage(2, False, {}) if len(trains) == 3 else stage(1, False, {}))
    passes: list[dict[str, int]] = []

    def run(function: Any) -> Any:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            out = function()
        passes.append({str(op): n for op, n in counter.get_flop_counts().get("Global", {}).items()})
        return out

    loss, _ = run(lambda: model.loss_sum(pack(samples)))
    run(lambda: loss.backward() if loss.requires_grad else None)
    return passes[0], passes[1]


def split(by_operator: dict[str, int]) -> tuple[int, int]:
    """(linear layers, attention): only attention multiplies batches, of heads."""
    attention = by_operator.get("aten.bmm", 0)
    return sum(by_operator.values()) - attention, attention


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("pictures", [True, False], ids=["pictures", "text"])
def test_as_pytorch_counts_them(number: int, pictures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # The position table's interpolation, which the definition writes as a product.
    monkeypatch.setattr("phi4rv.ops.reference._resize_table", lambda table, rows, cols: table[: rows * cols])
    samples = [sample(30, GRIDS if pictures else [], 7), sample(17, GRIDS[:1] if pictures else [], 17)]
    trains, config = STAGES[number].trains, small_model()[0].config
    tokens, labelled = [len(s) for s in samples], sum(int((s.labels[1:] != NO_LABEL).sum()) for s in samples)
    patches = [int(grid.prod()) for s in samples for grid in s.grids]
    parts = flops_by_part(config, tokens, patches, labelled, trains)
    for direction, found in zip(("forward", "backward"), counted(trains, samples), strict=True):
        linear, attention = split(found)
        ours = {name: getattr(part, direction) for name, part in parts.items()}
        images, documents = ours.pop("vision_attention"), ours.pop("decoder_attention")
        assert sum(ours.values()) == linear
        # The plain definition multiplies the upper triangle too.
        squares, triangles = sum(n * n for n in tokens), sum(n * (n + 1) // 2 for n in tokens)
        assert images + documents * squares // triangles == attention


def test_the_published_model() -> None:
    """Six operations a parameter and token, to a few percent: 14.66 B of them in the language model, of which the
    embeddings multiply nothing and the output layer works on labelled tokens alone.
    """
    config = Config()
    made = flops(config, [1] * 1000)
    weights = 14.66e9 - 2 * config.vocab_size * config.hidden_size
    assert made.total / 1000 == pytest.approx(6 * weights, rel=1e-3)
    assert made.backward == 2 * made.forward
    tower = flops(config, [], [256])
    assert flops(config, [2048], [256]) == flops(config, [2048]) + tower
    # 26 of 27 layers of 15.2 M parameters, each with attention to 256 patches, and the projector's 32.1 M.
    assert tower.forward / 256 == pytest.approx(2 * (26 * (15.2e6 + 2 * 256 * 1152) + 32.1e6), rel=0.01)


def test_what_attention_sees_is_the_document_and_not_the_row() -> None:
    config = Config()
    assert flops(config, [4096]).total > flops(config, [2048, 2048]).total
    assert flops(config, [], [3600]).total > flops(config, [], [1800, 1800]).total
    assert flops(config, [100, 50], [4, 6], 9) == flops(config, [100], [4], 2) + flops(config, [50], [6], 7)
    assert flops(config, []) == Flops()


def test_nothing_trained_runs_nothing_backward() -> None:
    assert flops(Config(), [100], [50], 1, ()).backward == 0
    assert flops(Config(), [100], [], 1, ("projector",)).backward == 0
    frozen = flops_by_part(Config(), [100], [50], 1, ("projector",))
    assert frozen["vision_linear"].backward == frozen["vision_attention"].backward == 0
    assert frozen["decoder_linear"].backward == frozen["decoder_linear"].forward
