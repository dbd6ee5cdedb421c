"""What recognises a quantised base: a digest of its codes and scales, and dequantised samples."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from sparseft._integrity import hash_tensor
from sparseft.fingerprint import TensorFingerprint, sample_positions
from sparseft.modules.dequantise import (
    dequantise,
    logical_shape,
    scheme_of,
    stored_tensors,
)

__all__ = ["fingerprint_quantised"]


@torch.no_grad()
def fingerprint_quantised(name: str, module: nn.Module, attr: str = "weight") -> TensorFingerprint:
    """Fingerprint a quantised weight; its dense value is made once, and let go of.

    Args:
        name: canonical parameter name; seeds the sample positions.
        module: the layer that has the weight.
        attr: its attribute.

    Returns:
        The scheme for a dtype (``.double`` where scales are quantised, too), a digest over every
        stored tensor, the samples, and how far apart its values are there.
    """
    shape, stored = logical_shape(module, attr), stored_tensors(module, attr, name=name)
    digest = hashlib.blake2b(digest_size=16)
    for key, tensor in stored.items():
        if key == "codes":  # packed into uint8, or into a wider dtype for FSDP: the same bytes
            tensor = tensor.contiguous().view(-1).view(torch.uint8)
        digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        hash_tensor(digest, tensor)
    flat = dequantise(module, attr, torch.float32, name=name).reshape(-1)
    positions = sample_positions(name, flat.numel()).to(flat.device)
    values = flat[positions]
    step = _step(module, attr, stored, positions, shape, values) if flat.numel() else 0.0
    scheme = f"{scheme_of(module, attr)}{'.double' if 'nested_absmax' in stored else ''}"
    return TensorFingerprint(shape, scheme, digest.hexdigest(), tuple(values.cpu().tolist()), step)


def _step(
    module: nn.Module,
    attr: str,
    stored: dict[str, Tensor],
    positions: Tensor,
    shape: tuple[int, ...],
    values: Tensor,
) -> float:
    """Return the largest distance of neighbouring values at these flat positions."""
    if "absmax" in stored:
        code = stored["quant_map"].float().sort().values
        widest = float(code.diff().max())
        return widest * float(
            _absmax(module, attr, stored)[positions // _block(module, attr)].max()
        )
    if "scales" in stored:
        return float(stored["scales"][positions // shape[-1]].max()) / 127
    codes = stored.get("qdata")
    if codes is not None and codes.dtype.is_floating_point:
        return float(values.abs().max()) * torch.finfo(codes.dtype).eps
    scale = stored.get("scale")
    return 0.0 if scale is None else float(scale.abs().max())


def _state(module: nn.Module, attr: str) -> Any:
    return getattr(module._parameters[attr], "quant_state", None) or module.quant_state


def _block(module: nn.Module, attr: str) -> int:
    return int(_state(module, attr).blocksize)


def _absmax(module: nn.Module, attr: str, stored: dict[str, Tensor]) -> Tensor:
    """Return (blocks,) fp32 scales of a 4-bit weight."""
    if "nested_absmax" not in stored:
        return stored["absmax"].float()
    from bitsandbytes import functional

    state = _state(module, attr)
    return functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
