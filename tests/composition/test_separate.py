"""SeparateComposer on a small model: equal to merged weights, and not a weight written."""

from __future__ import annotations

import contextvars
import copy
import gc
import logging
import threading
import weakref

import pytest
import torch
from torch import nn

from sparseft import Composer, SeparateComposer, SparseDiff
from sparseft.adapter import Adapter
from sparseft.errors import BaseMismatchError, CompositionError, UnknownNameError

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 1], [1, 2, 3, 4]])
ALL = ("embed.weight", "body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias",
       "body.2.weight", "head.bias")  # fmt: skip


pytestmark = pytest.mark.usefixtures("untouched")


def merged(model, adapters, which, **options):
    """What a Composer's model gives; a copy, so that no weight of ours is written."""
    twin = copy.deepcopy(model)
    composer = Composer(twin, adapters)
    composer.switch(which, **options)
    with torch.no_grad():
        return twin(IDS)


CASES = [
    ("sw", {}),
    (["sw", "nli"], {}),
    ({"sw": 0.5, "qu": -1.5}, {}),
    (["sw", "qu", "nli"], {"method": "ties", "density": 0.7}),
]


@pytest.mark.parametrize(("which", "options"), CASES, ids=str)
def test_equals_merged_weights(separate, model, adapters, which, options):
    with separate.using(which, **options):
        got = model(IDS)
    torch.testing.assert_close(got, merged(model, adapters, which, **options))
    assert not torch.allclose(got, model(IDS))


def test_bf16_model(make_model, make_adapter):
    model = make_model(torch.bfloat16)
    adapters = {"a": make_adapter(model, 0, names=ALL)}
    with SeparateComposer(model, adapters) as handle, handle.using("a"):
        got = model(IDS)
    exact = merged(model.float(), {"a": make_adapter(model, 0, names=ALL)}, "a")
    theirs = merged(make_model(torch.bfloat16), adapters, "a")
    mine = (got.float() - exact).norm() / exact.norm()
    assert mine <= 2 * (theirs.float() - exact).norm() / exact.norm() + 2**-8


def test_embedding_has_the_bits_of_a_written_table(separate, model, adapters):
    with separate.using("sw"):
        got = model.embed(IDS)
    written = torch.nn.functional.embedding(
        IDS, model.embed.weight + adapters["sw"]["embed.weight"].to_dense()
    )
    assert torch.equal(got, written)


def test_switch_using_and_revert(separate, model):
    base = model(IDS)
    separate.switch({"sw": 0.5})
    assert separate.active == {"sw": 0.5}
    half = model(IDS)
    with separate.using("qu"):
        inner = model(IDS)
        with separate.using([]):
            assert torch.equal(model(IDS), base)
        assert torch.equal(model(IDS), inner)
    assert torch.equal(model(IDS), half)
    assert len({t.sum().item() for t in (base, half, inner)}) == 3
    separate.revert()
    assert torch.equal(model(IDS), base)
    assert separate.active == {}
    with separate.using({"sw": 0.0}):
        assert torch.equal(model(IDS), base)


ROWS = [["sw", "nli"], None, {"qu": 0.5, "nli": 1.0}, ["nli", "sw"]]


def test_every_row_has_the_bits_of_its_composition(separate, model):
    with separate.rows(ROWS):
        got = model(IDS)
    for row, which in enumerate(ROWS):
        with separate.using(which or []):
            apart = model(IDS)
        assert torch.equal(got[row], apart[row])
    # rows 0 and 3 have equal inputs, and one composition under two spellings
    assert torch.equal(got[0], got[3])
    for row, which in enumerate(ROWS):
        with separate.using(which or []):
            torch.testing.assert_close(got[row], model(IDS[row : row + 1])[0])


def test_equal_rows_are_one_group(separate, model):
    with separate.rows(["sw"] * 4):
        together = model(IDS)
    with separate.using("sw"):
        assert torch.equal(model(IDS), together)


def test_rows_through_flattened_layers(separate, model):
    """(B * T, H) in: T positions of a row together."""
    hidden = torch.randn(4, 5, 6)
    with separate.rows(["sw", "qu", None, "nli"]):
        flat = model.body(hidden.view(20, 6)).view(4, 5, 6)
        assert torch.equal(flat, model.body(hidden))


