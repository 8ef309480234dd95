"""The engine with text: streams, stop strings, grammars, cancelling, draining, and what breaks it."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_core import fleet

from whalepod.models.transformer import Transformer, init_weights
from whalepod.serve.core import CoreConfig
from whalepod.serve.engine import Engine
from whalepod.serve.grammar import Grammars
from whalepod.serve.output import Output
from whalepod.serve.request import Busy, Chunk, Draining, Grammar, Request, Sampling
from whalepod.spec.errors import UserError
from whalepod.spec.presets import load_model_spec
from whalepod.text.tokenizer import Tokenizer, train_tokenizer

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 512,
    "initializer_range": 0.15,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "q_lora_rank": 32,
}


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    return train_tokenizer(str(corpus), 512)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(load_model_spec("v3-mini").with_(**SMALL))
    init_weights(model, 1)
    return model.eval().requires_grad_(False)


@pytest.fixture
def engine(model: Transformer, tokenizer: Tokenizer) -> Iterator[Engine]:
    config, grammars = CoreConfig(num_pages=64, page_size=16, max_running=4), Grammars(tokenizer, 512)
    engine = Engine(fleet(model, config, grammars.mask), tokenizer, 2)
    yield engine
    engine.close()


def prompt(tokenizer: Tokenizer, text: str = "def function(") -> tuple[int, ...]:
    return tuple(tokenizer.encode(text))


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def test_chunks_join_to_the_text(engine: Engine, tokenizer: Tokenizer) -> None:
    request = Request(prompt(tokenizer), 40, logprobs=2)
    chunks = list(engine.stream(request))
    ids = [info.id for chunk in chunks for info in chunk.tokens]
    assert len(ids) == chunks[-1].new_tokens == 40
    assert text_of(chunks) == tokenizer.decode(ids)
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1].prompt_tokens == len(request.prompt)
    for info in (info for chunk in chunks for info in chunk.tokens):
        assert info.logprob is not None
        assert info.top[0][2] >= info.top[1][2] >= -100
        assert info.id == info.top[0][0]  # greedy
    assert engine.complete([request] * 3) == [(text_of(chunks), "length")] * 3


def test_many_at_once_from_an_event_loop(engine: Engine, tokenizer: Tokenizer) -> None:
    requests = [Request(prompt(tokenizer, "def f" * n), 5 * n) for n in range(1, 6)]
    expected = engine.complete(requests)

    async def one(request: Request) -> tuple[str, Any]:
        chunks = [chunk async for chunk in engine.generate(request)]
        return text_of(chunks), chunks[-1].finish_reason

    async def all_of_them() -> list[tuple[str, Any]]:
        return list(await asyncio.gather(*map(one, requests)))

    assert asyncio.run(all_of_them()) == expected


def test_text_ends_before_a_stop_string(engine: Engine, tokenizer: Tokenizer) -> None:
    whole = text_of(list(engine.stream(Request(prompt(tokenizer), 60))))
    for begin, size in ((5, 3), (20, 1), (31, 12)):
        stop = whole[begin : begin + size]
        chunks = list(engine.stream(Request(prompt(tokenizer), 60, stop=("never there", stop))))
        assert text_of(chunks) == whole[: whole.index(stop)]
        assert chunks[-1].finish_reason == "stop"
        assert chunks[-1].new_tokens < 60
    assert engine.stats().pages_in_use == 0


def test_output_never_shows_part_of_a_stop_string(tokenizer: Tokenizer) -> None:
    text = "one two <end> three"
    ids = tokenizer.encode(text)
    shown = []
    output = Output(tokenizer, ("<end>", "zzz"))
    for token in ids:
        shown.append(output.push([token]))
    assert "".join(shown) == "one two "
    assert output.stopped
    assert output.finish() == ""
    open_ = Output(tokenizer, ("<end>",))
    assert open_.push(tokenizer.encode("a <en")) == "a "
    assert open_.finish() == "<en"


@pytest.mark.parametrize(
    ("grammar", "fits"),
    [
        (Grammar("regex", "(yes|no), [0-9]{3}"), lambda text: re.fullmatch("(yes|no), [0-9]{3}", text)),
        (Grammar("json_object"), lambda text: isinstance(json.loads(text), dict)),
        (
            Grammar(
                "json_schema",
                json.dumps(
                    {
                        "type": "object",
                        "properties": {"name": {"enum": ["a", "b"]}, "count": {"type": "boolean"}},
                        "required": ["name", "count"],
                        "additionalProperties": False,
                    }
                ),
            ),
            lambda text: set(json.loads(text)) == {"name", "count"},
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, Grammar) else "",
)
def test_output_keeps_to_a_grammar(engine: Engine, tokenizer: Tokenizer, grammar: Grammar, fits: Any) -> None:
    # An untrained model writes what it may: strings without end are cut by the length, and tried again.
    for seed in range(20):
        request = Request(prompt(tokenizer), 200, Sampling(1.0, seed=seed), grammar=grammar)
        chunks = list(engine.stream(request))
        if chunks[-1].finish_reason == "stop":
            assert fits(text_of(chunks)), text_of(chunks)
            return
    raise AssertionError("no output came to its end")


def test_a_grammars_end_is_the_end(engine: Engine, tokenizer: Tokenizer) -> None:
    request = Request(prompt(tokenizer), 60, ignore_eos=True, grammar=Grammar("regex", "[ab]{3}"))
    chunks = list(engine.stream(request))
    assert chunks[-1].finish_reason == "stop"
    assert re.fullmatch("[ab]{3}", text_of(chunks))
    for extreme in (Sampling(1e-39), Sampling(1.0, repetition_penalty=0.01), Sampling(100.0)):
        chunks = list(engine.stream(Request(request.prompt, 60, extreme, grammar=request.grammar)))
        assert re.fullmatch("[ab]{3}", text_of(chunks))
    assert engine.failure is None


def test_special_tokens_are_no_text_of_a_grammar(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_id is not None
    mask = Grammars(tokenizer, 512).mask(Grammar("regex", "[^a]{40}"))
    logits = torch.zeros(512)
    mask.apply(logits)
    assert logits[tokenizer.bos_id] == float("-inf")
    assert not mask.accept(tokenizer.bos_id)


def test_hardly_any_temperature_is_none(engine: Engine, tokenizer: Tokenizer) -> None:
    greedy = text_of(list(engine.stream(Request(prompt(tokenizer), 30))))
    for cold in (1e-300, 1e-39, 1e-5):
        drawn = list(engine.stream(Request(prompt(tokenizer), 30, Sampling(cold, seed=1))))
        assert text_of(drawn) == greedy, cold


class Oracle:
    """In place of a runner's guesses: those that are right, which an untrained block's hardly ever are."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer

    def __call__(self, _hidden: Any, runs: Any, _wishes: Any, picked: Any) -> list[tuple[int, ...]]:
        ends = [run.sequence.num_new + len(found) for run, found in zip(runs, picked, strict=True)]
        known = [run.writes and end < len(self.answer) for run, end in zip(runs, ends, strict=True)]
        return [(self.answer[end],) if is_known else () for end, is_known in zip(ends, known, strict=True)]


