"""Give a module a class of its own, in which reads of masked parameters are differentiable.

``module.__class__`` becomes a subclass of its class with one property per masked attribute. The
parameter stays in ``module._parameters``, so names and state dicts are those of the stock model,
and any code that reads ``module.weight``, in forward or around it, gets the leaf its gradient.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.errors import AttachError, BaseMismatchError
from sparseft.modules.experts import FusedExperts, is_stacked, read_in_forward
from sparseft.modules.functional import given_weight
from sparseft.modules.fused import fused_class
from sparseft.modules.leaves import MaskedParameter, leaf_attribute
from sparseft.modules.names import STATE_KEY, canonical_name
from sparseft.modules.replacing import RefusesReplacing
from sparseft.modules.rounded import rounded_entries, rounded_key, write_rounded_
from sparseft.modules.taps import alias_at_mask
from sparseft.modules.weight_storage import is_sharded, read_entries
from sparseft.ops._rounding import rounds_either_way

__all__ = [
    "MaskedModule",
    "check_class",
    "mask_attribute",
    "masked_attributes",
    "unmask_attribute",
]


def masked_attributes(module: nn.Module) -> dict[str, MaskedParameter]:
    """Return the masked parameters of one module by attribute; empty for a stock module."""
    return module.__dict__.get(STATE_KEY, {})


def _apart(
    masks: dict[str, MaskedParameter],
) -> tuple[dict[str, MaskedParameter], dict[str, Any]]:
    """Return the masks within weights, and those beside them, whose attributes stay stock."""
    inside = {attr: masked for attr, masked in masks.items() if not masked.separate}
    return inside, {attr: masked for attr, masked in masks.items() if masked.separate}


def _owns_leaf(module: nn.Module, attr: str, masked: MaskedParameter) -> bool:
    return module._parameters.get(leaf_attribute(attr)) is masked.leaf


def _keeps_leaf(module: nn.Module, attr: str, masked: MaskedParameter, prefix: str) -> bool:
    """Whether a state dict has the leaf under ``prefix``: once, if a module has several names.

    (save_pretrained of transformers 4 refuses shared tensors that its model class does not list.)
    """
    alias = canonical_name(prefix + attr) in masked.aliases
    return _owns_leaf(module, attr, masked) and not alias


class MaskedModule(RefusesReplacing):
    """What every swapped class adds to the stock one, besides its properties."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedModule:
        """Move and cast the module; leaves move but keep their dtype, bases follow the weight."""
        masks = masked_attributes(self)
        dtypes = {attr: masked.weight.dtype for attr, masked in masks.items()}
        aside = {
            leaf_attribute(attr): masked.leaf
            for attr, masked in masks.items()
            if _owns_leaf(self, attr, masked)
        }
        for name in aside:
            del self._parameters[name]
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters.update(aside)
        for leaf in aside.values():
            moved = fn(leaf.data)
            leaf.data = moved if moved.dtype == leaf.dtype else leaf.data.to(moved.device)
            if leaf.grad is not None:
                leaf.grad = leaf.grad.to(leaf.device)
        for attr, masked in masks.items():
            masked.follow_weight_()
            if masked.weight.dtype != dtypes[attr]:
                masked.write_("cast")
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for attr, masked in masked_attributes(self).items():
            if not _keeps_leaf(self, attr, masked, prefix):
                destination.pop(prefix + leaf_attribute(attr), None)
            elif masked.compact:
                destination[_digest_key(prefix, attr)] = masked.digest_tensor()
                entries = rounded_entries(masked)
                if entries is not None:
                    destination[rounded_key(prefix, attr)] = entries

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *lists: Any,
    ) -> None:
        masks, beside = _apart(masked_attributes(self))
        taken = {prefix + a for a, m in beside.items() if m.take_base(state_dict, prefix, a)}
        as_saved = set()
        rounded = {attr: state_dict.pop(rounded_key(prefix, attr), None) for attr in masks}
        for attr, masked in masks.items():
            masked.require_top("load a state dict into")
            if _keeps_leaf(self, attr, masked, prefix):
                keep = _verify_base(masked, attr, state_dict, prefix)
            else:
                keep = _alias_as_saved(masked, attr, state_dict, prefix)
            if keep:
                as_saved.add(attr)
        # Copied into place also under assign=True: a weight that is another object tomorrow would
        # no longer be the one the leaf drives.
        local_metadata = {**(local_metadata or {}), "assign_to_params_buffers": False}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *lists
        )
        for attr, masked in masks.items():
            key = prefix + leaf_attribute(attr)
            if key in missing_keys and not _keeps_leaf(self, attr, masked, prefix):
                missing_keys.remove(key)
            if attr not in as_saved:
                masked.write_("load a state dict into")
                write_rounded_(masked, rounded[attr])
        missing_keys[:] = [key for key in missing_keys if key not in taken]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # For pickle and deepcopy: the class is made at run time and has no importable name.
        masks = masked_attributes(self)
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        _, _, *rest = reduced
        inside, _ = _apart(masks)
        arguments = _stock_class(type(self)), tuple(inside), isinstance(self, FusedExperts)
        return _new_instance, arguments, *rest


