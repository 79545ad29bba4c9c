"""What goes over the wire: torch.distributed's collectives on one group, counted, with failures in plain words."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from linop_hess.errors import ProcessError

# How long to ask whether a message has come before sleeping until it has.
_POLL_SECONDS = 0.05

_give_way: Callable[[], object] = getattr(os, "sched_yield", lambda: time.sleep(0))

WORLD = "world"
"""All processes of torch.distributed."""


class Wire:
    """The collectives of one process group.

    Parameters
    ----------
    group : ProcessGroup, DeviceMesh of one dimension, or "world"

    Attributes
    ----------
    rank, size : int
        This process in the group, and how many there are.
    messages, numbers : int
        Collectives so far, and entries of tensors that this process gave to them.

    Raises
    ------
    TypeError
        If the group is none.
    ValueError
        If torch.distributed is not initialized, this process is not of the group, or a mesh has several dimensions.
    """

    def __init__(self, group: Any) -> None:
        self.group = _as_group(group)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError(
                "expected a group that this process is of, got one of others: call with group= on its members alone"
            )
        backends = str(dist.get_backend_config(self.group))
        self.takes_host, self.takes_cuda = "cpu:" in backends, "nccl" in backends
        self.messages = self.numbers = 0

    @property
    def device(self) -> torch.device:
        """Where messages of its own lie."""
        return torch.device("cpu") if self.takes_host else torch.device("cuda", torch.cuda.current_device())

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, the same on all to the last bit, in the memory of `tensor` where that is contiguous."""
        message = self._as_message(tensor)
        self._call(lambda: dist.all_reduce(message, group=self.group, async_op=True), message)
        return message if message.device == tensor.device else message.to(tensor.device)

    def maximum(self, numbers: list[float]) -> list[float]:
        """The largest over processes, entry by entry."""
        message = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self._call(lambda: dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self.group, async_op=True), message)
        return list(map(float, message.cpu()))

    def gather(self, value: Any) -> list[Any]:
        """Objects of all processes, by rank; two messages."""
        mine = _packed(value, self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        size = torch.tensor([mine.numel()], device=self.device)
        self._call(lambda: dist.all_gather(sizes, size, group=self.group, async_op=True), size)
        longest = max(map(int, sizes))
        padded = torch.cat([mine, mine.new_zeros(longest - mine.numel())])
        found = [torch.empty_like(padded) for _ in range(self.size)]
        self._call(lambda: dist.all_gather(found, padded, group=self.group, async_op=True), padded)
        return [_unpacked(one[: int(length)]) for one, length in zip(found, sizes, strict=True)]

    def from_first(self, value: Any) -> Any:
        """The object of process 0 on all, tensors on the host; two messages."""
        source = dist.get_global_rank(self.group, 0)
        mine = _packed(value, self.device) if self.rank == 0 else torch.empty(0, dtype=torch.uint8, device=self.device)
        size = torch.tensor([mine.numel()], device=self.device)
        self._call(lambda: dist.broadcast(size, source, group=self.group, async_op=True), size)
        message = mine if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8, device=self.device)
        self._call(lambda: dist.broadcast(message, source, group=self.group, async_op=True), message)
        return value if self.rank == 0 else _unpacked(message)

    def _as_message(self, tensor: Tensor) -> Tensor:
        """A tensor where the group's backend takes it."""
        is_taken = self.takes_host if tensor.device.type == "cpu" else self.takes_cuda
        return tensor.contiguous() if is_taken else tensor.contiguous().to(self.device)

    def _call(self, collective: Callable[[], Any], message: Tensor) -> None:
        self.messages += 1
        self.numbers += message.numel()
        try:
            work = collective()
            if message.device.type == "cpu":
                _poll(work)
            work.wait()
        except RuntimeError as error:
            raise ProcessError(
                f"expected an answer of all {self.size} processes, got none of some ({str(error).splitlines()[0]}): a process has "
                "ended, or was elsewhere for longer than the timeout of the group; end this one too and start all again, and give a "
                "longer timeout to init_process_group where one has so much more to do than others"
            ) from error


def _poll(work: Any) -> None:
    """Give way to the threads that send and receive until a collective is done, for a while.

    Where there are as many processes as cores, one that sleeps until it is woken lets them wait for a whole slice of another's time: with
    4 ms of work before each sum of 3,658 numbers, 7.0 ms a sum of two processes on two cores instead of 4.6.
    """
    end = time.perf_counter() + _POLL_SECONDS
    while not work.is_completed() and time.perf_counter() < end:
        _give_way()


def _as_group(group: Any) -> Any:
    if not dist.is_available():
        raise ValueError(
            "expected a torch with torch.distributed, got one built without it: leave group out, or install another"
        )
    if not dist.is_initialized():
        raise ValueError(
            "expected torch.distributed to be initialized for group=, got a process that is alone: start with torchrun and call "
            'torch.distributed.init_process_group("gloo") or ("nccl") first, or leave group out'
        )
    if isinstance(group, str) and group == WORLD:
        return dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "expected a group that this process is of, got one of others: call with group= on its members alone"
        )
    if isinstance(group, dist.ProcessGroup):
        return group
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise ValueError(
                f"expected a mesh of one dimension, over which samples are spread, got {group.ndim}: pass one of them, mesh[name]"
            )
        return group.get_group()
    raise TypeError(
        f'expected group to be "world", a process group or a DeviceMesh of one dimension, got {group!r}: pass one of these'
    )


def _packed(value: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(np.frombuffer(pickle.dumps(value), dtype=np.uint8).copy()).to(device)


def _unpacked(message: Tensor) -> Any:
    return pickle.loads(message.cpu().numpy().tobytes())  # of this program's own processes
