"""Text to token ids and back: a tokenizer that was loaded, or trained here in seconds.

Byte-level BPE, as in every DeepSeek model: text becomes UTF-8 bytes, and the vocabulary holds all 256 of
them, so nothing is unknown and decoding gives the text back exactly. The splitting into words before the
merges is that of DeepSeek-V3's tokenizer.json: numbers in groups of three digits, runs of Chinese or
Japanese, words with the mark before them. The work itself is done by the `tokenizers` library.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from filelock import FileLock
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from whalepod.spec.errors import UserError
from whalepod.text import sources as text_sources
from whalepod.text.lines import read_settings
from whalepod.text.sources import Progress

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
BOS_NAMES = (BOS, "<|begin_of_text|>", "<s>", "<bos>")
EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "<|im_end|>")
FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
MIN_VOCAB_SIZE = 256 + 2  # every byte, BOS and EOS
SAMPLE_BYTES = 8_000_000  # more text hardly moves the merges, and costs time
MAX_FILE_BYTES = 256 << 20  # the largest tokenizer.json known is a tenth of this
MAX_VOCABULARY, MAX_GROWTH = 1 << 22, 256
RECIPE_VERSION = 1  # part of the cache key: raise it when the same text would train another tokenizer

SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer` with what a language model asks of it.

    `bos_id` and `eos_id` are None where the tokenizer has no such token.
    """

    inner: tokenizers.Tokenizer = field(repr=False)
    bos_id: int | None
    eos_id: int | None

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        # A second copy, because the switch is a setting of the object and not an argument of its calls.
        with _refusing("the tokenizer"):
            literal = tokenizers.Tokenizer.from_str(self.inner.to_str())
        literal.encode_special_tokens = True
        return literal

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, nothing added around them.

        `special=True` reads a special token written out in the text as that token: for rendered chat
        templates. By default it is text like any other, so no document or user can smuggle one in.
        """
        chosen = self.inner if special else self._literal
        with _refusing("the tokenizer"):  # its unknown token may be unknown to itself
            return chosen.encode(text_sources.clean(text), add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """`encode` of each text, on all cores; unlike it, other threads run meanwhile."""
        chosen = self.inner if special else self._literal
        cleaned = [text_sources.clean(text) for text in texts]
        with _refusing("the tokenizer"):
            encodings = chosen.encode_batch_fast(cleaned, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing."""
        return self.inner.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        return StreamDecoder(self, skip_special=skip_special)

    @cached_property
    def vocab_size(self) -> int:
        """The smallest embedding that holds every id: the largest id + 1, for ids may have gaps."""
        return max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self.inner.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def fim_ids(self) -> tuple[int, int, int] | None:
        """Ids of the marks of fill-in-the-middle: begin, hole, end."""
        begin, hole, end = (self.inner.token_to_id(name) for name in FIM)
        return None if begin is None or hole is None or end is None else (begin, hole, end)

    @cached_property
    def byte_level(self) -> bool:
        """Whether tokens are runs of bytes, and a text is their concatenation."""
        decoder = json.loads(self.inner.to_str())["decoder"] or {}
        steps = decoder.get("decoders", [decoder])
        return [step.get("type") for step in steps] == ["ByteLevel"]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the tokenizer's JSON."""
        return hashlib.sha256(self.inner.to_str().encode()).hexdigest()

    def save(self, path: str | Path) -> Path:
        """Writes the file `path` if that ends in .json, else tokenizer.json in that folder; returns the file.

        A folder without a tokenizer_config.json gets one too, so that other engines find BOS and EOS.
        """
        path = Path(path)
        folder = path.parent if path.suffix == ".json" else path
        target = path if path.suffix == ".json" else path / "tokenizer.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(target, self.inner.to_str(pretty=True))
            config = folder / "tokenizer_config.json"
            if folder == path and not config.exists():
                names = {"bos_token": self.bos_id, "eos_token": self.eos_id}
                tokens = {k: self.inner.id_to_token(i) for k, i in names.items() if i is not None}
                write_atomically(config, json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **tokens}))
        except OSError as error:
            raise UserError(f"cannot write the tokenizer to {str(path)!r}: {error.strerror}") from error
        return target


