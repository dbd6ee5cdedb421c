"""Upload an adapter to the hub, with a card that says what it is."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparseft.io.card import CARD_MARK, model_card
from sparseft.io.hub import first_line, hub_api
from sparseft.io.safetensors_v1 import DEFAULT_FILE, save_adapter

if TYPE_CHECKING:
    from sparseft.adapter import Adapter

__all__ = ["push_adapter"]

_CARD = "README.md"


def push_adapter(
    adapter: Adapter,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    compact: bool = False,
    dtype: torch.dtype | None = None,
) -> str:
    """Upload ``adapter``; documented behaviour and errors are those of `Adapter.push_to_hub`."""
    api = hub_api(token)
    sent = adapter if dtype is None else adapter.to(dtype=dtype)
    with tempfile.TemporaryDirectory(prefix="sparseft-push-") as scratch:
        file = save_adapter(sent, Path(scratch), compact=compact)  # checked before anything is sent
        try:
            return _upload(api, sent, file, repo_id, revision, private, commit_message, create_pr)
        except Exception as error:
            _explain(error, repo_id)
            raise


def _upload(
    api: Any,
    adapter: Adapter,
    file: Path,
    repo_id: str,
    revision: str | None,
    private: bool | None,
    commit_message: str | None,
    create_pr: bool,
) -> str:
    from huggingface_hub import CommitOperationAdd

    # Of a bare name the hub makes owner/name, by the owner of the token.
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(name, branch=revision, exist_ok=True)
    operations = [CommitOperationAdd(DEFAULT_FILE, str(file))]
    if _may_write_card(api, name, revision, file.parent):
        operations.append(CommitOperationAdd(_CARD, model_card(adapter, name).encode()))
    commit = api.create_commit(
        name,
        operations,
        commit_message=commit_message or f"Upload adapter {adapter.name}",
        revision=revision,
        create_pr=create_pr,
    )
    return str(commit.commit_url)


def _may_write_card(api: Any, name: str, revision: str | None, scratch: Path) -> bool:
    """Whether there is no card yet, or one that was written here."""
    if not api.file_exists(name, _CARD, revision=revision):
        return True
    # Into a cache of its own, which goes away: the user's would keep a card about to change.
    path = api.hf_hub_download(name, _CARD, revision=revision, cache_dir=scratch / "cache")
    return CARD_MARK in Path(path).read_text(encoding="utf-8", errors="replace")


def _explain(error: Exception, repo_id: str) -> None:
    """Raise what a refusal or a silence of the hub means here; return for any other error."""
    response = getattr(error, "response", None)
    if response is not None:
        if response.status_code in (401, 403):
            raise PermissionError(
                f"cannot push to {repo_id!r}: the hub refused ({first_line(error)}). Log in with "
                "hf auth login, or pass a token that may write there."
            ) from error
        raise OSError(
            f"cannot push to {repo_id!r}: the hub answered with an error ({first_line(error)})."
        ) from error
    from_network = type(error).__module__.split(".")[0] in ("requests", "httpx", "httpx2")
    if from_network or isinstance(error, ConnectionError):
        raise ConnectionError(
            f"cannot push to {repo_id!r}: the hub does not answer ({first_line(error)})."
        ) from error
