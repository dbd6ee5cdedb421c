"""torch.compile of forward, backward and optimizer step: eager's bits, no graph break of ours, no
recompilation as learning rates and masks move.

aot_eager runs the traced graphs unfused, so bits are comparable; Inductor's turn is in the slow
lane.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import LambdaLR

from sparseft import SparseAdamW, SparseLion, SparseSGD, attach

# Before, torch breaks a graph where a hook does something once (`sparseft.modules.traced`).
ONE_GRAPH = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"

OURS = {
    "adamw": lambda p, **o: SparseAdamW(p, lr=torch.tensor(1e-2), **o),
    "adamw8": lambda p, **o: SparseAdamW(p, lr=torch.tensor(1e-2), moment_bits=8, **o),
    "lion": lambda p, **o: SparseLion(p, lr=torch.tensor(1e-3), **o),
    "sgd": lambda p, **o: SparseSGD(p, lr=torch.tensor(1e-1), momentum=0.9, **o),
}
STOCK = {
    "fused": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "for_loop": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
}
# What torch breaks graphs at by itself: zero_grad and backward, the step that a scheduler wraps,
# and its own optimizers, which do it on purpose (`_use_grad`) and around the fused update.
BREAKS_OF_TORCH = ("zero_grad", ".backward()", "lr_scheduler", "graph_break()", "_fused_adam")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def breaks_of_ours() -> list[str]:
    if not ONE_GRAPH:
        return []
    return [
        why for why in counters["graph_break"] if not any(known in why for known in BREAKS_OF_TORCH)
    ]


def moved(sparse, seed: int, more: int = 0) -> dict[str, torch.Tensor]:
    """Return other masks for every masked tensor, with ``more`` entries than now."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, pattern in sparse.patterns.items():
        mask = torch.zeros(pattern.shape, dtype=torch.bool)
        count = min(pattern.nnz + more, mask.numel())
        mask.view(-1)[torch.randperm(mask.numel(), generator=generator)[:count]] = True
        masks[name] = mask
    return masks


def state_of(sparse, optimizer) -> list[torch.Tensor]:
    tensors = list(sparse._masked.values())
    found = [m.leaf.detach().clone() for m in tensors]
    found += [m.weight.detach().clone() for m in tensors]
    found += [x.clone() for s in optimizer.state.values() for x in s.values()]
    return found


class Small(nn.Module):
    """Tied embedding and head, a fused layer and a norm through the generic tier."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(23, 8)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 23, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(self.norm(torch.tanh(self.mix(self.emb(ids)))))


def run(kit, make, backend, *, model=None, steps=10, at=None, more=0):
    """Train with one function for forward, backward, clipping and step; return what came out.

    ``at``: steps before which masks move. Returns losses, state, and how many graphs had been
    compiled after each step.
    """
    torch.manual_seed(0)
    model = (model or kit.make)()
    sparse = attach(model, kit.masks(model, density=0.15))
    optimizer = make(list(sparse.parameters()))
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    counter = CompileCounterWithBackend(backend or "aot_eager")

    def step(ids):
        optimizer.zero_grad()
        logits = F.dropout(model(ids), 0.1)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sparse.parameters(), 0.1)
        optimizer.step()
        return loss.detach()

    call = torch.compile(step, backend=counter) if backend else step
    torch.manual_seed(5)
    losses, graphs = [], []
    for number in range(steps):
        if number in (at or ()):
            assert sparse.reselect_(moved(sparse, number, more), optimizer=optimizer) > 0
        losses.append(call(torch.randint(1, 23, (3, 7))))
        scheduler.step()
        graphs.append(counter.frame_count)
    assert kit.agrees(sparse)
    return losses, state_of(sparse, optimizer), graphs


def check_equal(eager, compiled):
    for mine, theirs in zip(compiled[:2], eager[:2], strict=True):
        assert len(mine) == len(theirs)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_whole_step_with_masks_that_move(kit):
    """Ten steps: dropout, clipping, another rate at each, masks of the same counts moved twice."""
    eager = run(kit, OURS["adamw"], None, model=Small, at=(4, 7))
    compiled = run(kit, OURS["adamw"], "aot_eager", model=Small, at=(4, 7))
    check_equal(eager, compiled)
    assert breaks_of_ours() == []
    assert len(set(compiled[2])) == 1, "recompiled after the first step"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*OURS, "fused"])
def test_a_whole_step(kind, kit):
    make = {**OURS, **STOCK}[kind]
    eager, compiled = run(kit, make, None), run(kit, make, "aot_eager")
    check_equal(eager, compiled)
    assert breaks_of_ours() == []
    assert len(set(compiled[2][1:])) == 1, "recompiled after the second step"


@pytest.mark.slow
def test_masks_of_another_count_recompile_and_are_right(kit):
    """Each count of entries is a shape of its own: a graph for it, then none."""
    eager = run(kit, OURS["adamw"], None, steps=8, at=(4,), more=2)
    compiled = run(kit, OURS["adamw"], "aot_eager", steps=8, at=(4,), more=2)
    check_equal(eager, compiled)
    graphs = compiled[2]
    assert len(set(graphs[:4])) == 1
    assert graphs[4] > graphs[3]
    assert len(set(graphs[4:])) == 1


def two_layers(dtype=torch.float32):
    """Return an attached model of two layers, a bias trained whole, with gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 5)).to(dtype)
    masks = {f"{i}.weight": torch.rand(model[i].weight.shape) < 0.2 for i in (0, 1)}
    sparse = attach(model, masks, full_params=["1.bias"])
    return sparse


