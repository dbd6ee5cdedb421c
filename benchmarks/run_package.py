"""`run.py ops` and `run.py profile`: what the package's commands measure, kept as results."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from sparseft.benchmarking import results_folder, write_results
from sparseft.cli.main import main as sparseft

__all__ = ["ops", "profile"]

# One of each kind that this project is for, as large as a laptop can train.
_MODELS = ("encoder:12x384x25000", "xlmr-base", "decoder:6x512x32000")


def ops(arguments: list[str], *, results: Path) -> int:
    parser = argparse.ArgumentParser(
        prog="run.py ops",
        description="`sparseft bench --op all`, its JSON lines and tables kept as NAME.jsonl, .md.",
        epilog="Other options are those of `sparseft bench`: --size, --device, --threads, --clock.",
    )
    parser.add_argument("--out", type=Path, help="folder of the results; left out: results/")
    parser.add_argument("--name", default="ops", help="name of the result files")
    options, rest = parser.parse_known_args(arguments)
    named = [] if "--op" in rest else ["--op", "all"]
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=results.parent) as scratch:
        made = Path(scratch)
        status = sparseft(["bench", *named, *rest, "--out", str(made), "--no-plot"])
        written = made / "bench.jsonl"
        if not written.is_file():
            return status or 1
        # Part of the operations, or shapes that mean nothing, are no committed result.
        whole = bool(named) and "tiny" not in rest
        folder = options.out or results_folder(results, passed=status == 0 and whole)
        folder.mkdir(parents=True, exist_ok=True)
        for file in (written, made / "bench.md"):
            # Not `replace`: the folder may be on another disk.
            shutil.move(file, folder / f"{options.name}{file.suffix}")
    print(f"written to {folder / options.name}.jsonl")
    return status


def profile(arguments: list[str], *, results: Path) -> int:
    import torch
    from page_tables import memory_table

    from sparseft.profiling.profiles import DEFAULT_DENSITIES, profile
    from sparseft.profiling.report import profile_json
    from sparseft.profiling.workload import Workload

    parser = argparse.ArgumentParser(
        prog="run.py profile", description="Memory and time of a step, predicted and measured."
    )
    parser.add_argument("--model", nargs="+", default=list(_MODELS), help="see sparseft profile")
    parser.add_argument("--density", nargs="+", type=float, default=list(DEFAULT_DENSITIES))
    parser.add_argument(
        "--ways",
        nargs="+",
        default=["attached", "gradient_mask", "dense", "lora", "shira", "frozen"],
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder of the results; left out: results/")
    parser.add_argument("--name", default="profile", help="name of the result files")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found = []
    for model in options.model:
        work = Workload(
            model=model, dtype=options.dtype, batch=options.batch, length=options.length
        )
        found.append(
            profile_json(
                profile(
                    work,
                    options.density,
                    ways=options.ways,
                    device=options.device,
                    steps=options.steps,
                    threads=options.threads,
                )
            )
        )
        print(f"\n{model}\n{memory_table(found[-1])}", flush=True)
    table = "\n".join(f"## {one['workload']['model']}\n{memory_table(one)}\n" for one in found)
    # A way that cannot run here says why; one that was neither predicted nor measured is a failure.
    passed = all(row["predicted"] or row["measured"] for one in found for row in one["rows"])
    tiny = any(model.startswith("tiny") for model in options.model)
    folder = options.out or results_folder(results, passed=passed and not tiny)
    path = write_results(folder, options.name, {"profiles": found}, table)
    print(f"written to {path}")
    return 0 if passed else 1
