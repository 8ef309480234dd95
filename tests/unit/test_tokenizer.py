"""Tokenizers: exact round trips, streaming, caching, and files that are none."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from whalepod.spec.errors import UserError
from whalepod.text.tokenizer import (
    BOS,
    EOS,
    Tokenizer,
    check_vocab,
    load_tokenizer,
    train_tokenizer,
)

WORDS = ["the", "whale", "swims", "déjà", "vu", "鲸鱼", "在", "游泳", "🐋🐳", "def", "f(x):", "12345", "\n\t"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WHALEPOD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = random.Random(0)
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(" ".join(rng.choices(WORDS, k=12)) for _ in range(400)))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(" ".join(WORDS * 50))
    return train_tokenizer(str(path), 300, cache_dir=path.parent / "cache")


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_round_trip_of_any_text(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text)) == text
    assert small.encode_many([text, text]) == [small.encode(text)] * 2


def test_special_tokens_in_text_are_text_unless_asked_for(small: Tokenizer) -> None:
    assert (BOS, EOS) == ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")  # DeepSeek's bars
    written = f"{BOS}whale{EOS}"
    plain = small.encode(written)
    assert not {small.bos_id, small.eos_id} & set(plain)
    assert small.decode(plain) == written
    read = small.encode(written, special=True)
    assert (read[0], read[-1]) == (small.bos_id, small.eos_id)
    assert small.decode(read) == "whale"
    assert small.decode(read, skip_special=False) == written


def test_lone_surrogates_do_not_crash(small: Tokenizer) -> None:
    assert small.decode(small.encode("a\ud800b")) == "a?b"
    assert small.decode(small.encode_many(["a\ud800b"])[0]) == "a?b"


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stream_equals_decode(small: Tokenizer, data: st.DataObject) -> None:
    # Random ids make every kind of broken UTF-8, and ids beyond the vocabulary, as padded models may sample.
    ids = data.draw(st.lists(st.integers(0, small.vocab_size + 5), max_size=60))
    skip = data.draw(st.booleans())
    decoder = small.stream(skip_special=skip)
    pieces = [decoder.push(i) for i in ids] + [decoder.finish()]
    assert "".join(pieces) == small.decode(ids, skip_special=skip)
    assert decoder.finish() == ""


def test_stream_never_shows_half_a_character(small: Tokenizer) -> None:
    decoder = small.stream()
    ids = small.encode("x🐬é")  # the dolphin is not in the corpus: four tokens, one for each byte
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) == "x🐬é"
    assert "🐬" in pieces
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_of_a_tokenizer_with_byte_fallback() -> None:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "▁whale": 257, "s": 258}
    inner = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(inner, None, None)
    assert not tokenizer.byte_level
    rng = random.Random(1)
    for _ in range(50):
        ids = [
            i for _ in range(8) for i in rng.choice([[256], [257], [258], [*"鲸".encode()], [*"🐋".encode()]])
        ]
        decoder = tokenizer.stream()
        pieces = [decoder.push(i) for i in ids]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids)
    decoder = tokenizer.stream()
    assert [decoder.push(256), decoder.push(0xF0), decoder.finish()] == ["a", "", "\ufffd"]


def test_training_is_cached_and_deterministic(corpus: Path, cache: Path, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    first = train_tokenizer(str(corpus), 320, progress=lambda *report: reports.append(report))
    assert first.vocab_size == 320
    assert reports[-1][1] == reports[-1][2] == corpus.stat().st_size
    assert [done for _, done, _ in reports] == sorted(done for _, done, _ in reports)
    reports.clear()
    again = train_tokenizer(str(corpus), 320, progress=lambda *report: reports.append(report))
    assert not reports
    assert again.fingerprint == first.fingerprint
    elsewhere = train_tokenizer(str(corpus), 320, cache_dir=tmp_path / "other")
    assert elsewhere.fingerprint == first.fingerprint
    assert train_tokenizer(str(corpus), 300).fingerprint != first.fingerprint
    assert len(list((cache / "tokenizers").glob("*.json"))) == 2


def test_training_at_once_gives_one(corpus: Path, cache: Path) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(train_tokenizer(str(corpus), 310).fingerprint))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    leftovers = [p.name for p in (cache / "tokenizers").iterdir() if not p.name.endswith((".json", ".lock"))]
    assert not leftovers


def test_bad_source_while_training_is_a_user_error(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\nbroken\n')
    with pytest.raises(UserError, match="line 2"):
        train_tokenizer(str(path), 300)
    assert not list((cache / "tokenizers").glob("*.json"))
    with pytest.raises(UserError, match="at least 258"):
        train_tokenizer("stdlib", 100)


def test_unusable_cache_folder(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WHALEPOD_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="WHALEPOD_CACHE"):
        train_tokenizer(str(corpus), 300)


def test_full_disk_is_one_line(corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        train_tokenizer(str(corpus), 300)
    assert {path.suffix for path in (cache / "tokenizers").iterdir()} == {".lock"}


def test_save_and_load(small: Tokenizer, tmp_path: Path) -> None:
    assert small.save(tmp_path / "model") == tmp_path / "model" / "tokenizer.json"
    small.save(tmp_path / "deep" / "tok.json")
    for path in (tmp_path / "model", tmp_path / "model" / "tokenizer.json", tmp_path / "deep" / "tok.json"):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == small.fingerprint
        assert (loaded.bos_id, loaded.eos_id) == (small.bos_id, small.eos_id) == (0, 1)
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == (BOS, EOS)
    with pytest.raises(UserError, match="cannot write"):
        small.save(tmp_path / "deep" / "tok.json" / "below")


def test_bos_and_eos_from_the_config_beside(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "!"}, "bos_token": None}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_id == loaded.inner.token_to_id("!")
    assert loaded.bos_id == 0
    config.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_tokenizer(tmp_path)


def test_no_special_tokens_at_all(tmp_path: Path) -> None:
    tokenizers.Tokenizer(models.BPE({"a": 0, "b": 7}, [])).save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.bos_id is None
    assert loaded.eos_id is None
    assert loaded.vocab_size == 8  # ids have gaps: an embedding must hold the largest


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a tokenizer.json"),
        (b"\xff\xfe", "not a tokenizer.json"),
        (b"[]", "has no 'model'"),
        (b'{"vocab": {}}', "has no 'model'"),
        (b'{"model": {"type": "BPE"}}', "not a tokenizer.json"),
        (
            b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": "x"}, "merges": 3}}',
            "not a tokenizer",
        ),
        (b"[" * 100_000, "not a tokenizer.json"),
    ],
)
def test_wrong_tokenizer_file(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_missing_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "tokeniser.json").write_text("{}")
    with pytest.raises(UserError, match=r"did you mean 'tokeniser\.json'"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "none" / "tokenizer.json")


def test_check_vocab(small: Tokenizer) -> None:
    check_vocab(small, small.vocab_size)
    with pytest.raises(UserError, match=rf"ids up to {small.vocab_size - 1}.*at least {small.vocab_size}"):
        check_vocab(small, small.vocab_size - 1)
