"""A mask on a weight that nobody writes: ``y = W(x) + x @ S.T``, trained beside a quantised weight.

The same compact leaf as in place, registered on the module as ``diff_weight``; a forward hook adds
its product to what the layer gives. Codes and scales keep their bytes; there is nothing to restore.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.diff import SparsePattern
from sparseft.errors import AttachError, BaseMismatchError
from sparseft.fingerprint import TensorFingerprint
from sparseft.modules import dequantise as dense
from sparseft.modules.leaves import MaskedParameter, leaf_attribute
from sparseft.modules.names import STATE_KEY, ParameterIndex
from sparseft.modules.quantised_base import fingerprint_quantised
from sparseft.modules.separate import why_not_separate
from sparseft.modules.sharding import Sharding
from sparseft.modules.storage_stack import Holder
from sparseft.ops.spmm import segment_spmm

__all__ = ["SeparateParameter", "check_separable", "make_masked", "refuse_keeping"]

Owner = tuple[nn.Module, str]


def check_separable(name: str, owners: Sequence[Owner]) -> bool:
    """Say whether a weight is quantised, so that its mask is trained beside it.

    Args:
        name: canonical name.
        owners: every (module, attribute) that holds it.

    Raises:
        AttachError: quantised, but not where a diff could be added to the layer's output.
    """
    module, attr = owners[0]
    if not dense.is_quantised(module, attr):
        return False
    linear = all(isinstance(getattr(module, n, None), int) for n in ("in_features", "out_features"))
    why = why_not_separate(module, attr)
    if not linear or attr != "weight":
        kind = type(module).__qualname__
        why = f"it is the {attr!r} of a {kind}, and only linear layers add their diff beside"
    if why is not None:
        raise AttachError(
            f"{name!r} is quantised ({dense.scheme_of(module, attr)}) and cannot have a mask: "
            f"{why}. Leave it out of the masks, or keep that layer unquantised when loading "
            "(llm_int8_skip_modules, modules_to_not_convert)."
        )
    return True


def make_masked(
    index: ParameterIndex,
    name: str,
    pattern: SparsePattern,
    *,
    backend: str | None,
    compact: bool,
    sharding: Sharding,
) -> MaskedParameter:
    """Return a parameter's mask: in its weight, or beside it where that is quantised."""
    owners, aliases, weight = index.owners(name), index.aliases(name), index.get(name)
    if dense.is_quantised(*owners[0]):
        return SeparateParameter(
            name, owners, pattern, aliases=aliases, backend=backend, compact=compact
        )
    return MaskedParameter(
        name, weight, pattern,
        aliases=aliases, backend=backend, compact=compact, shards=sharding.of(weight),
    )  # fmt: skip


def refuse_keeping(masks: Iterable[MaskedParameter]) -> None:
    """Raise AttachError for ``detach(restore=False)`` where a weight cannot keep its diff."""
    beside = [masked for masked in masks if masked.separate]
    if beside:
        more = f" (with {len(beside) - 1} more)" if len(beside) > 1 else ""
        raise AttachError(
            f"detach(restore=False): {beside[0].name!r}{more} is quantised ({beside[0].scheme}), "
            "and nothing is merged into quantised storage: small diffs would be lost in its "
            "rounding. For a plain model of the trained values: attachment.merged_state_dict(dtype="
            "torch.bfloat16), or attachment.save_merged(folder). Then detach()."
        )


