"""Which entries of a mask have ever got a gradient: one bool each, kept where masks move.

An entry that never gets one (the embedding of a token that does not occur, an unused expert) takes
its share of the budget and stays at its base.
"""

from __future__ import annotations

import base64
import weakref
import zlib

import torch
from torch import Tensor

from sparseft.modules.leaves import MaskedParameter
from sparseft.modules.transplant import Moves

__all__ = ["SeenEntries", "forget", "seen_entries", "watch_entries"]


class SeenEntries:
    """Entries of one masked parameter that a gradient has reached.

    Args:
        masked: whose entries; not kept.

    Attributes:
        flags: (nnz,) bool, in the order of the leaf.
        looks: how many optimizer steps have been looked at.
    """

    def __init__(self, masked: MaskedParameter) -> None:
        self.pattern = masked.pattern
        self.flags = torch.zeros(masked.pattern.nnz, dtype=torch.bool, device=masked.leaf.device)
        self.looks = 0
        self._all = False

    @torch.no_grad()
    def look(self, masked: MaskedParameter) -> None:
        """Note which entries have a gradient now. Does not wait for the device.

        NaN (after an overflow under loss scaling) says nothing and does not count.
        """
        self.follow(masked)
        self.looks += 1
        grad = masked.leaf.grad
        if grad is not None and not self._all:
            self.flags |= grad.abs() > 0

    def follow(self, masked: MaskedParameter) -> None:
        """Bring the flags to where the mask is now: kept entries keep theirs.

        A new entry whose diff is not zero comes from a state that was loaded: it had gradients.
        """
        now = masked.pattern
        if now is self.pattern:
            return
        flags = self.flags.to(masked.leaf.device)
        if not now.equals(self.pattern.to(now.device)):
            moves = Moves.between(self.pattern.indices.to(now.device), now.indices)
            flags = moves.apply(flags) | (masked.leaf.detach() != 0)
            self._all = False
        self.pattern, self.flags = now, flags

    def unseen(self) -> Tensor:
        """Return the number of entries without a gradient so far, a 0-d int64 tensor."""
        return self.flags.numel() - self.flags.sum()

    def settle(self, unseen: int) -> None:
        """Stop looking where nothing is left to see; ``unseen`` is what `unseen` gave."""
        self._all = unseen == 0

    # -- going on later ---

    def encode(self) -> str:
        """Return the flags as text for JSON: eight to a byte, compressed; "" where all are set."""
        if bool(self.flags.all()):
            return ""
        padded = torch.zeros(-(-self.flags.numel() // 8) * 8, dtype=torch.uint8)
        padded[: self.flags.numel()] = self.flags.cpu()
        shifts = 1 << torch.arange(8, dtype=torch.uint8)
        packed = (padded.view(-1, 8) * shifts).sum(1, dtype=torch.uint8)
        return base64.b64encode(zlib.compress(bytes(packed.tolist()))).decode()

    def restore(self, text: str | None, looks: int, masked: MaskedParameter) -> None:
        """Take back what `encode` gave; None: entries whose diff is not zero count as seen.

        Raises:
            ValueError: not what `encode` gives for a mask of this size.
        """
        self.follow(masked)
        if text is None:
            known = masked.leaf.detach() != 0
        elif not text:
            known = torch.ones_like(self.flags)
        else:
            count = self.flags.numel()
            raw = zlib.decompress(base64.b64decode(text, validate=True))
            if len(raw) != -(-count // 8):
                raise ValueError(f"flags of {len(raw)} bytes, wanted {-(-count // 8)}")
            packed = torch.tensor(list(raw), dtype=torch.uint8)
            shifts = torch.arange(8, dtype=torch.uint8)
            known = ((packed[:, None] >> shifts) & 1).bool().view(-1)[:count]
        self.flags |= known.to(self.flags.device)
        self.looks = max(self.looks, looks)


# A masked parameter's flags live as long as it does.
_watched: weakref.WeakKeyDictionary[MaskedParameter, SeenEntries] = weakref.WeakKeyDictionary()


def watch_entries(masked: MaskedParameter) -> SeenEntries:
    """Return the flags of a masked parameter, new ones if it has none."""
    if masked not in _watched:
        _watched[masked] = SeenEntries(masked)
    return _watched[masked]


def seen_entries(masked: MaskedParameter) -> SeenEntries | None:
    """Return the flags of a masked parameter, None where nobody has looked."""
    found = _watched.get(masked)
    if found is not None:
        found.follow(masked)
    return found if found is not None and found.looks else None


def forget(masked: MaskedParameter) -> None:
    """Drop the flags of a masked parameter: a new run begins."""
    _watched.pop(masked, None)
