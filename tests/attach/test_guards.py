"""What a loop's own code does to a model after attach: it works, or is noticed by the next step."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from sparseft import SparseAdamW, attach
from sparseft.attachment import attachments_of
from sparseft.errors import AttachError
from sparseft.modules import writeback

MASKED = ("emb.weight", "norm.weight", "up.weight", "conv.weight")


def some(model, kit, names=MASKED):
    masks = kit.masks(model, 0.1)
    return {name: masks[name] for name in names}


def said(caplog):
    return " ".join(r.getMessage() for r in caplog.records if r.name.startswith("sparseft"))


class Run:
    """A model with masks that has trained one step."""

    def __init__(self, kit, ids, optimizer=torch.optim.AdamW, dtype=torch.float32, **options):
        self.kit, self.ids = kit, ids
        self.model = kit.make(dtype)
        self.base = kit.snapshot(self.model)
        self.sparse = attach(self.model, some(self.model, kit), **options)
        self.optimizer = optimizer(self.sparse.parameters(), lr=1e-2)
        self.step()
        self.leaves = {n: leaf.detach().clone() for n, leaf in self.sparse.leaves.items()}

    def step(self, model=None):
        self.optimizer.zero_grad()
        self.kit.loss(model or self.model, self.ids).backward()
        self.optimizer.step()

    def moved(self):
        return [
            n for n, leaf in self.sparse.leaves.items() if not torch.equal(leaf, self.leaves[n])
        ]

    def restored(self):
        now = self.kit.snapshot(self.model)
        return list(now) == list(self.base) and all(
            torch.equal(t, self.base[n]) for n, t in now.items()
        )


@pytest.fixture
def run(kit, ids):
    return Run(kit, ids)


# Replaced, in ways that no module can refuse.


def another_parameter(m):
    m.up._parameters["weight"] = nn.Parameter(torch.zeros(24, 8))


def another_module(m):
    m.up = nn.Linear(8, 24)


def another_tied_module(m):
    m.head = nn.Linear(8, 23)


def another_class(m):
    m.up.__class__ = nn.Linear


def data_of_an_alias(m):
    m.up.weight.data = torch.zeros(24, 8)


def data_of_an_alias_read_again(m):
    m.conv.weight.data = torch.zeros(8, 8, 3)
    m.conv.weight.sum()


def data(m):
    with torch.no_grad():
        m.up.weight.data = torch.zeros(24, 8)


def cast_leaves(m):
    for parameter in m.parameters():
        parameter.data = parameter.data.bfloat16()


REPLACED = {
    another_parameter: (r"'up.weight'.*Linear now holds float32 \(24, 8\) on cpu", False),
    another_module: (r"'up.weight'.*Linear that holds it is no longer a part", False),
    another_tied_module: (r"'emb.weight'.*Linear that holds it is no longer a part", False),
    another_class: (r"'up.weight'.*class of its module was set to Linear", True),
    data_of_an_alias: (r"'up.weight'.*assigned to .data.*alias", True),
    data_of_an_alias_read_again: (r"'conv.weight'.*assigned to .data.*alias", True),
    data: (r"'up.weight'.*another tensor, float32 \(24, 8\).*not its base plus its diff", False),
    cast_leaves: (r"'emb.weight'.*leaf is torch.bfloat16, wanted torch.float32.*3 more", None),
}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, SparseAdamW])
@pytest.mark.parametrize("change", REPLACED, ids=lambda change: change.__name__)
def test_what_was_replaced_is_named_and_what_was_trained_is_kept(change, kind, kit, ids, caplog):
    what, restored = REPLACED[change]
    run = Run(kit, ids, kind)
    digest = run.sparse.adapter().digest
    change(run.model)
    for _ in range(2):
        with pytest.raises(AttachError, match=f"(?s){what}.*adapter.*detach.*attach again"):
            run.step()
    if change is not cast_leaves:
        assert run.moved() == []
    with pytest.raises(AttachError, match=what):
        run.sparse.sync_()
    caplog.clear()
    adapter = run.sparse.adapter()
    assert "adapter(): " in said(caplog)
    if change is not cast_leaves:
        assert adapter.digest == digest
    again = attach(kit.make(), adapter)  # whose fingerprint is that of the base
    assert all(torch.equal(leaf, adapter[n].values) for n, leaf in again.leaves.items())
    caplog.clear()
    run.sparse.detach()
    if restored:
        assert run.restored()
    if restored is not None:
        assert ("left as it is" in said(caplog)) == (not restored)
    if change is cast_leaves:
        plain = {n: t.bfloat16() for n, t in run.base.items()}
        assert all(torch.equal(t, plain[n]) for n, t in kit.snapshot(run.model).items())


def test_memory_replaced_before_the_first_step(tiny, ids, kit):
    sparse = attach(tiny, some(tiny, kit))
    optimizer = torch.optim.AdamW(sparse.parameters())
    data(tiny)
    kit.loss(tiny, ids).backward()
    with pytest.raises(AttachError, match=r"'up.weight'.*another tensor"):
        optimizer.step()


def test_another_shape_is_left_alone(run, caplog):
    with torch.no_grad():
        run.model.up.weight.data = torch.zeros(2, 3)
    run.optimizer.zero_grad()
    with pytest.raises(AttachError, match=r"'up.weight'.*\.data is float32 \(2, 3\).*\(24, 8\)"):
        run.optimizer.step()
    run.sparse.detach()
    assert "(2, 3)" in said(caplog)
    assert torch.equal(run.model.up.weight, torch.zeros(2, 3))
    rest = {n: t for n, t in run.kit.snapshot(run.model).items() if n != "up.weight"}
    assert all(torch.equal(t, run.base[n]) for n, t in rest.items())


def test_a_full_parameter_replaced(tiny, ids, kit):
    sparse = attach(tiny, some(tiny, kit, ["up.weight"]), full_params=["norm.*"])
    optimizer = torch.optim.AdamW(sparse.parameters())
    tiny.norm = nn.LayerNorm(8)
    kit.loss(tiny, ids).backward()
    with pytest.raises(AttachError, match=r"'norm.weight'.*LayerNorm that holds it.*1 more"):
        optimizer.step()


def test_a_deep_copy_is_watched_by_itself(run):
    clone = copy.deepcopy(run.model)
    again = attachments_of(clone)[-1]
    optimizer = torch.optim.AdamW(again.parameters())
    clone.up = nn.Linear(8, 24)
    run.step()
    with pytest.raises(AttachError, match=r"'up.weight'.*no longer a part"):
        optimizer.step()


@pytest.mark.slow
def test_a_compiled_step_is_traced_again_and_says_so():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparse = attach(model, {"0.weight": torch.eye(8) > 0})
    optimizer = SparseAdamW(sparse.parameters(), lr=1e-2)

    def step():
        optimizer.zero_grad()
        model(torch.ones(4, 8)).pow(2).sum().backward()
        optimizer.step()

    compiled = torch.compile(step, backend="eager")
    compiled()
    before = sparse.leaves["0.weight"].detach().clone()
    model[0] = nn.Linear(8, 8)
    # torch wraps what is raised while it traces.
    with pytest.raises(Exception, match=r"'0.weight'.*no longer a part"):
        compiled()
    assert torch.equal(sparse.leaves["0.weight"], before)


# Refused at once.


def weight_norm(m):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(m.up)


def prune_without_grad(m):
    with torch.no_grad():
        prune.l1_unstructured(m.up, "weight", 0.5)


REFUSED = {
    "assigned": lambda m: setattr(m.up, "weight", nn.Parameter(torch.zeros(24, 8))),
    "registered": lambda m: m.up.register_parameter("weight", nn.Parameter(torch.zeros(24, 8))),
    "weight_norm": weight_norm,
    "parametrizations": lambda m: nn.utils.parametrizations.weight_norm(m.up),
    "spectral_norm": lambda m: nn.utils.spectral_norm(m.up),
    "prune": lambda m: prune.l1_unstructured(m.up, "weight", 0.5),
    "prune_without_grad": prune_without_grad,
    "meta_module": lambda m: m.up.to("meta"),
    "meta_model": lambda m: m.to("meta"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_refused_changes_nothing(how, run):
    with pytest.raises(AttachError, match=r"'(up|emb)\.weight' has a mask attached.*detach\(\)"):
        REFUSED[how](run.model)
    run.step()
    assert run.moved() == list(MASKED)
    run.sparse.detach()
    assert run.restored()


def test_a_parametrization_beside_a_mask_goes_before_the_mask(run):
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    parametrize.register_parametrization(run.model.up, "bias", Twice())
    run.step()
    assert run.moved() == list(MASKED)
    with pytest.raises(AttachError, match=r"'up.weight' became a Parametrized.*remove_parametriz"):
        run.sparse.detach()
    parametrize.remove_parametrizations(run.model.up, "bias", leave_parametrized=False)
    run.sparse.detach()
    assert type(run.model.up) is nn.Linear
    assert all(torch.equal(t, run.base[n]) for n, t in run.kit.snapshot(run.model).items())


def bert(**options):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 16,
    }
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**sizes, **options))


WORDS = "bert.embeddings.word_embeddings.weight"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def test_resized_embeddings():
    model = bert()
    ids = torch.arange(8)[None]
    with attach(model, {WORDS: torch.eye(40, 16) > 0}):
        with pytest.raises(AttachError, match=rf"resize '{WORDS}' from 40 to 44.*Resize before"):
            model.resize_token_embeddings(44)
        assert model.resize_token_embeddings(40) is model.get_input_embeddings()
        copy.deepcopy(model).resize_token_embeddings(40)
    assert "resize_token_embeddings" not in model.__dict__
    with attach(model, {QUERY: torch.eye(16) > 0}) as sparse:
        model.resize_token_embeddings(44)  # nothing there has a mask
        optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        assert sparse.leaves[QUERY].any()
    assert model.get_input_embeddings().weight.shape == (44, 16)


# Fine: the weight is where it was, in other memory or behind other modules.


def clone_data(m):
    for parameter in m.parameters():
        parameter.data = parameter.data.clone()


def through_a_vector(m):
    with torch.no_grad():
        vector = nn.utils.parameters_to_vector(m.parameters()).clone()
        nn.utils.vector_to_parameters(vector, m.parameters())


def widen_data(m):
    for name, parameter in m.named_parameters():
        if "diff_" not in name:
            parameter.data = parameter.data.float()


def cast_to_new_parameters(m):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        m.bfloat16()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def wrap_a_module(m):
    m.up = nn.Sequential(m.up)


FINE = {
    "share_memory": lambda m: m.share_memory(),
    "clone_data": clone_data,
    "through_a_vector": through_a_vector,
    "widen_data": widen_data,
    "cast": lambda m: m.half().float(),
    "cast_to_new_parameters": cast_to_new_parameters,
    "wrap_a_module": wrap_a_module,
}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("how", FINE)
def test_moved_memory_and_wrapped_modules_train_on(how, rounding, ids, kit):
    def optimizer(parameters, lr):
        return SparseAdamW(parameters, lr=lr, stochastic_rounding=rounding == "stochastic")

    run = Run(kit, ids, optimizer, torch.bfloat16)
    FINE[how](run.model)
    run.step()
    run.step()
    assert run.moved() == list(MASKED)
    if rounding == "nearest":
        assert kit.agrees(run.sparse)
    run.sparse.detach()
    if how == "wrap_a_module":
        run.model.up = run.model.up[0]
    wanted = run.base if how != "cast" else {n: t.half() for n, t in run.base.items()}
    assert all(torch.equal(t.to(wanted[n]), wanted[n]) for n, t in kit.snapshot(run.model).items())


def test_moved_memory_of_weights_near_zero():
    """Where fp16 has one spacing for all, rounding either way is no small part of a number."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 16, bias=False).half()
    with torch.no_grad():
        layer.weight.mul_(1e-6)
    sparse = attach(layer, {"weight": torch.ones(16, 16) > 0})
    optimizer = SparseAdamW(sparse.parameters(), lr=1e-7, stochastic_rounding=True)
    addresses = []  # kept from being given out again
    for _ in range(3):
        layer(torch.ones(2, 16).half()).sum().backward()
        optimizer.step()
        addresses.append(layer._parameters["weight"].data)
        clone_data(layer)
    with torch.no_grad():
        layer.weight.data = layer.weight.data + 1e-6
    with pytest.raises(AttachError, match=r"'weight'.*another tensor"):
        optimizer.step()


