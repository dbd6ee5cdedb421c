"""``sparseft convert``: adapters of other projects into ours, and ours into theirs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseft.adapter import Adapter
    from sparseft.io.foreign import Conversion, Found

__all__ = ["HELP", "add_parser", "run"]

HELP = "read adapters of composable-sft, PEFT, SpIEL, RoSA; write ours as theirs"

_OURS = "sparseft"

_DESCRIPTION = """\
Reads an adapter of another project and writes ours, or the other way round. What is lost, if
anything, is said; what cannot be represented is refused. Files are taken for hostile: no pickle
runs code. Where nothing has to be chosen, conversion is not needed: every command that takes an
adapter reads these formats as they are."""

_EPILOG = """\
formats (found by the files themselves):
  composable-sft     pytorch_diff.bin                    read, write
  spiel              PEFT fork, peft_type SFT            read, write
  peft-shira         PEFT SHiRA                          read, write
  peft-sparseft      sparseft.peft, the method in PEFT   read, write
  peft-supertuning   PEFT Super-Tuning                   read, write
  rosa               PEFT fork; sparse part              read
  lora               PEFT LoRA; its largest entries      read, lossy: --density or --nnz
  masks              boolean masks by name (torch.save)  read: masks, or with --base and --tuned
                                                         an adapter of the differences

