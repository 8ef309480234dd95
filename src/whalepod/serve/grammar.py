"""Output that keeps to a grammar (JSON schema, regular expression, any JSON object), by the library xgrammar.

Before a token is picked the library rules out every token after which the output could not become a sentence
of the grammar any more. EOS is among those that are left when it is one.
"""

from __future__ import annotations

import re
import threading
from typing import Any

from torch import Tensor

from whalepod.serve.request import Grammar
from whalepod.spec.errors import UserError
from whalepod.text.tokenizer import Tokenizer

MAX_BLANKS = 16  # in a row, between the parts of JSON: a small model may write nothing else
CACHE_BYTES = 256 << 20  # of compiled grammars


class GrammarMask:
    """How far one output has come in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        import xgrammar

        self._matcher, self._library = matcher, xgrammar
        self._bits = xgrammar.allocate_token_bitmask(1, vocab_size)

    def apply(self, logits_V: Tensor) -> None:
        """Rules out, in place, tokens that may not come next."""
        self._matcher.fill_next_token_bitmask(self._bits)
        self._library.apply_token_bitmask_inplace(logits_V.unsqueeze(0), self._bits.to(logits_V.device))

    def accept(self, token: int) -> bool:
        """Whether the token fits; it does, unless the grammar had none to offer."""
        return bool(self._matcher.accept_token(token))


class Grammars:
    """Compiles grammars for one tokenizer, and remembers them. vocab_size: of the model's logits."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._compiler: Any = None

    def mask(self, grammar: Grammar) -> GrammarMask:
        """Raises UserError for a grammar that the library does not take."""
        if self._tokenizer.eos_id is None:
            raise UserError("the tokenizer has no EOS, with which output of a grammar ends")
        import xgrammar

        with self._lock:  # the library's compiler keeps its own cache
            compiler = self._made()
            try:
                if grammar.kind == "regex":
                    compiled = compiler.compile_regex(grammar.source)
                else:
                    schema = grammar.source if grammar.kind == "json_schema" else '{"type": "object"}'
                    compiled = compiler.compile_json_schema(schema, max_whitespace_cnt=MAX_BLANKS)
                matcher = xgrammar.GrammarMatcher(compiled)
            except Exception as error:  # the library has no common class for them
                line = (str(error).splitlines() or [type(error).__name__])[0]
                line = re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", line)
                raise UserError(
                    f"the {grammar.kind.replace('_', ' ')} cannot be used: {line}"[:300]
                ) from None
        return GrammarMask(matcher, self._vocab_size)

    def _made(self) -> Any:
        import xgrammar

        if self._compiler is None:
            inner, eos, special = self._tokenizer.inner, self._tokenizer.eos_id, self._tokenizer.special_ids
            # Special tokens are not text: none of them may stand for theirs.
            vocabulary = [
                "" if i in special else inner.id_to_token(i) or "" for i in range(self._tokenizer.vocab_size)
            ]
            kind = xgrammar.VocabType
            info = xgrammar.TokenizerInfo(
                vocabulary,
                kind.BYTE_LEVEL if self._tokenizer.byte_level else kind.BYTE_FALLBACK,
                vocab_size=self._vocab_size,
                stop_token_ids=None if eos is None else [eos],
            )
            self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=CACHE_BYTES)
        return self._compiler
