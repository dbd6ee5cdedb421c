"""A folder that appears whole or not at all, and what it may take the place of."""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparseft.composition.checkpoint_card import RECIPE_FILE
from sparseft.errors import CompositionError

__all__ = ["check_outside", "check_replaceable", "new_folder"]

logger = logging.getLogger(__name__)

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


def check_replaceable(target: Path, sources: Sequence[str | os.PathLike[str]]) -> None:
    """Check that an existing ``target`` is a model's folder and that nothing still needed is in it.

    Args:
        target: the folder to be replaced; one that is not there is fine.
        sources: what is read meanwhile.

    Raises:
        CompositionError: it is no folder, no model's, or holds the working folder or a source.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise CompositionError(f"{target} is a file; give a folder to write the checkpoint into.")
    place = Path(os.path.realpath(target))
    for source in [*sources, "."]:
        path = Path(os.path.realpath(Path(source).expanduser()))
        if path.exists() and path.is_relative_to(place):
            what = "the working folder" if source == "." else f"{source}, which is read,"
            raise CompositionError(
                f"{target} would be replaced as a whole, but {what} lies in it; write to another "
                "folder."
            )
    _check_is_model(place)


def _check_is_model(folder: Path) -> None:
    """Refuse to replace a folder with contents that no merge or save_pretrained has written."""
    names = sorted(os.listdir(folder))
    weights = any(any(folder.glob(pattern)) for pattern in _WEIGHTS)
    if not names or RECIPE_FILE in names or ("config.json" in names and weights):
        return
    raise CompositionError(
        f"{folder} would be replaced as a whole, but it is no model's folder (no {RECIPE_FILE}, no "
        f"config.json with weights): {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} "
        f"({len(names)} in all) would be lost. Write to another folder, or empty this one."
    )


def check_outside(target: Path, base: Path) -> None:
    """Refuse to write into the folder of the base: a merge adds nothing to what it reads.

    Raises:
        CompositionError: ``target`` lies below ``base``.
    """
    if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(base)):
        raise CompositionError(
            f"{target} lies in the base's own folder {base}; write the checkpoint elsewhere."
        )


@contextlib.contextmanager
def new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give a hidden folder that takes the place of ``target`` when the block ends without error.

    Raises:
        FileExistsError: ``target`` has appeared meanwhile and may not be replaced: it stays, and
            the new folder lies beside it, under the name in the message.
    """
    target = Path(os.path.realpath(target))  # a link stays a link
    target.parent.mkdir(parents=True, exist_ok=True)
    # Cut, so that a long name does not pass the usual 255-byte limit with the suffix added.
    stem = os.fsencode(target.name)[:200].decode(errors="ignore")
    _name_leftovers(target, stem)
    tag = secrets.token_hex(6)
    temporary = target.with_name(f".{stem}.{tag}.tmp")
    aside = target.with_name(f".{stem}.{tag}.old")
    temporary.mkdir()
    try:
        yield temporary
        _put(temporary, target, aside, target.with_name(f"{stem}.{tag}"), overwrite)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _put(temporary: Path, target: Path, aside: Path, spare: Path, overwrite: bool) -> None:
    """Rename ``temporary`` to ``target``; without ``overwrite`` nothing there is ever moved."""
    try:
        if os.path.lexists(target):
            if not overwrite:
                raise FileExistsError(errno.EEXIST, "exists")
            check_replaceable(target, ())
            os.replace(target, aside)
        os.rename(temporary, target)  # replaces an empty folder at most
    except BaseException as bad:
        if aside.exists() and not os.path.lexists(target):
            os.replace(aside, target)
        if not temporary.exists():  # interrupted when all was done
            shutil.rmtree(aside, ignore_errors=True)
        taken = isinstance(bad, OSError) and bad.errno in _TAKEN and temporary.exists()
        if not taken and not isinstance(bad, CompositionError):
            raise
        os.rename(temporary, spare)
        why = f" {bad}" if isinstance(bad, CompositionError) else ""
        raise FileExistsError(
            f"{target} has appeared while the checkpoint was being made, and is left as it is."
            f"{why} The checkpoint is complete and lies in {spare}."
        ) from None


def _name_leftovers(target: Path, stem: str) -> None:
    """Say what earlier runs have left beside ``target``: a killed process cannot clean up."""
    ours = re.compile(rf"\.{re.escape(stem)}\.[0-9a-f]{{12}}\.(tmp|old)")
    for found in sorted(target.parent.glob(f".{glob.escape(stem)}.*")):
        match = ours.fullmatch(found.name)
        if match is None or not found.is_dir():
            continue
        what = {
            "tmp": "an unfinished checkpoint of a run that was killed (or still goes on)",
            "old": f"what {target.name} was before a run that was killed while it replaced it",
        }[match[1]]
        logger.warning("%s is %s; delete it when it is not needed", found, what)
