"""`SeparateComposer`: adapters beside a model whose weights nobody writes, per batch or per row."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.adapter import Adapter
from sparseft.composition.coefficients import Coeffs, Which, as_coeffs
from sparseft.composition.fit import Dense, Loaded, Missing
from sparseft.composition.registry import recipe_of
from sparseft.composition.separate_hooks import Hook, encoder_of
from sparseft.composition.separate_sums import Blender
from sparseft.errors import CompositionError
from sparseft.modules.deltas import Applied, Pass
from sparseft.modules.separate import Site

__all__ = ["SeparateComposer"]

logger = logging.getLogger(__name__)

# What is in force in this context (thread or task), by handle. One variable for all handles: those
# made outside of a module's top level are never freed.
_local: ContextVar[Mapping[int, Applied]] = ContextVar("sparseft_separate", default={})  # noqa: B039


_pass: ContextVar[Pass | None] = ContextVar("sparseft_separate_pass", default=None)

RowSpec = Which | None
# Where a model's forward has its batch, looked for in this order among keyword arguments.
_BATCH_KEYS = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features")


class SeparateComposer:
    """Runs a model under adapters without touching a weight: ``y = W(x) + x @ S.T`` in each layer.

    For a base that is quantised, shared by several users, or mapped read-only; and for batches
    whose rows want different adapters. The same adapters, coefficients and methods as `Composer`.

    Args:
        model: any module; its parameters are only read. Diffs may belong to Linear (floating, or
            quantised: anything with in_features and out_features), transformers' Conv1D, Embedding
            and LayerNorm; other parameters are refused by name before anything runs. Each layer
            must be called, not read (``F.linear(x, layer.weight)`` sees no diff; a warning names
            parameters whose layers were not called).
        adapters: name -> adapter, or path of one; more with `add`.
        check_base, dense, missing: as in `Composer`.
        cache: how many compositions keep their sums (8 bytes an entry, and 4 more once it ran; 12
            after a backward).

    Example:
        >>> import torch
        >>> from sparseft import Adapter, SeparateComposer, SparseDiff
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> change = SparseDiff.from_dense(torch.tensor([[0.0, 2.0]]))
        >>> separate = SeparateComposer(layer, {"a": Adapter({"weight": change})})
        >>> x = torch.ones(3, 2)
        >>> with separate.rows(["a", None, {"a": 0.5}]):
        ...     moved = layer(x) - x @ layer.weight.T
        >>> moved.round().tolist()
        [[2.0], [0.0], [1.0]]

    `using` and `rows` hold for the context they are entered in (thread, or asyncio task), so that
    threads that serve different requests do not disturb each other; `switch` holds wherever neither
    is. Two handles on one model add up.

    Diffs of mode "set" are put into the base as it is when a block is entered, or at `switch`. An
    adapter's values are taken to stay as they are (those that require grad aside): what is kept
    goes by its digest, which is computed once. Another `Adapter` under the same name is noticed.

    A copy of the model, and a saved one (``copy.deepcopy``, ``torch.save``), is the stock model;
    the handle itself cannot be copied.

    Checkpointed layers run again in backward, which must see the same compositions: call
    ``backward()`` inside the block (or use `switch`); outside it is refused.

    Under ``torch.compile`` every changed layer breaks the graph; ``fullgraph=True`` is refused by
    torch at the first of them. Code that was compiled before a layer is changed for the first time
    is compiled again (``torch.compiler.reset()``).

    Numerics: diffs are summed in fp32 and added in fp32 to the layer's rounded output, with one
    rounding more: close to merged weights, not equal, except in Embeddings, which have their bits.
    A row has the bits it has when the whole batch runs under its composition; where an adapter
    replaces a weight whole, or on a GPU, where tiles follow group sizes, it is close.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, Adapter | str | os.PathLike[str]] | None = None,
        *,
        check_base: bool = True,
        dense: Dense = "auto",
        missing: Missing = "auto",
        cache: int = 16,
    ) -> None:
        self.model = model
        self._blender = Blender(
            model, cache=cache, missing=missing, dense=dense, check_base=check_base
        )
        self._loaded = self._blender.loaded
        self._sites: dict[int, tuple[Site, Any]] = {}  # id of the module -> site, hook
        self._default: Applied | None = None
        self._default_coeffs: dict[str, float] = {}
        self._open: list[Applied] = []
        self._lock = threading.RLock()
        self._warned: set[str] = set()
        self._closed = False
        encoder = encoder_of(model)
        self._entries = [model] if encoder is None else [model, encoder]
        self._root = []
        for module in self._entries:
            before, after = Hook(self._before_model), Hook(self._after_model)
            self._root += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after, always_call=True),
            ]
        for name, adapter in (adapters or {}).items():
            self.add(name, adapter)

    # The adapters.

    def add(self, name: str, adapter: Adapter | str | os.PathLike[str]) -> None:
        """Add an adapter, or the path of one, under a new name; errors as in `Composer.add`.

        Its digest is computed once: after a change of values in place, `remove` it and add a new
        `Adapter`.
        """
        with self._lock:
            self._check_open()
            self._loaded[name] = Loaded.opened(name, adapter, self._loaded)

    def remove(self, name: str) -> None:
        """Forget an adapter; blocks that are open keep what they have.

        Raises:
            UnknownNameError: there is none of that name.
        """
        with self._lock:
            as_coeffs(name, None, self._loaded)
            self._blender.forget(name)

    def names(self) -> list[str]:
        """Return the names of the adapters, in the order they were added."""
        return list(self._loaded)

    def __getitem__(self, name: str) -> Adapter:
        as_coeffs(name, None, self._loaded)
        return self._loaded[name].adapter

    @property
    def skipped(self) -> dict[str, tuple[str, ...]]:
        """Adapter -> its tensors that were left out because the model has no place for them."""
        return {name: fit.skipped for name, fit in self._blender.fits.items() if fit.skipped}

    # The compositions.

    def switch(
        self, which: Which, coeffs: Coeffs = None, *, method: str = "linear", **options: Any
    ) -> None:
        """Run under exactly these adapters from now on, in every thread, outside of blocks.

        Arguments and errors as in `Composer.switch`; ``switch([])`` is `revert`.
        """
        chosen = as_coeffs(which, coeffs, self._loaded)
        self._default = self._apply([chosen], None, method, options)
        self._default_coeffs = chosen

    def revert(self) -> None:
        """Take back `switch`: the base alone, outside of blocks."""
        self._default, self._default_coeffs = None, {}

    @property
    def active(self) -> dict[str, float]:
        """Name -> coefficient of what `switch` set."""
        return dict(self._default_coeffs)

    @contextmanager
    def using(
        self, which: Which, coeffs: Coeffs = None, *, method: str = "linear", **options: Any
    ) -> Iterator[SeparateComposer]:
        """Run under these adapters for the length of a ``with`` block, in this thread or task.

        Blocks nest, the innermost holds; arguments and errors as in `Composer.switch`.
        """
        chosen = as_coeffs(which, coeffs, self._loaded)
        with self._entered(self._apply([chosen], None, method, options)):
            yield self

    @contextmanager
    def rows(
        self, rows: Sequence[RowSpec], *, method: str = "linear", repeat: int = 1, **options: Any
    ) -> Iterator[SeparateComposer]:
        """Run each row of the batch under its own adapters for the length of a ``with`` block.

        Args:
            rows: per row of the batch (dim 0 of the model's inputs): a name, names, a mapping of
                name to coefficient, or None (or nothing) for the base.
            method: a registered composition method, for all rows, with its ``options``.
            repeat: batch rows that each entry stands for, one after another: beams, or sequences
                returned per prompt, as ``generate`` repeats them. A layer may also have one row per
                entry, as the encoder has when ``generate`` repeats the decoder's rows alone.

        Raises:
            CompositionError: no rows; later, from the model: a batch of another number of rows, a
                layer whose input cannot be told apart by rows.
            UnknownNameError, BaseMismatchError: as in `Composer.switch`.
        """
        if isinstance(rows, str) or not isinstance(rows, Sequence) or not rows:
            raise CompositionError(
                f"rows is {rows!r}; wanted a list with one composition per row of the batch. One "
                "for all rows is using(...)."
            )
        if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
            raise CompositionError(
                f"repeat={repeat!r}; wanted how many rows of the batch each entry of rows stands "
                "for, an integer from 1 (num_beams or num_return_sequences)."
            )
        chosen = [as_coeffs([] if row is None else row, None, self._loaded) for row in rows]
        distinct = list({tuple(sorted(c.items())): c for c in chosen}.values())
        row_of = [distinct.index(c) for c in chosen]
        with self._entered(self._apply(distinct, row_of, method, options, repeat)):
            yield self

    @contextmanager
    def _entered(self, applied: Applied) -> Iterator[None]:
        token = _local.set({**_local.get(), id(self): applied})
        self._open.append(applied)
        try:
            yield
        finally:
            self._open.remove(applied)
            _local.reset(token)

    def close(self) -> None:
        """Take the hooks off; the model is what it was. The handle cannot be used afterwards."""
        with self._lock:
            for hook in [*self._root, *(hook for _, hook in self._sites.values())]:
                hook.remove()
            self._sites.clear()
            self._default, self._default_coeffs, self._closed = None, {}, True

    def __enter__(self) -> SeparateComposer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise CompositionError("this SeparateComposer is closed; make a new one.")

    def __reduce__(self) -> Any:
        raise CompositionError(
            "a SeparateComposer cannot be copied or pickled: it belongs to one model in one "
            "process. Copy or save the model (that leaves the diffs out) and the adapters "
            "(handle[name]), and make a new SeparateComposer(model, adapters) there."
        )

    def __repr__(self) -> str:
        return f"SeparateComposer(adapters={self.names()}, active={self.active})"

    # How: what is in force where.

    def _in_force(self, site: Site) -> Applied | None:
        mine = _local.get().get(id(self))
        if torch._C._current_graph_task_id() == -1:
            site.last = found = mine or self._default
            return found
        # In backward: a checkpointed layer runs again, on CUDA in a thread without our context.
        if mine is not None:
            return mine
        opened = set(self._open)
        if len(opened) > 1:
            raise CompositionError(
                f"{site.name!r} runs again in backward (checkpointing) while {len(opened)} blocks "
                "are open in several threads, so it cannot know its composition. Use switch(...)."
            )
        found = opened.pop() if opened else self._default
        if found is not site.last:
            raise CompositionError(
                f"{site.name!r} runs again in backward (checkpointing), but outside of the "
                "using(...) or rows(...) block of its forward. Call backward() inside the block, "
                "or use switch(...)."
            )
        return found

    def _hook(self, site: Site) -> Callable[..., Tensor | None]:
        def add(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            if module is not site.module:
                _refuse_replica(module, site)  # a deep copy of the model is a stock model
                return None
            applied = self._in_force(site)
            if applied is None:
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            now = _pass.get()
            if now is None:
                return site.add(applied, x, output)
            now.seen.add(id(site))
            return site.add(applied, x, output, now)

        return Hook(add)

    def _before_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        applied = _local.get().get(id(self)) or self._default
        if applied is None or all(module is not entry for entry in self._entries):
            return
        if module is not self.model and _pass.get() is not None:
            return  # the encoder within the model's forward
        _pass.set(None)
        rows, sizes = None, set[int]()
        named = [kwargs[key] for key in _BATCH_KEYS if kwargs.get(key) is not None]
        for value in (*args, *named, *kwargs.values()):
            if isinstance(value, Tensor) and value.ndim:
                rows = value.shape[0]
                if not applied.takes(rows):
                    each = f" (repeat={applied.repeat})" if applied.repeat > 1 else ""
                    raise CompositionError(
                        f"rows(...) was given {applied.batch} compositions{each} for a batch of "
                        f"{rows} rows (input of shape {tuple(value.shape)}); give one per row."
                    )
                sizes.update(rows * length for length in value.shape[1:2])
                break
        _pass.set(Pass(module, rows, set(), sizes))

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        applied, now = _local.get().get(id(self)) or self._default, _pass.get()
        if applied is None or now is None or module is not now.entry:
            return
        _pass.set(None)
        if output is None or module is not self.model:  # None: an exception is under way
            return
        sites = [site for site, _ in self._sites.values() if id(site) in now.seen]
        ran = {name for site in sites for name in (site.weight, site.bias)}
        silent = [n for n in applied.names if n not in ran and n not in self._warned]
        if silent:
            self._warned.update(silent)
            logger.warning(
                "separate mode: the layers of %d parameters with diffs were not called (%s%s); if "
                "the model reads those weights in another way, their diffs had no effect",
                len(silent), ", ".join(silent[:3]), ", ..." if len(silent) > 3 else "",
            )  # fmt: skip

    def _apply(
        self,
        chosen: Sequence[dict[str, float]],
        row_of: Sequence[int] | None,
        method: str,
        options: dict[str, Any],
        repeat: int = 1,
    ) -> Applied:
        """Check everything and prepare what is to be in force; the model is only read."""
        recipe = recipe_of(method, options)
        # What is made here is kept: a training step may follow an inference step.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._check_open()
            for coeffs in chosen:  # another thread may have removed one
                as_coeffs(coeffs, None, self._loaded)
            if self._blender.refresh():
                for _, hook in self._sites.values():
                    hook.remove()
                self._sites.clear()
            how = (method, repr(sorted(options.items())))
            blends = [self._blender.blend(coeffs, recipe, how) for coeffs in chosen]
            applied = Applied(blends, row_of, repeat)
            held = [applied, *self._open, *([self._default] if self._default else [])]
            self._place(sorted({name for each in held for name in each.names}))
        return applied

    # How: the places.

    def _place(self, names: Sequence[str]) -> None:
        """Hook every layer that holds one of the parameters."""
        index = self._blender.index
        places = [module for name in names for module in self._blender.places(name)]
        new = [module for module in places if id(module) not in self._sites]
        if not new:
            return
        held: dict[int, dict[str, str]] = {id(module): {} for module in new}
        for name in index.names:
            for module, attr in index.owners(name):
                if id(module) in held:
                    held[id(module)][attr] = name
        for module in new:
            if id(module) in self._sites:
                continue  # listed for its weight and its bias
            site = Site(module, held[id(module)])
            # First: what others hook on the layer's output sees the diffs.
            hook = module.register_forward_hook(self._hook(site), prepend=True, with_kwargs=True)
            self._sites[id(module)] = (site, hook)
        if "torch._dynamo" in sys.modules:
            # Compiled code does not look whether its modules have new hooks.
            torch.compiler.reset()


def _refuse_replica(module: nn.Module, site: Site) -> None:
    if getattr(module, "_is_replica", False):
        raise CompositionError(
            f"{site.name!r} runs in a replica of nn.DataParallel, where separate mode has no "
            "effect. Use DistributedDataParallel, or one process per device."
        )
