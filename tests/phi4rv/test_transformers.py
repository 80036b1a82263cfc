"""Tower, projector and decoder against transformers' own classes, on random weights of many shapes."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM, Siglip2VisionConfig, Siglip2VisionModel

from phi4rv import Config, PackedBatch, Phi4RV, Sample, VisionConfig, pack
from phi4rv.checkpoint.huggingface import HF_PREFIXES, empty_model, hf_name
from tests.parity import gradients, relative

TOWER = HF_PREFIXES[0][1]
BOUND = 1e-4
# Head dims 72, 64, 16, 8; tables of 16, 9, 4 and 1 rows a side.
TOWERS = {
    "72": VisionConfig(144, 208, 3, 2),
    "64": VisionConfig(64, 96, 2, 1, num_patches=81, layer_norm_eps=1e-5),
    "16": VisionConfig(80, 56, 4, 5, num_patches=16),
    "8": VisionConfig(24, 40, 2, 3, num_patches=1),
}
decoder = partial(Config, vision=TOWERS["8"])
# Head dims 128, 64, 16, 4; 2, 4, 1 and 3 query heads to a key head.
DECODERS = {
    "128": decoder(96, 256, 320, 2, 2, 1),
    "64": decoder(50, 512, 96, 1, 8, 2, rope_theta=10000.0),
    "16": decoder(65, 48, 112, 4, 3, 3, rms_norm_eps=1e-6, rope_theta=1e6),
    "4": decoder(33, 24, 40, 3, 6, 2, rope_theta=100.0),
}
GRIDS = [(1, 1), (1, 7), (16, 16), (3, 50), (9, 2)]


def random_model(config: Config, seed: int = 0) -> Phi4RV:
    """Weights that keep activations near 1, with biases, scales and shifts that matter."""
    model = empty_model(config, "cpu", torch.float32).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = p.shape[-1] ** -0.5 if p.ndim == 2 and "embed" not in name else 0.5
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, scale, generator=generator)
    return model


def small(vision: VisionConfig) -> Config:
    return Config(8, 16, 8, 1, 1, 1, vision=vision)


def published_state(model: Phi4RV, prefix: str) -> dict[str, Tensor]:
    """Parameters under ``prefix`` of this code's names, by their published names."""
    return {hf_name(n): p.detach().clone() for n, p in model.named_parameters() if n.startswith(prefix)}


def phi3(model: Phi4RV) -> Phi3ForCausalLM:
    ours = model.config
    config = Phi3Config(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_hidden_layers,
        num_attention_heads=ours.num_attention_heads,
        num_key_value_heads=ours.num_key_value_heads,
        rms_norm_eps=ours.rms_norm_eps,
        rope_parameters={"rope_theta": ours.rope_theta, "rope_type": "default"},
        max_position_embeddings=32768,
        original_max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="sdpa",
        use_cache=False,
    )
    theirs = Phi3ForCausalLM(config).eval()
    theirs.load_state_dict(published_state(model, "decoder."), strict=True)
    return theirs


def siglip2(model: Phi4RV) -> Siglip2VisionModel:
    ours = model.config.vision
    config = Siglip2VisionConfig(
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_hidden_layers,
        num_attention_heads=ours.num_attention_heads,
        num_patches=ours.num_patches,
        layer_norm_eps=ours.layer_norm_eps,
        attn_implementation="sdpa",
    )
    theirs = Siglip2VisionModel(config).eval()
    state = {name.removeprefix(TOWER): p for name, p in published_state(model, "vision.").items()}
    theirs.load_state_dict(state, strict=True)
    return theirs


