"""Which implementation of an op runs: the plain-torch reference (any device) or a Triton kernel.

Order of choice: the call's ``backend=`` argument, then the innermost ``with backend(...)``, then
the environment variable ``SPARSEFT_BACKEND`` (read at call time), then ``"auto"``. ``"triton"``
never falls back: it raises with the reason. ``"auto"`` takes Triton on GPU tensors where a kernel
exists, and otherwise logs once why it did not.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

from torch import Tensor

from sparseft._text import did_you_mean
from sparseft.errors import BackendError

__all__ = ["BackendName", "backend", "current_backend", "resolve_backend"]

BackendName = Literal["auto", "reference", "triton"]
Resolved = Literal["reference", "triton"]

_NAMES = ("auto", "reference", "triton")
_ENV = "SPARSEFT_BACKEND"
# Ops that have a Triton kernel. An op is added here by the change that adds its launcher.
_TRITON_OPS = frozenset(
    {
        "adamw_step_",
        "cholesky_inverse",
        "compose_entries",
        "compose_entries_grad",
        "compose_many_",
        "difference_",
        "embedding_diff",
        "gather_entries",
        "lion_step_",
        "prune_residual_",
        "sampled_embedding_grad",
        "sampled_weight_grad",
        "segment_spmm",
        "sgd_step_",
        "sign_sketch",
        "sparse_step_",
        "topk_differences",
        "topk_patterns",
        "write_entries_",
        "write_sum_",
    }
)

# Those whose kernels take operands of any strides, instead of a copy or a refusal.
_STRIDED_OPS = frozenset({"difference_", "sampled_embedding_grad", "sampled_weight_grad"})

_log = logging.getLogger("sparseft.backend")
# Process-wide on purpose: CUDA backward runs in autograd's own threads, which a thread-local or
# context variable set around `loss.backward()` would not reach.
_stack: list[BackendName] = []
_logged: set[str] = set()


def _checked(name: str, source: str) -> BackendName:
    if name not in _NAMES:
        raise BackendError(
            f"{source} is {name!r}; it should be one of {', '.join(map(repr, _NAMES))}."
            f"{did_you_mean(name, _NAMES)}"
        )
    return cast(BackendName, name)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend for every op inside the ``with`` block, in all threads of the process.

    Args:
        name: ``"auto"``, ``"reference"`` or ``"triton"``. Blocks nest; the innermost wins. A
            ``backend=`` argument on a call wins over the block, the block over
            ``SPARSEFT_BACKEND``.

    Raises:
        BackendError: unknown name. (That Triton cannot run here is raised by the op, which knows
            its tensors.)

    Example:
        >>> with backend("reference"):
        ...     current_backend()
        'reference'
    """
    _stack.append(_checked(name, "backend"))
    try:
        yield
    finally:
        _stack.pop()


def current_backend() -> BackendName:
    """Return the backend asked for outside of any call: innermost block, environment, or
    ``"auto"``.
    """
    if _stack:
        return _stack[-1]
    name = os.environ.get(_ENV)
    return _checked(name, f"environment variable {_ENV}") if name else "auto"


@functools.cache
def _missing_package() -> str | None:
    """Return the first absent package the kernels need; looked up once, not imported."""
    for name in ("triton", "sparseft_kernels"):
        if importlib.util.find_spec(name) is None:
            return name
    return None


def _why_not_triton(op: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Return why the Triton kernel of ``op`` cannot take these tensors, or None when it can."""
    if op not in _TRITON_OPS:
        have = ", ".join(sorted(_TRITON_OPS))
        return f"{op} has no Triton kernel (ops that have one: {have})"
    devices = {t.device.type for t in tensors}
    if len(devices) > 1:
        return f"its tensors lie on different devices ({', '.join(sorted(devices))})"
    device = devices.pop() if devices else "cpu"
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return (
            f"its tensors lie on {device}; Triton needs CUDA or ROCm "
            "(or TRITON_INTERPRET=1 on CPU, for tests)"
        )
    if op not in _STRIDED_OPS and not all(t.is_contiguous() for t in tensors):
        return "one of its tensors is not contiguous"
    missing = _missing_package()
    return None if missing is None else f"the Python package {missing!r} is not installed"


def resolve_backend(
    op: str, *tensors: Tensor, backend: str | None = None, why_not: str | None = None
) -> Resolved:
    """Return ``"reference"`` or ``"triton"`` for one call of ``op`` on ``tensors``.

    Args:
        op: name of the op as in ``torch.ops.sparseft``.
        tensors: every tensor the kernel would touch.
        backend: the caller's ``backend=`` argument, or None (or ``""``) when it gave none.
        why_not: what else keeps the op's kernel from these tensors, as a clause; None: nothing.

    Raises:
        BackendError: unknown name, or ``"triton"`` was asked for and cannot run here; the message
            says why.
    """
    name = _checked(backend, f"{op}: backend") if backend else current_backend()
    if name == "reference":
        return "reference"
    if name == "auto" and all(t.device.type != "cuda" for t in tensors):
        return "reference"  # the ordinary case off GPUs: nothing to explain
    reason = _why_not_triton(op, tensors) or why_not
    if reason is None:
        return "triton"
    if name == "triton":
        raise BackendError(
            f"{op}: backend 'triton' was asked for but {reason}. Use backend='reference' or 'auto'."
        )
    message = f"{op} runs on the reference backend: {reason}"
    if message not in _logged:
        _logged.add(message)
        _log.warning("%s", message)
    return "reference"
