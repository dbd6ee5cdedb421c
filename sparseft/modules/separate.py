"""Layers that add a sparse diff to what their untouched weight gives: ``y = W(x) + x @ S.T``.

A `Site` is a module with parameters that some adapter changes; its forward hook adds, row by row of
the batch, what the diffs in force would have changed. No weight is written and no class replaced,
so quantised and shared weights will do, and taking the hook off leaves the stock module.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseft.errors import CompositionError
from sparseft.modules.deltas import Applied, Group, Pass
from sparseft.modules.dequantise import is_opaque
from sparseft.modules.fused import FusedEmbedding, FusedLinear
from sparseft.modules.names import ParameterIndex, canonical_name
from sparseft.ops import RowGroups
from sparseft.ops.spmm import segment_spmm
from sparseft.ops.spmm_embedding import embedding_diff_at

__all__ = ["SeparateIndex", "Site", "is_opaque", "shape_of", "why_not_separate"]


def _is_linear_like(module: nn.Module) -> bool:
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return all(isinstance(size, int) for size in sizes)


def _conv1d() -> type | None:
    # Never imported by us: a model with Conv1D layers has imported it already.
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


class SeparateIndex(ParameterIndex):
    """The parameters of a model, and weights of quantised linear layers that are buffers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        for prefix, module in model.named_modules():
            weight = module._buffers.get("weight")
            if weight is None or not _is_linear_like(module) or not is_opaque(weight):
                continue
            full = f"{prefix}.weight" if prefix else "weight"
            name = canonical_name(full)
            if name not in self:
                self._parameters[name] = weight
                self._owners[name], self._aliases[name] = [(module, "weight")], []
                self._canonical[name] = self._canonical[full] = name


def shape_of(module: nn.Module, attr: str, weight: Tensor) -> tuple[int, ...]:
    """Return the shape that a diff of this parameter has, also where it is stored packed."""
    if attr == "weight" and is_opaque(weight) and _is_linear_like(module):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    return tuple(weight.shape)


def _kind(module: nn.Module) -> str | None:
    """Return which layer a module is for us, None for none."""
    conv1d = _conv1d()
    if conv1d is not None and isinstance(module, conv1d):
        return "conv1d"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.LayerNorm):
        return "layer_norm"
    return "linear" if isinstance(module, nn.Linear) or _is_linear_like(module) else None


# Forwards known to give the stock layer's output.
_STOCK = {
    "linear": (nn.Linear.forward, FusedLinear.forward),
    "embedding": (nn.Embedding.forward, FusedEmbedding.forward),
    "layer_norm": (nn.LayerNorm.forward,),
}


def why_not_separate(module: nn.Module, attr: str) -> str | None:
    """Return why a parameter cannot have a diff kept apart, as a clause; None where it can."""
    kind, cls = _kind(module), type(module)
    parameter = getattr(module, attr, None)
    if kind is None or attr not in ("weight", "bias"):
        return (
            f"it is the {attr!r} of a {cls.__qualname__}, and only Linear, Conv1D, Embedding and "
            "LayerNorm are known"
        )
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"it belongs to a {cls.__qualname__}, whose forward attention never calls"
    if attr == "bias" and isinstance(parameter, Tensor) and is_opaque(parameter):
        return "it is a quantised bias"
    if kind == "embedding" and getattr(module, "max_norm", None) is not None:
        return "it belongs to an Embedding with max_norm, which renormalises the table in place"
    if kind == "conv1d":
        return None
    if cls.forward in _STOCK[kind]:
        return None
    if kind == "linear" and is_opaque(module.weight):  # type: ignore[arg-type]
        return None
    if kind == "embedding" and isinstance(getattr(module, "embed_scale", None), float | Tensor):
        return None  # transformers' scaled embeddings: the stock output times embed_scale
    return (
        f"it belongs to a {cls.__qualname__} with a forward of its own, which may use it in "
        "another way than the stock layer"
    )