def test_rows_repeat_for_beams(separate, model):
    twice = IDS[:2].repeat_interleave(2, 0)
    with separate.rows(["sw", "qu"], repeat=2):
        got = model(twice)
    with separate.rows(["sw", "sw", "qu", "qu"]):
        assert torch.equal(model(twice), got)


def test_rows_repeat_where_a_layer_has_one_row_for_each(separate, model):
    """As the encoder has when `generate` repeats the decoder's rows alone."""
    hidden = torch.randn(2, 5, 6)
    with separate.rows(["sw", "qu"]):
        expected = model.body(hidden)
    with separate.rows(["sw", "qu"], repeat=3):
        assert torch.equal(model.body(hidden), expected)
        assert torch.equal(model.body(hidden.repeat_interleave(3, 0))[::3], expected)
        assert torch.equal(model.body(hidden.view(10, 6)).view(2, 5, 6), expected)
        assert torch.equal(model(IDS[:2]), model(IDS[:2].repeat_interleave(3, 0))[::3])
        with pytest.raises(CompositionError, match=r"2 compositions \(repeat=3\).*of 4 rows"):
            model(IDS)
        with pytest.raises(CompositionError, match=r"ids of shape \(1, 3\)"):
            model.embed(torch.tensor([[1, 2, 3]]))  # shared by two rows, or by six?


@pytest.mark.parametrize("repeat", [1.5, 0, True, "2", None])
def test_repeat_must_be_a_count(separate, repeat):
    with pytest.raises(CompositionError, match=r"repeat=.*integer from 1"):
        with separate.rows(["sw"], repeat=repeat):
            pass


def test_methods_in_rows(separate, model, adapters):
    options = {"method": "ties", "density": 0.5}
    with separate.rows([["sw", "qu"], "nli", None, ["sw", "qu"]], **options):
        got = model(IDS)
    torch.testing.assert_close(got[0], merged(model, adapters, ["sw", "qu"], **options)[0])
    torch.testing.assert_close(got[1], merged(model, adapters, "nli", **options)[1])


def test_wrong_number_of_rows(separate, model):
    with separate.rows(["sw", "qu", "nli"]):
        with pytest.raises(CompositionError, match=r"given 3 compositions.*4 rows.*\(4, 4\)"):
            model(IDS)
        with pytest.raises(CompositionError, match=r"'body.0.weight'.*\(4, 6\).*not 3 rows"):
            model.body(torch.randn(4, 6))
        with pytest.raises(CompositionError, match=r"\(7, 3, 6\), which is not 3 rows"):
            model.body(torch.randn(7, 3, 6))
        with pytest.raises(CompositionError, match=r"\(6, 3, 6\), which is not 3 rows"):
            model.body(torch.randn(6, 3, 6))  # tokens first?
        with pytest.raises(CompositionError, match=r"ids of shape \(3,\)"):
            model.embed(torch.tensor([1, 2, 3]))
    for bad in ("sw", [], {"sw": 1.0}, 3, None):
        with pytest.raises(CompositionError, match="one composition per row"):
            with separate.rows(bad):
                pass


def test_shared_positions_are_given_to_every_row(separate, model):
    ids = torch.tensor([[1, 2, 3]])
    with separate.rows(["sw", None]):
        got = model.embed(ids)
    assert got.shape == (2, 3, 6)
    assert torch.equal(got[1], model.embed(ids)[0])
    assert not torch.equal(got[0], got[1])


def test_heads_replace_whole_rows(model, make_adapter):
    adapters = {
        "a": make_adapter(model, 0, dense=True),
        "b": make_adapter(model, 1, dense=True),
        "c": make_adapter(model, 2),
    }
    x = torch.randn(4, 6)
    with SeparateComposer(model, adapters) as handle:
        with handle.rows(["b", "c", "a", "b"]):
            got = model.classifier(x)
        expected = [
            nn.functional.linear(x[r], a.dense["classifier.weight"], a.dense["classifier.bias"])
            for r, a in ((0, adapters["b"]), (2, adapters["a"]), (3, adapters["b"]))
        ]
        torch.testing.assert_close(got[[0, 2, 3]], torch.stack(expected))
        assert torch.equal(got[1], model.classifier(x)[1])
        with handle.using("a"):
            torch.testing.assert_close(model.classifier(x)[2], got[2])
        with pytest.raises(CompositionError, match="both hold all of 'classifier"):
            with handle.using(["a", "b"]):
                pass
    with SeparateComposer(model, adapters, dense="skip") as handle, handle.using("a"):
        assert torch.equal(model.classifier(x), nn.functional.linear(
            x, model.classifier.weight, model.classifier.bias))  # fmt: skip


