"""Tensors on their way to the backend that decides, and back."""

from __future__ import annotations

from typing import Any

import torch

from ...core.backend import Backend

__all__ = ["from_backend", "to_backend"]


def to_backend(tensor: torch.Tensor, backend: Backend) -> Any:
    """Return a tensor as an array of the backend, on the host unless the backend is torch."""
    tensor = tensor.detach()
    if backend.library == "torch":
        return tensor
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return backend.xp.asarray(tensor.cpu().numpy())


def from_backend(array: Any, backend: Backend, device: torch.device) -> torch.Tensor:
    """Return an array of the backend as a tensor on a device."""
    if backend.library == "torch":
        tensor: torch.Tensor = array.to(device)
        return tensor
    # A copy, because some libraries return memory that must not be written to.
    return torch.tensor(backend.to_numpy(array), device=device)
