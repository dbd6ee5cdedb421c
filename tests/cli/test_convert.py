"""``sparseft convert``: what it prints and writes, and how it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from sparseft.adapter import Adapter
from sparseft.cli.main import BAD_INPUT, FAILURE, OK, main
from sparseft.diff import SparseDiff
from sparseft.io import foreign, hub
from sparseft.selection import Masks

QUERY = "roberta.encoder.layer.0.attention.self.query"
WRITTEN = f"Written are {', '.join(['sparseft', *foreign.writable()])}."


@pytest.fixture(scope="module")
def base(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("base"), num_labels=2)


@pytest.fixture
def adapter() -> Adapter:
    rng = torch.Generator().manual_seed(0)
    mask = torch.rand(16, 16, generator=rng) < 0.1
    change = SparseDiff.from_dense(torch.randn(16, 16, generator=rng), mask)
    head = {"classifier.out_proj.bias": torch.ones(2)}
    return Adapter({f"{QUERY}.weight": change}, name="sw", dense=head)


@pytest.fixture
def sft(adapter: Adapter, tmp_path: Path) -> Path:
    foreign.write(adapter, tmp_path / "sft", "composable-sft")
    return tmp_path / "sft"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    folder = tmp_path / "lora"
    folder.mkdir()
    config = {"peft_type": "LORA", "lora_alpha": 4, "base_model_name_or_path": "org/tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    rng = torch.Generator().manual_seed(0)
    factors = {
        f"base_model.model.{QUERY}.lora_A.weight": torch.randn(2, 16, generator=rng),
        f"base_model.model.{QUERY}.lora_B.weight": torch.randn(16, 2, generator=rng),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def run(*words: object) -> int:
    return main(["convert", *map(str, words)])


def test_there_and_back(
    adapter: Adapter, sft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(sft, tmp_path / "ours", "--name", "qu") == OK
    out = capsys.readouterr().out
    size = (tmp_path / "ours" / "adapter.safetensors").stat().st_size
    assert f"{sft}: composable-sft, " in out
    assert f"sparseft, {adapter.nnz} entries of 256 (" in out
    assert "in 1 tensors, 1 dense (2 entries), " in out
    assert size > 0
    assert "lost  nothing" in out
    ours = Adapter.load(tmp_path / "ours")
    assert ours.equals(adapter)
    assert ours.name == "qu"
    assert run(tmp_path / "ours", tmp_path / "back", "--to", "composable-sft") == OK
    assert Adapter.load(tmp_path / "back").equals(adapter)
    assert f"{tmp_path / 'back'}: composable-sft, " in capsys.readouterr().out


def test_peft_with_a_base_and_what_was_left_out(
    adapter: Adapter, base: Path, sft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = (sft, tmp_path / "p", "--to", "peft-shira", "--base", base)
    assert run(*words) == BAD_INPUT  # PEFT stores whole modules; the head's weight is not here
    assert "'classifier.out_proj', but not 'classifier.out_proj.weight'" in capsys.readouterr().err
    assert run(*words, "--exclude", "classifier.*") == OK
    out = capsys.readouterr().out
    assert f"  added {32 - adapter.nnz} zeros, to reach r=1 in every module" in out
    assert "lost  1 tensors were left out (--exclude)" in out
    assert f"base  {base.name}" in out
    assert run(tmp_path / "p", tmp_path / "again") == OK
    again = Adapter.load(tmp_path / "again")[f"{QUERY}.weight"]
    assert torch.equal(again.to_dense(), adapter[f"{QUERY}.weight"].to_dense())
    assert run(tmp_path / "p", tmp_path / "again") == BAD_INPUT
    assert "exists already; add --overwrite" in capsys.readouterr().err
    assert run(tmp_path / "p", tmp_path / "again", "--overwrite") == OK


def test_lora_reports_its_error(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(lora, tmp_path / "out") == BAD_INPUT
    assert "--density 0.01" in capsys.readouterr().err
    assert run(lora, tmp_path / "out", "--density", "0.1") == OK
    out = capsys.readouterr().out
    adapter = Adapter.load(tmp_path / "out")
    assert adapter.nnz == 26
    error = adapter.metadata.extra["converted"]["error"]
    lines = [line.split() for line in out.splitlines()]
    assert [f"{QUERY}.weight", "26", "10.16%", f"{error:.4f}"] in lines
    assert ["all", "26", f"{error:.4f}"] in lines
    assert "lost  230 of 256 entries of the low-rank changes" in out
    assert "base  org/tiny" in out


def test_masks(base: Path, tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    mask = torch.eye(16, dtype=torch.bool)
    torch.save({QUERY: mask}, tmp_path / "masks.pt")
    assert run(tmp_path / "masks.pt", tmp_path / "new" / "m.safetensors") == OK
    assert "16 of 256 entries (6.250%)" in capsys.readouterr().out
    assert torch.equal(
        Masks.load(tmp_path / "new" / "m.safetensors")[f"{QUERY}.weight"].to_mask(), mask
    )
    for command in ("inspect", "convert"):
        words = [tmp_path / "new" / "m.safetensors", *[tmp_path / "y"] * (command == "convert")]
        assert main([command, *map(str, words)]) == BAD_INPUT
        err = capsys.readouterr().err
        assert "m.safetensors: holds masks" in err
        assert "select(model, 'file', path=...)" in err
    assert not (tmp_path / "y").exists()
    assert run(tmp_path / "masks.pt", tmp_path / "x", "--to", "spiel") == BAD_INPUT
    assert "masks without values" in capsys.readouterr().err
    tuned = tiny.save_tiny(tmp_path / "tuned", num_labels=2, seed=1)
    capsys.readouterr()
    words = ("--base", base, "--tuned", tuned)
    assert run(tmp_path / "masks.pt", tmp_path / "made", *words) == OK
    assert Adapter.load(tmp_path / "made").nnz == 16


def test_what_is_counted_is_what_was_written(
    sft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """With --exclude the tensors that were left out count nowhere, whatever is written."""
    for to in ("sparseft", "composable-sft"):
        assert run(sft, tmp_path / to, "--to", to, "--exclude", f"{QUERY}*") == OK
        lines = capsys.readouterr().out.splitlines()
        assert f": {to}, 0 entries in 0 tensors, 1 dense (2 entries), " in lines[1]
        assert lines[3] == "  lost  1 tensors were left out (--exclude)"
        assert Adapter.load(tmp_path / to).names == []


def test_folders_without_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "empty"
    folder.mkdir()
    assert run(folder, tmp_path / "out") == BAD_INPUT
    err = capsys.readouterr().err
    assert f"nothing to convert in folder {folder}: no adapter.safetensors (ours), no" in err
    assert "It is empty." in err
    (folder / "config.json").write_text('{"model_type": "x"}')
    assert run(folder, tmp_path / "out") == BAD_INPUT
    assert "It has config.json; name a file itself." in capsys.readouterr().err
    assert main(["inspect", str(folder / "config.json")]) == BAD_INPUT
    assert "config.json: not a safetensors file" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="POSIX limits")
@pytest.mark.parametrize("to", ["sparseft", *foreign.writable()])
def test_a_full_disk_names_the_file_and_leaves_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
):
    import resource

    rng = torch.Generator().manual_seed(0)
    mask = torch.rand(300, 300, generator=rng) < 0.5
    change = SparseDiff.from_dense(torch.randn(300, 300, generator=rng), mask)
    Adapter({f"{QUERY}.weight": change}).save(tmp_path / "a")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        assert run(tmp_path / "a", tmp_path / "new" / "out", "--to", to) == FAILURE
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err.startswith(f"sparseft convert: {tmp_path / 'new' / 'out'}/")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_name_on_the_hub_is_downloaded_unless_it_is_a_path_here(
    adapter: Adapter, sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Through a cache of downloads, whose folders are called after commits."""
    snapshot = tmp_path / "models--org--swahili-sft" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    sft.joinpath("pytorch_diff.bin").rename(snapshot / "pytorch_diff.bin")
    asked = []
    monkeypatch.setattr(hub, "download_adapter", lambda name: asked.append(name) or snapshot)
    monkeypatch.chdir(tmp_path)
    assert run("org/swahili-sft", "out") == OK
    assert asked == ["org/swahili-sft"]
    assert Adapter.load("out").equals(adapter)
    assert Adapter.load("out").name == "swahili-sft"
    (tmp_path / "org").mkdir()
    assert run("org/swahili-sft", "out2") == BAD_INPUT
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SFT", "out", "--to", "peft-shria"], "Did you mean 'peft-shira'"),
        (["SFT", "out", "--to", "foo"], f"no format 'foo'. {WRITTEN}"),
        (["SFT", "out", "--to", "lora"], "lora is read, not written. Written are sparseft, "),
        (["SFT", "out", "--density", "0.1"], "'composable-sft' has no option 'density'"),
        (["SFT", "out", "--exclude", "nothing*"], "'nothing*' matches none of 2 tensors"),
        (["nope", "out"], "nothing to convert at nope"),
        (["SFT", "out", "--base", "/nope/base"], "no folder /nope/base"),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else "",
)
def test_bad_input(
    sft: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    assert run(*(sft if word == "SFT" else word for word in words)) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_ours_takes_no_options_of_others(
    adapter: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    adapter.save(tmp_path / "a")
    assert run(tmp_path / "a", tmp_path / "b", "--nnz", "3") == BAD_INPUT
    assert "--nnz is for other formats" in capsys.readouterr().err


def test_a_malicious_file_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (pytest.fail, ("a pickle was executed",))

    torch.save({"diffs": {"w": Bomb()}}, tmp_path / "pytorch_diff.bin")
    assert run(tmp_path, tmp_path / "out") == BAD_INPUT
    assert "would run code" in capsys.readouterr().err


def test_other_commands_read_foreign_files_as_they_are(
    adapter: Adapter, sft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["inspect", str(sft)]) == OK
    out = capsys.readouterr().out
    assert f"{QUERY}.weight" in out
    assert '"from": "composable-sft"' in out
    assert main(["compose", "--adapter", str(sft), "--out", str(tmp_path / "sum")]) == OK
    assert Adapter.load(tmp_path / "sum")[f"{QUERY}.weight"].equals(adapter[f"{QUERY}.weight"])
