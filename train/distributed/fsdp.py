"""Sharding a model over ranks with PyTorch's FSDP2: ZeRO-1 to -3 (Rajbhandari et al. 2020) and HSDP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from phi4rv.batch import NO_LABEL, PackedBatch, Sample, pack
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.processing.images import PATCH_DIM
from train.distributed.context_parallel import NO_CONTEXT_PARALLEL, ContextParallel
from train.distributed.ranks import Ranks

SHARDS = ("none", "optimizer", "gradients", "full")


def device_mesh(ranks: Ranks, replicas: int, device: torch.device) -> DeviceMesh | None:
    """(replicate, shard): ``replicas`` copies of the model, each sharded over world_size / replicas neighbouring ranks.

    None for a single process. With one copy a node, gathers stay inside the node, and only summed gradient shards
    cross between nodes.
    """
    if replicas < 1 or ranks.world_size % replicas:
        raise UserError(
            f"--replicas: {replicas} replicas cannot share {ranks.world_size} process(es) evenly; give a divisor"
        )
    if ranks.world_size == 1:
        return None
    if replicas == 1:
        return init_device_mesh(device.type, (ranks.world_size,), mesh_dim_names=("shard",))
    shape = (replicas, ranks.world_size // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def parallelize(model: Phi4RV, mesh: DeviceMesh, shard: str, dtype: torch.dtype) -> None:
    """Shards ``model`` (on any device, also meta) in place; ``set_trainable`` must have frozen what does not train.

    ``shard`` says what is sharded beside masters (float32, the parameters themselves), moments and summed gradients
    (float32), in a step with several rows a rank:

    - ``optimizer`` (ZeRO-1): gathered ``dtype`` weights stay from the first row to the last, gradients are summed
      whole in float32 on each rank and scattered once (``set_requires_gradient_sync``).
    - ``gradients`` (ZeRO-2): weights stay as well, gradients are scattered after every row.
    - ``full`` (ZeRO-3): weights are gathered layer by layer, freed after each layer's forward pass
      (``reshard_after_forward``) and gathered again for its backward pass.

    Gradients are sums over the ranks, not means: rows have different numbers of labelled tokens.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    # Positions, rope tables and pixels keep float32 until an operation rounds them, as without sharding.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def wrap(module: nn.Module | list[nn.Module]) -> None:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=shard == "full")

    *tower, last = model.vision.layers()
    blocks = [model.decoder.embed_tokens, *tower, model.projector, *model.decoder.layers]  # in the order of forward
    for block in blocks:
        wrap(block)
    wrap([last, model.vision.post_layernorm, model.vision.head])  # never read, so never gathered
    # Patch embedding, last norm and output layer: needed again at once, as the backward pass begins with them.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    # What is called in place of ``forward`` has to gather as well.
    register_fsdp_forward_method(model.projector, "project_into")
    for method in ("loss_sum_by_mode", "loss_sum"):
        register_fsdp_forward_method(model, method)
    for block, following in pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction


def fsdp_micro_batches(
    model: Phi4RV, shard: str, batches: Iterable[PackedBatch], count: int, cp: ContextParallel = NO_CONTEXT_PARALLEL
) -> Iterator[PackedBatch]:
    """``count`` batches, the same number on every rank, as FSDP's collectives need every rank.

    A rank with fewer batches gets dummy ones, and a batch without an image a dummy image. Sets what FSDP does after
    each backward pass. ``cp``: the ranks that share this one's rows.
    """
    assert isinstance(model, FSDPModule)
    source = iter(batches)
    for number in range(count):
        batch = next(source, None)
        last = number == count - 1
        if shard != "full":
            model.set_reshard_after_backward(last)
        if shard == "optimizer":
            model.set_requires_gradient_sync(last)
        if shard != "optimizer":
            model.set_requires_all_reduce(last)  # between replicas once a step
        model.set_is_last_backward(last)
        yield with_dummy_image(batch if batch is not None else cp.shard(dummy_batch(cp.size)).to(model.device))
    assert next(source, None) is None, "a rank has more rows than its share"


def dummy_batch(count: int = 1) -> PackedBatch:
    """``count`` tokens without labels."""
    nothing = torch.zeros(0, dtype=torch.int64)
    tokens, grids = torch.zeros(count, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int32)
    return pack([Sample(tokens, torch.full_like(tokens, NO_LABEL), torch.zeros(0, PATCH_DIM), grids, nothing)])


def with_dummy_image(batch: PackedBatch) -> PackedBatch:
    """``batch``; without an image, with a blank one of one patch, whose features go to no token.

    Tower and projector then run on every rank, and get gradients of exactly zero.
    """
    if len(batch.patches):
        return batch
    return replace(
        batch,
        patches=batch.patches.new_zeros(1, PATCH_DIM),
        grids=batch.grids.new_ones(1, 2),
        cu_patches=torch.tensor([0, 1], dtype=batch.cu_patches.dtype, device=batch.cu_patches.device),
        max_patches=1,
    )


def to_local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_full_tensor(parameter: Tensor, full: Tensor) -> None:
    """Copies a full tensor into ``parameter``, which may be a DTensor; no communication."""
    if isinstance(parameter, DTensor):
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    to_local(parameter).copy_(full)
