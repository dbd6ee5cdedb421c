"""`SparseFtModel`: the tuner that PEFT makes of a model and a `SparseFtConfig`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from sparseft._text import did_you_mean
from sparseft.errors import CompositionError, OptionError, UnknownNameError
from sparseft.modules.dequantise import keep_all_trainable
from sparseft.peft._shim import PREFIX
from sparseft.peft.config import SparseFtConfig
from sparseft.peft.extraction import adapter_of, heads_of
from sparseft.peft.layer import BASE, SparseFtLayer, layer_for
from sparseft.peft.merging import ATTRS
from sparseft.peft.planning import Plan, plan_layers

__all__ = ["SparseFtModel"]


# Arguments of a model's forward whose first dimension is the batch.
_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")


class SparseFtModel(BaseTuner):
    """A model whose layers have sparse adapters; `peft.get_peft_model` makes it.

    Args:
        model: changed in place.
        config: `SparseFtConfig`.
        adapter_name: of the first adapter.
    """

    prefix = PREFIX
    tuner_layer_cls = SparseFtLayer
    target_module_mapping: dict[str, Any] = {}

    _planned: Plan = {}
    _undo_repacking: tuple[Callable[[], None], ...] = ()

    # Making layers.

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        ready = (peft_config.masks, peft_config.adapter, peft_config.entries)
        if peft_config.target_modules is None and all(given is None for given in ready):
            peft_config.target_modules = "all-linear"
        return peft_config

    def _prepare_model(self, peft_config: SparseFtConfig, model: nn.Module) -> None:
        # Entries compete over all layers, so they are chosen before the first one is replaced.
        plan = plan_layers(peft_config, model)
        self._planned = plan
        peft_config._planned_modules = frozenset(plan)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        planned: frozenset[str] = getattr(peft_config, "_planned_modules", frozenset())
        if key in planned:
            return True
        found = BaseTuner._check_target_module_exists(peft_config, key)
        return False if found else found  # a target that got no entry; or excluded, which PEFT says

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Lay out an adapter in the model, and give it what its configuration starts from.

        Raises:
            OptionError: a name with a dot, which torch allows in no name of a parameter.
        """
        if "." in adapter_name:
            raise OptionError(
                f"adapter name {adapter_name!r} has a dot, which torch allows in no name of a "
                f"parameter; call it {adapter_name.replace('.', '_')!r}, say."
            )
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._planned = {}
        config = self.peft_config[adapter_name]
        self._keep_trainable()
        if config.adapter is not None:
            _fill_heads(model, adapter_name, config.adapter)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional: Any,
    ) -> None:
        parts = self._planned[current_key]
        if isinstance(target, SparseFtLayer):
            target.update_layer(adapter_name, parts)
            return
        layer = layer_for(target, current_key)
        layer.update_layer(adapter_name, parts)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Set the active adapters, as `BaseTuner` does; trainable unless ``inference_mode``."""
        super().set_adapter(*args, **kwargs)
        self._keep_trainable()

    def _keep_trainable(self) -> None:
        """Let bitsandbytes repack no layer for inference while there is something to train."""
        held = (layer.values_of(attr) for layer in self._layers() for attr in ATTRS)
        if any(values.requires_grad for table in held for values in table.values()):
            self._undo_repacking += tuple(keep_all_trainable(self.model))

    # Merging and unloading.

    def _layers(self) -> Iterator[SparseFtLayer]:
        return (m for m in self.model.modules() if isinstance(m, SparseFtLayer))

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for layer in self._layers():  # before the first is written: all or none
            why = layer.why_not_mergeable()
            if why is not None:
                raise CompositionError(why)

    def unload(self) -> nn.Module:
        """Return the base model, bit for bit; merged adapters are unmerged first."""
        for layer in self._layers():
            if layer.merged:
                layer.unmerge()
        for let_repack in self._undo_repacking:
            let_repack()
        self._undo_repacking = ()
        return super().unload()

    # Several adapters.

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        **options: Any,
    ) -> None:
        """Add an adapter composed of others.

        Args:
            adapters: names of loaded adapters.
            weights: coefficient of each.
            adapter_name: of the new one; inactive and frozen until it is set.
            combination_type: a method of `sparseft.composition`: ``"linear"``, ``"ties"``, ...
            options: of that method, e.g. ``density``.

        Raises:
            UnknownNameError: no such adapter, method or option.
            OptionError: other numbers of adapters and weights, or a name that is taken.
            CompositionError: heads that differ: they cannot be added up.
        """
        from sparseft.composition import compose_adapters

        if len(adapters) != len(weights):
            raise OptionError(
                f"{len(adapters)} adapters and {len(weights)} weights; give one weight each."
            )
        if adapter_name in self.peft_config:
            raise OptionError(f"adapter {adapter_name!r} exists already; take another name.")
        for name in adapters:
            if name not in self.peft_config:
                raise UnknownNameError(
                    f"no adapter {name!r}.{did_you_mean(name, self.peft_config)} "
                    f"There are: {', '.join(self.peft_config)}."
                )
        # One base by construction: no fingerprints are needed.
        parts = {n: adapter_of(self.model, n, name=n, fingerprint=False) for n in adapters}
        composed = compose_adapters(
            parts,
            dict(zip(adapters, weights, strict=True)),
            name=adapter_name,
            method=combination_type,
            check_base=False,
            **options,
        )
        first = self.peft_config[adapters[0]]
        config = SparseFtConfig(
            adapter=composed,
            modules_to_save=first.modules_to_save,
            task_type=first.task_type,
            base_model_name_or_path=first.base_model_name_or_path,
        )
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            raise
        config.adapter = None  # it lives in the layers now
        config._chosen_here = False  # and cannot be chosen again without it

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Tell the layers which rows of the batch are whose, for one forward or ``generate``."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_rows(names, [kwargs.get(key) for key in _INPUTS] + list(args[:1]))
        beams = kwargs.get("num_beams") or 1
        encoder = getattr(self.model, "get_encoder", lambda: None)() if beams > 1 else None
        inside = set() if encoder is None else set(encoder.modules())
        repeated = [name for name in names for _ in range(beams)]
        handles = []
        try:
            for module in self.modules():
                if isinstance(module, SparseFtLayer | AuxiliaryTrainingWrapper):
                    # An encoder runs before its batch is repeated for the beams.
                    own = list(names) if module in inside else repeated
                    hook = partial(_with_adapter_names, own)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_rows(self, names: Sequence[str], inputs: Sequence[Any]) -> None:
        first = next((x for x in inputs if isinstance(x, torch.Tensor) and x.ndim), None)
        if first is not None and first.shape[0] != len(names):
            raise CompositionError(
                f"adapter_names has {len(names)} names and the batch {first.shape[0]} rows; give "
                f"one name for each row, {BASE!r} for rows without an adapter."
            )
        if self.training:
            raise CompositionError(
                "adapter_names is for inference, and the model is in training mode; call "
                "model.eval(), or train one adapter at a time."
            )
        for name in set(names) - {BASE}:
            if name not in self.peft_config:
                raise UnknownNameError(
                    f"adapter_names: no adapter {name!r}.{did_you_mean(name, self.peft_config)} "
                    f"There are: {', '.join(self.peft_config)}, and {BASE!r} for none."
                )

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Positions: every rank has the same ones, which DDP need not send before each forward.

        Names as the wrapped `PeftModel` has them, through which DDP asks.
        """
        wanted = tuple(f".{name}." for name in SparseFtLayer.other_param_names)
        names = [name for name, _ in self.named_buffers() if any(part in name for part in wanted)]
        return [f"base_model.{name}" for name in names]


def _with_adapter_names(
    names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _fill_heads(model: nn.Module, adapter_name: str, adapter: Any) -> None:
    """Copy an adapter's dense tensors into the modules that PEFT trains whole."""
    heads = heads_of(model, adapter_name)
    for name, tensor in adapter.dense.items():
        if name not in heads:
            raise OptionError(
                f"adapter: it holds all of {name!r}, which is in no module of modules_to_save. "
                f"Add {name.rpartition('.')[0]!r} to modules_to_save."
            )
        with torch.no_grad():
            heads[name].copy_(tensor)