def _add_diff(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor | None:
    """Forward hook of a layer with such a mask. A hook, because what spreads a model over several
    devices (accelerate) puts a forward of its own into the module's dict, past any class.
    """
    masked = module.__dict__.get(STATE_KEY, {}).get("weight")
    if not isinstance(masked, SeparateParameter):
        return None
    leaf = module._parameters.get(leaf_attribute("weight"))  # torch.func puts another one there
    x = args[0] if args else next(iter(kwargs.values()))
    return masked.add(x, output, masked.leaf if leaf is None else leaf)


class SeparateParameter(MaskedParameter):
    """A quantised weight, left as it is, and the leaf whose product is added to its layer's output.

    Nothing lies on the storage stack; steps, loads and `sync_` write nothing.

    Args:
        name: canonical name of the weight, for messages.
        owners: every (module, attribute) that holds it, the canonical one first.
        pattern: where it is trained, of the weight's logical shape.
        aliases, backend, compact: as `MaskedParameter`.

    Attributes:
        scheme: how the weight is quantised, e.g. ``"bnb.nf4"``.

    Numerics: ``rn(y + x @ S.T)`` with y what the layer gives, in its dtype; product, leaf and sum
        in fp32, rounded once to y's dtype. Under autocast x is taken in the autocast dtype. The
        leaf's gradient is the one of the weight in place: summed in fp32 from x and dY.
    """

    separate = True

    def __init__(
        self,
        name: str,
        owners: Sequence[Owner],
        pattern: SparsePattern,
        *,
        aliases: Iterable[str] = (),
        backend: str | None = None,
        compact: bool = False,
    ) -> None:
        self.owners = list(owners)
        module, attr = self.owners[0]
        self.scheme = dense.scheme_of(module, attr) or ""
        weight: Any = module._parameters[attr]
        # Not the base's own __init__, which reads the weight and joins its stack.
        self.start(name, weight, pattern, aliases=aliases, backend=backend, compact=compact)
        self.wide = torch.float32
        self.leaf = nn.Parameter(torch.zeros(pattern.nnz, device=pattern.device))
        self.holder = Holder(f"attach({name!r})", None, torch.empty(0))
        for owner, _ in self.owners:
            owner.register_forward_hook(_add_diff, prepend=True, with_kwargs=True)
        self.register()

    def add(self, x: Tensor, y: Tensor, leaf: Tensor) -> Tensor:
        """Return ``rn(y + x @ S.T)`` in y's dtype and shape.

        Args:
            x: (..., in) what the layer was given.
            y: (..., out) what its weight made of it.
            leaf: (nnz,) values of S.
        """
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))  # as the layer itself takes it
        x3, y3 = x.reshape(1, -1, x.shape[-1]).to(y.device), y.reshape(1, -1, y.shape[-1])
        rows, cols = self.pattern.shape
        out = segment_spmm(
            x3, y3, [leaf], [self.indices], [], None, [1], rows, cols, False, self.backend or ""
        )
        return out.view(y.shape)

    def dense_base(self, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Return the weight's dense value, made anew at each call."""
        return dense.dequantise(*self.owners[0], dtype, name=self.name)

    @property
    def base(self) -> Tensor:
        """(nnz,) dequantised entries at the mask in fp32: read anew, not kept."""
        return self.dense_base().reshape(-1)[self.indices.long()]

    def fingerprint(self, name: str) -> TensorFingerprint:
        """Return what recognises this base; see `sparseft.modules.quantised_base`."""
        return fingerprint_quantised(name, *self.owners[0])

    def follow_weight_(self) -> None:
        """Bring indices and leaf to the weight's device."""
        if self.pattern.device != self.weight.device:
            self.pattern = self.pattern.to(self.weight.device)
        if self.leaf.device != self.weight.device:
            self.leaf.data = self.leaf.data.to(self.weight.device)
            if self.leaf.grad is not None:
                self.leaf.grad = self.leaf.grad.to(self.weight.device)

    def require_top(self, action: str) -> None:
        """Nothing is ever written, so nobody is in the way."""

    def write_(self, action: str = "") -> None:
        """Do nothing: the forward adds what the leaf holds."""

    def write_entries_(self, values: Tensor) -> None:
        """Do nothing."""

    def expected_entries(self, values: Tensor) -> Tensor:
        """Return ``base + values``, (nnz,) fp32."""
        return self.base + values.detach().to(self.weight.device, torch.float32)

    def release_(self, *, restore: bool) -> None:
        """Take the hooks off; the weight has not changed."""
        for module, _ in self.owners:
            for number, hook in list(module._forward_hooks.items()):
                if hook is _add_diff:
                    del module._forward_hooks[number]
                    module._forward_hooks_with_kwargs.pop(number, None)
        self.unregister()

    def digest_tensor(self) -> Tensor:
        """Return 32 bytes (uint8) that name mask and base; compact checkpoints carry them."""
        text = self.pattern.digest()[:16] + self.fingerprint(self.name).digest[:16]
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def take_base(self, state_dict: Any, prefix: str, attr: str) -> bool:
        """Take the keys of this weight out of a state dict about to be loaded, checked.

        Returns:
            Whether the weight itself was among them.

        Raises:
            BaseMismatchError: they are of another base or mask.
        """
        digest = state_dict.pop(f"{prefix}{leaf_attribute(attr)}_base", None)
        if digest is not None and not torch.equal(digest.cpu(), self.digest_tensor()):
            raise BaseMismatchError(
                f"the compact checkpoint was made with another mask or base of {self.name!r}. Load "
                "its base model, quantised in the same way, and attach its masks first."
            )
        module, there = self.owners[0][0], prefix + attr in state_dict
        wrong = dense.take_stored(module, attr, state_dict, prefix)
        if wrong is not None:
            raise BaseMismatchError(
                f"the checkpoint's {self.name!r} is quantised ({self.scheme}) to another base than "
                f"this model's: its {wrong!r} differs. Load the base that the run began with, "
                "quantised in the same way, and attach its masks, before loading."
            )
        return there

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["placement"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("placement", None)
        self.__dict__.update(state)
        self.register()
