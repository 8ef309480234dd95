"""Sources of text: what they yield, in which order, and what a user is told when they do not."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalepod.spec.errors import UserError
from whalepod.text import sources as text


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def error(source: str | Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        list(text.documents(str(source), **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_stdlib_is_python_text_in_one_order() -> None:
    first = list(text.documents("stdlib", max_bytes=300_000))
    assert first == list(text.documents("stdlib", max_bytes=300_000))
    assert sum(len(document.encode()) for document in first) == 300_000
    assert any("import " in document for document in first)
    assert text.fingerprint("stdlib") == text.fingerprint("stdlib")
    assert (text.total_bytes("stdlib") or 0) > 5_000_000


def test_stdlib_leaves_out_installed_packages() -> None:
    names = text._find("stdlib").names
    assert "argparse.py" in names
    assert os.path.join("json", "decoder.py") in names
    assert not any("site-packages" in name or "dist-packages" in name for name in names)


def test_folder_reads_text_and_skips_the_rest(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "deep/er/b.md", "two é")
    write(tmp_path / "notes", "three, no suffix")
    write(tmp_path / "c.jsonl", '{"text": "four"}\n\n{"text": "five"}\n')
    write(tmp_path / "blank.txt", " \n\n")
    write(tmp_path / "image.png", b"\x89PNG\r\n\x1a\n\0\0")
    write(tmp_path / "latin.txt", "é".encode("latin-1"))
    write(tmp_path / ".git/config", "hidden")
    write(tmp_path / "node_modules/x.js", "foreign")
    found = list(text.documents(str(tmp_path)))
    assert sorted(found) == ["five", "four", "one", "three, no suffix", "two é"]
    assert found == list(text.documents(str(tmp_path)))


def test_glob_and_order_shuffled_but_fixed(tmp_path: Path) -> None:
    for i in range(40):
        write(tmp_path / f"{i:02}.txt", str(i))
    write(tmp_path / "other.md", "no")
    found = list(text.documents(f"{tmp_path}/*.txt"))
    assert sorted(found, key=int) == [str(i) for i in range(40)]
    assert found != sorted(found, key=int)
    assert found == list(text.documents(f"{tmp_path}/**/*.txt"))


@settings(max_examples=40, deadline=None)
@given(st.text(st.sampled_from("ab é鲸🐋\n"), min_size=1, max_size=9000).filter(lambda s: not s.isspace()))
def test_a_lone_file_is_cut_without_losing_a_byte(
    tmp_path_factory: pytest.TempPathFactory, content: str
) -> None:
    path = write(tmp_path_factory.mktemp("text") / "book.txt", content)
    pieces = list(text.documents(str(path)))
    starts = [content.find(piece) for piece in pieces]
    assert min(starts) >= 0
    # Blank pieces are dropped; everything else is there, whole characters and all.
    assert sorted("".join("".join(pieces).split())) == sorted("".join(content.split()))
    assert all(len(piece.encode()) <= 2 * text.MIN_PIECE_BYTES for piece in pieces)


def test_a_lone_file_is_cut_at_lines(tmp_path: Path) -> None:
    lines = [f"line {i} {'x' * (i % 90)}\n" for i in range(3000)]
    path = write(tmp_path / "book.txt", "".join(lines))
    pieces = list(text.documents(str(path)))
    assert len(pieces) > 30
    assert all(piece.startswith("line ") and piece.endswith("\n") for piece in pieces)
    assert sorted(line for piece in pieces for line in piece.splitlines(keepends=True)) == sorted(lines)


@pytest.mark.parametrize("shift", range(4))
def test_one_endless_line_is_cut_between_characters(tmp_path: Path, shift: int) -> None:
    content = "x" * shift + "é鲸🐋" * 5000
    pieces = list(text.documents(str(write(tmp_path / "line.txt", content))))
    assert len(pieces) > 8
    assert sorted("".join(pieces)) == sorted(content)


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    assert list(text.documents(str(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")))) == ["hello"]


@pytest.mark.parametrize("cap", [1, 5, 9, 10, 11, 1000])
def test_max_bytes_cuts_at_a_character(tmp_path: Path, cap: int) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "éééé"}\n{"text": "abcdef"}\n')
    whole = list(text.documents(str(path)))
    capped = list(text.documents(str(path), max_bytes=cap))
    assert "".join(whole).startswith("".join(capped))
    size = sum(len(document.encode()) for document in capped)
    assert min(cap, 14) - 1 <= size <= cap


def test_jsonl_field_and_lone_surrogates(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"body": "yes \\ud800", "n": 1}')
    assert list(text.documents(str(path), text_field="body")) == ["yes ?"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{oops", "not a JSON object"),
        ("[1]", "no text under 'text'"),
        ('{"tekst": "x"}', "did you mean 'tekst'"),
        ('{"text": 3}', "no text under 'text'"),
        ("[" * 100_000, "not a JSON object"),
    ],
)
def test_jsonl_bad_line_is_numbered(tmp_path: Path, line: str, says: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "good"}\n' + line + '\n{"text": "good"}\n')
    message = error(path)
    assert "a.jsonl' line 2: " in message
    assert says in message


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "corpus.txt", "x")
    assert "did you mean 'corpus.txt'" in error(tmp_path / "corpsu.txt")
    assert "allowed" not in error(tmp_path / "zzzzzzzzzzzz")
    assert "does not exist" in error(tmp_path / "no" / "corpus.txt")
    assert "did you mean 'stdlib'" in error("stdlb")
    assert "no file matches" in error(tmp_path / "*.nothing")
    assert "no file or folder" in error("x" * 5000) or "cannot read" in error("x" * 5000)


def test_empty_text(tmp_path: Path) -> None:
    assert "holds no text" in error(write(tmp_path / "zero.txt", ""))
    assert "holds no text" in error(write(tmp_path / "blank.txt", " \n \n"))
    (tmp_path / "folder").mkdir()
    assert "holds no text" in error(tmp_path / "folder")
    assert "is empty" in error("")


def test_binary_file(tmp_path: Path) -> None:
    assert "is not UTF-8 text" in error(write(tmp_path / "a.bin", bytes(range(256))))
    assert "at byte 3" in error(write(tmp_path / "a.txt", b"abc\xff"))
    assert "is not UTF-8 text" in error(write(tmp_path / "b.txt", b"abc\0"))
    os.mkfifo(tmp_path / "pipe")
    assert "neither a regular file" in error(tmp_path / "pipe")


def test_mistakes_show_before_the_first_document(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        text.documents(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="must be positive"):
        text.documents("stdlib", max_bytes=0)


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "x.txt", "one")
    before = text.fingerprint(str(tmp_path / "a"))
    assert before == text.fingerprint(str(tmp_path / "a"))
    assert before != text.fingerprint(str(tmp_path / "a"), text_field="body")
    (tmp_path / "a").rename(tmp_path / "moved")
    assert before == text.fingerprint(str(tmp_path / "moved"))
    path = tmp_path / "moved" / "x.txt"
    stat = path.stat()
    write(path, "two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert before != text.fingerprint(str(tmp_path / "moved"))
    write(tmp_path / "moved" / "y.txt", "more")
    assert len({before, text.fingerprint(str(tmp_path / "moved"))}) == 2


def test_dataset_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in error("hf:some/set")
    assert "names no dataset" in error("hf:")
    assert "names no file" in error("hf:json")


class Table:
    """What `datasets.load_dataset(...)` returns, as far as it is used."""

    column_names = ("text", "label")

    def __len__(self) -> int:
        return 30

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"text": f"row {row}" if row else None, "label": 1}


def test_dataset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    def load_dataset(name: str, **options: Any) -> Table:
        calls.append((name, options))
        if name == "gone":
            raise RuntimeError("not there\nsecond line")
        return Table()

    fake = ModuleType("datasets")
    vars(fake).update(vars(SimpleNamespace(load_dataset=load_dataset)))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = list(text.documents("hf:some/set:test"))
    assert sorted(found) == sorted(f"row {i}" for i in range(1, 30))
    assert found == list(text.documents("hf:some/set:test"))
    path = write(tmp_path / "rows.json", json.dumps({"text": "x"}))
    list(text.documents(f"hf:json:{path}"))
    assert calls[0] == ("some/set", {"split": "test"})
    assert calls[-1] == ("json", {"split": "train", "data_files": [str(path)]})
    assert "did you mean 'label'" in error("hf:some/set", text_field="lable")
    assert error("hf:gone").endswith("not there")
    assert "no file or folder" in error(f"hf:json:{tmp_path}/none.json")
    assert text.total_bytes("hf:some/set") is None
    prints = [text.fingerprint(s) for s in ("hf:some/set", "hf:some/set:test", f"hf:json:{path}")]
    assert len(set(prints)) == 3
