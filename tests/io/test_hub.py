"""Adapters on the hub, with huggingface_hub's own client against a small hub on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sparseft.adapter import Adapter, AdapterMetadata
from sparseft.diff import SparseDiff
from sparseft.errors import AdapterFormatError, DiffError
from sparseft.io import download_adapter, model_card
from sparseft.io.card import CARD_MARK
from sparseft.io.hub import is_hub_name

FILE = "adapter.safetensors"


@pytest.fixture
def published(hub: Any, saved: Path) -> bytes:
    """The tiny adapter as me/sw, among files that nobody needs; returns its bytes."""
    content = saved.read_bytes()
    hub.add("me/sw", {FILE: content, "README.md": b"x", "model.safetensors": b"huge", "a.py": b"x"})
    return content


def test_pushed_and_loaded_by_name(hub: Any, adapter: Adapter, tmp_path: Path):
    url = adapter.push_to_hub("me/sw", token=hub.token)
    files = hub.repos["me/sw"].branches["main"]
    assert url.startswith(f"{hub.url}/me/sw/commit/")
    assert hub.messages == ["Upload adapter sw"]
    assert files[FILE] == adapter.save(tmp_path / "x").read_bytes()
    assert files["README.md"].decode() == model_card(adapter, "me/sw")
    assert any("sparseft/" in agent for agent in hub.agents)
    for load in (Adapter.load, Adapter.from_pretrained):
        loaded = load("me/sw")
        assert loaded.equals(adapter)
        assert loaded.name == "sw"
        assert loaded.metadata == adapter.metadata


def test_a_name_that_was_loaded_once_needs_no_network(hub: Any, published: bytes, adapter: Adapter):
    assert Adapter.load("me/sw").equals(adapter)
    asked = len(hub.asked)
    assert asked
    assert Adapter.load("me/sw").equals(adapter)
    assert len(hub.asked) == asked  # not a single question
    hub.stop()
    assert Adapter.load("me/sw", check="lazy").equals(adapter)
    assert Adapter.from_pretrained("me/sw", local_files_only=True).equals(adapter)
    with pytest.raises(ConnectionError, match=r"'me/qu'.*neither a path here nor in the cache"):
        Adapter.load("me/qu")
    with pytest.raises(FileNotFoundError, match=r"'me/qu' in the cache.*local_files_only=False"):
        Adapter.from_pretrained("me/qu", local_files_only=True)
    with pytest.raises(ConnectionError, match="'me/sw'.*does not answer"):
        Adapter.from_pretrained("me/sw", force_download=True)


def test_only_what_is_needed_is_fetched(hub: Any, published: bytes, tmp_path: Path):
    folder = download_adapter("me/sw", cache_dir=tmp_path / "mine")
    assert [p.name for p in folder.iterdir()] == [FILE]
    assert folder.is_relative_to(tmp_path / "mine")
    assert (folder / FILE).read_bytes() == published
    with pytest.raises(FileNotFoundError, match="in the cache"):
        download_adapter("me/sw", local_files_only=True)  # the other cache has it


@pytest.mark.parametrize(
    "files",
    [
        ["pytorch_diff.bin"],
        ["adapter_config.json", "adapter_model.safetensors"],
        ["adapter_config.json", "adapter_model.bin"],
    ],
    ids=lambda files: files[-1],
)
def test_foreign_layouts_are_fetched_whole(hub: Any, files: list[str]):
    hub.add("them/theirs", {f: f.encode() for f in [*files, "README.md", "training_args.bin"]})
    folder = download_adapter("them/theirs")
    assert sorted(p.name for p in folder.iterdir()) == sorted(files)
    (folder / files[0]).unlink()  # half a layout in the cache is none
    assert sorted(p.name for p in download_adapter("them/theirs").iterdir()) == sorted(files)


def test_revisions(hub: Any, published: bytes, adapter: Adapter, tmp_path: Path):
    older = Adapter({"w": SparseDiff.from_dense(torch.ones(2))}, name="old")
    files = {FILE: older.save(tmp_path / "old").read_bytes()}
    hub.add("me/sw", files, branch="v1")
    commit = hub.repos["me/sw"].find("v1")[0]
    assert Adapter.from_pretrained("me/sw").equals(adapter)
    assert Adapter.from_pretrained("me/sw", revision="v1").name == "old"
    assert Adapter.from_pretrained("me/sw", revision=commit).name == "old"
    hub.add("me/sw", files)  # main moves on: the cache keeps its word until asked
    assert Adapter.from_pretrained("me/sw").equals(adapter)
    assert Adapter.from_pretrained("me/sw", force_download=True).name == "old"
    assert Adapter.load("me/sw").name == "old"
    with pytest.raises(FileNotFoundError, match=r"'me/sw' at revision 'v9': .* no such revision"):
        Adapter.from_pretrained("me/sw", revision="v9")


def test_what_the_hub_does_not_give(hub: Any, published: bytes):
    with pytest.raises(FileNotFoundError, match=r"'me/nope'.*no such repository.*hf auth login"):
        Adapter.load("me/nope")
    hub.add("me/model", {"config.json": b"{}", "model.safetensors": b"", ".gitattributes": b""})
    with pytest.raises(FileNotFoundError, match=r"it has config\.json, model\.safetensors; wanted"):
        Adapter.load("me/model")
    hub.add("me/gated", {FILE: published}, gated=True)
    with pytest.raises(PermissionError, match="'me/gated' is gated: ask for access"):
        Adapter.load("me/gated")
    hub.add("me/private", {FILE: published}, private=True)
    with pytest.raises(FileNotFoundError, match="private one"):
        Adapter.load("me/private")
    assert Adapter.from_pretrained("me/private", token=hub.token).name == "sw"
    with pytest.raises(ValueError, match=r"'a/b/c' is not a name on the hub; wanted 'owner/name'"):
        Adapter.from_pretrained("a/b/c")
    hub.broken.add("GET")
    with pytest.raises(OSError, match=r"'me/other': the hub answered with an error \(.*500"):
        Adapter.load("me/other")


def test_downloaded_files_are_as_hostile_as_any(hub: Any, published: bytes):
    hub.add("me/bad", {FILE: published[:-1] + bytes([published[-1] ^ 1])})
    with pytest.raises(AdapterFormatError, match="digest"):
        Adapter.load("me/bad")


def test_a_path_is_no_name(
    hub: Any, published: bytes, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A path that exists, or whose folder does, is never asked about at the hub."""
    monkeypatch.chdir(tmp_path)
    other = Adapter({}, name="other")
    other.save("me/sw")
    for load in (Adapter.load, Adapter.from_pretrained):
        assert load("me/sw").name == "other"
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'sw'\?.*Adapter.from_pretrained"):
        Adapter.load("me/sww")
    assert hub.asked == []
    with pytest.raises(FileNotFoundError, match="Nor does"):
        Adapter.load(Path("them/sw"))  # a Path is a path
    assert hub.asked == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", True),
        ("cambridgeltl/xlmr-lang-sft-sw-small", True),
        ("o/n_1.2-b", True),
        ("name", False),
        ("owner/name/", False),
        ("a/b/c", False),
        ("./name", False),
        ("../name", False),
        ("~/name", False),
        ("/owner/name", False),
        ("owner/na--me", False),
        ("owner/-name", False),
        ("owner/name.", False),
        ("out/sw.safetensors", False),
        ("out/pytorch_diff.bin", False),
        ("owner/" + "n" * 100, False),
        ("owner/na me", False),
        ("owner/name\n", False),
        (r"C:\owner/name", False),
    ],
)
def test_names(text: str, expected: bool):
    assert is_hub_name(text) is expected


