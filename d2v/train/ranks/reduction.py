"""Gradients rounded to bfloat16 on their way between ranks, and added up in float32.

An all-reduce in bfloat16 would round after each rank, and gloo gets it wrong without a word (torch 2.13). Here every
rank gets its piece of the gradient from all others, adds the pieces in float32, and hands the sum round. Any number of
ranks sends half the bytes of an all-reduce in float32, and all end with the same bits.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future


def reduce_pieces(value: Tensor, group: Any) -> Tensor:
    """This rank's piece of the sum of `value` over the ranks of a group.

    value: float32, contiguous, a piece of equal size for each rank. The sum is float32, of values rounded to bfloat16.
    """
    sent = value.view(group.size(), -1).bfloat16()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.sum(0, dtype=torch.float32)


class RoundedReduce:
    """Means of gradients over all ranks beside the backward pass, for DistributedDataParallel."""

    def __init__(self, device: torch.device, timeout: datetime.timedelta) -> None:
        """Every rank calls."""
        # Its own: DistributedDataParallel may exchange something else at the same time.
        self._group = dist.new_group(timeout=timeout)
        # One thread, so that all ranks exchange bucket after bucket; on a device a stream of its own.
        self._thread = ThreadPoolExecutor(1, "d2v-reduce") if device.type == "cpu" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._devices: list[int | str | torch.device] | None = [device] if device.type == "cuda" else None

    def __call__(self, buffer: Tensor) -> Future[Tensor]:
        """A future of the mean of `buffer` (float32, flat) over the ranks, in place."""
        done: Future[Tensor] = Future(devices=self._devices)
        if self._thread is not None:
            self._thread.submit(self._finish, buffer, done)
        else:
            assert self._stream is not None
            self._stream.wait_stream(torch.cuda.current_stream(buffer.device))
            with torch.cuda.stream(self._stream):
                self._finish(buffer, done)
        return done

    def _finish(self, buffer: Tensor, done: Future[Tensor]) -> None:
        try:
            done.set_result(self._reduce(buffer))
        except Exception as error:  # raised by who waits for the result
            done.set_exception(error)  # type: ignore[arg-type]

    @torch.no_grad()
    def _reduce(self, buffer: Tensor) -> Tensor:
        size, count = self._group.size(), buffer.numel()
        padded = torch.nn.functional.pad(buffer, (0, -count % size))
        own = (reduce_pieces(padded, self._group) / size).bfloat16()
        whole = own.new_empty(size * own.numel())
        dist.all_gather(list(whole.chunk(size)), own, group=self._group)
        return buffer.copy_(whole[:count])


class RoundedReduceScatter:
    """`reduce_pieces` as `torch.distributed.fsdp.FSDPModule.set_custom_reduce_scatter` takes it."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what goes in and what comes out."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Fills this rank's piece, float32; op: sum or mean."""
        assert op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG) and not async_op
        torch.mul(
            reduce_pieces(input_tensor, group), 1.0 / group.size() if op == dist.ReduceOp.AVG else 1.0,
            out=output_tensor,
        )  # fmt: skip
