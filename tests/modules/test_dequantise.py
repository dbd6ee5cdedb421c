"""Which weights are quantised, their shape and dense value, and what recognises them."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from sparseft.errors import AttachError
from sparseft.fingerprint import compare, fingerprint_tensor
from sparseft.modules.dequantise import (
    dequantise,
    is_quantised,
    keep_trainable,
    let_repack,
    logical_shape,
    scheme_of,
    stored_tensors,
)
from sparseft.modules.quantised_base import fingerprint_quantised

_spec = importlib.util.spec_from_file_location(
    "_quantised", Path(__file__).parent.parent / "_quantised.py"
)
q = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(q)

schemes = pytest.mark.parametrize("scheme", q.SCHEMES)


@schemes
def test_the_dense_value_is_what_the_layer_multiplies_by(scheme):
    layer = q.net(scheme)[0].train()
    before = {k: t.clone() for k, t in stored_tensors(layer).items()}
    dense = dequantise(layer)
    assert logical_shape(layer) == tuple(dense.shape) == (128, 64)
    assert dense.dtype == torch.float32
    assert is_quantised(layer)
    with torch.no_grad():
        product = (layer(torch.eye(64)) - layer.bias).t()
    assert (product - dense).abs().max() <= 4 * torch.finfo(torch.float32).eps * dense.abs().max()
    # 8-bit scales are elsewhere after a forward.
    assert torch.equal(dequantise(layer), dense)
    assert torch.equal(dequantise(layer, dtype=torch.bfloat16), dense.bfloat16())
    after = stored_tensors(layer)
    assert all(torch.equal(t, after[k]) for k, t in before.items())


@q.needs("bitsandbytes")
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=["uint8", "bf16"])
def test_codes_stored_in_another_dtype_are_the_same_base(storage):
    from bitsandbytes.nn import Linear4bit

    made = Linear4bit(64, 128, bias=False, quant_type="nf4", quant_storage=storage)
    made.weight.data = q.stock_net()[0].weight.data.clone()
    made = made.to("cpu")
    assert made.weight.dtype == storage
    wanted = q.net("bnb.nf4.double")[0]
    assert torch.equal(dequantise(made), dequantise(wanted))
    assert fingerprint_quantised("w", made) == fingerprint_quantised("w", wanted)


@q.needs("bitsandbytes")
@pytest.mark.parametrize("scheme", ["bnb.nf4", "bnb.nf4.double"])
def test_a_layer_repacked_for_inference_is_read_and_brought_back(scheme):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer = q.net(scheme)[0]
    before, codes = dequantise(layer), stored_tensors(layer)["codes"].clone()
    print_before = fingerprint_quantised("w", layer)
    weight = layer.weight  # what its forward does on CPUs with AVX512-BF16
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )
    repacked = dequantise(layer)
    assert not torch.equal(weight.data.reshape(-1), codes.reshape(-1))
    # Its scales are bf16 now: half of 2 ** -7 relative.
    assert ((repacked - before).abs() <= 2**-8 * before.abs() * 1.01).all()
    assert compare(print_before, fingerprint_quantised("w", layer)) == "quantised"

    layer.support_avx512bf16_for_cpu = True
    assert keep_trainable(layer)
    assert torch.equal(weight.data, codes)
    assert torch.equal(dequantise(layer), repacked)
    x = torch.randn(4, 64, requires_grad=True)
    layer.eval()(x).sum().backward()
    assert x.grad is not None
    layer(x.detach())
    assert torch.equal(weight.data, codes)  # evaluation does not repack it any more
    let_repack(layer)
    assert layer.support_avx512bf16_for_cpu


class Odd(torch.Tensor):
    """A subclass of nobody's."""


def test_a_plain_weight_is_returned_and_an_unknown_one_named():
    layer = nn.Linear(4, 3)
    assert dequantise(layer).data_ptr() == layer.weight.data_ptr()
    assert dequantise(layer, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert scheme_of(layer) is None
    layer.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AttachError, match=r"'up.weight' of a Linear is a Parameter of torch.int8"):
        dequantise(layer, name="up.weight")
    layer.weight = nn.Parameter(torch.zeros(3, 4).as_subclass(Odd))
    with pytest.raises(AttachError, match=r"is a .* known are bitsandbytes"):
        dequantise(layer)
    with pytest.raises(AttachError, match="not quantised in a way known here"):
        stored_tensors(nn.Linear(4, 3))
    with pytest.raises(AttachError, match="has no parameter or buffer 'gamma'"):
        dequantise(layer, "gamma")


@q.needs("bitsandbytes")
def test_layers_not_quantised_yet_are_named():
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    assert scheme_of(Linear4bit(64, 128)) is None
    with pytest.raises(AttachError, match=r"not quantised yet.*model.to\(device\)"):
        dequantise(Linear4bit(64, 128))
    with pytest.raises(AttachError, match=r"has_fp16_weights=False"):
        dequantise(Linear8bitLt(64, 128))


@schemes
def test_fingerprints_tell_the_base_another_quantisation_and_another_model(scheme):
    layer, plain = q.net(scheme)[0], q.stock_net()[0].weight.detach()
    mine = fingerprint_quantised("w", layer)
    assert compare(mine, fingerprint_quantised("w", copy.deepcopy(layer))) == "equal"
    assert mine.step > 0
    for other in (plain, plain.bfloat16()):
        assert compare(fingerprint_tensor("w", other), mine) == "quantised"
    strange = fingerprint_tensor("w", plain.flip(0).contiguous())
    assert compare(mine, strange) == compare(strange, mine) == "different"
    # The same scheme asks for nearly the same values.
    near = nn.Linear(64, 128)
    near.weight.data = plain * 1.05
    assert compare(mine, fingerprint_quantised("w", q.quantise(near, scheme))) == "different"