def test_pushing_again_and_elsewhere(hub: Any, adapter: Adapter, tmp_path: Path):
    adapter.push_to_hub("sw", token=hub.token, private=True)  # a bare name: the owner's
    assert hub.repos["me/sw"].private
    first = hub.repos["me/sw"].branches["main"]["README.md"]
    assert b'"me/sw"' in first
    smaller = adapter.to(dtype=torch.bfloat16)
    adapter.push_to_hub(
        "me/sw", token=hub.token, compact=True, dtype=torch.bfloat16, commit_message="smaller"
    )
    assert hub.messages[-1] == "smaller"
    files = hub.repos["me/sw"].branches["main"]
    assert files[FILE] == smaller.save(tmp_path / "x", compact=True).read_bytes()
    assert files["README.md"] == model_card(smaller, "me/sw").encode()
    adapter.push_to_hub("me/sw", token=hub.token, revision="v2")
    assert hub.repos["me/sw"].branches["v2"][FILE] == adapter.save(tmp_path / "y").read_bytes()
    assert hub.repos["me/sw"].branches["main"] == files


def test_a_card_written_by_hand_is_kept(hub: Any, adapter: Adapter):
    mine = b"---\nlicense: mit\n---\n# Mine\n"
    hub.add("me/sw", {"README.md": mine})
    adapter.push_to_hub("me/sw", token=hub.token)
    assert hub.repos["me/sw"].branches["main"]["README.md"] == mine
    assert Adapter.load("me/sw").equals(adapter)


def test_refused_pushes(hub: Any, adapter: Adapter):
    with pytest.raises(PermissionError, match=r"cannot push to 'me/sw'.*hf auth login"):
        adapter.push_to_hub("me/sw", token="hf_reader")
    with pytest.raises(DiffError, match="overflows"):
        Adapter({"w": SparseDiff.from_dense(torch.tensor([1e30]))}).push_to_hub(
            "me/sw", token=hub.token, dtype=torch.float16
        )
    assert hub.repos == {}
    hub.stop()
    with pytest.raises(ConnectionError, match="cannot push to 'me/sw': the hub does not answer"):
        adapter.push_to_hub("me/sw", token=hub.token)