class Site:
    """A module whose output gets diffs added, and the names of its parameters.

    Args:
        module: a layer for which `why_not_separate` has nothing to say.
        names: attribute -> canonical parameter name, of those that adapters may change.
    """

    def __init__(self, module: nn.Module, names: Mapping[str, str]) -> None:
        self.module = module
        self.weight, self.bias = names.get("weight"), names.get("bias")
        self.kind = _kind(module)
        self.last: Applied | None = None  # in force when the module ran last, backward aside

    @property
    def name(self) -> str:
        return self.weight or self.bias or "?"

    def add(self, applied: Applied, x: Tensor, y: Tensor, under: Pass | None = None) -> Tensor:
        """Return what the layer gives under the compositions.

        Args:
            applied: they.
            x: the layer's input.
            y: what its stock forward made of it.
            under: the model's forward under way; None: the layer is called by itself.

        Raises:
            CompositionError: the input cannot be told apart by rows of the batch.
        """
        groups = applied.groups(self)
        if not groups:
            return y
        if not y.is_floating_point() or y.dtype.itemsize == 1:
            raise CompositionError(
                f"separate mode cannot run {self.name!r}: its layer gives {y.dtype}, to which "
                "nothing can be added. Leave that parameter out of the adapter, or load the model "
                "in bfloat16."
            )
        for group in groups:
            for delta in (group.weight, group.bias):
                if delta is not None:
                    delta.read()
        whole = not groups[0].rows
        if self.kind == "embedding":
            return self._add_embedding(applied, groups, whole, x, y, under)
        if self.kind == "layer_norm":
            return self._add_layer_norm(applied, groups, whole, x, y, under)
        return self._add_linear(applied, groups, whole, x, y, under)

    def _by_row(self, x: Tensor, applied: Applied, under: Pass | None) -> Tensor:
        """View (B, ..., N), or (B * k, N) with k positions of a row together, as (B, L, N)."""
        rows, batch = x.shape[0] if x.ndim > 1 else 0, applied.batch or 1
        wrong = rows == 0 or rows % batch > 0
        if x.ndim > 2:
            wrong |= not applied.takes(rows) and applied.takes(x.shape[1])
            if under is not None and applied.takes(rows):
                under.sizes.add(rows * x.shape[1])
        elif under is not None and not wrong:
            # Tokens picked for an expert, say, are a multiple of the batch by chance only.
            wrong = rows not in under.sizes and not applied.takes(rows)
        if wrong:
            raise CompositionError(
                f"{self.name!r}: its input has shape {tuple(x.shape)}, which is not {batch} rows "
                "(batch first), or a multiple of that flattened; rows(...) cannot tell which row "
                "an entry belongs to. Give rows() one composition per row of the batch, or "
                "run the rows apart with using()."
            )
        return x.reshape(batch, -1, x.shape[-1])

    def _add_linear(
        self,
        applied: Applied,
        groups: list[Group],
        whole: bool,
        x: Tensor,
        y: Tensor,
        under: Pass | None,
    ) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))  # as the layer itself takes it
        batch = applied.batch
        if whole or batch is None:
            shape = (1, -1)
            x3, y3 = x.reshape(*shape, x.shape[-1]), y.reshape(*shape, y.shape[-1])
        else:
            x3 = self._by_row(x, applied, under)
            y3 = y.reshape(*x3.shape[:2], y.shape[-1])
        sparse = [g for g in groups if g.weight is None or g.weight.replaced is None]
        if sparse:
            y3 = self._add_sparse(applied, sparse, whole, x3, y3)
        for group in groups:
            if group.weight is not None and group.weight.replaced is not None:
                rows = None if whole else applied.order((group.rows,), x.device)[1][0]
                y3 = self._replace(group, rows, x3, y3)
        return y3.view(y.shape)

    def _add_sparse(
        self, applied: Applied, groups: list[Group], whole: bool, x3: Tensor, y3: Tensor
    ) -> Tensor:
        transposed = self.kind == "conv1d"
        inner, outer = x3.shape[-1], y3.shape[-1]
        rows, cols = (inner, outer) if transposed else (outer, inner)
        no_indices, none = applied.nothing(x3.device)
        values = [none if g.weight is None else g.weight.now().to(x3.device) for g in groups]
        indices = [
            no_indices if g.weight is None else g.weight.indices.to(x3.device) for g in groups
        ]
        biases: list[Tensor] = []
        if any(g.bias is not None for g in groups):
            base = self.module.bias
            biases = [none if g.bias is None else g.bias.vector(base) for g in groups]  # type: ignore[arg-type]
        if whole:
            made = RowGroups.whole(1)
        else:
            made, _ = applied.order(tuple(g.rows for g in groups), x3.device)
        return segment_spmm(
            x3, y3, values, indices, biases, made.order, list(made.ends), rows, cols, transposed, ""
        )

    def _replace(self, group: Group, rows: Tensor | None, x3: Tensor, y3: Tensor) -> Tensor:
        """Compute the rows of a group with its own whole weight."""
        if group.weight is None or group.weight.replaced is None:
            return y3
        weight = group.weight.replaced.to(x3.device, y3.dtype)
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        if bias is not None and group.bias is not None:
            bias = (bias.detach() + group.bias.vector(bias)).to(bias.dtype)
        taken = x3 if rows is None else x3.index_select(0, rows)
        if self.kind == "conv1d":
            weight = weight.t()
        taken = taken.to(weight.dtype)
        part = F.linear(taken, weight, None if bias is None else bias.to(weight.dtype))
        return part if rows is None else y3.index_copy(0, rows, part.to(y3.dtype))

    def _add_embedding(
        self,
        applied: Applied,
        groups: list[Group],
        whole: bool,
        ids: Tensor,
        y: Tensor,
        under: Pass | None,
    ) -> Tensor:
        module: Any = self.module
        dim, batch = y.shape[-1], applied.batch
        if whole or batch is None:
            ids3, y3, shape = ids.reshape(1, -1), y.reshape(1, -1, dim), y.shape
        else:
            many = batch if applied.repeat == 1 else under and under.rows
            if ids.ndim > 1 and ids.shape[0] == 1 and many:
                # Positions shared by the rows: each row gets its own from here on.
                ids, y = ids.expand(many, *ids.shape[1:]), y.expand(many, *y.shape[1:])
            # (query, key) distances, not (batch, position) ids, whatever their numbers are
            distances = self.name.endswith("relative_attention_bias.weight")
            if ids.ndim < 2 or not applied.takes(ids.shape[0]) or distances:
                raise CompositionError(
                    f"{self.name!r}: it looks up ids of shape {tuple(ids.shape)}, which are not "
                    f"{batch} rows (batch first); rows(...) cannot tell which row an id belongs "
                    "to. Run the rows apart with using(), or leave this parameter out."
                )
            shape = y.shape
            ids3, y3 = ids.reshape(batch, -1), y.reshape(batch, -1, dim)
        scale = getattr(module, "embed_scale", None)
        sparse = [g.weight for g in groups if g.weight is not None and g.weight.replaced is None]
        if sparse:
            values = [d.now().to(y.device) for d in sparse]
            if scale is not None:
                values = [v * scale for v in values]
            made = RowGroups.whole(1)
            if not whole:
                kept = tuple(g.rows for g in groups if g.weight in sparse)
                made, _ = applied.order(kept, y.device)
            padding = -1 if module.padding_idx is None else module.padding_idx
            y3 = embedding_diff_at(
                y3, ids3, values, [d.indices.to(y.device) for d in sparse], made.order,
                list(made.ends), module.weight.shape[0], padding, module.scale_grad_by_freq, "",
            )  # fmt: skip
        for group in groups:
            if group.weight is not None and group.weight.replaced is not None:
                rows = None if whole else applied.order((group.rows,), y.device)[1][0]
                table = group.weight.replaced.to(y.device, y.dtype)
                part = F.embedding(ids3 if rows is None else ids3[rows], table, module.padding_idx)
                part = part if scale is None else part * scale
                y3 = part if rows is None else y3.index_copy(0, rows, part.to(y3.dtype))
        return y3.view(shape)

    def _add_layer_norm(
        self,
        applied: Applied,
        groups: list[Group],
        whole: bool,
        x: Tensor,
        y: Tensor,
        under: Pass | None,
    ) -> Tensor:
        module: Any = self.module
        wide = torch.promote_types(y.dtype, torch.float32)
        normal = F.layer_norm(x.to(wide), module.normalized_shape, None, None, module.eps)
        width = normal.shape[-1]
        if len(module.normalized_shape) > 1:
            raise CompositionError(f"{self.name!r}: a LayerNorm over several dimensions")
        out = y.to(wide)
        batch = applied.batch
        if not (whole or batch is None):
            normal = self._by_row(normal, applied, under)
            out = out.reshape(normal.shape)
        for attr, factor in (("weight", normal), ("bias", None)):
            deltas = [getattr(g, attr) for g in groups]
            if all(d is None for d in deltas):
                continue
            base = getattr(module, attr)
            zeros = torch.zeros(width, dtype=wide, device=y.device)
            table = [zeros if d is None else d.vector(base).to(wide) for d in deltas]
            if whole or batch is None:
                change = table[0]
            else:
                places = applied.group_of(tuple(g.rows for g in groups), y.device)
                change = torch.stack([*table, zeros])[places][:, None]
            out = out + (change if factor is None else factor * change)
        return out.to(y.dtype).view(y.shape)
