"""Token files and the batches cut from them.

A token file (`prepare.py` writes them) is one flat row of ids, documents with EOS behind each.
`PackedTokens` cuts windows of equal length out of it, straight across the documents' ends: no padding, every
position trains.

    tokens   t0 t1 t2 t3 t4 t5 t6 t7 t8 t9 ...         L = 4, extra = 1
    window 0 [------------ ]                           inputs w[:, :-1], targets w[:, 1:]
    window 1             [------------ ]               each overlaps the next one by `extra`, so that every
    window 2                         [------------ ]   token but the first is predicted exactly once

Which windows a step trains on is a pure function of (seed, step). Nothing has to be saved to resume, any rank
can work out any other's rows, and the data order does not depend on how many ranks there are.

Names: N tokens in the file, L sequence length, W windows, B sequences in a batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from whalepod.spec.errors import UserError
from whalepod.text import sources as text_sources
from whalepod.text.tokenizer import Tokenizer

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4"), "int32": np.dtype("<i4")}  # signed: chat
FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class TokenFile:
    """What the JSON beside a token file says of it.

    `sha256` (hex) is that of the token file's bytes: the same on two hosts means the same training data.
    `eos_id` ends each document.
    """

    path: Path
    dtype: str
    count: int
    documents: int
    tokenizer_fingerprint: str
    source_fingerprint: str
    sha256: str
    eos_id: int

    def tokens(self) -> npt.NDArray[np.uint16 | np.uint32]:
        """The ids [count], memory-mapped: pages are read as they are used."""
        if self.count == 0:
            return np.zeros(0, DTYPES[self.dtype])  # an empty file cannot be mapped
        return np.memmap(self.path, DTYPES[self.dtype], mode="r", shape=(self.count,))


@dataclass(frozen=True)
class TokenFiles:
    """What `prepare` made. `validation.count` is 0 when nothing was to be held out."""

    train: TokenFile
    validation: TokenFile

    @property
    def sha256(self) -> str:
        """Of both: the same where two runs train and are measured on the same tokens."""
        return hashlib.sha256(f"{self.train.sha256} {self.validation.sha256}".encode()).hexdigest()


def open_tokens(path: str | Path, tokenizer: Tokenizer | None = None) -> TokenFile:
    """Checks a token file against the JSON beside it, and against `tokenizer` when given. Reads no ids."""
    path = Path(path)
    facts_path = path.with_suffix(".json")
    for file in (path, facts_path):
        if not file.is_file():
            raise text_sources.missing(file, "token file")
    again = f"delete the folder {str(path.parent)!r} and prepare the text again"
    facts = _facts(facts_path, again)
    made = TokenFile(path, **facts)
    expected = made.count * DTYPES[made.dtype].itemsize
    size = path.stat().st_size
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise UserError(
            f"the token file {str(path)!r} is {state}: it has {size} bytes, its {made.count} tokens need "
            f"{expected}; {again}"
        )
    if tokenizer is not None and made.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(f"the token file {str(path)!r} was written with another tokenizer; {again}")
    return made


def _facts(path: Path, again: str) -> dict[str, Any]:
    """The fields of a TokenFile but its path, each of the right kind: the file may come from anywhere."""
    wanted = {
        "dtype": str, "count": int, "documents": int,
        "tokenizer_fingerprint": str, "source_fingerprint": str, "sha256": str, "eos_id": int,
    }  # fmt: skip
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        facts = None
    if (
        not isinstance(facts, dict)
        or {name: type(value) for name, value in facts.items()} != wanted
        or facts["dtype"] not in DTYPES
        or facts["count"] < 0
    ):
        raise UserError(f"{str(path)!r} does not describe a token file; {again}")
    return facts


class PackedTokens:
    """The windows of a token file, in a new order every epoch.

    Window i is `tokens[i * L : i * L + L + extra]`; `extra` is 1 for next-token targets, plus the depth of
    multi-token prediction. Sequences are numbered from the start of training: sequence s is window
    `permutation_of_epoch(s // W)[s % W]`, so each window is used exactly once an epoch, also where a batch
    spans the end of one, and a batch larger than the file simply holds several epochs.
    """

    def __init__(self, path: str | Path, sequence_length: int, seed: int, extra: int = 1) -> None:
        self.file = open_tokens(path)
        self.tokens = self.file.tokens()
        self.sequence_length = sequence_length
        self.extra = extra
        self.seed = seed
        if seed < 0:
            raise UserError(f"the data seed is {seed}, it must not be negative")
        self.num_windows = _count_windows(self.file, sequence_length, extra)

    def batch(self, step: int, global_batch: int, rank: int = 0, num_ranks: int = 1) -> npt.NDArray[np.int64]:
        """Rank `rank`'s rows [global_batch / num_ranks, L + extra] of step `step`, for a constant batch size.

        The ranks' rows, joined in rank order, are the batch of one rank alone.
        """
        return self.batch_at(step * global_batch, global_batch, rank, num_ranks)

    def batch_at(
        self, first_sequence: int, global_batch: int, rank: int = 0, num_ranks: int = 1
    ) -> npt.NDArray[np.int64]:
        """The same for a batch that begins at sequence `first_sequence`, the number trained on so far.

        For a batch size that ramps up: there the step alone does not say how much came before.
        """
        assert 0 <= rank < num_ranks
        assert first_sequence >= 0
        rows = _rows_per_rank(global_batch, num_ranks)
        return self.sequences(first_sequence + rank * rows, rows)

    def sequences(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Sequences first ... first + count - 1 of the run, [count, L + extra]."""
        return _gather(self.tokens, self.windows(first, count), self.sequence_length, self.extra)

    def windows(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """The windows [count] that sequences `first` and following are."""
        numbers = np.arange(first, first + count, dtype=np.int64)
        epochs, positions = np.divmod(numbers, self.num_windows)
        chosen = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = permute(positions[here], self.num_windows, (self.seed, int(epoch)))
        return chosen

    def epoch(self, num_sequences: int) -> float:
        """How many times the text was read after `num_sequences` sequences."""
        return num_sequences / self.num_windows


def validation_batches(
    path: str | Path,
    sequence_length: int,
    batch: int,
    limit: int | None = None,
    *,
    extra: int = 1,
    rank: int = 0,
    num_ranks: int = 1,
) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    """The first `limit` held-out windows (None: all) in the order of the file, in batches of
    [batch / num_ranks, L + extra], and how many rows of each count.

    The same windows every time, whatever the batch and the ranks. All batches have the full shape, as
    pipelines need: the last is filled up with windows from the start, which do not count.
    """
    assert 0 <= rank < num_ranks
    file = open_tokens(path)
    num_windows = _count_windows(file, sequence_length, extra)
    rows = _rows_per_rank(batch, num_ranks)
    wanted = num_windows if limit is None else min(limit, num_windows)
    tokens = file.tokens()

    def generate() -> Iterator[tuple[npt.NDArray[np.int64], int]]:
        for start in range(0, wanted, batch):
            first = start + rank * rows
            windows = np.arange(first, first + rows) % num_windows
            yield _gather(tokens, windows, sequence_length, extra), min(max(wanted - first, 0), rows)

    return generate()  # so that mistakes show at the call, not at the first batch


def permute(positions: npt.NDArray[np.int64], size: int, key: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Where a pseudo-random permutation of range(size), chosen by `key`, sends `positions` [n].

    Works out single positions without the whole permutation: a shuffled list of a trillion tokens' windows
    would take gigabytes on every rank. A Feistel network permutes range(4^h) >= size: split the number into
    two halves of h bits, and in each round change one by a hash of the other, which can be undone, so no two
    numbers meet. Whatever lands beyond `size` goes round again, and since it started inside the cycle it
    comes back inside.
    """
    half = max((max(size - 1, 1).bit_length() + 1) // 2, 1)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    round_keys = np.random.SeedSequence(key).generate_state(FEISTEL_ROUNDS, np.uint64)
    numbers = positions.astype(np.uint64)
    outside = np.ones(len(numbers), bool)
    while outside.any():
        left, right = numbers[outside] >> shift, numbers[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        numbers[outside] = left << shift | right
        outside = numbers >= size
    return numbers.astype(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _gather(
    tokens: npt.NDArray[np.uint16 | np.uint32],
    windows: npt.NDArray[np.int64],
    sequence_length: int,
    extra: int,
) -> npt.NDArray[np.int64]:
    rows = np.empty((len(windows), sequence_length + extra), np.int64)
    for row, window in zip(rows, windows, strict=True):
        row[:] = tokens[window * sequence_length : (window + 1) * sequence_length + extra]
    return rows


def _count_windows(file: TokenFile, sequence_length: int, extra: int) -> int:
    assert extra >= 0
    if sequence_length < 1:
        raise UserError(f"sequence_length is {sequence_length}, it must be at least 1")
    count = (file.count - extra) // sequence_length
    if count < 1:
        raise UserError(
            f"the text has {file.count} tokens, one sequence needs {sequence_length + extra} "
            f"(sequence_length {sequence_length} + {extra}): give more text or a shorter sequence_length"
        )
    return count


def _rows_per_rank(global_batch: int, num_ranks: int) -> int:
    if global_batch < 1 or global_batch % num_ranks:
        below = global_batch // num_ranks * num_ranks
        options = ", ".join(str(n) for n in (below, below + num_ranks) if n > 0)
        raise UserError(
            f"the global batch of {global_batch} sequences must be a multiple of {num_ranks} data ranks; "
            f"nearest: {options}"
        )
    return global_batch // num_ranks
