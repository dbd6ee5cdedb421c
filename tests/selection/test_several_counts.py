"""Lists of counts and densities: several masks from one computation of the scores.

That each is what its count alone gives is checked for every method in test_conformance.py.
"""

from __future__ import annotations

import pytest

from sparseft import select
from sparseft.errors import MaskError

NUMEL = 116


class TestSeveralCounts:
    """A list of counts: scores that are computed once, not once for each."""

    def test_of_densities(self, pair):
        base, tuned = pair()
        several = select(tuned, density=[0.5, 0.1], base=base)
        assert [masks.nnz for masks in several] == [58, 12]
        assert several[1].equals(select(tuned, density=0.1, base=base))
        [alone] = select(tuned, density=[0.1], base=base)
        assert alone.equals(several[1])

    @pytest.mark.parametrize("scope", ["global", "tensor", "row"])
    def test_scores_are_computed_once(self, scope, pair):
        _, tuned = pair()
        asked = []

        def score(name, parameter):
            asked.append(name)
            return parameter.abs()

        select(tuned, "function", nnz=[5, 50, 20], fn=score, scope=scope)
        assert asked == list(select(tuned, "random", nnz=0))

    @pytest.mark.parametrize("scope", ["global", "tensor", "row"])
    def test_differences_are_taken_once(self, scope, pair, monkeypatch):
        from sparseft.ops import streaming_topk
        from sparseft.selection import differences

        base, tuned = pair()
        taken = []

        def count(new, old, of=streaming_topk.difference):
            taken.append(new.numel())
            return of(new, old)

        monkeypatch.setattr(streaming_topk, "difference", count)
        monkeypatch.setattr(differences, "difference", count)
        select(tuned, nnz=[5, 50, 20], base=base, scope=scope)
        assert sum(taken) == NUMEL

    @pytest.mark.parametrize("scope", ["global", "tensor"])
    def test_where_kernels_read_the_tensors(self, scope, pair, monkeypatch):
        """Then each count is a launch over the same pairs; no difference is formed for it here."""
        from sparseft.selection import scopes

        base, tuned = pair()
        walked = select(tuned, nnz=[5, 50, 0], base=base, scope=scope)
        launched = []

        def launch(pairs, nnz, of=scopes.topk_differences):
            launched.append(nnz)
            return of(pairs, nnz)

        monkeypatch.setattr(scopes, "current_backend", lambda: "triton")
        monkeypatch.setattr(scopes, "topk_differences", launch)
        for one, other in zip(
            walked, select(tuned, nnz=[5, 50, 0], base=base, scope=scope), strict=True
        ):
            assert one.equals(other)
        assert len(launched) == 3 * (1 if scope == "global" else 7)

    def test_ready_masks_have_the_count_they_have(self, pair, tmp_path):
        base, tuned = pair()
        path = select(tuned, nnz=31, base=base).save(tmp_path / "m.safetensors")
        assert [m.nnz for m in select(tuned, "file", path=path, nnz=[31, 31])] == [31, 31]
        with pytest.raises(MaskError, match="30 entries were asked for but the masks .* have 31"):
            select(tuned, "file", path=path, nnz=[31, 30])

    def test_refusals(self, pair):
        base, tuned = pair()
        with pytest.raises(MaskError, match="nnz is an empty list"):
            select(tuned, nnz=[], base=base)
        with pytest.raises(MaskError, match="got both"):
            select(tuned, nnz=[1, 2], density=[0.1], base=base)
        with pytest.raises(MaskError, match=r"nnz is 2.5, wanted an integer"):
            select(tuned, nnz=[1, 2.5], base=base)
        with pytest.raises(MaskError, match=r"density is 7, wanted a fraction"):
            select(tuned, density=(0.1, 7), base=base)
        with pytest.raises(MaskError, match=r"nnz is '12', wanted an integer"):
            select(tuned, nnz="12", base=base)