def test_set_diffs_replace_entries(model, make_adapter, adapters):
    tuned = {"t": make_adapter(model, 3, mode="set", names=ALL), "sw": adapters["sw"]}
    with SeparateComposer(model, tuned) as handle:
        with handle.using(["t", "sw"]):
            got = model(IDS)
        with pytest.raises(CompositionError, match="mode 'set'"):
            with handle.using({"t": 0.5}):
                pass
    torch.testing.assert_close(got, merged(model, tuned, ["t", "sw"]))


def test_tied_weights_have_the_diff_in_both_places(model, make_adapter):
    only = {"a": make_adapter(model, 0, names=("embed.weight",))}
    hidden = torch.randn(2, 6)
    with SeparateComposer(model, only) as handle, handle.using("a"):
        assert not torch.equal(model.embed(IDS), model.embed.weight[IDS])
        written = model.embed.weight + only["a"]["embed.weight"].to_dense()
        torch.testing.assert_close(
            model.head(hidden), nn.functional.linear(hidden, written, model.head.bias)
        )


# Threads, handles, life.


def test_threads_do_not_disturb_each_other(separate, model):
    names = ["sw", "qu", "nli", None]
    expected = {}
    for name in names:
        with separate.using(name or []):
            expected[name] = model(IDS)
    meet, wrong = threading.Barrier(4, timeout=20), []

    def serve(name):
        with separate.using(name or []):
            meet.wait()
            for _ in range(5):
                with torch.no_grad():
                    if not torch.equal(model(IDS), expected[name]):
                        wrong.append(name)
            meet.wait()

    threads = [threading.Thread(target=serve, args=(n,)) for n in names]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_switch_holds_in_new_threads_and_blocks_in_copied_contexts(separate, model):
    found = {}
    separate.switch("sw")

    def look(key):
        found[key] = model(IDS)

    thread = threading.Thread(target=look, args=("thread",))
    thread.start()
    thread.join()
    assert torch.equal(found["thread"], model(IDS))
    with separate.using("qu"):
        context = contextvars.copy_context()
        inside = model(IDS)
    context.run(look, "copy")
    assert torch.equal(found["copy"], inside)
    separate.revert()


def test_two_handles_add_up_and_close_apart(model, adapters):
    base = model(IDS)
    one = SeparateComposer(model, {"sw": adapters["sw"]})
    two = SeparateComposer(model, {"qu": adapters["qu"]})
    one.switch("sw")
    first = model(IDS)
    with two.using("qu"):
        both = model(IDS)
    torch.testing.assert_close(both, merged(model, adapters, ["sw", "qu"]), rtol=1e-4, atol=1e-5)
    two.close()
    assert torch.equal(model(IDS), first)
    one.close()
    assert torch.equal(model(IDS), base)


def test_close_leaves_the_stock_model(model, adapters):
    stock = {
        n: (type(m), dict(m._forward_hooks), dict(m._forward_pre_hooks), set(m.__dict__))
        for n, m in model.named_modules()
    }
    handle = SeparateComposer(model, adapters)
    with handle.using("sw"):
        model(IDS)
    handle.close()
    for name, module in model.named_modules():
        cls, after, before, attributes = stock[name]
        assert type(module) is cls
        assert dict(module._forward_hooks) == after
        assert dict(module._forward_pre_hooks) == before
        assert set(module.__dict__) == attributes
    with pytest.raises(CompositionError, match="closed"):
        handle.switch("sw")
    handle.close()


def test_a_closed_handle_is_freed(model, adapters):
    handle = SeparateComposer(model, adapters)
    handle.switch("sw")
    model(IDS)
    handle.close()
    alive = weakref.ref(handle)
    del handle
    gc.collect()
    assert alive() is None


def test_an_error_inside_a_block_leaves_it(separate, model):
    base = model(IDS)
    with pytest.raises(ZeroDivisionError):
        with separate.using("sw"):
            1 / 0  # noqa: B018
    assert torch.equal(model(IDS), base)


def test_adapters_come_and_go(separate, model, make_adapter):
    separate.add("new", make_adapter(model, 7))
    assert separate.names() == ["sw", "qu", "nli", "new"]
    with separate.using("new"):
        model(IDS)
    separate.remove("new")
    with pytest.raises(UnknownNameError, match="'new'"):
        separate.switch("new")
    with pytest.raises(CompositionError, match="here already"):
        separate.add("sw", make_adapter(model, 7))
    assert separate["sw"].nnz > 0