examples:
  sparseft convert cambridgeltl/xlmr-lang-sft-sw-small swahili/
      a language adapter of composable-sft, from the hub or a folder
  sparseft convert swahili/ out/ --to composable-sft
      and back
  sparseft convert shira/ out/ --base path/to/model
      SHiRA, Super-Tuning and SpIEL store no shapes; --base gives them (config.json is enough)
  sparseft convert lora/ out/ --density 0.01
      the 1 % largest entries of a LoRA's change, with the error
  sparseft convert masks.pt masks.safetensors
      masks for select(model, "file", path=...)"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "convert",
        help=HELP,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder, file, or name on the hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder or file to write")
    parser.add_argument(
        "--to", default=_OURS, metavar="FORMAT", help="what to write (default: %(default)s)"
    )
    parser.add_argument(
        "--base",
        metavar="PATH",
        help="folder or name of the base model, for shapes; with weights the adapter also gets its "
        "fingerprint",
    )
    parser.add_argument(
        "--tuned", metavar="PATH", help="with masks: folder of the tuned model, for values"
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--density", type=float, metavar="D", help="LoRA: fraction to keep")
    amount.add_argument("--nnz", type=int, metavar="N", help="LoRA: number of entries to keep")
    parser.add_argument(
        "--drop-low-rank",
        action="store_true",
        help="RoSA, Supra: leave out the low-rank part instead of refusing",
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="GLOB",
        help='tensors to leave out, e.g. "*embeddings*"',
    )
    parser.add_argument("--name", help="name of the adapter (default: the folder's)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(args: argparse.Namespace) -> int:
    """Convert and say what came out."""
    from sparseft._text import did_you_mean
    from sparseft.adapter import Adapter
    from sparseft.cli._output import quiet_transformers
    from sparseft.errors import OptionError, UnknownNameError
    from sparseft.io import adapter_file, foreign

    quiet_transformers()
    if args.to != _OURS and args.to not in foreign.writable():
        names = [_OURS, *foreign.writable()]
        written_are = f"Written are {', '.join(names)}."
        if args.to in foreign.FORMATS.names():
            raise OptionError(f"{args.to} is read, not written. {written_are}")
        raise UnknownNameError(
            f"no format {args.to!r}.{did_you_mean(args.to, names)} {written_are}"
        )
    source = _located(args.source)
    base = foreign.Base(args.base) if args.base is not None else None
    found = foreign.detect(source, base=base)
    options = {
        name: value
        for name in ("density", "nnz", "tuned", "drop_low_rank")
        if (value := getattr(args, name)) not in (None, False)
    }
    if found is not None and found.format == "masks" and "tuned" not in options:
        return _convert_masks(args, found)
    lost: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    if found is None:
        _need_adapter(source)
        adapter = Adapter.load(source)
        if options:
            raise UnknownNameError(
                f"{args.source} is an adapter of ours; --{next(iter(options)).replace('_', '-')} "
                "is for other formats."
            )
        _say_source(args.source, _OURS, adapter_file(source).stat().st_size)
        if args.name is not None:
            adapter.name = args.name
    else:
        conversion = foreign.read(found, name=args.name, **options)
        adapter, lost = conversion.adapter, conversion.lost
        _say_source(args.source, found.format, conversion.nbytes)
        _say_errors(conversion)
    if args.exclude:
        before = len(adapter) + len(adapter.dense)
        adapter = foreign.without(adapter, args.exclude)
        left = before - len(adapter) - len(adapter.dense)
        lost = (*lost, f"{left} tensors were left out (--exclude)")
    if args.to != _OURS:
        written = foreign.write(adapter, args.out, args.to, base=base, overwrite=args.overwrite)
        target, size = args.out, written.nbytes
        lost, added = (*lost, *written.lost), written.added
    else:
        _need_room(adapter_file(args.out), args.overwrite)
        target = adapter.save(args.out, overwrite=args.overwrite)
        size = target.stat().st_size
    _say_result(target, args.to, adapter, size, lost, added)
    return 0


def _located(source: str) -> Path:
    """Return the path, or the folder of a download where it can only be a name on the hub."""
    from sparseft.io.hub import download_adapter, is_hub_name

    here = Path(source)
    if not here.exists():
        if is_hub_name(source) and not here.parent.exists():
            return download_adapter(source)
        raise FileNotFoundError(
            f"nothing to convert at {source}: the path does not exist. Wanted a folder, a file, or "
            "a name on the hub (owner/name)."
        )
    return here


def _need_adapter(source: Path) -> None:
    """Say of a folder without any adapter what was looked for."""
    from sparseft._text import first_of
    from sparseft.io import adapter_file

    if source.is_dir() and not adapter_file(source).exists():
        there = sorted(p.name for p in source.iterdir())
        has = f"It has {first_of(there)}; name a file itself." if there else "It is empty."
        raise FileNotFoundError(
            f"nothing to convert in folder {source}: no adapter.safetensors (ours), no "
            f"pytorch_diff.bin (composable-sft), no adapter_config.json (PEFT). {has}"
        )


def _need_room(target: Path, overwrite: bool) -> None:
    from sparseft.errors import OptionError

    if target.exists() and not overwrite:
        raise OptionError(f"{target} exists already; add --overwrite, or give another OUT.")


def _convert_masks(args: argparse.Namespace, found: Found) -> int:
    from sparseft._text import human_bytes
    from sparseft.errors import OptionError
    from sparseft.io import foreign
    from sparseft.selection import Masks

    if args.to != _OURS:
        raise OptionError(
            f"{args.source} holds masks without values; they cannot become {args.to}. With --base "
            "and --tuned an adapter of the differences is made first."
        )
    masks = Masks.of(foreign.read_masks(found))
    target = args.out if args.out.suffix == ".safetensors" else args.out / "masks.safetensors"
    _need_room(target, args.overwrite)
    masks.save(target, overwrite=args.overwrite)
    _say_source(args.source, found.format, found.nbytes)
    print(
        f"{target}: masks, {masks.nnz:,} of {masks.numel:,} entries ({masks.density:.3%}) in "
        f"{len(masks)} tensors, {human_bytes(target.stat().st_size)}\n"
        "  no values: for an adapter give --base and --tuned; to train, select(model, 'file', "
        f"path={str(target)!r})"
    )
    return 0


def _say_source(source: str, format: str, nbytes: int) -> None:
    from sparseft._text import human_bytes

    print(f"{source}: {format}, {human_bytes(nbytes)}")


def _say_errors(conversion: Conversion) -> None:
    """Print the error of a lossy conversion, per tensor and in total."""
    from sparseft.cli._output import print_table

    if conversion.error is None:
        return
    adapter = conversion.adapter
    rows = [
        (name, f"{adapter.header(name).nnz:,}",
         f"{adapter.header(name).nnz / max(adapter.header(name).numel, 1):.2%}", f"{error:.4f}")
        for name, error in conversion.errors.items()
    ]  # fmt: skip
    rows.append(("all", f"{adapter.nnz:,}", "", f"{conversion.error:.4f}"))
    print_table(
        ("tensor", "kept", "density", "relative error"),
        rows,
        title="Relative error: Frobenius norm of what is left out, over that of the change",
    )


def _say_result(
    target: Path,
    format: str,
    adapter: Adapter,
    nbytes: int,
    lost: Sequence[str],
    added: Sequence[str],
) -> None:
    from sparseft._text import human_bytes

    numel = sum(adapter.header(name).numel for name in adapter.names)
    density = f" of {numel:,} ({adapter.nnz / numel:.3%})" if numel else ""
    whole = sum(t.numel() for t in adapter.dense.values())
    dense = f", {len(adapter.dense)} dense ({whole:,} entries)" if adapter.dense else ""
    print(
        f"{target}: {format}, {adapter.nnz:,} entries{density} in {len(adapter)} tensors{dense}, "
        f"{human_bytes(nbytes)}"
    )
    print(f"  base  {adapter.metadata.base_name or 'not said'}")
    for line in lost or ("nothing",):
        print(f"  lost  {line}")
    for line in added:
        print(f"  added {line}")