def test_what_comes_behind_a_stop_string_is_not_told(model: Transformer, tokenizer: Tokenizer) -> None:
    whole = Request(prompt(tokenizer), 30)
    found: list[Any] = []
    text, answer = "", []
    for speculate in (False, True):
        engine = Engine(fleet(model, CoreConfig(64, 16, speculate=speculate)), tokenizer)
        if speculate:
            engine._fleet._runner._guess = Oracle(answer)  # type: ignore[method-assign]
        else:
            chunks = list(engine.stream(whole))
            text, answer = text_of(chunks), [info.id for chunk in chunks for info in chunk.tokens]
        rows = []
        for begin in range(0, len(text) - 4, 3):
            stop = (text[begin : begin + 3],)
            chunks = list(engine.stream(Request(whole.prompt, 30, stop=stop, logprobs=0)))
            tokens = [info.id for chunk in chunks for info in chunk.tokens]
            assert len(tokens) == chunks[-1].new_tokens
            rows.append((text_of(chunks), tokens))
        if speculate:
            assert engine.stats().steps < engine.stats().new_tokens
        engine.close()
        found.append(rows)
    assert found[0] == found[1]


def test_a_grammar_that_is_none_is_refused(engine: Engine, tokenizer: Tokenizer) -> None:
    for grammar in (Grammar("regex", "(unclosed"), Grammar("json_schema", '{"type": 3}')):
        with pytest.raises(UserError, match=r"cannot be used"):
            list(engine.stream(Request(prompt(tokenizer), 5, grammar=grammar)))


