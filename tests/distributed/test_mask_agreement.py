"""Ranks that attach other masks, bases or values: the same error on every rank, and who differs."""

from __future__ import annotations

import copy
import logging
import pickle
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sparseft
from sparseft.errors import AttachError, SparseFtError
from sparseft.modules import _collective
from sparseft.modules._collective import Ranks, exchange_device


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 11))
    return model, {"0.weight": torch.rand(11, 6) < 0.15, "1.weight": torch.rand(9, 6) < 0.15}


def refused(call):
    """Return the error's type and text."""
    try:
        call()
    except SparseFtError as error:
        return type(error).__name__, str(error)
    return "", ""


def clean(model):
    return not any("diff_" in n for n, _ in model.named_parameters()) and all(
        p.requires_grad for p in model.parameters()
    )


def disagree(rank):
    said = {}
    model, masks = network()
    if rank == 2:
        masks["1.weight"] = ~masks["1.weight"]
    said["mask"] = refused(lambda: sparseft.attach(model, masks))
    model, masks = network()
    if rank in (0, 3):
        del masks["0.weight"]
    said["set"] = refused(lambda: sparseft.attach(model, masks))
    model, masks = network()
    heads = ["3.*"] if rank < 2 else []
    said["heads"] = refused(lambda: sparseft.attach(model, masks, full_params=heads))
    model, masks = network()
    with torch.no_grad():  # inside of the mask; by the sign of a zero
        row, column = masks["1.weight"].nonzero()[3].tolist()
        model[1].weight[row, column] = -0.0 if rank == 1 else 0.0
    said["base"] = refused(lambda: sparseft.attach(model, masks))
    said["clean"] = clean(model)
    model, masks = network()
    with sparseft.attach(model, masks, group=False) as sparse:
        sparse.leaves["0.weight"].data.fill_(float(rank == 1))
        adapter = sparse.adapter()
    said["start"] = refused(lambda: sparseft.attach(model, adapter))
    said["clean"] &= clean(model)
    sparse = sparseft.attach(model, masks)
    said["load"] = refused(lambda: sparse.load_adapter_(adapter))
    moved = dict(masks) if rank == 3 else {}
    moved["0.weight"] = masks["0.weight"].flip(0)
    said["moves"] = refused(lambda: sparse.reselect_(moved, optimizer=None))
    said["untouched"] = torch.equal(sparse.patterns["0.weight"].to_mask(), masks["0.weight"])
    sparse.detach()
    # Another place: one loads while the others attach once more.
    sparse = sparseft.attach(model, masks)
    if rank == 0:
        said["place"] = refused(lambda: sparse.load_adapter_(adapter))
    else:
        other, _ = network()
        said["place"] = refused(lambda: sparseft.attach(other, masks))
    return said


def test_each_kind_of_disagreement_is_named_on_every_rank(run_ranks):
    ranks = run_ranks(disagree, 4)
    said = ranks[0]
    for other in ranks[1:]:
        assert said["place"][1].partition(": ")[2] == other["place"][1].partition(": ")[2]
        assert {**other, "place": said["place"]} == said, "one error for all"
    assert all(kind == "AttachError" for kind, _ in (v for v in said.values() if v is not True))
    text = {key: value[1] for key, value in said.items() if value is not True}
    assert "disagree on the mask of '1.weight': rank 2 against ranks 0, 1, 3." in text["mask"]
    assert "select with one seed" in text["mask"]
    assert "broadcast_object_list" in text["mask"]
    assert "different sets of tensors: '0.weight' is there on ranks 1, 2 and not on" in text["set"]
    assert "'3.weight' (and 1 more) is there on ranks 0, 1 and not on ranks 2, 3" in text["heads"]
    assert "base weights at the mask of '1.weight': rank 1 against ranks 0, 2, 3" in text["base"]
    assert "Load the same weights on every rank" in text["base"]
    assert "attach: ranks disagree on the adapter's diff of '0.weight': rank 1" in text["start"]
    assert "load_adapter_: ranks disagree on the adapter's diff of '0.weight'" in text["load"]
    assert "'1.weight' is there on rank 3 and not on ranks 0, 1, 2" in text["moves"]
    assert 'rank 0 at "load_adapter_: the adapter\'s diff"' in text["place"]
    assert "ranks 1, 2, 3 at 'attach: the mask'" in text["place"]
    assert said["clean"] is True, "no mask is left where attach was refused"
    assert said["untouched"] is True


