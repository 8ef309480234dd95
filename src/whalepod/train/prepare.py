"""Text into token files: every document encoded once, an EOS behind each.

Two flat files of ids come out, one to train on and one held out, split by whole documents. Beside each
stands a JSON file that says what it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from whalepod.spec.errors import UserError
from whalepod.text import sources as text_sources
from whalepod.text.chat import ChatTemplate, conversations, encoded
from whalepod.text.fim import rearranged
from whalepod.text.sources import Progress
from whalepod.text.tokenizer import FIM, Tokenizer, cache_folder, made_once, write_atomically
from whalepod.train.data import DTYPES, TokenFile, TokenFiles, open_tokens

CHUNK_BYTES = 2 << 20  # text encoded at once: large enough for all cores, and the memory that encoding takes
FORMAT_VERSION = 2  # part of the cache key


def prepare(
    source: str,
    tokenizer: Tokenizer,
    cache_dir: str | Path | None = None,
    validation_fraction: float = 0.05,
    *,
    text_field: str = "text",
    max_bytes: int | None = None,
    fim_rate: float = 0.0,
    chat: ChatTemplate | None = None,
    progress: Progress | None = None,
) -> TokenFiles:
    """Encodes `source` into token files under the cache folder, or finds them there from an earlier call.

    Memory stays flat however long the text. A crash leaves nothing that a later call would take for whole,
    and of several processes that ask at once one writes while the others wait.
    `chat`: the source is a file of conversations, and this their template. `fim_rate` of the documents are
    rearranged for fill-in-the-middle. `validation_fraction` is a share of the tokens, reached to within a
    document. `progress` counts bytes of text; its total is 0 while nobody knows it.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}, it must be at least 0 and below 1")
    if (eos_id := tokenizer.eos_id) is None:
        raise UserError("the tokenizer has no EOS: tokenizer_config.json beside it can name one as eos_token")
    if fim_rate and tokenizer.fim_ids is None:
        raise UserError(
            f"data.fim_rate {fim_rate}: the tokenizer has no {FIM[0]}; use 0, or another tokenizer"
        )
    origin = text_sources.fingerprint(source, text_field=text_field)
    parts = (
        FORMAT_VERSION,
        origin,
        tokenizer.fingerprint,
        eos_id,
        validation_fraction,
        max_bytes,
        fim_rate,
        chat and chat.source,
    )
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
    folder = cache_folder(cache_dir, "tokens") / key
    if not folder.exists():
        with made_once(folder):
            if not folder.exists():
                # The lock is ours, so a folder of this name was left by a process that was killed.
                unfinished = folder.with_name(f"{key}.unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                try:
                    if chat is None:
                        documents = text_sources.documents(source, text_field=text_field, max_bytes=max_bytes)
                        total = text_sources.total_bytes(source)
                        total = min(total, max_bytes) if total and max_bytes else total or max_bytes or 0
                        ids = _encoded(documents, tokenizer, eos_id, fim_rate, total, progress)
                    else:
                        ids = _chats(Path(source), chat, tokenizer, eos_id, progress)
                    kind = "int32" if chat else "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
                    _write(ids, tokenizer, unfinished, validation_fraction, origin, eos_id, kind)
                    unfinished.rename(folder)
                except BaseException:
                    shutil.rmtree(unfinished, ignore_errors=True)
                    raise
    return TokenFiles(*(open_tokens(folder / f"{name}.bin", tokenizer) for name in ("train", "validation")))


class _Writer:
    """One token file as it grows: ids in, bytes, count and hash out."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self.dtype = dtype
        self.count = 0
        self.documents = 0
        self._hash = hashlib.sha256()
        self._file: BinaryIO = path.open("xb")

    def add(self, ids: list[int]) -> None:
        data = np.asarray(ids, DTYPES[self.dtype]).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.count += len(ids)
        self.documents += 1

    def close(self, tokenizer_fingerprint: str, source_fingerprint: str, eos_id: int) -> None:
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        made = TokenFile(
            self.path, self.dtype, self.count, self.documents, tokenizer_fingerprint, source_fingerprint,
            self._hash.hexdigest(), eos_id,
        )  # fmt: skip
        facts = {name: value for name, value in asdict(made).items() if name != "path"}
        write_atomically(self.path.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")


def _write(
    documents: Iterator[list[int]],
    tokenizer: Tokenizer,
    folder: Path,
    validation_fraction: float,
    source_fingerprint: str,
    eos_id: int,
    dtype: str,
) -> None:
    train, validation = (_Writer(folder / f"{name}.bin", dtype) for name in ("train", "validation"))
    for ids in documents:
        # Held out whenever its share lags behind. The choice must not look at the document itself: a rule
        # that did would sort the long ones from the short.
        lags = validation.count < validation_fraction * (train.count + validation.count)
        (validation if lags else train).add(ids)
    if validation_fraction and not validation.documents:
        raise UserError(
            f"the text is a single document of {train.count} tokens, so none can be held out: "
            "give more text, or set validation_fraction to 0"
        )
    for writer in (train, validation):
        writer.close(tokenizer.fingerprint, source_fingerprint, eos_id)


def _encoded(
    documents: Iterator[str],
    tokenizer: Tokenizer,
    eos_id: int,
    fim_rate: float,
    total: int,
    progress: Progress | None,
) -> Iterator[list[int]]:
    """The ids of each document with EOS behind them."""
    done, number = 0, 0
    for texts, num_bytes in _chunks(documents):
        whole = iter(tokenizer.encode_many(texts))
        for text in texts:
            ids = next(whole)
            yield [*(rearranged(text, number, fim_rate, tokenizer) or ids), eos_id]
            number += 1
        done += num_bytes
        if progress:
            progress("tokenising", min(done, total) if total else done, total)
    if progress:
        progress("tokenising", total or done, total or done)


def _chats(
    path: Path, template: ChatTemplate, tokenizer: Tokenizer, eos_id: int, progress: Progress | None
) -> Iterator[list[int]]:
    """The ids of each conversation, an EOS that is learnt at its end."""
    total = path.stat().st_size if path.is_file() else 0
    for number, (conversation, done) in enumerate(conversations(path), start=1):
        try:
            ids = encoded(conversation, template, tokenizer)
        except UserError as error:
            raise UserError(f"{path}, conversation {number}: {error}") from None
        yield ids if ids[-1] == eos_id else [*ids, eos_id]
        if progress:
            progress("tokenising", done, total)


def _chunks(documents: Iterator[str]) -> Iterator[tuple[list[str], int]]:
    """Documents by the 2 MiB, with their size in bytes."""
    texts: list[str] = []
    num_bytes = 0
    for text in documents:
        texts.append(text)
        num_bytes += len(text.encode())
        if num_bytes >= CHUNK_BYTES:
            yield texts, num_bytes
            texts, num_bytes = [], 0
    if texts:
        yield texts, num_bytes
