"""Every op passes torch.library.opcheck, works under torch.compile's tracing, and has a fake."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from sparseft import ops
from sparseft.diff import SparseDiff, SparsePattern
from sparseft.ops import pack_diffs
from sparseft.ops._common import LIBRARY

namespace = torch.ops.sparseft


def samples() -> dict[str, list[tuple]]:
    """Arguments per op, with and without gradients."""
    torch.manual_seed(0)
    pattern = SparsePattern.from_mask(torch.rand(6, 5) < 0.5)
    i, n = pattern.indices, pattern.nnz
    weight = torch.randn(6, 5)
    rand = lambda *s: torch.randn(*s)  # noqa: E731
    leaf = lambda *s: torch.randn(*s, requires_grad=True)  # noqa: E731
    packed = pack_diffs([SparseDiff.from_pattern(pattern, rand(n)) for _ in range(2)])
    entries = (packed.indices, packed.counts, packed.values, packed.ordinals, packed.places)
    return {
        "compose_entries": [
            (weight, *entries, packed.block_entry, rand(2)),
            (
                leaf(6, 5), *entries[:2], leaf(2 * n), *entries[3:], packed.block_entry, leaf(2),
                "reference",
            ),
        ],
        "compose_entries_grad": [(weight, entries[0], *entries[2:], rand(2))],
        "gather_entries": [(weight, i), (leaf(6, 5), i, "reference")],
        "write_entries": [(weight, i, rand(n)), (leaf(6, 5), i, leaf(n))],
        "write_sum": [(weight, i, rand(n), rand(n)), (leaf(6, 5), i, leaf(n), leaf(n))],
        "write_entries_": [(weight, i, rand(n))],
        "write_sum_": [(weight, i, rand(n), rand(n))],
        "sampled_weight_grad": [
            (rand(2, 3, 6), rand(2, 3, 5), i),
            (leaf(4, 6), leaf(4, 5), i),
            (leaf(4, 5), leaf(4, 6), i, True),
            (rand(4, 6).bfloat16(), rand(4, 5), i),
        ],
        "sampled_weight_grad_": [(rand(n), rand(4, 6), rand(4, 5), i)],
        "spmm": [
            (rand(2, 3, 6), rand(n), i, 6, 5),
            (leaf(4, 5), leaf(n), i, 6, 5, True),
        ],
        "segment_spmm": [
            (rand(3, 2, 5), None, [rand(n)], [i], [], None, [3], 6, 5, False, ""),
            (leaf(4, 6), leaf(4, 5), [leaf(n)], [i], [], None, [3], 6, 5, True, ""),
            (
                leaf(4, 5), leaf(4, 6), [leaf(n), rand(n)], [i, i], [leaf(6), rand(6)],
                torch.tensor([2, 0, 3], dtype=torch.int32), [1, 3], 6, 5, False, "",
            ),
        ],
        "embedding_diff": [
            (
                rand(3, 2, 5), torch.randint(0, 6, (3, 2)), [rand(n)], [i], None, [3], 6,
                -1, False, "",
            ),
            (
                leaf(4, 5), torch.randint(0, 6, (4,)), [leaf(n), rand(n)], [i, i],
                torch.tensor([2, 0, 3]), [1, 3], 6, 2, True, "",
            ),
        ],
        "sampled_embedding_grad": [
            (rand(2, 3, 5), torch.randint(0, 6, (2, 3)), i, 6),
            (leaf(7, 5), torch.randint(0, 6, (7,)), i, 6, 2, True),
        ],
        "adamw_step_": [
            (
                rand(n), rand(n), rand(n), rand(n).abs(), weight, rand(n), i,
                1e-2, 0.9, 0.999, 1e-8, 0.1, 3,
            )
        ],
        "lion_step_": [
            (rand(n), rand(n), rand(n), weight, rand(n), i, 1e-2, 0.9, 0.99, 0.1),
        ],
        "sparse_step_": [
            (
                "adamw", [rand(n), rand(n)], [rand(n), rand(n)], [rand(n), rand(n)],
                [rand(n).abs(), rand(n).abs()], [], [], [weight, rand(6, 5)], [rand(n), rand(n)],
                [i, i], [torch.tensor(2.0), torch.tensor(0.0)], [0, 1], [0, 1],
                [1e-2, 0.1, 0.9, 0.999, 1e-8, 0.0] * 2, [None, None],
            ),
            (
                "lion", [rand(3, 4)], [rand(3, 4)], [rand(3, 4)], [], [], [], [], [], [],
                [torch.tensor(0.0)], [0], [0], [1e-2, 0.1, 0.9, 0.99, 0.0, 0.0], [None],
                torch.tensor(0.5), torch.tensor(0.0), 7, "reference",
            ),
        ],
        "sgd_step_": [
            (rand(n), rand(n), rand(n), weight, rand(n), i, 1e-2, 0.9, 0.0, False, 0.1, False),
            (rand(n), rand(n), None, weight, rand(n), i, 1e-2, 0.0, 0.0, False, 0.0, True, 0.5),
        ],
    }  # fmt: skip


def registered() -> set[str]:
    return {name.split("::")[1].split(".")[0] for name in LIBRARY._op_defs}


def test_every_op_has_samples():
    assert registered() == set(samples())


@pytest.mark.parametrize("name", sorted(samples()))
def test_opcheck(name):
    op = getattr(namespace, name).default
    for arguments in samples()[name]:
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", [n for n in sorted(samples()) if not n.endswith("_")])
def test_fake_agrees_on_shape_and_dtype(name):
    op = getattr(namespace, name)
    for arguments in samples()[name]:
        real = op(*arguments)
        with FakeTensorMode() as mode:
            fake = op(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
        several = isinstance(real, tuple)
        for a, b in zip(fake, real, strict=True) if several else [(fake, real)]:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_compiled_public_functions_have_no_graph_break():
    pattern = SparsePattern.from_mask(torch.rand(6, 5) < 0.5)
    indices = pattern.indices

    def step(dy, x, weight):
        values = ops.sampled_weight_grad(dy, x, pattern)
        ops.write_sum_(weight, indices, values, values)
        return ops.gather_entries(weight, indices)

    dy, x, weight = torch.randn(4, 6), torch.randn(4, 5), torch.randn(6, 5)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    theirs, mine = weight.clone(), weight.clone()
    assert torch.equal(compiled(dy, x, mine), step(dy, x, theirs))
    assert torch.equal(mine, theirs)
