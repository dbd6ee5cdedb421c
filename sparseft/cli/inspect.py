"""``sparseft inspect``: what adapter files hold, and how much several have in common."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseft.composition.overlap import Overlap
    from sparseft.summary import AdapterSummary

__all__ = ["HELP", "add_parser", "run"]

HELP = "what an adapter holds; with several, how much they have in common"

_ENCODINGS = {
    "plain": "plain (positions)",
    "gaps": "compact (gaps, where smaller)",
}

_EPILOG = """\
examples:
  sparseft inspect swahili/                  tensors, sizes, where it comes from
  sparseft inspect swahili/ nli/             and the overlap of their masks
  sparseft inspect swahili/ --json           for programs

Every byte of ours is checked while reading: a damaged file ends with exit code 2 and the tensor's
name. Of other formats all is checked that can be: composable-sft's files store checksums, those of
PEFT in safetensors do not."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "inspect",
        help=HELP,
        description="Reads adapters and prints what is in them; no model is needed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", nargs="+", metavar="FILE", help="adapter folders or files")
    parser.add_argument(
        "--tensors", action=argparse.BooleanOptionalAction, default=True, help="a row per tensor"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    from sparseft.adapter import Adapter
    from sparseft.cli._paths import need_adapters
    from sparseft.composition.overlap import Overlap, jaccard

    need_adapters(args.adapter)
    adapters = [Adapter.load(path) for path in args.adapter]
    summaries = [adapter.summary() for adapter in adapters]
    shared = {
        (i, j): jaccard(adapters[i], adapters[j]) for i, j in combinations(range(len(adapters)), 2)
    }
    pairs = {pair: sum(rows.values(), Overlap()) for pair, rows in shared.items()}
    if args.json:
        data = {
            "adapters": [
                {"path": path, **_facts(summary)}
                for path, summary in zip(args.adapter, summaries, strict=True)
            ],
            "overlaps": [
                {"a": args.adapter[i], "b": args.adapter[j], "common": o.common,
                 "union": o.union, "opposed": o.opposed, "jaccard": o.jaccard}
                for (i, j), o in pairs.items()
            ],
        }  # fmt: skip
        print(json.dumps(data, indent=2, ensure_ascii=False))
        return 0
    for path, summary in zip(args.adapter, summaries, strict=True):
        _print_adapter(path, summary, tensors=args.tensors)
    if len(adapters) > 1:
        _print_overlaps(args.adapter, pairs)
        if args.tensors and len(adapters) == 2:
            _print_shared(shared[0, 1])
    return 0


def _facts(summary: AdapterSummary) -> dict[str, Any]:
    meta = summary.metadata
    return {
        "name": summary.name,
        "digest": summary.digest,
        "base": meta.base_name,
        "fingerprinted_tensors": len(meta.fingerprint.tensors) if meta.fingerprint else 0,
        "method": meta.method,
        "density_asked": meta.density,
        "seed": meta.seed,
        "versions": dict(meta.versions),
        "parents": list(meta.parents),
        "extra": dict(meta.extra),
        "nnz": summary.nnz,
        "numel": summary.numel,
        "density": summary.density,
        "dense_numel": summary.dense_numel,
        "nbytes": summary.nbytes,
        "encoding": summary.encoding,
        "stored_nbytes": summary.stored_nbytes,
        "bytes_per_entry": summary.bytes_per_entry,
        "tensors": [
            {**vars(row), "shape": list(row.shape)} for row in summary.tensors
        ],
    }  # fmt: skip


def _print_adapter(path: str, summary: AdapterSummary, *, tensors: bool) -> None:
    from sparseft._text import human_bytes
    from sparseft.cli._output import print_table

    meta = summary.metadata
    print(f"{path}: adapter {summary.name!r}")
    facts = {
        "digest": summary.digest,
        "base": meta.base_name or "not said",
        "fingerprint": f"{len(meta.fingerprint.tensors)} base tensors"
        if meta.fingerprint
        else "none",
        "method": meta.method or "not said",
        "seed": "none" if meta.seed is None else str(meta.seed),
        "versions": ", ".join(f"{n} {v}" for n, v in sorted(meta.versions.items())),
        "parents": ", ".join(p[:12] for p in meta.parents) or "none",
        "extra": json.dumps(dict(meta.extra), ensure_ascii=False) if meta.extra else "none",
        "indices": _ENCODINGS[summary.encoding],
    }
    for what, value in facts.items():
        print(f"  {what:<12} {value}")
    if tensors:
        header = ("tensor", "kind", "shape", "nnz", "density", "mode", "dtype", "mean |v|",
                  "max |v|", "size", "B/entry")  # fmt: skip
        rows = [
            (
                row.name,
                row.kind,
                "x".join(map(str, row.shape)) or "scalar",
                f"{row.nnz:,}",
                f"{row.density:.2%}",
                row.mode,
                row.dtype,
                f"{row.mean_abs:.3g}",
                f"{row.max_abs:.3g}",
                human_bytes(row.stored_nbytes),
                f"{row.stored_nbytes / row.nnz:.2f}" if row.nnz else "-",
            )
            for row in summary.tensors
        ]
        print_table(header, rows)
    diffs = sum(row.kind == "diff" for row in summary.tensors)
    dense = f" and {summary.dense_numel:,} dense" if summary.dense_numel else ""
    size = human_bytes(summary.stored_nbytes)
    if summary.stored_nbytes != summary.nbytes:
        size += f" ({human_bytes(summary.nbytes)} in memory)"
    print(
        f"  {summary.nnz:,} of {summary.numel:,} entries ({summary.density:.3%}) in {diffs} "
        f"tensors{dense}, {size}, {summary.bytes_per_entry:.2f} bytes per entry\n"
    )


_COLUMNS = ("common", "union", "Jaccard", "opposed", "of common")


def _cells(o: Overlap) -> tuple[str, ...]:
    share = f"{o.opposed / o.common:.1%}" if o.common else "-"
    return f"{o.common:,}", f"{o.union:,}", f"{o.jaccard:.4f}", f"{o.opposed:,}", share


def _print_overlaps(paths: Sequence[str], pairs: Mapping[tuple[int, int], Overlap]) -> None:
    from sparseft.cli._output import print_table

    rows = [(f"{paths[i]} | {paths[j]}", *_cells(o)) for (i, j), o in pairs.items()]
    title = "Overlap of masks; opposed: shared entries of opposite signs"
    print_table(("pair", *_COLUMNS), rows, title=title)


def _print_shared(shared: Mapping[str, Overlap]) -> None:
    from sparseft.cli._output import print_table

    print_table(("tensor", *_COLUMNS), [(name, *_cells(o)) for name, o in shared.items()])