def _new_instance(stock: type[nn.Module], attrs: tuple[str, ...], stacked: bool) -> nn.Module:
    cls = _swapped_class(stock, frozenset(attrs), stacked)
    return cls.__new__(cls)


def _digest_key(prefix: str, attr: str) -> str:
    return f"{prefix}{leaf_attribute(attr)}_base"


def _verify_base(masked: MaskedParameter, attr: str, state_dict: Any, prefix: str) -> bool:
    """Raise BaseMismatchError where a checkpoint's tensors cannot belong to this mask and base.

    Returns:
        Whether its weight is its diff's sum rounded either way: by stochastic rounding, so to be
        kept as it is, for a resumed run to go on with the same bits.
    """
    digest = state_dict.pop(_digest_key(prefix, attr), None)
    leaf, weight = (state_dict.get(prefix + a) for a in (leaf_attribute(attr), attr))
    if digest is not None and not torch.equal(digest.cpu(), masked.digest_tensor()):
        got, wanted = bytes(digest.tolist()).decode(), bytes(masked.digest_tensor()).decode()
        raise BaseMismatchError(
            f"the compact checkpoint was made with another mask or base of {masked.name!r}: it "
            f"has digest {got}, the model {wanted}. Load its base model and attach its masks first."
        )
    if weight is None or weight.shape != masked.weight.shape:
        return False  # absent, or torch reports the shapes
    found = read_entries(_like(weight, masked.weight), masked.indices)
    if leaf is not None and leaf.shape == masked.leaf.shape:
        wanted_entries = [masked.expected_entries(leaf)]
        rounded = rounds_either_way(found, masked.base, leaf)  # by stochastic rounding
    else:
        wanted_entries = [masked.base, masked.expected_entries(masked.leaf)]
        rounded = False
    if not rounded and not any(torch.equal(found, entries) for entries in wanted_entries):
        at = int((found != wanted_entries[0]).nonzero()[0])
        raise BaseMismatchError(
            f"the checkpoint's {masked.name!r} is not this base plus its diff: at flat index "
            f"{int(masked.indices[at])} it has {float(found[at]):g}, wanted "
            f"{float(wanted_entries[0][at]):g}. It was made with other masks or another base: "
            "attach its masks to its base, then load it; if its masks moved in training, load the "
            "state of that Reselection first."
        )
    return rounded


def _like(weight: Tensor, wanted: Tensor) -> Tensor:
    return weight.detach().to(device=wanted.device, dtype=wanted.dtype)


def _alias_as_saved(masked: MaskedParameter, attr: str, state_dict: Any, prefix: str) -> bool:
    """Whether loading under another name of a tied weight leaves it a rounding of its diff.

    Names load one by one, the canonical one with the diff first: after it, the others must not
    round again. Entries of the plain base may be neighbours of a small sum, too; those are no
    rounding of it.
    """
    if prefix + leaf_attribute(attr) in state_dict:
        return False
    weight = state_dict.get(prefix + attr)
    if weight is None:
        return True  # nothing is loaded
    if weight.shape != masked.weight.shape:
        return False
    masked.follow_weight_()
    found, held = (
        read_entries(_like(w, masked.weight), masked.indices) for w in (weight, masked.weight)
    )
    known = torch.equal(found, held) or not torch.equal(found, masked.base)
    return known and rounds_either_way(found, masked.base, masked.leaf)


class _MaskedRNN(nn.RNNBase):
    """RNNs keep a list of raw parameters; here it is read afresh, through the properties."""

    @property
    def _flat_weights(self) -> list[Any | None]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Any | None]) -> None:
        self.__dict__["_flat_weights"] = value  # what the stock class finds again after detach

    def _weights_have_changed(self) -> bool:
        return False  # an alias is never the parameter it was made from


def _property(attr: str) -> property:
    def read(self: nn.Module) -> Tensor | None:
        weight = self._parameters[attr]
        masked = self.__dict__[STATE_KEY][attr]
        if masked.shards is not None and (weight is None or is_sharded(weight)):
            return masked.weight  # outside of forward: rows, which no layer computes with
        if weight is None:
            return None
        given = given_weight(weight, masked)
        if given is not None:
            return given
        if not (torch.is_grad_enabled() and masked.leaf.requires_grad):
            return weight
        compiling = torch.compiler.is_compiling()
        if not compiling:
            masked.data_was_set()  # also lets go of the last alias, before there is a new one
        alias = None if compiling else read_in_forward(self, attr, weight, masked)
        if alias is None:
            alias = alias_at_mask(weight, masked)
        if not compiling:
            # isinstance(module.weight, nn.Parameter) stays true, as get_parameter() demands.
            alias._is_param = True
            masked.hand_out(alias)
        return alias

    return property(read, doc=f"{attr}, trained at a mask: an alias while gradients are recorded.")