def fails_alone(rank):
    said = {}
    model, masks = network()
    with sparseft.attach(model, masks, group=False) as sparse:
        adapter = sparse.adapter()
    with torch.no_grad():
        model[0].weight[3, 3] += rank == 1
    said["base"] = refused(lambda: sparseft.attach(model, adapter))
    model, masks = network()
    said["name"] = refused(lambda: sparseft.attach(model, {"9.weight": masks["0.weight"]}))
    sparse = sparseft.attach(model, masks)
    moved = {"2.weight" if rank == 0 else "0.weight": masks["0.weight"].flip(0)}
    said["moves"] = refused(lambda: sparse.reselect_(moved, optimizer=None))
    some = {"0.weight": masks["0.weight"].flip(0)} if rank == 0 else {}
    said["none"] = refused(lambda: sparse.reselect_(some, optimizer=None))
    return said


def test_a_failure_on_one_rank_is_said_on_all(run_ranks):
    first, second = run_ranks(fails_alone, 2)
    assert second["base"][0] == "BaseMismatchError"
    assert first["base"][0] == "AttachError"
    text = (
        f"attach: stopped here, because it failed on rank 1: BaseMismatchError: {second['base'][1]}"
    )
    assert first["base"][1] == text
    assert first["name"] == second["name"]
    assert first["name"][0] == "UnknownNameError"
    assert first["moves"][0] == "UnknownNameError"
    assert "moving masks: stopped here, because it failed on rank 0" in second["moves"][1]
    assert first["none"] == second["none"]
    assert "'0.weight' is there on rank 0 and not on rank 1" in first["none"][1]


def attached_alone(rank):
    found = {}
    for what in ("mask", "base", "nothing"):
        model, masks = network()
        if what == "mask" and rank == 1:
            masks["1.weight"] = masks["1.weight"].flip(0)
        if what == "base" and rank == 1:
            with torch.no_grad():
                model[1].weight += 1
        sparse = sparseft.attach(model, masks, full_params=["3.*"], group=False)
        wrapped = nn.parallel.DistributedDataParallel(model)
        data = torch.randint(0, 11, (4, 5))
        with torch.no_grad():
            wrapped(data)
        found[what] = refused(lambda run=wrapped, x=data: run(x).sum().backward())
        sparse.detach()
        assert not model._forward_pre_hooks
    return found


def test_what_was_attached_alone_is_compared_by_the_wrapper(run_ranks):
    for found in run_ranks(attached_alone, 2):
        assert "ranks disagree on the mask of '1.weight'" in found["mask"][1]
        assert "disagree on the base weights at the mask of '1.weight'" in found["base"][1]
        assert found["nothing"] == ("", "")


def copied(rank):
    found = []
    for group in (dist.new_group([0, 1]), False):
        model, masks = network()
        sparseft.attach(model, masks, group=group)
        for copy_of in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
            twin = copy_of(model)
            found.append(sparseft.attachments_of(twin)[-1]._group is group)
            sparseft.attachments_of(twin)[-1].detach()
    return found


def test_copies_of_a_model_attached_within_a_group(run_ranks):
    # A group cannot be pickled: there it is the default one again.
    assert run_ranks(copied, 2) == [[True, False, True, True]] * 2


