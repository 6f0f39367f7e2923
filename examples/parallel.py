"""Several processes that share each batch, as `torchrun` starts them (DDP).

Without torchrun there is one process, and each function here does the same for that one.
"""

import contextlib
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def start(device: str) -> None:
    """Joins the other processes, if there are any; on CUDA each takes the GPU of its number."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")


def finish() -> None:
    """Ends the process if it is one of several; returns if it is the only one.

    Python's own shutdown is skipped: gloo's threads free the tensors of finished collectives, and a
    thread that needs the interpreter during its shutdown aborts the process (torch 2.13).
    """
    if not dist.is_initialized():
        return
    dist.barrier()  # the first process is still writing when the others are done
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def share(items: list) -> list:
    """The items that are this process's own: each belongs to one process."""
    return items[rank() :: count()]


def total(*values: float) -> list[float]:
    """Each value summed over all processes."""
    if count() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def from_first(value):
    """The first process's value, in all of them."""
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gathered(value) -> list:
    """Every process's value, by rank."""
    if count() == 1:
        return [value]
    values = [None] * count()
    dist.all_gather_object(values, value)
    return values


def wrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model whose backward pass averages gradients over all processes."""
    return model if count() == 1 else DistributedDataParallel(model)


def averaging(model: torch.nn.Module, now: bool):
    """Backward passes below this point average gradients now, or leave them for a later one."""
    return contextlib.nullcontext() if now or count() == 1 else model.no_sync()