def front_matter(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)---\n", card, re.S)
    assert found is not None
    return yaml.safe_load(found[1])


def test_the_card(adapter: Adapter, saved: Path, tmp_path: Path):
    card = model_card(adapter, "me/sw")
    assert front_matter(card) == {
        "library_name": "sparseft",
        "base_model": "org/tiny",
        "base_model_relation": "adapter",
        "tags": ["sparseft", "sparse-fine-tuning", "adapter", "magnitude"],
    }
    assert CARD_MARK in card
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", card, re.M))
    assert rows["base"] == "`org/tiny`"
    assert rows["changed entries"] == f"{adapter.nnz} of 19 in 3 tensors"
    assert rows["density"] == f"{adapter.nnz / 19:.4%} (0.5 was asked for)"
    assert rows["fully trained tensors"] == "`head.weight` 2x2"
    assert rows["seed"] == "3"
    assert rows["trained on top of"] == f"`{'0' * 32}`"
    assert rows["digest"] == f"`{adapter.digest}`"
    assert model_card(Adapter.load(saved, check="lazy"), "me/sw") == card
    assert str(tmp_path) not in card
    assert not re.search(r"20\d\d-\d\d", card)  # no date


def test_the_code_in_the_card_runs(hub: Any, tiny: Any):
    model = torch.nn.Linear(3, 2, bias=False)
    base = model.weight.detach().clone()
    adapter = Adapter({"weight": SparseDiff.from_dense(torch.eye(2, 3))}, name='odd "`name`"')
    adapter.push_to_hub("me/odd", token=hub.token)
    code = re.search(r"```python\n(.*?)```", model_card(adapter, "me/odd"), re.S)
    assert code is not None
    seen: dict[str, Any] = {"model": model}
    exec(code[1].replace("...\n", "changed = model.weight.detach().clone()\n"), seen)
    assert torch.equal(seen["changed"], base + torch.eye(2, 3))
    assert torch.equal(model.weight.detach(), base)
    assert seen["adapter"].equals(adapter)


@pytest.mark.parametrize("base", [None, "/models/xlmr", "xlm-roberta-base", "a/b: {c", "a/--b"])
def test_only_a_name_is_given_as_base_model(base: str | None):
    card = model_card(Adapter({}, metadata=AdapterMetadata(base_name=base)))
    assert "base_model" not in front_matter(card)


def test_a_hostile_adapter_cannot_write_its_own_card():
    evil = 'x"]})\n```\n---\nlicense: mit\n<script>|`\u2028'
    name = Adapter(
        {evil: SparseDiff.from_dense(torch.ones(2))},
        name=evil,
        dense={evil + "2": torch.ones(1)},
        metadata=AdapterMetadata(base_name=evil, method=evil, versions={evil: evil}),
    )
    plain = model_card(
        Adapter({"w": SparseDiff.from_dense(torch.ones(2))}, dense={"h": torch.ones(1)})
    )
    card = model_card(name)
    assert set(front_matter(card)) <= {"library_name", "tags"}
    for mark in ("\n---\n", "```", "\n| "):
        assert card.count(mark) == plain.count(mark), mark
    outside_code = re.sub(r"```.*?```|(?<!\\)`[^`\n]*`", "", card, flags=re.S)
    assert re.findall(r".<script", outside_code) == [r"\<script"] * 4  # tag, title, two of versions
    assert len(card.splitlines()) == len(plain.splitlines()) + 1  # its method is a tag


def test_a_foreign_adapter_by_name(hub: Any, tmp_path: Path):
    """As composable-sft publishes them: column-major steps in a pickle."""
    steps = {"size": torch.Size((2, 3)), "index_steps": [1, 3], "values": torch.tensor([0.5, -2.0])}
    torch.save({"diffs": {"w": steps}, "abs": {}}, tmp_path / "pytorch_diff.bin")
    content = (tmp_path / "pytorch_diff.bin").read_bytes()
    hub.add("them/sft-sw", {"pytorch_diff.bin": content, "config.json": b"{}"})
    for load in (Adapter.load, Adapter.from_pretrained):
        loaded = load("them/sft-sw")
        assert loaded["w"].to_dense().tolist() == [[0.0, 0.0, -2.0], [0.5, 0.0, 0.0]]
        assert loaded.name == "sft-sw"


def test_names_wherever_a_path_is_taken(
    hub: Any, published: bytes, capsys: pytest.CaptureFixture[str]
):
    from sparseft.cli.main import main
    from sparseft.composition.merge import compose_adapters

    assert compose_adapters(["me/sw"], name="sw").nnz == Adapter.load("me/sw").nnz
    assert main(["inspect", "me/sw", "--no-tensors"]) == 0
    assert "me/sw: adapter 'sw'" in capsys.readouterr().out
    assert main(["inspect", "me/nope"]) == 2
    assert "no such repository on the hub" in capsys.readouterr().err
