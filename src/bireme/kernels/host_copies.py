"""Copies between the host and a device, of which the host waits for nothing."""

from __future__ import annotations

import torch


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device once its stream comes to it; on a CPU it may be the same tensor."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # of other memory the host may wait


def upload_into(place: torch.Tensor, tensor: torch.Tensor) -> None:
    """The same into memory that is there."""
    place.copy_(tensor.pin_memory() if place.is_cuda else tensor, non_blocking=True)


def download(tensor: torch.Tensor) -> torch.Tensor:
    """On the host once the device's stream is past it, whatever becomes of the tensor; on a CPU the same."""
    if not tensor.is_cuda:
        return tensor
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return on_host.copy_(tensor, non_blocking=True)
