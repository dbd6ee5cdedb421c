"""Run mergekit on small dense models and keep what it gave, for `test_mergekit.py`.

    pip install mergekit==0.1.5
    python tests/composition/make_mergekit_results.py

writes ``mergekit_results.safetensors`` beside this file: inputs, results, and in the metadata what
was run by which versions. Nothing of mergekit itself is in there.

A case is a call of mergekit's `merge_tensors` with the base first. Models are dense tensors; those
called ``sparse*`` differ from the base in some entries only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PATH = Path(__file__).with_name("mergekit_results.safetensors")
SEED = 20240531
SHAPE = (20, 16)
NNZ = 96  # entries in which a sparse model differs
DRAWS = 400

DENSE = ["dense0", "dense1", "dense2"]
SPARSE = ["sparse0", "sparse1", "sparse2"]


def inputs(seed: int) -> dict[str, Tensor]:
    """Base, three models that differ everywhere, three that differ in NNZ entries; fp32."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(SHAPE, generator=generator) * 0.2
    made = {"base": base, "zero": torch.zeros(SHAPE)}
    for i in range(3):
        change = torch.randn(SHAPE, generator=generator) * 0.02
        made[f"dense{i}"] = base + change
        here = torch.randperm(base.numel(), generator=generator)[:NNZ]
        keep = torch.zeros(base.numel(), dtype=torch.bool).index_fill_(0, here, True)
        made[f"sparse{i}"] = torch.where(keep.view(SHAPE), base + change, base)
        made[f"delta{i}"] = change
    for name in ("base", "dense0", "dense1"):
        made[f"{name}_bf16"] = made[name].bfloat16()
    made["plus"] = torch.tensor([1.0, 2.0, 0.0, 5.0])
    made["minus"] = torch.tensor([-1.0, 0.0, 0.0, 1.0])
    made["nothing"] = torch.zeros(4)
    return made


def share(count: int, of: int) -> float:
    """A share that mergekit's rounding down turns into ``count`` of ``of``."""
    return (count + 0.5) / of if count < of else 1.0


def cases() -> dict[str, dict[str, Any]]:
    """Name -> method, models, parameters (one of each per model), base, seed of torch."""
    out: dict[str, dict[str, Any]] = {}

    def case(name: str, method: str, models: list[str], *, base: str = "base", **p: Any) -> None:
        seed = p.pop("torch_seed", None)
        out[name] = {"method": method, "models": models, "base": base, "parameters": p}
        if seed is not None:
            out[name]["torch_seed"] = seed

    size = SHAPE[0] * SHAPE[1]
    for kind, models, nnz in (("dense", DENSE, size), ("sparse", SPARSE, NNZ)):
        case(f"linear-{kind}", "task_arithmetic", models, weight=[0.7, -0.4, 1.0])
        for keep in (1.0, 0.5, 0.25):
            density = [share(round(keep * nnz), size)] * 3
            name = f"ties-{kind}-{keep}"
            case(f"{name}-equal", "ties", models, weight=[1.0] * 3, density=density)
            case(f"{name}-weights", "ties", models, weight=[1.0, 0.5, 2.0], density=density)
            case(
                f"{name}-none",
                "ties",
                models,
                weight=[1.0, -0.5, 2.0],
                density=density,
                normalize=False,
            )
            case(f"{name}-count", "ties_by_count", models, weight=[1.0, 0.5, 2.0], density=density)
        for keep, gamma in ((0.5, 0.125), (0.75, 0.0), (0.25, 0.5), (0.5, 1 / 128), (0.75, 0.5)):
            if kind == "sparse" and keep + gamma > 1:
                continue  # mergekit fills up with the zeros around a sparse model's entries
            case(
                f"breadcrumbs-{kind}-{keep}-{gamma}",
                "breadcrumbs",
                models,
                weight=[0.7, -0.4, 1.0],
                density=[share(round(keep * nnz), size)] * 3,
                gamma=[share(int(gamma * nnz), size) if int(gamma * nnz) else 0.0] * 3,
            )
    # Random methods: with weight 1 for one model and 0 for the others, on a base of zeros, the
    # result is that model's sparsified delta; the same torch seed gives the same masks again.
    deltas = ["delta0", "delta1", "delta2"]
    random: list[tuple[str, str, dict[str, Any]]] = [
        ("dare_linear", "dare_linear", {}),
        ("dare_linear-plain", "dare_linear", {"rescale": False}),
        ("dare_ties", "dare_ties", {}),
        ("della", "della", {"epsilon": [0.2] * 3}),
    ]
    for name, method, extra in random:
        common = {"base": "zero", "density": [0.5] * 3, "torch_seed": 7, **extra}
        case(f"{name}-merged", method, deltas, weight=[1.0, 0.5, 2.0], **common)
        for i in range(3):
            alone = [float(i == j) for j in range(3)]
            case(f"{name}-part{i}", method, deltas, weight=alone, normalize=False, **common)
    # Where the two differ on purpose.
    case("zero-sum", "ties", ["plus", "minus"], base="nothing", weight=[1.0, 1.0])
    case("negative", "ties", ["dense0"], weight=[-1.0])
    case("both-signs", "ties", DENSE[:2], weight=[1.0, -0.9])
    case("bf16-one", "ties", ["dense0_bf16"], base="base_bf16", weight=[1.0])
    case("bf16-one-0.75", "ties", ["dense0_bf16"], base="base_bf16", weight=[0.75])
    case("bf16-sum", "task_arithmetic", ["dense0_bf16", "dense1_bf16"], base="base_bf16",
         weight=[0.7, 0.4])  # fmt: skip
    case("second-alone", "dare_linear", ["delta1"], base="zero", weight=[1.0], density=[0.5],
         torch_seed=7)  # fmt: skip
    return out


