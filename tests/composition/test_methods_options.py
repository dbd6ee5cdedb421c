"""Options of the methods: what is refused and how it is said."""

from __future__ import annotations

import pytest

from sparseft.composition import compose_adapters, methods
from sparseft.errors import OptionError, UnknownNameError

SHARES = [m for m in sorted(methods()) if "density" in methods()[m].options]
SEEDED = [m for m in sorted(methods()) if "seed" in methods()[m].options]
ELECTING = [m for m in sorted(methods()) if "vote" in methods()[m].options]


def test_who_has_which():
    assert SHARES == ["breadcrumbs", "dare_linear", "dare_ties", "della", "ties"]
    assert SEEDED == ["dare_linear", "dare_ties", "della"]
    assert ELECTING == ["dare_ties", "della", "ties"]


@pytest.mark.parametrize("method", SHARES)
@pytest.mark.parametrize(
    "density", [0, -0.1, 1.0001, float("nan"), float("inf"), True, "0.5", None], ids=repr
)
def test_density_is_a_share(method, density):
    with pytest.raises(OptionError, match=r"density is .*, wanted a number in \(0, 1\]: the "):
        methods()[method].fn(density=density)


@pytest.mark.parametrize("method", SEEDED)
@pytest.mark.parametrize("seed", [0.5, "1", None, True], ids=repr)
def test_seeds_are_integers(method, seed):
    with pytest.raises(OptionError, match="seed is .*, wanted an integer"):
        methods()[method].fn(density=0.5, seed=seed)


@pytest.mark.parametrize("method", ELECTING)
def test_choices_of_the_election(method):
    with pytest.raises(OptionError, match="vote is 'sums', wanted one of .*Did you mean 'sum'"):
        methods()[method].fn(vote="sums")
    with pytest.raises(OptionError, match="mean is 'average', wanted one of 'count', 'weights'"):
        methods()[method].fn(mean="average")


@pytest.mark.parametrize("gamma", [-0.1, 1, 1.5, float("nan"), "0.1", True], ids=repr)
def test_gamma(gamma):
    with pytest.raises(OptionError, match=r"gamma is .*, wanted a number in \[0, 1\): the share"):
        methods()["breadcrumbs"].fn(gamma=gamma)


@pytest.mark.parametrize(
    ("density", "epsilon"),
    [(0.5, 0.5), (0.05, 0.07), (0.95, 0.07), (0.5, -0.1), (0.5, float("nan")), (0.5, "0.1"),
     (1.0, float("inf"))],
)  # fmt: skip
def test_the_window_lies_between_0_and_1(density, epsilon):
    with pytest.raises(OptionError, match=r"epsilon is .* at density .*density - epsilon > 0"):
        methods()["della"].fn(density=density, epsilon=epsilon)


def test_windows_that_fit():
    for density, epsilon in ((1.0, 0.3), (0.5, 0.49), (0.6, 0.4), (0.2, 0)):
        assert methods()["della"].fn(density=density, epsilon=epsilon).rule.kind == "elect"


def test_ranks():
    with pytest.raises(OptionError, match="ranks is 'rows', wanted one of 'row', 'tensor'.*'row'"):
        methods()["della"].fn(ranks="rows")


@pytest.mark.parametrize("least", [0, -1, 1.5, "2", True], ids=repr)
def test_least(least):
    with pytest.raises(OptionError, match="least is .*, wanted an integer from 1: how many"):
        methods()["consensus"].fn(least=least)


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf"), "1", None], ids=repr)
def test_strength(strength):
    with pytest.raises(OptionError, match="strength is .*, wanted a finite number >= 0"):
        methods()["consensus"].fn(strength=strength)


def test_unknown_methods_and_options(make_model, make_adapter):
    adapters = [make_adapter(make_model(), 0)]
    with pytest.raises(UnknownNameError, match="no composition method 'tie'. Did you mean 'ties'"):
        compose_adapters(adapters, method="tie")
    with pytest.raises(UnknownNameError, match="'ties' has no option 'densty'.*mean 'density'"):
        compose_adapters(adapters, method="ties", densty=0.5)
    with pytest.raises(OptionError, match="density is 2"):
        compose_adapters(adapters, method="ties", density=2)


@pytest.mark.parametrize("method", SEEDED)
def test_a_rescaling_that_overflows_is_named(method, make_model, make_adapter):
    adapter = make_adapter(make_model(), 0, scale=1e38)
    options = {"epsilon": 0.005} if method == "della" else {}
    with pytest.raises(ValueError, match="is not finite: rescaling overflows torch.float32"):
        compose_adapters([adapter], method=method, density=0.01, seed=1, **options)