# Devices ("meta" is the second one of any machine).


def test_optimizer_state_that_stayed_behind(run):
    leaf = run.sparse.leaves["up.weight"]
    clone_data(run.model)  # as a move does: other memory
    run.optimizer.state[leaf]["exp_avg_sq"] = run.optimizer.state[leaf]["exp_avg_sq"].to("meta")
    with pytest.raises(
        AttachError, match=r"AdamW's 'exp_avg_sq' of 'up.weight' is on meta, its leaf on cpu.*load_"
    ):
        run.step()
    assert run.moved() == []


def test_a_parameter_on_another_device(run):
    up = run.model.up
    up._parameters["weight"] = nn.Parameter(torch.zeros(24, 8, device="meta"))
    with pytest.raises(AttachError, match=r"'up.weight'.*\(24, 8\) on meta.*\(24, 8\) on cpu"):
        run.optimizer.step()


@pytest.mark.gpu
def test_a_weight_moved_without_its_leaf(run):
    run.model.up._parameters["weight"].data = run.model.up._parameters["weight"].data.cuda()
    with pytest.raises(AttachError, match=r"'up.weight'.*leaf is on cpu, its weight on cuda:0"):
        run.optimizer.step()


def test_the_check_costs_no_reads(run, monkeypatch):
    """Nothing that waits for a GPU: no value is read while nothing has moved."""
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", str(function)))
            return function(*args, **(kwargs or {}))

    with Watch():
        writeback._check(run.optimizer)
    assert set(seen) <= {"data_ptr", "__get__", "__hash__"}, seen