class StreamDecoder:
    """Decodes ids as they are generated, holding back the bytes of an unfinished character.

    The pieces that `push` returns and the last one, of `finish`, join to exactly `decode` of all ids:

        >>> decoder = tokenizer.stream()
        >>> text = "".join(decoder.push(i) for i in ids) + decoder.finish()

    For a byte-level tokenizer this is an incremental UTF-8 decoder, constant work for each id. For any other
    kind the ids since the last whole character are decoded again with each new one.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # not byte-level only: the previous group of ids, then those held back
        self._shown = 0  # how many of these are the previous group, whose text is out

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often its own, possibly ''."""
        if token_id in self._skip:
            return ""
        if self._tokenizer.byte_level:
            return self._utf8.decode(self._bytes(token_id))
        self._ids.append(token_id)
        new = self._unshown()
        if not new or new.endswith("\ufffd"):
            return ""
        # The group just shown stays as context: some decoders treat the first word of a text differently.
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return new

    def finish(self) -> str:
        """What was held back and will not be completed any more. The decoder is empty afterwards."""
        if self._tokenizer.byte_level:
            text = self._utf8.decode(b"", final=True)
            self._utf8.reset()
            return text
        text = self._unshown()
        self._ids, self._shown = [], 0
        return text

    def _bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.inner.id_to_token(token_id)
        if token is None:
            return b""  # models pad their vocabulary beyond the tokenizer's; decode() skips such ids too
        try:
            return bytes(BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:
            return token.encode()  # an added token, written in plain text

    def _unshown(self) -> str:
        decode = self._tokenizer.decode
        shown = decode(self._ids[: self._shown], skip_special=self._skip_special)
        return decode(self._ids, skip_special=self._skip_special)[len(shown) :]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters, read backwards: 'A' is 65, 'Ġ' is 32 (the space)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of a folder that holds one.

    BOS and EOS are those that tokenizer_config.json beside it names, else tokens with one of the usual names.
    """
    given = Path(path).expanduser()
    file = given / "tokenizer.json" if given.is_dir() else given
    if not file.is_file():
        raise text_sources.missing(file, "tokenizer file")
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{str(file)!r} is larger than any tokenizer.json ({file.stat().st_size} bytes)")
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {str(file)!r}: {error.strerror}") from error
    with _refusing(repr(str(file))):
        content = json.loads(data)
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            raise UserError(f"{str(file)!r} is not a tokenizer.json: it has no 'model'")
        _check_growth(content, repr(str(file)))
        inner = tokenizers.Tokenizer.from_buffer(data)
        largest = max(inner.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= MAX_VOCABULARY:
            raise UserError(f"{str(file)!r}: no vocabulary is so large that a token is number {largest}")
        inner.no_truncation()  # some are saved with a length limit, which would cut documents silently
        inner.no_padding()
    config = read_settings(file.with_name("tokenizer_config.json"))
    return Tokenizer(
        inner,
        bos_id=_special_id(inner, config.get("bos_token"), BOS_NAMES),
        eos_id=_special_id(inner, config.get("eos_token"), EOS_NAMES),
    )


def _check_growth(content: dict[str, Any], what: str) -> None:
    """Raises UserError where the steps before the model may make a text so much longer that memory ends: the
    library aborts the process then."""
    growth = 1
    steps = [content.get("normalizer"), content.get("pre_tokenizer")]
    while steps and growth <= MAX_GROWTH:
        step = steps.pop()
        if not isinstance(step, dict):
            continue
        for key in ("normalizers", "pretokenizers"):
            steps += step[key] if isinstance(step.get(key), list) else []
        if step.get("type") == "ByteLevel":
            growth *= 2  # a byte beyond ASCII becomes a character of two
        elif step.get("type") == "Replace":
            growth *= max(1, len(str(step.get("content", ""))))
    if growth > MAX_GROWTH:
        raise UserError(f"the steps of {what} may make a text more than {MAX_GROWTH} times as long")


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever the library says to what it cannot read, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # It raises plain Exception; a panic of its own is not even that.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"{what} is not a tokenizer.json: {reason}") from error


def train_tokenizer(
    source: str,
    vocab_size: int,
    *,
    text_field: str = "text",
    sample_bytes: int = SAMPLE_BYTES,
    fim: bool = False,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, BOS and EOS included, trained on a sample of `source`;
    with `fim` the marks of fill-in-the-middle too.

    Kept under the cache folder and reused for the same source, size and sample. Two processes that ask at
    once get the same one: the second waits. A small text yields fewer merges, and so a smaller vocabulary.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size is {vocab_size}, a byte-level tokenizer needs at least {MIN_VOCAB_SIZE}")
    origin = text_sources.fingerprint(source, text_field=text_field)
    recipe = f"{RECIPE_VERSION}\0{origin}\0{vocab_size}\0{sample_bytes}"
    recipe += "\0fim" if fim else ""
    key = hashlib.sha256(recipe.encode()).hexdigest()[:24]
    file = cache_folder(cache_dir, "tokenizers") / f"{key}.json"
    if not file.exists():
        with made_once(file):
            if not file.exists():
                sample = text_sources.documents(source, text_field=text_field, max_bytes=sample_bytes)
                total = min(sample_bytes, text_sources.total_bytes(source) or sample_bytes)
                write_atomically(file, _train(_counted(sample, total, progress), vocab_size, fim).to_str())
    return load_tokenizer(file)


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises UserError unless every id of `tokenizer` is below a model's `vocab_size`."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's vocab_size is "
            f"{vocab_size}: it must be at least {tokenizer.vocab_size}"
        )


def cache_folder(cache_dir: str | Path | None = None, *parts: str) -> Path:
    """`cache_dir`, else $WHALEPOD_CACHE, else ~/.cache/whalepod, joined with `parts`; made if need be."""
    root = Path(cache_dir or os.environ.get("WHALEPOD_CACHE") or "~/.cache/whalepod").expanduser()
    folder = root.joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder {str(folder)!r}: {error.strerror} (see WHALEPOD_CACHE)"
        ) from error
    return folder


@contextmanager
def made_once(path: Path) -> Iterator[None]:
    """Holds the lock of a cached file or folder while it is made; other processes that want it wait.

    Check again inside whether it exists. A failure to write, such as a full disk, becomes a UserError.
    """
    try:
        with FileLock(path.with_name(f"{path.name}.lock")):
            yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"cannot write {str(path)!r}: {reason} (see WHALEPOD_CACHE)") from error


def write_atomically(path: Path, content: str) -> None:
    """Writes `content` beside `path` and renames: a reader sees the old file or the whole new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would lock others out of a shared cache
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _train(sample: Iterator[str], vocab_size: int, fim: bool) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, *(FIM if fim else ())],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(sample, trainer)
    return inner


def _counted(texts: Iterator[str], total: int, progress: Progress | None) -> Iterator[str]:
    """Passes `texts` on and reports their bytes."""
    done = 0
    for text in texts:
        yield text
        done += len(text.encode())
        if progress:
            progress("training the tokenizer", min(done, total), total)
    if progress:
        progress("training the tokenizer", total, total)


def _special_id(inner: tokenizers.Tokenizer, named: Any, usual: tuple[str, ...]) -> int | None:
    """The id of the token that tokenizer_config.json names, as text or as an object, else of a usual one."""
    if isinstance(named, dict):
        named = named.get("content")
    names = (text_sources.clean(named), *usual) if isinstance(named, str) else usual
    return next((i for name in names if (i := inner.token_to_id(name)) is not None), None)