def give_gradients(sparse, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in sparse.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize(
    "kind", ["adamw", "sgd", *(pytest.param(k, marks=pytest.mark.slow) for k in ("adamw8", "lion"))]
)
def test_the_step_alone_is_one_graph(kind):
    """``fullgraph=True``: hooks, state, checks and the update of every tensor, in bf16."""
    results = []
    counter = CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        sparse = two_layers(torch.bfloat16)
        optimizer = OURS[kind](sparse.parameters())
        step = torch.compile(optimizer.step, backend=counter, fullgraph=ONE_GRAPH)
        for number in range(3):
            give_gradients(sparse, number)
            (step if compiled else optimizer.step)()
            optimizer.param_groups[0]["lr"].mul_(0.5)
        results.append(state_of(sparse, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count == 1 or not ONE_GRAPH


def test_a_learning_rate_that_is_a_float_is_no_constant_for_long():
    """The second value makes a graph in which it is an input, with all of its 64 bits."""
    results = []
    counter = CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        sparse = two_layers()
        optimizer = SparseAdamW(sparse.parameters(), lr=1e-2)
        step = torch.compile(optimizer.step, backend=counter, fullgraph=ONE_GRAPH)
        for number in range(6):
            give_gradients(sparse, number)
            (step if compiled else optimizer.step)()
            optimizer.param_groups[0]["lr"] = 1e-2 / (number + 3)
        results.append(state_of(sparse, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count == 2 or not ONE_GRAPH


@pytest.mark.parametrize(
    "kind", ["fused", *(pytest.param(k, marks=pytest.mark.slow) for k in ("foreach", "for_loop"))]
)
def test_the_hook_after_a_stock_step_breaks_no_graph(kind, kit):
    """torch's optimizers break graphs around their own update; the weights are written in one."""
    sparse = two_layers()
    optimizer = STOCK[kind](sparse.parameters())
    step = torch.compile(optimizer.step, backend="aot_eager")
    for number in range(3):
        give_gradients(sparse, number)
        step()
    assert kit.agrees(sparse)
    assert all(bool((leaf != 0).all()) for leaf in sparse.leaves.values())
    assert breaks_of_ours() == []


def test_what_is_checked_at_a_step_is_checked_in_a_compiled_one(caplog):
    """A leaf without a gradient is named, once; other models and optimizers change nothing."""
    sparse = two_layers()
    optimizer = OURS["adamw"](sparse.parameters())
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizer.step, backend=counter, fullgraph=ONE_GRAPH)
    give_gradients(sparse, 0)
    sparse.leaves["1.weight"].grad = None
    step()
    step()
    said = [m for m in caplog.messages if "no gradient reached 1 of 2" in m]
    assert len(said) == 1
    assert "1.weight" in said[0]
    other = two_layers()
    give_gradients(other, 1)
    OURS["adamw"](other.parameters()).step()
    step()
    assert counter.frame_count == 1 or not ONE_GRAPH
    # It is known as one that has stepped: its state follows masks, whoever asks.
    before = optimizer.state[sparse.leaves["0.weight"]]["exp_avg"].clone()
    sparse.reselect_(moved(sparse, 3), optimizer=None)
    assert not torch.equal(optimizer.state[sparse.leaves["0.weight"]]["exp_avg"], before)


def test_no_dense_gradient_in_the_compiled_graphs(kit):
    """The traced backward of a fused layer has the sampled product, and no matrix of its shape."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    layer = nn.Linear(24, 40, bias=False)
    sparse = attach(layer, {"weight": torch.rand(40, 24) < 0.1})
    compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    torch.compile(layer, backend=compiler, fullgraph=True)(torch.randn(7, 24)).sum().backward()
    assert sparse.leaves["weight"].grad is not None
    backward = graphs[-1].graph
    assert any("sampled_weight_grad" in str(node.target) for node in backward.nodes)
    made = [n.meta["val"].shape for n in backward.nodes if n.op == "call_function"
            and isinstance(n.meta.get("val"), torch.Tensor)]  # fmt: skip
    assert made
    assert not [s for s in made if tuple(s) in ((40, 24), (24, 40))]


# Real architectures, and Inductor.


def _bert():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=24, max_position_embeddings=32)  # fmt: skip
    return BertForMaskedLM(config), {"use_cache": False}


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config), {"use_cache": False}


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=24)  # fmt: skip
    return LlamaForCausalLM(config), {"use_cache": False}


def _t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                      decoder_start_token_id=0)  # fmt: skip
    return T5ForConditionalGeneration(config), {"use_cache": False}


MODELS = {"bert": _bert, "gpt2": _gpt2, "llama": _llama, "t5": _t5}


def train_transformer(kind, compiler, *, checkpointing=None, steps=3):
    """Train every parameter of a tiny model at 20 %, dropout on; return losses and leaves."""
    torch.manual_seed(0)
    model, options = MODELS[kind]()
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    sparse = attach(model, {n: torch.rand(p.shape) < 0.2 for n, p in model.named_parameters()})
    optimizer = SparseAdamW(sparse.parameters(), lr=torch.tensor(1e-2))
    call, step = model, optimizer.step
    if compiler:
        call = torch.compile(model, backend=compiler, fullgraph=not checkpointing)
        step = torch.compile(optimizer.step, backend=compiler, fullgraph=ONE_GRAPH)
    losses = []
    torch.manual_seed(3)
    for _ in range(steps):
        ids = torch.randint(1, 40, (2, 9))
        optimizer.zero_grad()
        if kind == "t5":
            options["decoder_input_ids"] = ids
        # Not their own loss, whose first call may say something and so break a graph.
        logits = call(input_ids=ids, **options).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        step()
        losses.append(loss.detach())
    return losses, [leaf.detach().clone() for leaf in sparse.leaves.values()]


def check_transformer(kind, eager, compiled):
    """The same bits; of Llama nearly so, whose dense gradients aot_eager changes, too."""
    if kind != "llama":
        check_equal(eager, compiled)
        return
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(compiled[1], eager[1], strict=True):
        # A step of Adam is as long for a gradient of rounding errors, so a few entries may differ.
        far = (mine - theirs).abs() > 1e-3 * theirs.abs().max()
        assert int(far.sum()) <= 0.02 * far.numel() + 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_transformers_compile_without_a_break(kind):
    check_transformer(kind, train_transformer(kind, None), train_transformer(kind, "aot_eager"))


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_transformers_with_activation_checkpointing(kind, reentrant):
    """Compiled or not, recomputed activations give the bits of kept ones."""
    kept = train_transformer(kind, None)
    check_equal(kept, train_transformer(kind, None, checkpointing=reentrant))
    if not reentrant:  # torch.compile refuses to trace the reentrant kind
        check_transformer(kind, kept, train_transformer(kind, "aot_eager", checkpointing=False))


@pytest.mark.slow
@pytest.mark.skipif(not ONE_GRAPH, reason="the code of one graph is looked at")
def test_inductor_steps_in_place():
    """The kernel gets the parameters themselves: no clone of a weight before, no copy after."""
    from torch._inductor.utils import run_and_get_code

    results = []
    for compiled in (False, True):
        sparse = two_layers()
        optimizer = OURS["adamw"](sparse.parameters())
        step = torch.compile(optimizer.step, fullgraph=ONE_GRAPH)
        for number in range(3):
            give_gradients(sparse, number)
            if compiled and number == 0:
                _, code = run_and_get_code(step)
                assert len(code) == 1
                assert "torch.ops.sparseft.sparse_step_.default('adamw', [arg" in code[0]
                assert "copy_(" not in code[0]
            else:
                (step if compiled else optimizer.step)()
        results.append(state_of(sparse, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_inductor_trains_transformers(kind):
    """Its own random numbers and fusions: losses fall and stay near, not the same bits."""
    losses, _ = train_transformer(kind, "inductor", steps=6)
    eager, _ = train_transformer(kind, None, steps=6)
    assert all(bool(loss.isfinite()) for loss in losses)
    assert abs(float(losses[0] - eager[0])) < 0.5
