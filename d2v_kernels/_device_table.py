"""Host numbers for kernels on a device, once or step after step on any stream."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(op: str, host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without waiting for it.

    Raises:
        RuntimeError: during a graph capture, whose replays would read host memory that is long gone.
    """
    if device.type == "cpu":
        return host
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{op}: expected nothing to upload during a graph capture, got a host tensor")
    return host.pin_memory().to(device, non_blocking=True)


class DeviceTable:
    """What a plan of `op` reads at every step, in device memory; on a CPU the host tensor itself."""

    def __init__(self, op: str, host: Tensor, device: torch.device) -> None:
        self._rows, self._device = upload(op, host, device), device
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
            self._uploaded = self._stream.record_event()

    def on_current_stream(self) -> Tensor:
        """The table for a launch on the current stream, which waits for the upload where that went by another one."""
        if self._device.type != "cuda":
            return self._rows
        stream = torch.cuda.current_stream(self._device)
        if stream != self._stream:
            # The memory must not be given to others while this stream reads it, whoever drops the plan.
            self._rows.record_stream(stream)
            # A capture must not wait for what came before it; it begins when the device has done all that.
            if not torch.cuda.is_current_stream_capturing():
                stream.wait_event(self._uploaded)
        return self._rows
