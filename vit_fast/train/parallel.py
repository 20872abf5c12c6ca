"""Several processes, one model: torch's DistributedDataParallel and FSDP2, and what a checkpoint needs of either.

``torchrun`` starts the processes and says to each who it is. Weights and the optimizer's state are kept under the parameters'
names, whole, whatever process holds which part of them: what one arrangement has written, any other can read.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vit_fast.packing import PackedLinears
from vit_fast.terminal import CommandError


@dataclass(frozen=True)
class Processes:
    """Who we are among the processes that train one model; alone unless torchrun says otherwise."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def summed(self, values: Tensor) -> Tensor:
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def collected(self, value) -> list:
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def processes(device: torch.device):
    """Joins the others that torchrun has started, and leaves them at the end; one that is joined already stays so."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or not dist.is_available():
        yield Processes()
        return
    joined = dist.is_initialized()
    if not joined:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        if not joined:
            dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """A GPU of its own for each process of a machine."""
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise CommandError(f"process {device.index} of this machine has no GPU of its own: start as many as there are GPUs")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


# ---- The model ------------------------------------------------------------------------------------------------------


def shard(model: nn.Module, device: torch.device) -> None:
    """FSDP2: every process keeps its part of each parameter, and a block is whole only while it is computed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.transformer.encoder.layer:
        fully_shard(block, mesh=mesh)
        # The block of memory that held query, key and value side by side would keep all of them alive.
        block.attn._packed = PackedLinears()
    fully_shard(model, mesh=mesh)


def last_pass(model: nn.Module, last: bool):
    """A context for one of the passes that share a step: gradients are added up across processes in the last one only."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    elif not last and hasattr(model, "no_sync"):
        return model.no_sync()
    return contextlib.nullcontext()


# ---- States, whole and by name --------------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU, put together from all processes' parts; every process must ask."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True)


@torch.no_grad()
def put(target: Tensor, source: Tensor) -> None:
    """Copies a whole tensor into a parameter, or into the part of it that this process holds."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        source = source.to(target.device, target.dtype)
        source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(source)


def model_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def put_model_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        put(tensor, state[name])


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: whole(value) for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def put_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Tensor]]) -> None:
    for name, parameter in model.named_parameters():
        for key, value in state.get(name, {}).items():
            if value.shape == parameter.shape:
                kept = torch.zeros_like(parameter.detach(), memory_format=torch.preserve_format)
                put(kept, value)
            else:  # the count of steps
                kept = value.to(parameter.device)
            optimizer.state[parameter][key] = kept