_classes: dict[tuple[type, frozenset[str], bool], type] = {}


def _stock_class(cls: type) -> type:
    return cls.__dict__["_sparseft_stock"]


def check_class(module: nn.Module, name: str) -> None:
    """Raise AttachError where a class was derived from the swapped one, which cannot go then."""
    cls = type(module)
    if isinstance(module, MaskedModule) and "_sparseft_stock" not in cls.__dict__:
        raise AttachError(
            f"the module of {name!r} became a {cls.__qualname__} after attach. Undo that first "
            "(torch.nn.utils.parametrize.remove_parametrizations for each parametrized tensor), "
            "then detach()."
        )


def _swapped_class(
    stock: type[nn.Module], attrs: frozenset[str], stacked: bool = False
) -> type[nn.Module]:
    """Return the subclass of ``stock`` with ``attrs`` masked, ``stacked`` ones of experts among
    them; made once.
    """
    key = (stock, attrs, stacked)
    if key in _classes:
        return _classes[key]
    between = [fused_class(stock) if "weight" in attrs else None]
    if issubclass(stock, nn.RNNBase):
        between.append(_MaskedRNN)
    extra = [c for c in between if c is not None]
    # `stock` itself is left out where the fused class already derives from it.
    bases = [MaskedModule, *(() if any(issubclass(c, stock) for c in extra) else (stock,)), *extra]
    if stacked:
        bases.insert(0, FusedExperts)
    body: dict[str, Any] = {attr: _property(attr) for attr in attrs}
    body |= {
        "_sparseft_stock": stock,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
    }
    cls = types.new_class(stock.__name__, tuple(bases), exec_body=lambda ns: ns.update(body))
    _classes[key] = cls
    return cls


def _class_for(
    module: nn.Module, stock: type[nn.Module], masks: dict[str, MaskedParameter]
) -> type[nn.Module]:
    """Return the class of a module with these masks."""
    inside, _ = _apart(masks)
    stacked = any(is_stacked(module, masked.pattern) for masked in inside.values())
    return _swapped_class(stock, frozenset(inside), stacked)


def mask_attribute(module: nn.Module, attr: str, masked: MaskedParameter, *, owner: bool) -> None:
    """Make reads of ``module.attr`` feed the leaf of ``masked``.

    Args:
        module: one that holds the weight.
        attr: under which name.
        masked: its state, shared by all owners of a tied weight.
        owner: whether this is the canonical owner, which registers the leaf.

    Raises:
        AttachError: the module's class cannot be replaced.
    """
    before = dict(masked_attributes(module))
    if before:
        check_class(module, masked.name)
    stock = _stock_class(type(module)) if before else type(module)
    if owner:
        module.register_parameter(leaf_attribute(attr), masked.leaf)
        masked.home = module, leaf_attribute(attr)
    module.__dict__[STATE_KEY] = {**before, attr: masked}
    try:
        module.__class__ = _class_for(module, stock, masked_attributes(module))
    except TypeError as bad:
        _put_back(module, attr, before, owner)
        raise AttachError(
            f"{masked.name!r} belongs to a {stock.__qualname__}, whose class cannot be extended "
            f"({bad}). Scripted and compiled-to-C modules cannot have masks; use the Python module."
        ) from None


def unmask_attribute(module: nn.Module, attr: str) -> None:
    """Undo `mask_attribute`: leaf gone, and the stock class back after the last one."""
    rest = {a: m for a, m in masked_attributes(module).items() if a != attr}
    owner = _owns_leaf(module, attr, masked_attributes(module)[attr])
    if isinstance(module, MaskedModule):  # else somebody gave it another class, which stays
        stock = _stock_class(type(module))
        module.__class__ = _class_for(module, stock, rest) if rest else stock
    _put_back(module, attr, rest, owner)


def _put_back(module: nn.Module, attr: str, rest: dict[str, MaskedParameter], owner: bool) -> None:
    if owner:
        del module._parameters[leaf_attribute(attr)]
    if rest:
        module.__dict__[STATE_KEY] = rest
    else:
        module.__dict__.pop(STATE_KEY, None)
        if isinstance(module, nn.RNNBase):
            names: Iterable[str] = module._flat_weights_names
            module._flat_weights = [getattr(module, name) for name in names]
