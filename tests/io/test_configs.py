"""JSON beside weights: read, or refused by its file's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseft.errors import AdapterFormatError, CompositionError
from sparseft.io.configs import read_config, read_json_object

BAD = {
    "text": (b"{nope", "is no JSON"),
    "a list": (b"[1]", "holds list, wanted an object"),
    "no UTF-8": (b'{"a": "\xff\xfe\xfd"}', "is no JSON"),
    "too deep": (b"[" * 200_000, "is no JSON"),
    "nothing": (b"", "is no JSON"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_what_is_no_object_is_refused_by_name(tmp_path: Path, case: str):
    content, message = BAD[case]
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(AdapterFormatError, match=rf"config\.json {message}"):
        read_json_object(file)
    with pytest.raises(CompositionError, match=rf"config\.json {message}"):
        read_config(tmp_path)


def test_size_and_absence(tmp_path: Path):
    file = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError):
        read_json_object(file)
    with pytest.raises(CompositionError, match=r"has no config\.json, so it is no model"):
        read_config(tmp_path)
    file.write_text('{"a": 1}')
    assert read_config(tmp_path) == read_json_object(file, most=8) == {"a": 1}
    with pytest.raises(AdapterFormatError, match=r"config\.json has 8 bytes; refused"):
        read_json_object(file, most=7)
    file.unlink()
    file.mkdir()
    with pytest.raises(CompositionError, match=r"config\.json cannot be read: Is a directory"):
        read_config(tmp_path)
