"""Bad input: what it says names the parameter, what was got and the way out; nothing changes."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparseft import attach
from sparseft.diff import SparsePattern
from sparseft.errors import AttachError, MaskError, UnknownNameError


@pytest.fixture(autouse=True)
def nothing_changed(tiny):
    """Whatever was refused, the model is a stock one afterwards."""
    yield
    assert type(tiny.up) is nn.Linear
    assert all(p.requires_grad for p in tiny.parameters())
    assert not any("diff_" in n for n in tiny.state_dict())


def full(shape):
    return torch.ones(shape, dtype=torch.bool)


def test_unknown_parameter_gives_the_nearest_names(tiny):
    with pytest.raises(UnknownNameError, match=r"no parameter 'up.wieght'.*'up.weight'"):
        attach(tiny, {"up.wieght": full((24, 8))})


def test_unknown_full_parameter_glob(tiny, kit):
    with pytest.raises(UnknownNameError, match=r"^full_params: pattern 'hed.\*' matches none"):
        attach(tiny, {"up.weight": full((24, 8))}, full_params=["hed.*"])


def test_mask_of_another_shape(tiny):
    with pytest.raises(MaskError, match=r"up.weight.*\(24, 9\).*\(24, 8\)"):
        attach(tiny, {"up.weight": full((24, 9))})


def test_transposed_mask_gets_a_hint(tiny):
    with pytest.raises(MaskError, match=r"\(8, 24\).*\(24, 8\).*transposed"):
        attach(tiny, {"up.weight": full((8, 24))})


def test_mask_that_is_not_bool(tiny):
    with pytest.raises(MaskError, match=r"float32.*torch.bool"):
        attach(tiny, {"up.weight": torch.ones(24, 8)})


@pytest.mark.parametrize("masks", [{}, {"up.weight": ~full((24, 8))}], ids=["none", "all_false"])
def test_nothing_to_train(tiny, masks):
    with pytest.raises(MaskError, match="keep no entry at all"):
        attach(tiny, masks)


def test_an_empty_mask_beside_others_is_skipped(tiny):
    with attach(tiny, {"up.weight": ~full((24, 8)), "up.bias": full((24,))}) as sparse:
        assert sparse.names == ["up.bias"]


def test_two_names_of_one_tied_weight(tiny):
    with pytest.raises(AttachError, match=r"'emb.weight' and 'head.weight' are one tied weight"):
        attach(tiny, {"emb.weight": full((23, 8)), "head.weight": full((23, 8))})


def test_either_name_of_a_tied_weight_will_do(tiny):
    with attach(tiny, {"head.weight": full((23, 8))}) as sparse:
        assert sparse.names == ["emb.weight"]


def test_second_attach_on_one_parameter(tiny, kit):
    with attach(tiny, {"up.weight": full((24, 8))}) as sparse:
        with pytest.raises(AttachError, match=r"'up.weight' has a mask attached already.*detach"):
            attach(tiny, {"up.weight": full((24, 8))})
        assert kit.agrees(sparse)


def test_masked_and_full(tiny):
    with pytest.raises(AttachError, match=r"'up.weight' is in full_params and has a mask"):
        attach(tiny, {"up.weight": full((24, 8))}, full_params=["up.*"])


class QuantisedWeight(nn.Parameter):
    """Stands for the Parameter subclasses of quantisation libraries."""


def with_weight(weight):
    layer = nn.Linear(4, 3, bias=False)
    layer.weight = weight
    return layer


def quantised_int8():
    return with_weight(nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False))


def quantised_float8():
    return with_weight(nn.Parameter(torch.zeros(3, 4).to(torch.float8_e4m3fn), requires_grad=False))


def quantised_subclass():
    return with_weight(QuantisedWeight(torch.zeros(3, 4)))


@pytest.mark.parametrize("build", [quantised_int8, quantised_float8, quantised_subclass])
def test_quantised_weights(build):
    layer = build()
    with pytest.raises(AttachError, match=r"'weight' is a .*Quantised.*without quantisation"):
        attach(layer, {"weight": full((3, 4))})


def test_complex_weight():
    layer = nn.Linear(4, 3, bias=False, dtype=torch.complex64)
    with pytest.raises(AttachError, match=r"complex64"):
        attach(layer, {"weight": full((3, 4))})


def test_meta_weight():
    with pytest.raises(AttachError, match=r"meta device"):
        attach(nn.Linear(4, 3, device="meta"), {"weight": full((3, 4))})


def test_inference_mode():
    with torch.inference_mode():
        loaded = nn.Linear(4, 3)
    for layer, inside in ((loaded, False), (nn.Linear(4, 3), True)):
        with torch.inference_mode(inside), pytest.raises(AttachError, match=r"inference_mode"):
            attach(layer, {"weight": full((3, 4))})
        assert type(layer) is nn.Linear


def test_fake_weight_outside_its_mode():
    with FakeTensorMode():
        layer = nn.Linear(4, 3)
    for mode in (contextlib.nullcontext(), FakeTensorMode()):  # none, and another one
        with mode, pytest.raises(AttachError, match=r"'weight' is a FakeTensor of torch.float32"):
            attach(layer, {"weight": SparsePattern._trusted(torch.arange(2), (3, 4))})
    assert type(layer) is nn.Linear


def test_fake_weight_under_its_mode():
    with FakeTensorMode():
        layer = nn.Linear(4, 3)
        where = SparsePattern._trusted(torch.empty(2, dtype=torch.int32), (3, 4))
        with attach(layer, {"weight": where}) as sparse:
            layer(torch.empty(5, 4)).sum().backward()
            assert sparse.leaves["weight"].grad.shape == (2,)


def test_fake_weight_of_a_dtype_without_masks():
    with FakeTensorMode():
        layer = nn.Linear(4, 3, dtype=torch.complex64)
        where = SparsePattern._trusted(torch.empty(2, dtype=torch.int32), (3, 4))
        with pytest.raises(AttachError, match=r"complex64"):
            attach(layer, {"weight": where})


def test_lazy_weight():
    with pytest.raises(AttachError, match=r"not initialised yet"):
        attach(nn.LazyLinear(3), {"weight": full((3, 4))})


def test_expanded_weight():
    layer = with_weight(nn.Parameter(torch.zeros(1, 4).expand(3, 4)))
    with pytest.raises(AttachError, match=r"expanded.*share memory"):
        attach(layer, {"weight": full((3, 4))})


def test_renormalising_embedding():
    with pytest.raises(AttachError, match=r"max_norm=1.0.*frozen entries"):
        attach(nn.Embedding(5, 3, max_norm=1.0), {"weight": full((5, 3))})


def test_scripted_module():
    layer = torch.jit.script(nn.Linear(4, 3))
    with pytest.raises(AttachError, match=r"scripted"):
        attach(layer, {"weight": full((3, 4))})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["same", "mixed"])
def test_two_parameters_on_one_storage(dtype):
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    flat = model["a"].weight.detach().view(-1)
    if dtype == torch.float32:
        model["b"].weight = nn.Parameter(flat.view(4, 4))
    else:
        model["b"].weight = nn.Parameter(flat[:8].view(torch.float16).view(4, 4))
    with pytest.raises(AttachError, match=r"'a.weight'.*'b.weight'.*share memory"):
        attach(model, {"a.weight": full((4, 4))})


class TiedByConfig(nn.Module):
    """As transformers models are: what is tied is declared, and tied by assigning."""

    def __init__(self, listed, tied=True):
        super().__init__()
        self.body = nn.Module()
        self.body.embeddings = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.config = SimpleNamespace(tie_word_embeddings=tied)
        if listed and tied:  # transformers 5
            self.all_tied_weights_keys = {"head.weight": "body.embeddings.weight"}

    def get_input_embeddings(self):
        return self.body.embeddings

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside"])
@pytest.mark.parametrize("listed", [False, True], ids=["by_config", "listed"])
@pytest.mark.parametrize("name", ["head.weight", "body.embeddings.weight"])
def test_a_declared_tie_of_two_dtypes(name, listed, inside):
    model = TiedByConfig(listed)
    model.head.half()  # its own parameter: the tie was never made
    mask = {f"model.{name}" if inside else name: full((5, 4))}
    with pytest.raises(
        AttachError, match=r"head.weight' is torch.float16 and '.*embeddings.weight' is torch.float"
    ):
        attach(nn.ModuleDict({"model": model}) if inside else model, mask)
    assert type(model.head) is nn.Linear
    model.head.float()
    model.head.weight = model.body.embeddings.weight
    model.head.half()  # now it casts both
    with attach(model, {name: full((5, 4))}) as sparse:
        assert sparse.names == ["body.embeddings.weight"]


@pytest.mark.parametrize("listed", [False, True], ids=["by_config", "listed"])
def test_two_dtypes_that_nobody_tied(listed):
    model = TiedByConfig(listed, tied=False)
    model.head.half()
    with attach(model, {"head.weight": full((5, 4))}) as sparse:
        assert sparse.names == ["head.weight"]


def test_a_model_that_has_no_embeddings_to_tie():
    class Vision(nn.Linear):
        config = SimpleNamespace(tie_word_embeddings=True)  # a default of transformers 4

        def get_input_embeddings(self):
            raise NotImplementedError

    with attach(Vision(4, 3), {"weight": full((3, 4))}) as sparse:
        assert sparse.names == ["weight"]


def test_dense_masks_are_warned_of(caplog):
    def said(density, dtype):
        caplog.clear()
        layer = nn.Linear(100, 40, bias=False).to(dtype)
        mask = (torch.arange(4000) < density * 4000).view(40, 100)
        attach(layer, {"weight": mask}).detach()
        return " ".join(r.getMessage() for r in caplog.records)

    assert said(0.2, torch.float32) == ""
    message = said(0.25, torch.float32)
    assert "masks keep 25.0% of the masked tensors (1,000 of 4,000 entries)" in message
    assert "23.4 KiB here (24 bytes an entry) and 46.9 KiB" in message
    assert "(12 bytes a weight)" in message
    assert "sparseft profile" in message
    message = said(0.25, torch.bfloat16)
    assert "(22 bytes an entry)" in message
    assert "(6 bytes a weight)" in message


def test_density_is_counted_over_all_masked_tensors(tiny, caplog):
    masks = {"up.weight": full((24, 8)), "emb.weight": full((23, 8)) & False}
    masks["emb.weight"][0, 0] = True
    masks["down.weight"] = full((8, 24)) & (torch.arange(24) < 0)
    with attach(tiny, masks):
        assert "masks keep 51.3%" in caplog.text
    caplog.clear()
    masks["up.weight"][:, 3:] = False
    with attach(tiny, masks):
        assert caplog.text == ""


def test_parameters_side_by_side_in_one_buffer_are_fine(kit):
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    buffer = torch.randn(32)
    model["a"].weight = nn.Parameter(buffer[:16].view(4, 4))
    model["b"].weight = nn.Parameter(buffer[16:].view(4, 4))
    before = buffer.clone()
    with attach(model, {"a.weight": full((4, 4))}) as sparse:
        with torch.no_grad():
            sparse.leaves["a.weight"].fill_(1.0)
        sparse.sync_()
        assert torch.equal(buffer[16:], before[16:])
        assert torch.equal(buffer[:16], before[:16] + 1.0)
    assert torch.equal(buffer, before)


def test_replacing_or_deleting_an_attached_weight(tiny):
    with attach(tiny, {"up.weight": full((24, 8)), "emb.weight": full((23, 8))}):
        with pytest.raises(AttachError, match=r"cannot replace 'weight'.*up.weight"):
            tiny.up.weight = nn.Parameter(torch.zeros(24, 8))
        with pytest.raises(AttachError, match=r"cannot delete 'weight'"):
            del tiny.up.weight
        # Tying again what is tied is what libraries do on save and load; nothing to refuse.
        tiny.head.weight = tiny.emb.weight
        tiny.up.note = "ordinary attributes are free"
    del tiny.up.note


def test_another_view_of_a_weight_is_another_weight():
    model = nn.Linear(4, 4)
    attach(model, {"weight": torch.eye(4) > 0})
    weight = model._parameters["weight"]
    model.weight = model.weight  # what code that ties does
    with pytest.raises(AttachError, match="cannot replace 'weight'"):
        model.weight = nn.Parameter(weight.detach().t())
    assert model._parameters["weight"] is weight


def test_an_attribute_in_the_leaf_s_place(tiny):
    layer = nn.Linear(4, 3)
    layer.diff_weight = "mine"
    with pytest.raises(AttachError, match=r"diff_weight.*Rename"):
        attach(layer, {"weight": full((3, 4))})


def test_a_refused_mask_leaves_the_good_ones_off_too(tiny):
    masks = {"up.weight": full((24, 8)), "down.weight": full((8, 23))}
    with pytest.raises(MaskError, match=r"down.weight"):
        attach(tiny, masks)
