"""The processes of a training: one, or as many as torchrun started."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .settings import BadInput


@dataclass(frozen=True)
class World:
    """This process, its device, and how many there are."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over all processes."""
        if self.size > 1:
            x = x.to(self.device)
            dist.all_reduce(x)
        return x

    def gather(self, value: object) -> list:
        """The values of all processes, in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def start(device: str) -> World:
    """Joins the processes of torchrun, if it started this one. `stop` leaves them.

    Args:
        device: "cpu", "cuda", or "" for cuda where there is one.

    Raises:
        BadInput: no such device, or fewer GPUs than processes on this machine.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise BadInput(f"the device must be cpu or cuda, got {device!r}")
    local, rank, size, here = (
        int(os.environ.get(name, default))
        for name, default in (("LOCAL_RANK", 0), ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
    )
    if device == "cuda":
        if torch.cuda.device_count() < max(1, here):
            raise BadInput(f"{here} processes want a GPU each, torch sees {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if size > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return World(torch.device(device), rank, size)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(objective: nn.Module, world: World, fsdp: bool) -> nn.Module:
    """The module to call in training, whose backward averages gradients over the processes.

    With `fsdp` the objective itself, its weights sharded in place, block by block; call it, not the model within.
    """
    if world.size == 1:
        return objective
    if fsdp:
        return shard(objective, objective.model.blocks)
    return nn.parallel.DistributedDataParallel(
        objective, device_ids=[world.device.index] if world.device.type == "cuda" else None
    )


def shard(module: nn.Module, blocks: nn.ModuleList) -> nn.Module:
    """Spreads the weights of a module over the processes, in place: of each of its blocks, then of the rest."""
    from torch.distributed.fsdp import fully_shard

    for block in blocks:
        fully_shard(block)
    return fully_shard(module)


def synchronise(wrapped: nn.Module, yes: bool) -> AbstractContextManager:
    """Whether the next backward averages gradients: only the last of an update has to."""
    if hasattr(wrapped, "set_requires_gradient_sync"):
        wrapped.set_requires_gradient_sync(yes)
    return wrapped.no_sync() if hasattr(wrapped, "no_sync") and not yes else nullcontext()