def test_who_leaves_frees_the_pages(engine: Engine, tokenizer: Tokenizer) -> None:
    stream = engine.stream(Request(prompt(tokenizer), 800))
    next(stream)
    assert engine.stats().pages_in_use > 0
    stream.close()
    assert list(engine.stream(Request(prompt(tokenizer), 3)))[-1].finish_reason == "length"
    assert engine.stats().pages_in_use == 0
    assert engine.stats().finished == 2

    async def left() -> None:
        chunks = engine.generate(Request(prompt(tokenizer), 800))
        await anext(chunks)
        await chunks.aclose()  # type: ignore[attr-defined]

    asyncio.run(left())
    list(engine.stream(Request(prompt(tokenizer), 3)))
    assert engine.stats().pages_in_use == 0


def test_a_full_queue_says_so(engine: Engine, tokenizer: Tokenizer) -> None:
    streams = [engine.stream(Request(prompt(tokenizer), 700)) for _ in range(6)]
    for stream in streams[:1]:
        next(stream)
    threads = [threading.Thread(target=next, args=(stream,)) for stream in streams[1:]]
    for thread in threads:
        thread.start()
    while engine.stats().waiting + engine.stats().running < 6:
        pass
    with pytest.raises(Busy, match="2 requests wait"):
        next(engine.stream(Request(prompt(tokenizer), 5)))
    for thread in threads[:3]:
        thread.join()
    for stream in streams[:4]:
        stream.close()
    for thread in threads:
        thread.join()
    assert list(engine.stream(Request(prompt(tokenizer), 2)))[-1].finish_reason == "length"


def test_drains(engine: Engine, tokenizer: Tokenizer) -> None:
    first = engine.stream(Request(prompt(tokenizer), 50))
    next(first)
    closing = threading.Thread(target=engine.close, args=(60,))
    closing.start()
    while not engine._draining:
        pass
    with pytest.raises(Draining):
        next(engine.stream(Request(prompt(tokenizer), 1)))
    assert list(first)[-1].finish_reason == "length"
    closing.join()


def test_what_is_left_after_the_drain_is_aborted(engine: Engine, tokenizer: Tokenizer) -> None:
    first = engine.stream(Request(prompt(tokenizer), 900))
    next(first)
    engine.close(0)
    assert list(first)[-1].finish_reason == "abort"


def test_a_broken_engine_tells_everyone(
    engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = engine.stream(Request(prompt(tokenizer), 900))
    next(stream)

    def broken(*_: Any) -> Any:
        raise MemoryError("no memory left")

    monkeypatch.setattr(torch.nn.RMSNorm, "forward", broken)
    with pytest.raises(MemoryError):
        list(stream)
    assert isinstance(engine.failure, MemoryError)
    with pytest.raises(RuntimeError, match="broken"):
        list(engine.stream(Request(prompt(tokenizer), 1)))


def test_bad_requests(engine: Engine, tokenizer: Tokenizer) -> None:
    for request in (Request((), 3), Request((1,), 100_000), Request((600,), 1)):
        with pytest.raises(UserError):
            list(engine.stream(request))
    with pytest.raises(UserError):
        Request((1,), stop=("",))
    with pytest.raises(UserError):
        Request((1,), logprobs=21)
    assert list(engine.stream(Request(prompt(tokenizer), 2)))[-1].finish_reason == "length"
