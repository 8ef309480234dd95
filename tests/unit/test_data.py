"""Token files and batches: nothing lost, nothing twice, the same on every rank and after every restart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import whalepod
from whalepod.spec.errors import UserError
from whalepod.text import sources as text
from whalepod.text.tokenizer import Tokenizer, train_tokenizer
from whalepod.train import prepare as prepare_module
from whalepod.train.data import PackedTokens, TokenFile, open_tokens, permute, validation_batches
from whalepod.train.prepare import prepare


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WHALEPOD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 documents of different length."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = [
        json.dumps({"text": f"document {i}: " + "whales swim 鲸 " * (1 + i * 7 % 40)}) for i in range(200)
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    return train_tokenizer(str(corpus), 300, cache_dir=corpus.parent / "cache")


def token_file(folder: Path, count: int, dtype: str = "uint16") -> Path:
    """A token file of the ids 0 ... count - 1, so that a window's first id tells which window it is."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.bin"
    np.arange(count).astype(dtype).tofile(path)
    facts = {"dtype": dtype, "count": count, "documents": 1}
    facts |= {"tokenizer_fingerprint": "t", "source_fingerprint": "s", "sha256": "h", "eos_id": 1}
    path.with_suffix(".json").write_text(json.dumps(facts))
    return path


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_file(tmp_path_factory.mktemp("numbered"), 1001)


# ------------------------------------------------------------------------------------------------- prepare


def test_every_document_once_ended_by_eos(corpus: Path, tokenizer: Tokenizer) -> None:
    reports: list[tuple[str, int, int]] = []
    files = prepare(str(corpus), tokenizer, None, 0.1, progress=lambda *report: reports.append(report))
    found: list[str] = []
    for file in (files.train, files.validation):
        ids = file.tokens()
        assert ids.dtype == np.uint16
        assert len(ids) == file.count
        assert ids[-1] == tokenizer.eos_id
        ends = np.flatnonzero(ids == tokenizer.eos_id)
        assert len(ends) == file.documents
        found += [tokenizer.decode(part.tolist()) for part in np.split(ids, ends + 1)[:-1]]
    assert sorted(found) == sorted(text.documents(str(corpus)))
    share = files.validation.count / (files.train.count + files.validation.count)
    assert 0.08 < share < 0.12
    assert reports[-1] == ("tokenising", corpus.stat().st_size, corpus.stat().st_size)


def test_second_call_reuses_the_files(
    corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(str(corpus), tokenizer)
    monkeypatch.setattr(prepare_module, "_write", None)
    assert prepare(str(corpus), tokenizer) == first
    with pytest.raises(TypeError):  # another split is another file, and writing is switched off
        prepare(str(corpus), tokenizer, None, 0.2)


def test_same_text_gives_the_same_bytes(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, second = (prepare(str(corpus), tokenizer, tmp_path / name) for name in "ab")
    assert first.train.sha256 == second.train.sha256
    assert first.train.path != second.train.path


def test_wide_vocabulary_takes_four_bytes(corpus: Path, tokenizer: Tokenizer) -> None:
    inner = tokenizer.inner.from_str(tokenizer.inner.to_str())
    inner.add_tokens([f"<extra {i}>" for i in range(1 << 16)])
    wide = Tokenizer(inner, tokenizer.bos_id, tokenizer.eos_id)
    assert prepare(str(corpus), wide, max_bytes=2000).train.dtype == "uint32"


def test_nothing_held_out(corpus: Path, tokenizer: Tokenizer) -> None:
    files = prepare(str(corpus), tokenizer, None, 0.0)
    assert files.validation.count == 0
    assert files.train.documents == 200
    with pytest.raises(UserError, match="has 0 tokens"):
        validation_batches(files.validation.path, 16, 1)


def test_prepare_says_what_is_wrong(tmp_path: Path, cache: Path, tokenizer: Tokenizer) -> None:
    single, empty = tmp_path / "single.txt", tmp_path / "empty.txt"
    single.write_text("one short text")
    empty.write_text("\n\n")
    with pytest.raises(UserError, match="single document"):
        prepare(str(single), tokenizer)
    with pytest.raises(UserError, match="holds no text"):
        prepare(str(empty), tokenizer)
    with pytest.raises(UserError, match=r"did you mean 'single\.txt'"):
        prepare(str(tmp_path / "singel.txt"), tokenizer)
    with pytest.raises(UserError, match="below 1"):
        prepare(str(single), tokenizer, None, 1.0)
    with pytest.raises(UserError, match="no EOS"):
        prepare(str(single), Tokenizer(tokenizer.inner, None, None))
    assert {path.suffix for path in (cache / "tokens").iterdir()} == {".lock"}  # nothing half-made stays


PREPARE = """
import sys
from whalepod.train.prepare import prepare
from whalepod.text.tokenizer import train_tokenizer
files = prepare(sys.argv[1], train_tokenizer(sys.argv[1], 300))
print(files.train.sha256, files.train.path)
"""


def test_two_processes_at_once(corpus: Path, cache: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(whalepod.__file__).parents[1])}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, str(corpus)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    said = [worker.communicate(timeout=60)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert said[0].strip()
    assert len(set(said)) == 1
    assert len([path for path in (cache / "tokens").iterdir() if path.is_dir()]) == 1


def test_what_a_killed_process_left_is_replaced(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    made = prepare(str(corpus), tokenizer, tmp_path / "a").train.path.parent
    torn = tmp_path / "b" / "tokens" / f"{made.name}.unfinished"
    torn.mkdir(parents=True)
    (torn / "train.bin").write_bytes(b"half")
    assert prepare(str(corpus), tokenizer, tmp_path / "b").train.path.parent.name == made.name
    assert not torn.exists()


# ---------------------------------------------------------------------------------------------------- open


def test_truncated_file(tmp_path: Path) -> None:
    path = token_file(tmp_path / "tokens", 1000)
    os.truncate(path, 999)
    with pytest.raises(UserError, match="is truncated: it has 999 bytes, its 1000 tokens need 2000; delete"):
        PackedTokens(path, 10, 0)
    os.truncate(path, 2002)
    with pytest.raises(UserError, match="too long"):
        open_tokens(path)


def test_truncated_file_in_the_cache(corpus: Path, tokenizer: Tokenizer) -> None:
    path = prepare(str(corpus), tokenizer).train.path
    os.truncate(path, 100)
    with pytest.raises(UserError, match="truncated"):
        prepare(str(corpus), tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "object"},
        {"dtype": "float64"},
        {"count": -1},
        {"count": "1000"},
        {"count": True},
        {"more": 1},
    ],
)
def test_sidecar_is_not_trusted(tmp_path: Path, change: dict[str, object]) -> None:
    path = token_file(tmp_path, 1000)
    facts = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(facts | change))
    with pytest.raises(UserError, match="does not describe a token file"):
        open_tokens(path)


