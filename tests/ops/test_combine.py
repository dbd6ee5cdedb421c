"""The combination rules against their definition, entry by entry in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft.errors import OptionError
from sparseft.ops.combine import KINDS, MEANS, VOTES, Rule, Term, combine

RULES = [
    Rule("sum"),
    *(Rule("elect", vote=v, mean=m) for v in VOTES for m in MEANS),
    Rule("largest"),
    *(Rule("consensus", least=n, strength=s) for n, s in ((1, 1.0), (2, 0.4), (3, 0.0))),
]
IDS = [f"{r.kind}-{r.vote}-{r.mean}-{r.least}-{r.strength}" for r in RULES]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def sign(x) -> int:
    return int(x > 0) - int(x < 0)


def one_entry(met, rule, real):
    """What the (coefficient, value) pairs that meet at one entry become.

    ``real`` is np.float32 or np.float64, whose every operation is rounded once.
    """
    weighted = [(c, real(v) if c == 1 else real(v) * real(c)) for c, v in met]
    if rule.kind == "largest":
        best = real(-0.0)
        for i, (_, w) in enumerate(weighted):
            if i == 0 or abs(w) > abs(best):
                best = w
        return best
    total = real(-0.0)
    for _, w in weighted:
        total = total + w
    if rule.kind == "sum":
        return total
    if rule.kind == "consensus":
        theirs = [abs(w) >= abs(total - w) * real(rule.strength) for _, w in weighted]
        return total if sum(theirs) >= rule.least else real(-0.0)
    votes = sign(total) if rule.vote == "sum" else sign(sum(sign(w) for _, w in weighted))
    agreeing = [(c, w) for c, w in weighted if sign(w) == votes and votes]
    chosen, divisor = real(-0.0), real(0)
    for c, w in agreeing:
        chosen = chosen + w
        divisor = divisor + (real(1) if rule.mean == "count" else real(abs(c)))
    return chosen if rule.mean == "none" or not agreeing else chosen / divisor


def definition(terms, size, rule):
    double = any(t.values.dtype == torch.float64 for t in terms)
    real, dtype = (np.float64, torch.float64) if double else (np.float32, torch.float32)
    at = [[] for _ in range(size)]
    for term in terms:
        places = range(size) if term.positions is None else term.positions.tolist()
        for place, value in zip(places, term.values.to(dtype).tolist(), strict=True):
            at[place].append((term.coeff, value))
    return torch.tensor([float(one_entry(met, rule, real)) for met in at], dtype=dtype)


def bits(x):
    return x.view(torch.int64 if x.dtype == torch.float64 else torch.int32).tolist()


def random_terms(count, size, dtype=torch.float32, *, seed=0, share=0.6, coeffs=None):
    """Terms whose values repeat, cancel and vanish now and then."""
    generator = torch.Generator().manual_seed(seed)
    terms = []
    for i in range(count):
        here = torch.rand(size, generator=generator) < share
        here[i % size] = True
        values = torch.randn(int(here.sum()), generator=generator)
        coarse = torch.rand(values.shape, generator=generator) < 0.5
        values = torch.where(coarse, values.round(), values).to(dtype)
        positions = here.nonzero().flatten().int()
        coeff = (1.0, -0.3, 0.7, 2.0, -1.0)[i % 5] if coeffs is None else coeffs[i]
        terms.append(Term(coeff, values, None if here.all() else positions))
    return terms


@pytest.mark.parametrize("rule", RULES, ids=IDS)
class TestDefinition:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_every_entry(self, rule, count, dtype):
        terms = random_terms(count, 211, dtype, seed=count)
        assert bits(combine(terms, 211, rule)) == bits(definition(terms, 211, rule))

    def test_whole_and_partial_terms_of_either_index_dtype(self, rule):
        for share in (0.3, 1.0):
            terms = random_terms(3, 50, share=share)
            wide = [
                t._replace(positions=torch.arange(50))
                if t.positions is None
                else t._replace(positions=t.positions.long())
                for t in terms
            ]
            assert bits(combine(wide, 50, rule)) == bits(combine(terms, 50, rule))

    def test_inputs_stay(self, rule):
        terms = random_terms(3, 40)
        before = [(t.values.clone(), t.positions.clone()) for t in terms]
        combine(terms, 40, rule)
        for term, (values, positions) in zip(terms, before, strict=True):
            assert torch.equal(term.values, values)
            assert torch.equal(term.positions, positions)

    def test_no_entries(self, rule):
        out = combine([Term(0.5, torch.empty(0), None)], 0, rule)
        assert out.shape == (0,)
        assert out.dtype == torch.float32

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def test_any_values(self, rule, data):
        size = data.draw(st.integers(1, 6))
        number = st.one_of(
            st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -2.0]),
            st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
        )
        terms = []
        for _ in range(data.draw(st.integers(1, 4))):
            where = data.draw(st.lists(st.integers(0, size - 1), unique=True).map(sorted))
            values = data.draw(st.lists(number, min_size=len(where), max_size=len(where)))
            coeff = data.draw(number.filter(bool))
            positions = torch.tensor(where, dtype=torch.int32)
            terms.append(Term(coeff, torch.tensor(values), positions))
        assert bits(combine(terms, size, rule)) == bits(definition(terms, size, rule))


class TestExamples:
    """By hand, so that the definition above is not its own witness."""

    A, B, C = (
        torch.tensor(v)
        for v in ([3.0, -1.0, 2.0, 2.0], [1.0, -2.0, -2.0, 0.0], [-1.0, 2.0, 0.0, 0.0])
    )

    def out(self, *args, coeffs=(1.0, 1.0, 1.0), **options):
        terms = [Term(c, v, None) for c, v in zip(coeffs, (self.A, self.B, self.C), strict=True)]
        return combine(terms, 4, Rule(*args, **options)).tolist()

    def test_sum(self):
        assert self.out("sum") == [3.0, -1.0, 0.0, 2.0]

    def test_elect_takes_the_mean_of_those_that_agree(self):
        assert self.out("elect") == [2.0, -1.5, 0.0, 2.0]
        assert self.out("elect", mean="none") == [4.0, -3.0, 0.0, 2.0]

    def test_elect_divides_by_magnitudes_of_coefficients(self):
        got = self.out("elect", mean="weights", coeffs=(2.0, -1.0, 1.0))
        # weighted: [6, -2, 4, 4], [-1, 2, 2, 0], [-1, 2, 0, 0]
        assert got == [3.0, 2.0, 2.0, 2.0]

    def test_votes_may_differ_from_the_sum(self):
        # first entry: +3, +1, -1; make it +5, -1, -1
        terms = [Term(1.0, torch.tensor([v]), None) for v in (5.0, -1.0, -1.0)]
        assert combine(terms, 1, Rule("elect", vote="sum")).tolist() == [5.0]
        assert combine(terms, 1, Rule("elect", vote="count")).tolist() == [-1.0]

    def test_largest_takes_the_first_of_equals(self):
        assert self.out("largest") == [3.0, -2.0, 2.0, 2.0]

    def test_consensus_counts_who_recognises_the_sum(self):
        # sums [3, -1, 0, 2]. Entry 0: |3|>=|3-3|, |1|>=|3-1| no, |-1|>=|3+1| no: one.
        assert self.out("consensus", least=1) == [3.0, -1.0, 0.0, 2.0]
        # entry 1: |-1|>=|0| yes, |-2|>=|1| yes, |2|>=|3| no: two
        assert self.out("consensus", least=2) == [0.0, -1.0, 0.0, 0.0]
        # entry 2: |2|>=|-2| twice, 0>=0 from the third
        assert self.out("consensus", least=3, strength=0.0) == [3.0, -1.0, 0.0, 2.0]

    @pytest.mark.parametrize(
        "rule", [Rule("elect"), Rule("elect", vote="count")], ids=["sum", "count"]
    )
    def test_a_tie_elects_nobody_and_keeps_the_sign_of_zero(self, rule):
        out = combine(
            [Term(1.0, torch.tensor([2.0]), None), Term(-1.0, torch.tensor([2.0]), None)], 1, rule
        )
        assert out.tolist() == [0.0]
        assert torch.signbit(out).all()
        assert torch.signbit(torch.tensor([-0.0]) + out).all()


# At strength 0 everybody recognises every entry it has, zeros included.
@pytest.mark.parametrize(
    "rule",
    [r for r in RULES if r.strength],
    ids=[i for r, i in zip(RULES, IDS, strict=True) if r.strength],
)
def test_an_absent_entry_is_a_zero(rule):
    terms = random_terms(4, 97)
    dense = []
    for term in terms:
        values = torch.zeros(97)
        values[slice(None) if term.positions is None else term.positions.long()] = term.values
        dense.append(Term(term.coeff, values, None))
    assert torch.equal(combine(dense, 97, rule), combine(terms, 97, rule))


def test_one_wide_term_makes_the_result_wide():
    out = combine(
        [Term(0.1, torch.ones(2), None), Term(1.0, torch.ones(2).double(), None)], 2, Rule("sum")
    )
    assert out.dtype == torch.float64
    assert out.tolist() == [1.1, 1.1]


@pytest.mark.parametrize("least", [1, 2, 5])
def test_no_more_are_asked_to_agree_than_there_are(least):
    rule = Rule("consensus", least=least)
    assert rule.among(1).least == 1
    assert rule.among(0).least == 1
    assert rule.among(3).least == min(least, 3)
    assert rule.among(9) is rule


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "elct"}, "kind is 'elct', wanted one of 'sum'.*Did you mean 'elect'"),
        ({"vote": "counts"}, "vote is 'counts', wanted one of 'sum', 'count'.*'count'"),
        ({"mean": "weight"}, "mean is 'weight', wanted one of.*Did you mean 'weights'"),
        ({"least": 0}, "least is 0, wanted a number of adapters, 1 or more"),
        ({"strength": -0.1}, "strength is -0.1, wanted a finite number >= 0"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"strength": float("inf")}, "strength is inf"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_rules_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        Rule(**options)


def test_every_kind_is_covered():
    assert {r.kind for r in RULES} == set(KINDS)
