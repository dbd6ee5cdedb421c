"""`run.py ranks`: memory and bytes exchanged of several ranks, measured small, predicted large.

Measured: small models in 2 and 4 gloo processes beside their predictions. On paper: 7b, 13b and 30b
in bf16 on GPUs. Bytes only: processes that share a machine are not timed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseft._text import human_bytes
from sparseft.benchmarking import results_folder, write_results
from sparseft.benchmarking.results import markdown_table

__all__ = ["main", "measured_table", "paper_table"]

# Model and task: a classifier with a head of its own, and a decoder with an untied output layer.
_SMALL = (
    "encoder:4x128x5000,classification",
    "encoder:4x128x5000,mlm",
    "decoder:4x128x5000,causal",
)
_LARGE = ("7b", "13b", "30b")
# As near as bytes of two runs of one code can be: drawn masks divide unevenly over ranks.
_WITHIN = 0.02


def main(arguments: list[str], *, results: Path) -> int:
    """Measure, predict, write; 1 where bytes differ or memory is further off than it should be."""
    import torch

    from sparseft.profiling.profiles import profile
    from sparseft.profiling.workload import Workload

    parser = argparse.ArgumentParser(
        prog="run.py ranks", description="Memory and bytes exchanged of several ranks."
    )
    parser.add_argument("--model", nargs="*", default=list(_SMALL), help="measured: MODEL,TASK")
    parser.add_argument("--large", nargs="*", default=list(_LARGE), help="on paper")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4], help="measured")
    parser.add_argument("--paper-ranks", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--density", nargs="+", type=float, default=[0.001, 0.01, 0.1])
    parser.add_argument("--ways", nargs="+", default=["attached", "lora", "dense"])
    parser.add_argument("--batch", type=int, default=4, help="of each measured rank")
    parser.add_argument("--length", type=int, default=64, help="of the measured ones")
    parser.add_argument("--out", type=Path, help="folder of the results; left out: results/")
    parser.add_argument("--name", default="ranks", help="name of the result files")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    measured, paper = [], []
    for model, ranks, sharding in itertools.product(options.model, options.ranks, ("ddp", "fsdp")):
        name, _, task = model.partition(",")
        work = Workload(model=name, task=task or "auto", batch=options.batch, length=options.length)
        densities = [d for d in options.density if d >= 0.01] or options.density
        found = profile(
            work, densities, ways=options.ways, world_size=ranks, sharding=sharding, threads=1
        )
        measured.append(_plain(found))
        print(f"\n{model}, {ranks} ranks, {sharding}\n{measured_table([measured[-1]])}", flush=True)
    for model, sharding in itertools.product(options.large, ("ddp", "fsdp")):
        work = Workload(model=model, dtype="bf16", batch=1, length=2048, checkpointing=True)
        for ranks in options.paper_ranks:
            if ranks == 1 and sharding == "fsdp":
                continue  # one rank is one rank
            found = profile(
                work,
                options.density,
                ways=options.ways,
                device="cuda",
                world_size=ranks,
                sharding=sharding,
                predict_only=True,
            )
            paper.append(_plain(found))
        print(f"\n{model}, {sharding}\n{paper_table(paper[-1:])}", flush=True)
    wrong = [fault for one in measured for fault in faults(one)]
    print("\n".join(wrong))
    text = f"## Measured\n{measured_table(measured)}\n## On paper\n{paper_table(paper)}\n"
    tiny = any(model.startswith("tiny") for model in options.model)
    folder = options.out or results_folder(results, passed=not (wrong or tiny))
    path = write_results(
        folder, options.name, {"measured": measured, "paper": paper, "faults": wrong}, text
    )
    print(f"written to {path}")
    return 1 if wrong else 0


def _plain(found: Any) -> dict[str, Any]:
    """Return a profile as JSON, without what the file says once."""
    from sparseft.profiling.report import profile_json

    data = profile_json(found)
    del data["provenance"]
    return data


def faults(found: Mapping[str, Any]) -> list[str]:
    """Return what is not as predicted, in words."""
    said = []
    for row in found["rows"]:
        name = f"{found['workload']['model']}, {found['world_size']} {found['sharding']}"
        name = f"{name}, {row['label']}"
        if row["measured"] is None:
            said.append(f"{name}: not measured: {row['not_measured']}")
        elif row["exchange_measured"] != row["exchange_predicted"]:
            said.append(f"{name}: other bytes than predicted: {row['exchange_measured']}")
        elif abs(row["error"]) > _WITHIN:
            said.append(f"{name}: peak predicted {row['error']:+.1%} off")
    return said


def measured_table(profiles: list[dict[str, Any]]) -> str:
    """Return predicted beside measured, a row a way."""
    rows = []
    for found, row in _rows(profiles):
        work, same = found["workload"], row["exchange_measured"] == row["exchange_predicted"]
        sent = row["exchange_measured"] or {}
        rows.append(
            {
                "model": f"{work['model']} {work['task']}",
                "ranks": f"{found['world_size']} {found['sharding']}",
                "way": row["label"],
                "predicted": human_bytes(row["predicted"]["peak"]),
                "measured": human_bytes(row["measured"]["peak"]) if row["measured"] else "-",
                "error": "" if row["error"] is None else f"{100 * row['error']:+.2f} %",
                **{part: f"{sent[part]:,}" if sent.get(part) else "-" for part in _PARTS},
                "same": "yes" if same else "no",
            }
        )
    heads = {
        "model": "model",
        "ranks": "ranks",
        "way": "way",
        "predicted": "peak of a rank, predicted",
        "measured": "measured",
        "error": "error",
        **_PARTS,
        "same": "bytes as predicted",
    }
    return markdown_table(rows, heads).rstrip()


_PARTS = {
    "all_reduced": "all-reduced",
    "all_gathered": "all-gathered",
    "reduce_scattered": "reduce-scattered",
    "broadcast": "broadcast",
}


def paper_table(profiles: list[dict[str, Any]]) -> str:
    """Return what each rank holds by number of ranks, and what it exchanges, a row a way."""
    counts = sorted({found["world_size"] for found in profiles})
    alone = {
        (found["workload"]["model"], row["label"]): row
        for found, row in _rows(profiles)
        if found["world_size"] == 1
    }
    by_way: dict[tuple[str, str, str], dict[int, Any]] = {}
    for found, row in _rows(profiles):
        key = found["workload"]["model"], found["sharding"], row["label"]
        by_way.setdefault(key, {})[found["world_size"]] = row
    rows = []
    for (model, sharding, label), found in by_way.items():
        found.setdefault(1, alone.get((model, label)))
        last = next(found[n] for n in reversed(counts) if found.get(n) is not None)
        sent = last["exchange_predicted"] or {}
        rows.append(
            {
                "model": f"{model} {sharding}",
                "way": label,
                "trained": f"{last['trainable']:,}",
                **{f"n{n}": _peak(found.get(n)) for n in counts},
                **{part: human_bytes(sent[part]) if sent.get(part) else "-" for part in _SENT},
            }
        )
    heads = {"model": "model", "way": "way", "trained": "trained"}
    heads |= {f"n{n}": f"peak, {n} rank{'s' * (n > 1)}" for n in counts}
    return markdown_table(rows, heads | _SENT).rstrip()


_SENT = {name: _PARTS[name] for name in ("all_reduced", "all_gathered", "reduce_scattered")}
_SENT["on_the_wire"] = "a ring sends, most ranks"


def _peak(row: Mapping[str, Any] | None) -> str:
    return human_bytes(row["predicted"]["peak"]) if row and row["predicted"] else "-"


def _rows(profiles: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(found, row) for found in profiles for row in found["rows"]]
