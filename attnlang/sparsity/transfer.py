"""Captured tensors on the host: everything an analysis needs from a device, in one copy.

The analysis asks for ranges of values at indices it only knows as it goes, so it runs where the answers are: on the
host. The device packs what the mask reads into one buffer, which it can queue without anybody waiting; that buffer
comes over as it is, since summaries of it that answer exactly would be larger than the numbers themselves (large tables
are summarised there first, see :mod:`.cells`). Its arrival is the only time that the host waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["to_host"]

Tensor = torch.Tensor
ALIGNMENT = 16  # bytes; no dtype needs more


def _on_host(t: Tensor) -> bool:
    return t.device.type == "cpu"


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, those of one device by a single copy."""
    out = {name: t for name, t in tensors.items() if _on_host(t)}
    devices: dict[torch.device, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        if name not in out:
            devices.setdefault(t.device, {})[name] = t
    for group in devices.values():
        out.update(_fetch(group))
    return out


def _fetch(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts, at, places = [], 0, {}
    for name, t in group.items():
        # one element, or none, may have any stride, and then a view of its bytes is refused
        flat = t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8)
        pad = -flat.numel() % ALIGNMENT
        parts.append(torch.nn.functional.pad(flat, (0, pad)) if pad else flat)
        places[name] = slice(at, at + flat.numel())
        at += flat.numel() + pad
    host = torch.cat(parts).cpu()
    return {name: host[place].view(group[name].dtype).reshape(group[name].shape) for name, place in places.items()}