def test_compositions_are_kept_and_shared(separate):
    with separate.rows([["sw", "nli"], "nli"]):
        pass
    blender = separate._blender
    kept = len(blender._blends)
    with separate.rows([["nli", "sw"], "nli"]):
        assert len(blender._blends) == kept


def test_a_compiled_model_follows_the_compositions():
    small, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    adapter = Adapter({"0.weight": SparseDiff.from_dense(torch.randn(4, 4))})
    compiled = torch.compile(small, backend="aot_eager")
    with torch.no_grad():
        base = compiled(x)  # before there is a handle
        with SeparateComposer(small, {"a": adapter}) as handle:
            for which in ([], "a", {"a": 0.5}, []):
                with handle.using(which):
                    assert torch.equal(compiled(x), small(x))
            with handle.rows([None, "a"]):
                assert torch.equal(compiled(x), small(x))
                assert torch.equal(compiled(x)[0], base[0])
                assert not torch.equal(compiled(x)[1], base[1])
                torch._dynamo.reset()
                with pytest.raises(torch._dynamo.exc.Unsupported):
                    torch.compile(small, backend="aot_eager", fullgraph=True)(x)
        assert torch.equal(compiled(x), base)
    torch._dynamo.reset()


# Refusals.


def test_unknown_names_show_the_nearest(separate):
    with pytest.raises(UnknownNameError, match="'swa'.*'sw'"):
        separate.switch("swa")
    with pytest.raises(UnknownNameError, match="'nlli'.*'nli'"):
        with separate.rows(["sw", ["nlli"]]):
            pass
    with pytest.raises(UnknownNameError, match="linear"):
        separate.switch("sw", method="liner")


def test_another_base_is_refused(make_model, make_adapter, model, adapters):
    stranger = make_adapter(make_model(seed=5), 4)
    with SeparateComposer(model, {**adapters, "x": stranger}) as handle:
        with pytest.raises(BaseMismatchError, match="'x' was made on another base"):
            with handle.rows(["sw", "x"]):
                pass


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_coefficients_must_be_finite(separate, bad):
    with pytest.raises(CompositionError, match="finite"):
        with separate.rows([{"sw": bad}]):
            pass


def test_an_overflowing_sum_is_refused(model, make_adapter):
    large = {n: make_adapter(model, i, scale=10.0) for i, n in enumerate("ab")}
    with SeparateComposer(model, large) as handle:
        with pytest.raises(CompositionError, match="overflows"):
            handle.switch({"a": 3e38, "b": 3e38})
        assert handle.active == {}


def test_other_kinds_of_modules_are_refused_by_name():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.conv = nn.Conv1d(4, 4, 3)
            self.scale = nn.Parameter(torch.ones(4))
            self.own = Twice(4, 4)
            self.table = nn.Embedding(5, 4, max_norm=1.0)

    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Odd()
    reasons = {
        "attention.in_proj_weight": "MultiheadAttention",
        "attention.out_proj.weight": "forward attention never calls",
        "conv.weight": "Conv1d",
        "scale": "Odd",
        "own.weight": "Twice.*forward of its own",
        "table.weight": "max_norm",
    }
    for name, reason in reasons.items():
        parameter = model.get_parameter(name)
        adapter = Adapter({name: SparseDiff.from_dense(torch.ones(parameter.shape))})
        with SeparateComposer(model, {"a": adapter}) as handle:
            with pytest.raises(CompositionError, match=f"'{name}'.*{reason}.*Use Composer"):
                handle.switch("a")


def test_weights_that_are_read_and_not_called_are_reported(caplog):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.last = nn.Linear(3, 3)

        def forward(self, x):
            return self.last(nn.functional.linear(x, self.layer.weight))

    model = Reader()
    adapter = Adapter({n: SparseDiff.from_dense(torch.ones(3, 3)) for n in
                       ("layer.weight", "last.weight")})  # fmt: skip
    with SeparateComposer(model, {"a": adapter}) as handle, handle.using("a"):
        with caplog.at_level(logging.WARNING, "sparseft"):
            model(torch.ones(1, 3))
            model(torch.ones(1, 3))
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1
    assert "layer.weight" in said[0]
    assert "last.weight" not in said[0]