def test_broken_or_missing_sidecar(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = token_file(tmp_path, 1000)
    with pytest.raises(UserError, match="another tokenizer"):
        open_tokens(path, tokenizer)
    for content in ("{", "[]", "3", "[" * 100_000):
        path.with_suffix(".json").write_text(content)
        with pytest.raises(UserError, match="does not describe"):
            open_tokens(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="no token file"):
        open_tokens(path)
    with pytest.raises(UserError, match=r"did you mean 'train\.bin'"):
        open_tokens(tmp_path / "trian.bin")


# ------------------------------------------------------------------------------------------------- batches


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 3000), key=st.tuples(st.integers(0, 2**40), st.integers(0, 50)))
def test_permute_is_a_permutation(size: int, key: tuple[int, int]) -> None:
    everything = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(everything), np.arange(size))
    some = np.array([0, size // 2, size - 1])
    assert np.array_equal(permute(some, size, key), everything[some])


def test_permute_mixes_and_never_changes() -> None:
    size = 10_000
    order = permute(np.arange(size), size, (1, 0))
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert (order == permute(np.arange(size), size, (1, 1))).sum() < 20
    assert (order == permute(np.arange(size), size, (2, 0))).sum() < 20
    huge = permute(np.arange(1000), 10**15, (3, 3))
    assert len(np.unique(huge)) == 1000
    assert huge.min() >= 0
    assert huge.max() < 10**15
    # Resuming a run under a later release must find the same data order: these may never change.
    assert permute(np.arange(8), 8, (1234, 0)).tolist() == [0, 4, 7, 3, 6, 2, 1, 5]


def test_windows_of_the_file(numbered: Path) -> None:
    packed = PackedTokens(numbered, 10, seed=0, extra=3)
    assert packed.num_windows == 99  # (1001 - 3) // 10
    rows = packed.sequences(0, packed.num_windows)
    assert rows.dtype == np.int64
    assert rows.shape == (99, 13)
    assert np.array_equal(rows, rows[:, :1] + np.arange(13))
    assert np.array_equal(np.sort(rows[:, 0]), np.arange(99) * 10)
    assert packed.epoch(198) == 2.0


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 60),
    shape=st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 8])),
    seed=st.integers(0, 2**63),
    step=st.integers(0, 10_000),
)
def test_ranks_partition_the_batch(
    numbered: Path, length: int, shape: tuple[int, int], seed: int, step: int
) -> None:
    rows, num_ranks = shape
    packed = PackedTokens(numbered, length, seed)
    whole = packed.batch(step, rows * num_ranks)
    parts = [packed.batch(step, rows * num_ranks, rank, num_ranks) for rank in range(num_ranks)]
    assert np.array_equal(np.concatenate(parts), whole)
    again = PackedTokens(numbered, length, seed).batch(
        step, rows * num_ranks
    )  # a fresh process, resumed here
    assert np.array_equal(again, whole)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(3, 200), global_batch=st.integers(1, 400), seed=st.integers(0, 99))
