"""Sharding a model over ranks by PyTorch's FSDP2, from outside: ZeRO-1 to -3 (Rajbhandari et al. 2020) and HSDP."""

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
from train.distributed.context_parallel import ALONE, Context
from train.distributed.ranks import Ranks

SHARDS = ("none", "optimizer", "gradients", "full")


def device_mesh(ranks: Ranks, replicas: int, device: torch.device) -> DeviceMesh | None:
    """(replicate, shard): ``replicas`` copies of the model, each sharded over world / replicas neighbouring ranks.

    None where one process is alone. With a copy a node, gathers stay inside the node and only summed gradient shards
    cross between nodes.
    """
    if replicas < 1 or ranks.world % replicas:
        raise UserError(f"--replicas: {replicas} copies cannot share {ranks.world} process(es) evenly; give a divisor")
    if ranks.world == 1:
        return None
    if replicas == 1:
        return init_device_mesh(device.type, (ranks.world,), mesh_dim_names=("shard",))
    shape = (replicas, ranks.world // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def parallelize(model: Phi4RV, mesh: DeviceMesh, shard: str, dtype: torch.dtype) -> None:
    """Shards ``model`` (on any device, also meta) in place; ``trainable`` must have frozen what does not train.

    ``shard`` says what is cut into a part for each rank. Masters (float32, the parameters themselves), moments and
    summed gradients (float32) always are; on top of that, of a step with several rows a rank:

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
    register_fsdp_forward_method(model.projector, "into")
    for method in ("loss_sum_by_mode", "loss_sum"):
        register_fsdp_forward_method(model, method)
    for block, following in pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction


def passes(
    model: Phi4RV, shard: str, batches: Iterable[PackedBatch], count: int, context: Context = ALONE
) -> Iterator[PackedBatch]:
    """``count`` batches, the same on every rank: gathers and scatters are the work of all ranks together.

    Where a rank has less to do, the rest are idle; where a batch has no image, the tower reads a blank one.
    ``context``: the ranks that share this one's rows.
    """
    assert isinstance(model, FSDPModule)
    given = iter(batches)
    for number in range(count):
        batch = next(given, None)
        last = number == count - 1
        if shard != "full":
            model.set_reshard_after_backward(last)
        if shard == "optimizer":
            model.set_requires_gradient_sync(last)
        if shard != "optimizer":
            model.set_requires_all_reduce(last)  # between copies of the model once a step
        model.set_is_last_backward(last)
        yield with_image(batch if batch is not None else context.own(idle(context.size)).to(model.device))
    assert next(given, None) is None, "a rank has more rows than its share"


def idle(count: int = 1) -> PackedBatch:
    """``count`` tokens that nothing is learned from."""
    nothing = torch.zeros(0, dtype=torch.int64)
    tokens, grids = torch.zeros(count, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int32)
    return pack([Sample(tokens, torch.full_like(tokens, NO_LABEL), torch.zeros(0, PATCH_DIM), grids, nothing)])


def with_image(batch: PackedBatch) -> PackedBatch:
    """``batch``, if it has no image with a blank one of one patch, whose features go to no token.

    Tower and projector so run, on no rows that count, and get gradients of exactly zero.
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


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assign(parameter: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor into ``parameter``, of which this rank may hold a part; nothing is sent."""
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    local(parameter).copy_(whole)
