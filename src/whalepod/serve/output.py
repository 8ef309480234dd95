"""A request's tokens as text that can be shown: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Iterable

from whalepod.serve.request import TokenInfo
from whalepod.serve.runner import Picked
from whalepod.text.tokenizer import Tokenizer


class Output:
    """Takes tokens, gives text. After a stop string, which `stopped` then says was found, nothing comes."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = tokenizer.stream()
        self._held = ""
        self.stopped = False

    def push(self, tokens: Iterable[int]) -> str:
        return self._shown("".join(self._decoder.push(token) for token in tokens))

    def finish(self) -> str:
        """The text that was held back, for no more will come."""
        return self._shown(self._decoder.finish()) + self._rest()

    def _rest(self) -> str:
        rest, self._held = self._held, ""
        return rest

    def _shown(self, new: str) -> str:
        if self.stopped or not self._stop:
            return "" if self.stopped else new
        text = self._held + new
        found = [index for index in map(text.find, self._stop) if index >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        known = settled(text, self._stop)
        self._held = text[known:]
        return text[:known]

    def infos(self, picked: Iterable[Picked], wanted: bool) -> tuple[TokenInfo, ...]:
        """Tokens as a client sees them; with their texts only if logprobs are `wanted`."""
        if not wanted:
            return tuple(TokenInfo(each.token, "") for each in picked)
        return tuple(
            TokenInfo(
                each.token,
                self._text(each.token),
                each.logprob,
                tuple((token, self._text(token), logprob) for token, logprob in each.top),
            )
            for each in picked
        )

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special=False)


def settled(text: str, marks: tuple[str, ...]) -> int:
    """How much of `text` cannot be part of a mark whose rest is still to come."""
    for size in range(min(len(text), max(map(len, marks)) - 1), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return len(text) - size
    return len(text)