def their_features(tower: Siglip2VisionModel, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(P, C): what the published model reads of one image."""
    return tower(
        pixel_values=patches[None],
        pixel_attention_mask=torch.ones(1, len(patches), dtype=torch.int64),
        spatial_shapes=torch.tensor([grid]),
        output_hidden_states=True,
    ).hidden_states[-2][0]


def document(length: int, vocab: int, grids: Sequence[tuple[int, int]] = (), seed: int = 0) -> Sample:
    """``length`` random tokens, with the patches of each image behind an odd number of them."""
    generator = torch.Generator().manual_seed(seed + 1000 * length)
    positions: list[int] = []
    for i, (rows, cols) in enumerate(grids):
        start = 2 * i + 1 + len(positions)
        positions += range(start, start + rows * cols)
    ids = torch.randint(0, vocab, (length + len(positions),), generator=generator)
    return Sample(
        input_ids=ids,
        labels=None,
        patches=torch.randn(len(positions), 768, generator=generator),
        grids=torch.tensor(list(grids), dtype=torch.int32).view(-1, 2),
        image_positions=torch.tensor(positions, dtype=torch.int64),
    )


def images(grids: Sequence[tuple[int, int]]) -> PackedBatch:
    return pack([document(3 * len(grids), 8, grids)])


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_on_packed_documents(name: str) -> None:
    model = random_model(DECODERS[name])
    samples = [document(n, model.config.vocab_size) for n in (1, 17, 2, 1, 130)]
    ours = model(pack(samples))
    theirs = phi3(model)
    logits = [theirs(input_ids=s.input_ids[None]).logits[0] for s in samples]
    assert relative(ours, torch.cat(logits)) < BOUND

    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    own = gradients(model, (ours * weights).sum())
    (torch.cat(logits) * weights).sum().backward()
    for parameter, p in theirs.named_parameters():
        assert relative(own[parameter], p.grad) < BOUND, parameter


@pytest.mark.parametrize(("length", "config"), [(4096, DECODERS["4"]), (16384, decoder(16, 64, 16, 1, 1, 1))])
def test_decoder_on_long_text(length: int, config: Config) -> None:
    model = random_model(config)
    sample = document(length, config.vocab_size)
    with torch.no_grad():
        assert relative(model(pack([sample])), phi3(model)(input_ids=sample.input_ids[None]).logits[0]) < BOUND


@pytest.mark.parametrize("name", TOWERS)
def test_tower_on_packed_images(name: str) -> None:
    model = random_model(small(TOWERS[name]))
    batch, theirs = images(GRIDS), siglip2(model)
    ours = model.vision(batch)
    split = batch.patches.split([rows * cols for rows, cols in GRIDS])
    features = torch.cat([their_features(theirs, x, grid) for x, grid in zip(split, GRIDS, strict=True)])
    assert relative(ours, features) < BOUND

    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    own = {n.removeprefix(TOWER): g for n, g in gradients(model, (ours * weights).sum()).items()}
    (features * weights).sum().backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    largest = max(g.norm() for g in grads.values())
    assert own.keys() == grads.keys()
    for parameter, grad in grads.items():
        if parameter.endswith("k_proj.bias"):  # the true gradient is zero, see parity.relative_norms
            assert max(own[parameter].norm(), grad.norm()) < 1e-5 * largest, parameter
        else:
            assert relative(own[parameter], grad) < BOUND, parameter


@pytest.mark.parametrize("grid", [(60, 60), (1, 3600)])
def test_tower_on_3600_patches(grid: tuple[int, int]) -> None:
    model = random_model(small(TOWERS["72"]))
    batch = images([grid])
    with torch.no_grad():
        assert relative(model.vision(batch), their_features(siglip2(model), batch.patches, grid)) < BOUND


def test_whole_model_on_a_mixed_batch() -> None:
    """Documents with none, one and several images in one row, against transformers one document at a time."""
    model = random_model(
        Config(96, 64, 80, 2, 4, 2, vision=VisionConfig(144, 208, 3, 2, num_patches=64)),
    )
    layouts = [[(2, 3)], [], [(1, 1), (5, 4), (1, 6)], [], [(3, 3)]]
    samples = [document(n, 96, g, seed=n) for n, g in zip((9, 1, 40, 130, 3), layouts, strict=True)]
    with torch.no_grad():
        ours = model(pack(samples))
        tower, decoder = siglip2(model), phi3(model)
        own = model.projector
        projector = nn.Sequential(own[0], nn.GELU(approximate="none"), own[2])
        logits = []
        for sample, grids in zip(samples, layouts, strict=True):
            embeddings = decoder.get_input_embeddings()(sample.input_ids)
            if grids:
                split = sample.patches.split([rows * cols for rows, cols in grids])
                features = [their_features(tower, x, grid) for x, grid in zip(split, grids, strict=True)]
                embeddings[sample.image_positions] = projector(torch.cat(features))
            logits.append(decoder(inputs_embeds=embeddings[None]).logits[0])
    assert relative(ours, torch.cat(logits)) < BOUND


def test_packing_changes_nothing() -> None:
    model = random_model(DECODERS["64"])
    samples = [document(n, 50, g, seed=n) for n, g in ((1, ()), (5, GRIDS[:2]), (64, ()), (7, GRIDS[3:]))]
    with torch.no_grad():
        alone = torch.cat([model(pack([s])) for s in samples])
        assert relative(model(pack(samples)), alone) < 1e-5
        backwards = torch.cat(model(pack(samples[::-1])).split([len(s) for s in samples[::-1]])[::-1])
        assert relative(backwards, alone) < 1e-5


def test_unused_tower_weights_are_never_read() -> None:
    model = random_model(small(TOWERS["72"]))
    batch = images(GRIDS)
    with torch.no_grad():
        before = model.vision(batch), model(batch)
        unused = model.vision.unused_parameters()
        names = {n for n, p in model.vision.named_parameters() if any(p is u for u in unused)}
        assert {n.split(".")[0] for n in names} == {"encoder", "post_layernorm", "head"}
        assert {n.split(".")[2] for n in names if n.startswith("encoder")} == {"2"}  # the last of three
        for p in unused:
            p.fill_(float("nan"))
        after = model.vision(batch), model(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(p.requires_grad for p in unused)
    assert all(p.requires_grad for n, p in model.named_parameters() if n.removeprefix("vision.") not in names)


def test_without_images() -> None:
    model = random_model(DECODERS["16"])
    batch = pack([document(5, 65)])
    assert model.encode_images(batch).shape == (0, 48)
    assert model.vision(batch).shape == (0, model.config.vision.hidden_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    model = random_model(Config(96, 64, 80, 2, 4, 2, vision=TOWERS["64"]))
    batch = pack([document(9, 96, [(2, 3), (1, 1)])])
    with torch.no_grad():
        wide = model(batch)
        narrow = model.to(dtype)(batch)
        assert narrow.dtype == torch.float32
        assert model.encode_images(batch).dtype == dtype
    assert 0 < relative(narrow, wide) < 20 * torch.finfo(dtype).eps