def test_every_window_once_an_epoch(numbered: Path, length: int, global_batch: int, seed: int) -> None:
    packed = PackedTokens(numbered, length, seed)
    epochs = 3
    steps = -(-epochs * packed.num_windows // global_batch)
    firsts = np.concatenate([packed.batch(step, global_batch)[:, 0] for step in range(steps)])
    for epoch in range(epochs):
        seen = firsts[epoch * packed.num_windows : (epoch + 1) * packed.num_windows]
        assert np.array_equal(np.sort(seen), np.arange(packed.num_windows) * length)


def test_ramped_batch_continues_without_gap(numbered: Path) -> None:
    packed = PackedTokens(numbered, 10, 7)
    sizes = [2, 2, 4, 8, 8]
    firsts = np.cumsum([0, *sizes[:-1]]).tolist()
    rows = np.concatenate([packed.batch_at(f, n) for f, n in zip(firsts, sizes, strict=True)])
    assert np.array_equal(rows, packed.sequences(0, sum(sizes)))


def test_epochs_and_seeds_differ(numbered: Path) -> None:
    packed = PackedTokens(numbered, 10, 0)
    first, second = (packed.sequences(e * packed.num_windows, packed.num_windows) for e in (0, 1))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, PackedTokens(numbered, 10, 1).sequences(0, packed.num_windows))


def test_batch_mistakes(numbered: Path) -> None:
    with pytest.raises(UserError, match=r"has 1001 tokens, one sequence needs 1002 .*1001 \+ 1"):
        PackedTokens(numbered, 1001, 0)
    with pytest.raises(UserError, match="at least 1"):
        PackedTokens(numbered, 0, 0)
    with pytest.raises(UserError, match="negative"):
        PackedTokens(numbered, 10, -1)
    packed = PackedTokens(numbered, 1000, 0)
    assert packed.num_windows == 1
    assert packed.batch(0, 4).shape == (4, 1001)  # larger than the text: it wraps
    with pytest.raises(UserError, match="10 sequences must be a multiple of 4 data ranks; nearest: 8, 12"):
        packed.batch(0, 10, 0, 4)
    with pytest.raises(UserError, match="nearest: 4"):
        packed.batch(0, 0, 0, 4)


def test_validation_batches(numbered: Path) -> None:
    batches = list(validation_batches(numbered, 10, 8))
    assert [rows.shape for rows, _ in batches] == [(8, 11)] * 13  # 100 windows
    assert [counted for _, counted in batches] == [8] * 12 + [4]
    (only, counted), *rest = validation_batches(numbered, 400, 4, extra=2)
    assert only[:, 0].tolist() == [0, 400, 0, 400]
    assert (only.shape, counted, rest) == ((4, 402), 2, [])


@pytest.mark.parametrize("limit", [None, 1, 20, 24, 1000])
@pytest.mark.parametrize(("batch", "num_ranks"), [(1, 1), (8, 1), (8, 2), (12, 3), (64, 4)])
def test_validation_is_of_the_same_windows_whatever_the_batch(
    numbered: Path, limit: int | None, batch: int, num_ranks: int
) -> None:
    counted: list[int] = []
    for rank in range(num_ranks):
        for rows, num in validation_batches(numbered, 10, batch, limit, rank=rank, num_ranks=num_ranks):
            counted += rows[:num, 0].tolist()
    assert sorted(counted) == [10 * i for i in range(min(limit or 100, 100))]


def test_validation_needs_a_window(numbered: Path) -> None:
    with pytest.raises(UserError, match="one sequence needs"):
        validation_batches(numbered, 5000, 1)


# ------------------------------------------------------------------------------------------------------ fim


def test_documents_rearranged_for_fill_in_the_middle(corpus: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="the tokenizer has no <｜fim▁begin｜>"):
        prepare(str(corpus), tokenizer, fim_rate=0.1)
    marked = train_tokenizer(str(corpus), 300, fim=True)
    assert marked.fim_ids is not None
    begin, hole, end = marked.fim_ids
    plain = prepare(str(corpus), marked, None, 0.0)
    found = prepare(str(corpus), marked, None, 0.0, fim_rate=0.5)
    documents = [split(files.train) for files in (plain, found)]
    assert len(documents[0]) == len(documents[1]) > 10
    moved = 0
    for before, after in zip(*documents, strict=True):
        if before == after:
            continue
        moved += 1
        assert after[0] == begin
        assert after.count(hole) == after.count(end) == 1
        at, to = after.index(hole), after.index(end)
        prefix, suffix, middle = after[1:at], after[at + 1 : to], after[to + 1 :]
        assert "".join(map(marked.decode, (prefix, middle, suffix))) == marked.decode(before)
    assert 0.2 < moved / len(documents[0]) < 0.8
    assert prepare(str(corpus), marked, None, 0.0, fim_rate=0.5) == found


def split(file: TokenFile) -> list[list[int]]:
    """The documents of a token file."""
    tokens = file.tokens().tolist()
    ends = [i for i, token in enumerate(tokens) if token == file.eos_id]
    starts = [0, *(end + 1 for end in ends)]
    return [tokens[a:b] for a, b in zip(starts, ends, strict=False)]
