"""A small model with a tied weight, adapters for it, and a way to compare every bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparseft import Composer, SeparateComposer
from sparseft.adapter import Adapter, AdapterMetadata
from sparseft.diff import SparseDiff, SparsePattern
from sparseft.modules import ParameterIndex, fingerprint_model


class Net(nn.Module):
    """An encoder with a tied language-model head and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight
        self.classifier = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


DIFFED = ("embed.weight", "body.0.weight", "body.0.bias", "body.1.weight", "body.2.weight")


@pytest.fixture
def make_model() -> Callable[..., Net]:
    def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
        torch.manual_seed(seed)
        model = Net()
        with torch.no_grad():
            model.body[0].bias[0] = -0.0  # a sign that an addition of 0.0 would change
        return model.to(dtype)

    return make


@pytest.fixture
def make_adapter() -> Callable[..., Adapter]:
    def make(
        model: nn.Module,
        seed: int,
        *,
        name: str | None = None,
        mode: str = "add",
        density: float = 0.4,
        names: tuple[str, ...] = DIFFED,
        dense: bool = False,
        fingerprint: bool = True,
        dtype: torch.dtype = torch.float32,
        scale: float = 0.1,
    ) -> Adapter:
        generator = torch.Generator().manual_seed(1000 + seed)
        index = ParameterIndex(model)
        diffs = {}
        for parameter_name in names:
            shape = index.get(parameter_name).shape
            mask = torch.rand(shape, generator=generator) < density
            values = torch.randn(int(mask.sum()), generator=generator).to(dtype) * scale
            diffs[parameter_name] = SparseDiff.from_pattern(
                SparsePattern.from_mask(mask), values, mode
            )
        heads = {}
        if dense:
            for head in ("classifier.weight", "classifier.bias"):
                heads[head] = torch.randn(index.get(head).shape, generator=generator)
        metadata = AdapterMetadata(
            base_name="net", fingerprint=fingerprint_model(model, names) if fingerprint else None
        )
        return Adapter(diffs, name=name or f"a{seed}", dense=heads, metadata=metadata)

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def composer(model, make_adapter):
    return Composer(model, {n: make_adapter(model, i) for i, n in enumerate(("sw", "qu", "nli"))})


# What separate mode works on.

SEPARATE = (*DIFFED[:4], "body.1.bias", "body.2.weight", "head.bias")


@pytest.fixture
def adapters(model, make_adapter):
    return {n: make_adapter(model, i, names=SEPARATE) for i, n in enumerate(("sw", "qu", "nli"))}


@pytest.fixture
def separate(model, adapters):
    with SeparateComposer(model, adapters) as handle:
        yield handle


@pytest.fixture
def untouched(model, snapshot, same):
    """After the test: no parameter has another bit, or was written to at all."""
    before, versions = snapshot(model), [p._version for p in model.parameters()]
    yield
    assert same(snapshot(model), before)
    assert [p._version for p in model.parameters()] == versions


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().clone()
    return flat.view(_BITS[flat.element_size()])


@pytest.fixture
def snapshot() -> Callable[[nn.Module], dict[str, Tensor]]:
    """Every parameter's bits."""

    def take(model: nn.Module) -> dict[str, Tensor]:
        return {name: bits(p) for name, p in model.named_parameters()}

    return take


@pytest.fixture
def same() -> Callable[[dict[str, Tensor], dict[str, Tensor]], bool]:
    def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)

    return equal


@pytest.fixture
def naive() -> Callable[..., dict[str, Tensor]]:
    """The definition, densely: base + sum in canonical order in fp32, rounded once."""

    def compose(
        model: nn.Module, adapters: list[Adapter], coeffs: list[float]
    ) -> dict[str, Tensor]:
        index = ParameterIndex(model)
        pairs = sorted(
            zip(adapters, coeffs, strict=True), key=lambda pair: (pair[0].name, pair[0].digest)
        )
        out = {}
        for name in index.names:
            weight = index.get(name).detach()
            total = torch.zeros(weight.shape)
            touched = torch.zeros(weight.shape, dtype=torch.bool)
            for adapter, coeff in pairs:
                if name in adapter.diffs and coeff:
                    diff = adapter.diffs[name]
                    here = diff.pattern.to_mask()
                    product = diff.to_dense().float() * torch.tensor(coeff, dtype=torch.float32)
                    # A first addend is taken as it is, sign of zero included.
                    total = torch.where(here, torch.where(touched, total + product, product), total)
                    touched |= here
            result = (weight.float() + total).to(weight.dtype)
            out[name] = bits(torch.where(touched, result, weight))
        return out

    return compose
