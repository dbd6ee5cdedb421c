"""Our methods beside mergekit's on the same models: equal where the mathematics is, and where we
differ on purpose, how.

``mergekit_results.safetensors`` holds what mergekit 0.1.5 gave; `make_mergekit_results.py` made it.
Where mergekit is installed it is run again, also on other inputs.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from sparseft import Adapter, Composer, SparseDiff
from sparseft.composition import Part
from sparseft.composition.preparation import drop, drop_by_rank

HERE = Path(__file__).parent


def _script():
    spec = importlib.util.spec_from_file_location(
        "mergekit_results", HERE / "make_mergekit_results.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()
with safe_open(SCRIPT.PATH, "pt") as file:
    META = file.metadata()
    STORED = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
CASES = json.loads(META["cases"])
INPUTS = {n.removeprefix("in."): t for n, t in STORED.items() if n.startswith("in.")}

needs_mergekit = pytest.mark.skipif(
    importlib.util.find_spec("mergekit") is None,
    reason="mergekit is not installed; `pip install mergekit==0.1.5` to run it beside ours",
)


def compose(base, tuned, weights, method, **options):
    """Base and tuned tensors through our composer: differences as sparse adapters, in fp32."""
    module = nn.Module()
    module.w = nn.Parameter(base.clone())
    adapters = {
        f"m{i}": Adapter({"w": SparseDiff.from_dense(t.float() - base.float())}, name=f"m{i}")
        for i, t in enumerate(tuned)
    }
    composer = Composer(module, adapters)
    composer.apply(dict(zip(adapters, weights, strict=True)), method=method, **options)
    return module.w.detach().clone()


def run_ours(tensors, case, method, **options):
    models = [tensors[m] for m in case["models"]]
    return compose(tensors[case["base"]], models, case["parameters"]["weight"], method, **options)


def translated(name):
    """Our method and options for a case of deterministic mathematics, or None."""
    family, *rest = name.split("-")
    if family == "linear":
        return "linear", {}
    if family == "ties":
        _, keep, how = rest
        mean = {"equal": "count", "weights": "weights", "none": "none", "count": "weights"}[how]
        vote = "count" if how == "count" else "sum"
        return "ties", {"density": float(keep), "vote": vote, "mean": mean}
    if family == "breadcrumbs":
        _, keep, gamma = rest
        return "breadcrumbs", {"density": float(keep), "gamma": float(gamma)}
    return None


SAME = {name: found for name in CASES if (found := translated(name)) is not None}


def tied(tensors, case, options):
    """Entries at which as many trimmed models go up as down: mergekit elects plus, we nobody."""
    base = tensors[case["base"]]
    signs = [
        (compose(base, [tensors[m]], [1.0], "ties", density=options["density"]) - base).sign()
        for m in case["models"]
    ]
    return (sum(signs) == 0) & (sum(s.abs() for s in signs) > 0)


def assert_same(ours, theirs, tensors, case, name="", options=None):
    """Equal up to a few roundings of the largest number in the sum, entry by entry."""
    base = tensors[case["base"]]
    if options and options.get("vote") == "count":
        undecided = tied(tensors, case, options)
        assert torch.equal(ours[undecided], base[undecided])
        assert bool((theirs[undecided] > base[undecided]).all())
        assert undecided.any() == (name != "ties-dense-1.0-count")  # three cannot draw
        ours, theirs = torch.where(undecided, base, ours), torch.where(undecided, base, theirs)
    size = base.abs()
    for model, weight in zip(case["models"], case["parameters"]["weight"], strict=True):
        size = size + (tensors[model] - base).abs() * abs(weight)
    worst = ((ours - theirs).abs() / size.clamp(min=torch.finfo(torch.float32).tiny)).max()
    assert worst <= 4 * torch.finfo(torch.float32).eps, f"{name}: {worst:.2e}"


def test_the_file_says_where_it_comes_from():
    assert META["mergekit"] == "0.1.5"
    assert META["torch"]
    assert int(META["seed"]) == SCRIPT.SEED
    assert CASES == SCRIPT.cases()
    assert SCRIPT.PATH.stat().st_size < 200_000
    assert len(SAME) == 35


class TestSameMathematics:
    @pytest.mark.parametrize("name", SAME)
    def test_deterministic_methods(self, name):
        method, options = SAME[name]
        ours = run_ours(INPUTS, CASES[name], method, **options)
        assert not torch.equal(ours, INPUTS[CASES[name]["base"]])
        assert_same(ours, STORED[f"out.{name}"], INPUTS, CASES[name], name, options)

    @pytest.mark.parametrize(
        ("name", "method", "options"),
        [
            ("dare_linear", "linear", {}),
            ("dare_linear-plain", "linear", {}),
            ("dare_ties", "ties", {"mean": "none"}),
            ("della", "ties", {"mean": "weights"}),
        ],
    )
    def test_what_follows_a_random_mask(self, name, method, options):
        """Their sparsified models, recovered one by one, merged by our rule."""
        parts = [STORED[f"out.{name}-part{i}"] for i in range(3)]
        case = {**CASES[f"{name}-merged"], "models": ["p0", "p1", "p2"]}
        tensors = {**INPUTS, **{f"p{i}": p for i, p in enumerate(parts)}}
        ours = run_ours(tensors, case, method, **options)
        assert_same(ours, STORED[f"out.{name}-merged"], tensors, case, name)

    @pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della"])
    @pytest.mark.parametrize("i", range(3))
    def test_one_factor_for_what_stays(self, name, i):
        """Theirs is what the L1 norm lost, ours 1 / density: the same in expectation."""
        delta, part = INPUTS[f"delta{i}"], STORED[f"out.{name}-part{i}"]
        kept = part != 0
        factor = part[kept] / delta[kept]
        lost = delta.double().abs().sum() / delta[kept].double().abs().sum()
        torch.testing.assert_close(factor.double(), lost.expand_as(factor), rtol=1e-6, atol=0)
        assert abs(lost - 2) > 1e-3
        if name != "della":  # which keeps the large ones more often: less norm is lost
            assert abs(lost - 2) < 0.4
            ours = drop(0.5, 0)(_part(delta))
            stays = torch.isin(_part(delta).indices, ours.indices)
            assert torch.equal(ours.values, 2 * delta.flatten()[stays])

    def test_without_rescaling_entries_stay_as_they_are(self):
        for i in range(3):
            part = STORED[f"out.dare_linear-plain-part{i}"]
            assert torch.equal(part, torch.where(part != 0, INPUTS[f"delta{i}"], 0.0))

    @pytest.mark.parametrize("method", ["dare_linear", "della"])
    def test_entries_stay_equally_often(self, method):
        """Over as many seeds, entry by entry: two samples of the same binomials."""
        delta, draws = INPUTS["delta0"], int(META["draws"])
        part = _part(delta)
        steps = [
            drop(0.5, s) if method == "dare_linear" else drop_by_rank(0.5, 0.3, "row", s)
            for s in range(draws)
        ]
        ours = sum(torch.isin(part.indices, step(part).indices).long() for step in steps)
        theirs = STORED[f"often.{method}"].long().flatten()
        if method == "dare_linear":
            expected = torch.full((delta.numel(),), 0.5)
        else:
            rank = delta.abs().argsort(dim=1).argsort(dim=1)
            expected = (0.2 + 0.6 * rank / (delta.shape[1] - 1)).flatten()
        spread = (draws * expected * (1 - expected)).sqrt()
        for sample in (ours, theirs):
            z = (sample - draws * expected) / spread
            assert z.abs().max() < 4.5
            assert 0.88 < z.std() < 1.12
        z = (ours - theirs) / (spread * 2**0.5)
        assert z.abs().max() < 4.5
        assert 0.88 < z.std() < 1.12


def _part(delta):
    at = torch.arange(delta.numel(), dtype=torch.int32)
    return Part(at, delta.flatten(), delta.shape, "w", "00" * 16)


class TestDifferencesOnPurpose:
    """What mergekit 0.1.5 does that we do not: each shown in its own result."""

    def test_a_sum_of_zero_elects_plus_there_and_nobody_here(self):
        # [1, 2, 0, 5] and [-1, 0, 0, 1]
        assert STORED["out.zero-sum"].tolist() == [1.0, 2.0, 0.0, 3.0]
        ours = run_ours(INPUTS, CASES["zero-sum"], "ties")
        assert ours.tolist() == [0.0, 2.0, 0.0, 3.0]

    def test_a_negative_weight_is_turned_around_there(self):
        base, tuned = INPUTS["base"], INPUTS["dense0"]
        theirs = STORED["out.negative"]
        torch.testing.assert_close(theirs, tuned)  # as with weight 1
        ours = run_ours(INPUTS, CASES["negative"], "ties", mean="weights")
        torch.testing.assert_close(ours, 2 * base - tuned)

    def test_weights_of_both_signs_divide_by_what_is_left_there(self):
        case = CASES["both-signs"]
        changes = [(INPUTS[m] - INPUTS["base"]).abs() for m in case["models"]]
        largest = torch.maximum(*changes)
        theirs = (STORED["out.both-signs"] - INPUTS["base"]).abs()
        ours = (run_ours(INPUTS, case, "ties", mean="weights") - INPUTS["base"]).abs()
        assert (theirs > 5 * largest).sum() > 50  # divided by 1 - 0.9
        assert bool((ours <= largest * (1 + 1e-4)).all())

    def test_one_model_is_the_identity_here_in_bf16_too(self):
        """mergekit#231: signs are right in 0.1.5 (those not elected are exact zeros), but the
        difference is rounded to bf16, so that the model does not come back.
        """
        base, tuned = INPUTS["base_bf16"], INPUTS["dense0_bf16"]
        lost = (STORED["out.bf16-one"] != tuned).sum()
        assert lost > 0
        assert (STORED["out.bf16-one-0.75"] != tuned).sum() > lost
        for mean in ("count", "weights"):
            assert torch.equal(compose(base, [tuned], [1.0], "ties", mean=mean), tuned)
        again = compose(base, [tuned], [0.75], "ties", mean="weights")
        assert torch.equal(again, tuned)  # 0.75 cancels, up to fp32

    def test_sums_are_rounded_once_here(self):
        base, case = INPUTS["base_bf16"], CASES["bf16-sum"]
        exact = base.double()
        for model, weight in zip(case["models"], case["parameters"]["weight"], strict=True):
            exact = exact + weight * (INPUTS[model].double() - base.double())
        ours = run_ours(INPUTS, case, "linear")
        error = (ours.double() - exact).abs()
        theirs = (STORED["out.bf16-sum"].double() - exact).abs()
        assert torch.equal(ours, exact.bfloat16())
        assert bool((error <= theirs).all())
        assert (error < theirs).sum() > 5

    def test_a_mask_depends_on_other_models_there(self):
        alone, beside = STORED["out.second-alone"] != 0, STORED["out.dare_linear-part1"] != 0
        assert (alone != beside).sum() > 100  # of 320: drawn anew

    def test_one_entry_in_a_row_stops_della_there(self):
        assert "Expected p_in >= 0" in META["della_of_one_column"]
        ones = [torch.ones(4, 1)]
        ours = compose(torch.zeros(4, 1), ones, [1.0], "della", density=0.5, epsilon=0.1, seed=2)
        assert set(ours.flatten().tolist()) <= {0.0, 2.0}

    def test_gamma_below_one_entry_leaves_all_in(self):
        """An older ``x[n:-0]`` is said to empty the tensor then; 0.1.5 does not, nor do we."""
        name = "breadcrumbs-sparse-0.5-0.0078125"
        case = CASES[name]
        assert case["parameters"]["gamma"] == [0.0] * 3
        moved = STORED[f"out.{name}"] != INPUTS["base"]
        assert moved.sum() > SCRIPT.NNZ // 2
        _, options = SAME[name]
        ours = run_ours(INPUTS, case, "breadcrumbs", **options)
        assert torch.equal(ours != INPUTS["base"], moved)


@needs_mergekit
class TestLive:
    def test_the_file_is_what_mergekit_gives(self):
        for name, tensor in SCRIPT.results(SCRIPT.SEED).items():
            torch.testing.assert_close(STORED[name], tensor, msg=lambda m, n=name: f"{n}: {m}")
        assert SCRIPT.one_column() == META["della_of_one_column"]

    @pytest.mark.parametrize("seed", [1, 2, 3])
    def test_other_inputs(self, seed):
        tensors, run = SCRIPT.inputs(seed), SCRIPT.merger()
        for name, (method, options) in SAME.items():
            ours = run_ours(tensors, CASES[name], method, **options)
            assert_same(ours, run(tensors, CASES[name]), tensors, CASES[name], name, options)