def merger() -> Callable[[dict[str, Tensor], dict[str, Any]], Tensor]:
    """Return a function that runs a case by mergekit."""
    from mergekit.merge_methods import get
    from mergekit.merge_methods.api import merge_tensors
    from mergekit.merge_methods.generalized_task_arithmetic import (
        ConsensusMethod,
        GeneralizedTaskArithmeticMerge,
    )
    from mergekit.sparsify import SparsificationMethod

    by_count = GeneralizedTaskArithmeticMerge(  # not under a name of its own
        consensus_method=ConsensusMethod.count,
        sparsification_method=SparsificationMethod.magnitude,
        default_normalize=True,
        default_rescale=False,
        method_name="ties_by_count",
        method_pretty_name=None,
        method_reference_url=None,
    )

    def run(tensors: dict[str, Tensor], case: dict[str, Any]) -> Tensor:
        if "torch_seed" in case:
            torch.manual_seed(case["torch_seed"])
        method = by_count if case["method"] == "ties_by_count" else get(case["method"])
        models = [tensors[case["base"]], *(tensors[m] for m in case["models"])]
        return merge_tensors(models, method, parameters=case["parameters"], base_index=0)

    return run


def how_often(run: Callable[..., Tensor], tensors: dict[str, Tensor], **how: Any) -> Tensor:
    """Return how many of DRAWS merges kept each entry of ``delta0``, in int16."""
    kept = torch.zeros(SHAPE, dtype=torch.int16)
    parameters = {"weight": [1.0], "density": [0.5], **how.pop("parameters", {})}
    for seed in range(DRAWS):
        case = {"base": "zero", "models": ["delta0"], "parameters": parameters, **how}
        kept += (run(tensors, {**case, "torch_seed": seed}) != 0).short()
    return kept


def results(seed: int) -> dict[str, Tensor]:
    """Everything that the file holds; inputs under ``in.``, results under ``out.``."""
    tensors, run = inputs(seed), merger()
    out = {f"in.{name}": t for name, t in tensors.items()}
    out.update({f"out.{name}": run(tensors, case).contiguous() for name, case in cases().items()})
    out["often.dare_linear"] = how_often(run, tensors, method="dare_linear")
    out["often.della"] = how_often(
        run, tensors, method="della_linear", parameters={"epsilon": [0.3]}
    )
    return out


def one_column() -> str:
    """What mergekit says of a della merge of a (4, 1) tensor."""
    case = {
        "base": "zero", "models": ["one"], "method": "della",
        "parameters": {"weight": [1.0], "density": [0.5], "epsilon": [0.1]},
    }  # fmt: skip
    try:
        merger()({"zero": torch.zeros(4, 1), "one": torch.ones(4, 1)}, case)
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "merged"


def main() -> None:
    from importlib.metadata import version

    metadata = {
        "made_by": "tests/composition/make_mergekit_results.py",
        "mergekit": version("mergekit"),
        "torch": torch.__version__,
        "seed": str(SEED),
        "draws": str(DRAWS),
        "cases": json.dumps(cases()),
        "della_of_one_column": one_column(),
    }
    save_file(results(SEED), PATH, metadata)


if __name__ == "__main__":
    main()
