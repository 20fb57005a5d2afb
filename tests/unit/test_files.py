"""Files that are written whole or not at all, and their names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peft_gauge.files import slug, write_whole


@pytest.mark.parametrize("content", ["größer\n", b"\x00\xff"])
@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_written_and_others_can_read_it(content: str | bytes, durable: bool, tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("before")
    write_whole(target, content, durable=durable)
    assert target.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert target.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("broken", ["fsync", "replace", "encode"])
def test_what_was_there_stays_where_writing_fails(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, a target that cannot be replaced, a text that is not valid Unicode."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    if broken == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    if broken == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    target = tmp_path / "result.json"
    target.write_text("before")
    with pytest.raises((OSError, UnicodeEncodeError)):
        write_whole(target, "\ud800" if broken == "encode" else "after")
    assert target.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_name_is_flushed_to_the_disk_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "result.json"
    flush, seen = os.fsync, list[bool]()

    def fsync(handle: int) -> None:
        seen.append(target.exists())
        flush(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(target, "after")
    assert seen == [False]


def test_a_slug_has_letters_digits_and_single_hyphens() -> None:
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("  (Größe) × 2/… ") == "gr-e-2"
    assert slug("…") == ""
