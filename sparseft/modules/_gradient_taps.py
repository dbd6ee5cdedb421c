"""Give the gradients of chosen weights to their sums while a model runs forward and backward.

Layers with a fused backward (Linear, Embedding, Conv1D) never form dW: for the time of the taps
their class runs the stock forward without the weight's gradient, and hands dY and X over in
backward. Every other read of a weight makes one dense gradient, which is handed over and dropped.
Classes are put in as `sparseft.modules.class_swap` does it, and on top of it where masks are
attached.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparseft.diff import SparsePattern
from sparseft.errors import AttachError
from sparseft.modules._gradient_sums import TensorSums
from sparseft.modules._gradient_tiles import DenseGradient, EmbeddingGradient, LinearGradient
from sparseft.modules.class_swap import masked_attributes
from sparseft.modules.dense_view import DenseView
from sparseft.modules.experts import StackedWeight
from sparseft.modules.fused import FusedEmbedding, FusedLinear, fused_class
from sparseft.modules.leaves import MaskedParameter, masked_by_weight
from sparseft.modules.names import ParameterIndex
from sparseft.modules.taps import (
    _autocast_input,
    alias_at_mask,
    conv1d_at_mask,
    embedding_at_mask,
    linear_at_mask,
)
from sparseft.modules.weight_storage import is_sharded
from sparseft.ops._common import rows_of

__all__ = ["put_taps"]

_TAPS = "_sparseft_taps"  # class attribute: attribute name -> Tap


class _Watch(torch.autograd.Function):
    """A layer's output as it is; backward shows its gradient and the layer's input to a tap.

    The input is saved through autograd, so that checkpointing frees and remakes it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        operand: Tensor,
        take: Callable[[Tensor, Tensor], None],
        anchor: Tensor | None = None,  # requires grad, where neither of the others may
    ) -> Tensor:
        ctx.save_for_backward(operand)
        ctx.take = take
        # No view to autograd, or what follows could not work in place (nn.ReLU(inplace=True)).
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (operand,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.take(grad_output.detach(), operand.detach())
        return grad_output, None, None, None


class Tap:
    """One weight's way to its sums.

    Args:
        sums: where gradients go.
        weight: the parameter.

    Attributes:
        sharded: whether `fully_shard` has cut it; its modules then show a whole one in forward.
        trains: whether a mask on it is in training now: its leaf then gets its gradient as ever.
    """

    def __init__(self, sums: TensorSums, weight: nn.Parameter) -> None:
        self.sums, self.weight = sums, weight
        self.sharded = is_sharded(weight)
        masked = masked_by_weight(weight)
        self.trains = masked is not None and masked.leaf.requires_grad
        if masked is None or not self.trains:
            # A mask without entries: the fused layers make dX, and nothing for the weight.
            masked = cast(
                MaskedParameter,
                types.SimpleNamespace(
                    name=sums.name,
                    leaf=torch.zeros(0, device=weight.device, requires_grad=True),
                    pattern=SparsePattern.from_indices(
                        torch.empty(0, dtype=torch.int64, device=weight.device), weight.shape
                    ),
                    backend=None,
                ),
            )
        self.masked = masked
        self._accumulate: Any = None

    # -- layers ---

    def shown(self, module: nn.Module) -> Tensor:
        """Return the weight that a forward of the module computes with, detached."""
        weight = module._parameters["weight"] if self.sharded else self.weight
        return cast(Tensor, weight).detach()

    def linear(self, x: Tensor, module: nn.Module, *, transposed: bool) -> Tensor:
        x = _autocast_input(x)
        apply = conv1d_at_mask if transposed else linear_at_mask
        y = apply(x, self.shown(module), cast(Any, module).bias, self.masked)
        self.sums.used()

        def take(grad: Tensor, x: Tensor) -> None:
            gradient = LinearGradient.of_layer(
                rows_of(grad), rows_of(x), transposed=transposed, wide=self.sums.wide
            )
            self.sums.arrived(gradient, layer=True, more=self._read_elsewhere())

        return _Watch.apply(y, x, take)

    def embedding(self, ids: Tensor, module: nn.Embedding) -> Tensor:
        options = (module.padding_idx, module.scale_grad_by_freq)
        y = embedding_at_mask(
            ids,
            self.shown(module),
            self.masked,
            padding_idx=options[0],
            scale_grad_by_freq=options[1],
        )
        self.sums.used()

        def take(grad: Tensor, ids: Tensor) -> None:
            gradient = EmbeddingGradient(
                rows_of(grad),
                ids.reshape(-1),
                self.weight.shape[0],
                padding_idx=options[0],
                by_frequency=options[1],
                wide=self.sums.wide,
            )
            self.sums.arrived(gradient, layer=True, more=self._read_elsewhere())

        return _Watch.apply(y, ids, take)

    # -- reads in any other way ---

    def read(self, value: Any) -> Any:
        """Watch an alias through which a mask in training reads its weight."""
        if isinstance(value, Tensor) and value is not self.weight and value.requires_grad:
            if isinstance(value, StackedWeight):
                value = value.as_subclass(Tensor)  # all its gradient comes here, dense
            self.sums.used()

            def take(grad: Tensor) -> None:
                with torch.no_grad():
                    self.sums.arrived(DenseGradient(grad, self.sums.wide), layer=True)

            value.register_hook(take)
        return value

    def read_shown(self, shown: Tensor) -> Any:
        """Watch an alias of a sharded weight that no mask trains. Its own gradient would be made
        for the whole copy, which comes and goes, and be cut and kept by FSDP2.
        """
        # FSDP2 itself reads the cut one, and would take an alias for a parameter put there since.
        if not torch.is_grad_enabled() or is_sharded(shown):
            return shown
        return self.read(alias_at_mask(shown, self.masked))

    def watch_parameter(self, undo: ExitStack) -> None:
        """Take the parameter's own dense gradient, made where it is read around its layer."""
        weight = self.weight
        undo.callback(_put_back, weight, weight.requires_grad, weight.grad)
        weight.grad = None
        weight.requires_grad_(True)
        with torch.enable_grad():
            node = weight.view_as(weight).grad_fn
        self._accumulate = None if node is None else node.next_functions[0][0]
        undo.callback(setattr, self, "_accumulate", None)

        def take(parameter: Tensor) -> None:
            grad, parameter.grad = parameter.grad, None
            if grad is not None:
                with torch.no_grad():
                    self.sums.arrived(DenseGradient(grad, self.sums.wide), layer=False)

        undo.callback(weight.register_post_accumulate_grad_hook(take).remove)

    def _read_elsewhere(self) -> bool:
        """Whether this backward also comes to the parameter's own gradient."""
        return self._accumulate is not None and torch._C._will_engine_execute_node(self._accumulate)


def _put_back(weight: nn.Parameter, requires_grad: bool, grad: Tensor | None) -> None:
    weight.grad = None
    weight.requires_grad_(requires_grad)
    weight.grad = grad


def _tap_of(module: nn.Module) -> Tap:
    return type(module).__dict__[_TAPS]["weight"]


class _TappedLinear(FusedLinear):
    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return nn.Linear.forward(self, input)
        return _tap_of(self).linear(input, self, transposed=False)


class _TappedEmbedding(FusedEmbedding):
    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return nn.Embedding.forward(self, input)
        return _tap_of(self).embedding(input, self)


def _tapped_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """Return the layer that stands just before the fused one, None where there is none."""
    fused = fused_class(cls)
    if fused is None or fused is FusedLinear:
        return None if fused is None else _TappedLinear
    if fused is FusedEmbedding:
        return _TappedEmbedding
    stock = cast(Any, fused.__base__)  # transformers' Conv1D

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return stock.forward(self, x)
        return _tap_of(self).linear(x, self, transposed=True)

    return type("_TappedConv1D", (fused,), {"forward": forward})


def _property(cls: type, attr: str, tap: Tap) -> property:
    swapped = cast(property, getattr(cls, attr))  # what `attach` put there

    def read(self: nn.Module) -> Any:
        return tap.read(swapped.__get__(self, cls))

    return property(read)


def _sharded_property(attr: str, tap: Tap) -> property:
    def read(self: nn.Module) -> Any:
        return tap.read_shown(cast(Tensor, self._parameters[attr]))

    return property(read)


def _new_instance(cls: type[nn.Module], *arguments: Any) -> nn.Module:
    return cls.__new__(cls, *arguments)


def _put_class(module: nn.Module, taps: dict[str, Tap], undo: ExitStack) -> None:
    """Give one module a class of its own with taps, if one of its attributes needs it."""
    cls = type(module)
    masked = masked_attributes(module)
    layer = _tapped_class(cls) if "weight" in taps else None
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        layer = None  # its forward rescales the table: left to the stock one
    body: dict[str, Any] = {
        attr: _property(cls, attr, tap)
        for attr, tap in taps.items()
        if tap.trains and attr in masked
    }
    body |= {
        attr: _sharded_property(attr, tap)
        for attr, tap in taps.items()
        if tap.sharded and not tap.trains
    }
    if layer is None and not body:
        return

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # A copy has no taps; and pickle wants another maker than its own for another class.
        reduced: Any = cls.__reduce_ex__(cast(Any, self), max(int(protocol), 2))
        make, arguments, *rest = reduced
        if arguments[0] is not tapped:
            return reduced
        return _new_instance, (cls, *arguments[1:]), *rest

    body |= {
        _TAPS: taps,
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    if masked:
        body["_sparseft_stock"] = cls.__dict__["_sparseft_stock"]
    bases = (cls,) if layer is None else (layer,) if issubclass(layer, cls) else (cls, layer)
    tapped = types.new_class(cls.__name__, bases, exec_body=lambda space: space.update(body))
    try:
        module.__class__ = tapped
    except TypeError:
        return  # compiled to C: its reads make a dense gradient

    def restore() -> None:
        if type(module) is not tapped:
            raise AttachError(
                f"masks were attached to or detached from a {cls.__qualname__} inside a "
                "GradientScores block; do that before or after it."
            )
        module.__class__ = cls

    undo.callback(restore)


def _watch_quantised(module: nn.Module, sums: TensorSums, undo: ExitStack) -> None:
    """Watch what goes into and comes out of a linear layer whose weight is quantised.

    The stock forward runs; a hook shows its input and its output's gradient to the sums.
    """
    anchor = torch.zeros(0, requires_grad=True)

    def take(grad: Tensor, x: Tensor) -> None:
        gradient = LinearGradient.of_layer(
            rows_of(grad), rows_of(x), transposed=False, wide=sums.wide
        )
        sums.arrived(gradient, layer=True, more=False)

    def watch(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        sums.used()
        return cast(Tensor, _Watch.apply(output, _autocast_input(x), take, anchor))

    undo.callback(module.register_forward_hook(watch, with_kwargs=True).remove)


def put_taps(index: ParameterIndex, sums: Iterable[TensorSums], undo: ExitStack) -> None:
    """Tap every weight that has sums.

    Args:
        index: of the model.
        sums: by canonical name.
        undo: gets what takes the taps out again.
    """
    by_module: dict[nn.Module, dict[str, Tap]] = {}
    for one in sums:
        if isinstance(one.weight, DenseView):
            for module, _ in index.owners(one.name):
                _watch_quantised(module, one, undo)
            continue
        tap = Tap(one, index.get(one.name))
        for module, attr in index.owners(one.name):
            by_module.setdefault(module, {})[attr] = tap
        if not (tap.trains or tap.sharded):
            tap.watch_parameter(undo)
    for module, taps in by_module.items():
        _put_class(module, taps, undo)