def agree(rank):
    bytes_, plain = [], dist.all_reduce

    def counted(tensor, *rest, **more):
        bytes_.append(tensor.numel() * tensor.element_size())
        return plain(tensor, *rest, **more)

    dist.all_reduce = counted
    model, masks = network()
    with sparseft.attach(model, masks):
        together = list(bytes_)
    model, masks = network()
    masks = {name: mask.flip(0) if rank == 1 else mask for name, mask in masks.items()}
    with sparseft.attach(model, masks, group=False):
        alone = len(bytes_) - len(together)
    # Of four, two train together: the others have masks of their own.
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    model, masks = network()
    masks = {name: mask.flip(0) if rank % 2 else mask for name, mask in masks.items()}
    with sparseft.attach(model, masks, group=pairs[rank % 2]) as sparse:
        nnz = sparse.nnz
    wrong = {name: mask.flip(1) if rank == 3 else mask for name, mask in masks.items()}
    model, _ = network()
    kind, text = refused(lambda: sparseft.attach(model, wrong, group=pairs[rank % 2]))
    return together, alone, nnz, text


def test_agreement_is_three_small_reductions_within_a_group(run_ranks):
    ranks = run_ranks(agree, 4)
    for rank, (together, alone, nnz, text) in enumerate(ranks):
        assert together == [48, 48, 48], "bytes"
        assert alone == 0
        assert nnz == ranks[rank % 2][2]
        if rank % 2:
            assert "disagree on the mask of '0.weight' (and 1 more): rank 3 against rank 1" in text
        else:
            assert text == ""


def wrapped_first(rank):
    said = []
    model, masks = network()
    wrapped = nn.parallel.DistributedDataParallel(model)
    said.append(refused(lambda: sparseft.attach(wrapped, masks)))
    sparse = sparseft.attach(model, masks)  # of the model, which knows of no wrapper
    data = torch.randint(0, 11, (4, 5))
    model(data).sum().backward()  # not through it
    with torch.no_grad():
        wrapped(data)
    said.append(refused(lambda: wrapped(data)))
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(data).sum().backward()
    # Attached anew: the same wrapper does not know these leaves.
    sparse.detach()
    hooks = len(model._forward_pre_hooks)
    sparse = sparseft.attach(model, masks)
    said.append(refused(lambda: wrapped(data)))
    copy.deepcopy(model)(data).sum().backward()
    sparse.detach()
    return said, hooks, len(model._forward_pre_hooks)


def test_a_model_wrapped_before_attach_is_named(run_ranks):
    for (given, inner, anew), *hooks in run_ranks(wrapped_first, 2):
        assert given[0] == inner[0] == anew[0] == "AttachError"
        assert "'the model' is a DistributedDataParallel" in given[1]
        for _, text in (inner, anew):
            assert "'0.weight' and others were attached after the model was wrapped" in text
            assert "Attach first, then wrap" in text
        assert hooks == [0, 0]


def late(rank):
    _collective.PATIENCE = 0.1
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("sparseft").addHandler(handler)
    model, masks = network()
    time.sleep(0.4 * rank)
    sparseft.attach(model, masks)
    return said


def test_a_rank_that_waits_says_why(run_ranks):
    waited, came = run_ranks(late, 2)
    assert came == []
    assert len(waited) == 1
    assert "rank 0 has waited" in waited[0]
    assert "attach: comparing the mask of" in waited[0]
    assert "group=False" in waited[0]


@pytest.mark.parametrize(
    ("backends", "near", "device"),
    [
        ("cpu:gloo", "cpu", "cpu"),
        ("cpu:gloo", "cuda:1", "cpu"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda:1", "cuda:1"),
        ("cuda:nccl", "cuda:1", "cuda:1"),
        ("cuda:nccl", "cpu", "cuda:3"),
        ("cuda:nccl", None, "cuda:3"),
    ],
)
def test_tensors_are_exchanged_where_the_backend_works(backends, near, device, monkeypatch):
    class Cuda:
        @staticmethod
        def current_device():
            return 3

    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: Cuda)
    near = None if near is None else torch.device(near)
    assert exchange_device(None, near) == torch.device(device)


def test_one_process_compares_nothing():
    ranks = Ranks(None)
    assert not ranks.several
    assert ranks.gather("me") == {0: "me"}
    model, masks = network()
    with sparseft.attach(model, masks) as sparse:
        assert sparse.nnz == sum(int(mask.sum()) for mask in masks.values())
    with pytest.raises(AttachError, match="detached"):
        sparse.load_adapter_(None)
