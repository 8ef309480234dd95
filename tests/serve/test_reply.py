"""A reply told apart while it is written, however it is cut."""

from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from whalepod.serve.http.reply import ChosenCall, ForcedCall, Reader, Splitter

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"


def v3_call(name: str, arguments: str) -> str:
    return f"{CALL}function{SEPARATOR}{name}\n```json\n{arguments}\n```{CALL_END}"


def v31_call(name: str, arguments: str) -> str:
    return f"{CALL}{name}{SEPARATOR}{arguments}{CALL_END}"


def read(reader: Reader, *pieces: str) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content, and calls by name and arguments."""
    reasoning = content = ""
    calls: list[tuple[str, str]] = []
    for part in [part for piece in pieces for part in reader.push(piece)] + reader.finish():
        if part.kind == "reasoning":
            reasoning += part.text
        elif part.kind == "content":
            content += part.text
        elif part.kind == "call":
            calls.append((part.text, ""))
        else:
            calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    return reasoning, content, calls


def test_reasoning_is_told_from_content() -> None:
    assert read(Splitter(), "<think>\nHm.\n</think>\n\nYes.\n") == ("Hm.", "Yes.\n", [])
    assert read(Splitter(thinking=True), "\nHm.\n</think>\n\nYes.") == ("Hm.", "Yes.", [])
    assert read(Splitter(), " \n<think></think>Yes.") == ("", "Yes.", [])
    assert read(Splitter(thinking=True), "still at it, </thi") == ("still at it, </thi", "", [])
    # Only a reply that begins with the mark thinks; elsewhere it is text about it.
    assert read(Splitter(), " Write <think> and </think>. ") == ("", " Write <think> and </think>. ", [])
    assert read(Splitter(), "") == ("", "", [])
    assert read(Splitter(), "  <thin") == ("", "  <thin", [])


def test_calls_of_both_forms() -> None:
    arguments = '{"city": "Köln", "code": "```py\\n```"}'
    for call in (v3_call, v31_call):
        one, two = call("get_weather", arguments), call("now", "{}")
        expected = [("get_weather", arguments), ("now", "{}")]
        assert read(Splitter(tools=True), f"Well.\n\n{CALLS}{one}\n{two}{CALLS_END}") == (
            "",
            "Well.",
            expected,
        )
        assert read(Splitter(tools=True), f"{CALLS}{one}{two}{CALLS_END}\n") == ("", "", expected)
        assert read(Splitter(tools=True), one + two) == ("", "", expected)  # some forget the outer marks
        thought = read(Splitter(thinking=True, tools=True), f"Hm.\n</think>\n\n{CALLS}{one}{CALLS_END}")
        assert thought == ("Hm.", "", expected[:1])
        whole = f"{CALLS}{one}{CALLS_END}"
        assert read(Splitter(), whole) == ("", whole, [])  # nobody offered a tool


def test_odd_calls() -> None:
    tools = lambda text: read(Splitter(tools=True), text)  # noqa: E731
    assert tools(CALL + "function" + SEPARATOR + 'f\n{"a": 1}' + CALL_END) == ("", "", [("f", '{"a": 1}')])
    assert tools(v31_call("function", '{"a": 1}')) == ("", "", [("function", '{"a": 1}')])
    assert tools(CALL + "f" + SEPARATOR + CALL_END) == ("", "", [("f", "")])
    assert tools(CALL + "function" + SEPARATOR + "f" + CALL_END) == ("", "", [("f", "")])
    assert tools(CALL + "no separator" + CALL_END) == ("", "no separator", [])
    # Cut short by the token limit: what there is of the arguments is kept.
    assert tools(CALLS + v3_call("f", '{"a": [1, 2')[: -len("\n```" + CALL_END)]) == (
        "",
        "",
        [("f", '{"a": [1, 2')],
    )
    assert tools(CALLS + CALL + "f" + SEPARATOR + '{"a"' + CALLS_END + " more") == (
        "",
        "more",
        [("f", '{"a"')],
    )


def test_nothing_of_a_mark_is_shown_before_it_is_known() -> None:
    text = f"<think>a</think>b {CALLS}{v31_call('f', '{}')}{CALLS_END}"
    reader = Splitter(tools=True)
    seen = [part for character in text for part in reader.push(character)] + reader.finish()
    assert [(part.kind, part.text) for part in seen] == [
        ("reasoning", "a"), ("content", "b"), ("call", "f"), ("arguments", "{"), ("arguments", "}"),
    ]  # fmt: skip


def test_text_is_not_held_longer_than_it_must_be() -> None:
    reader = Splitter(tools=True)
    assert [part.text for part in reader.push("Hello, wor")] == ["Hello, wor"]
    assert [part.text for part in reader.push("ld <")] == ["ld"]
    assert [part.text for part in reader.push("br>")] == [" <br>"]


def test_forced_calls() -> None:
    assert read(ForcedCall("f"), "", '{"a"', ": 1}") == ("", "", [("f", '{"a": 1}')])
    assert read(ForcedCall("f")) == ("", "", [])
    whole = '{"name": "g", "arguments": {"a": [1]}}'
    assert read(ChosenCall(), whole[:9], whole[9:]) == ("", "", [("g", '{"a": [1]}')])
    assert read(ChosenCall(), whole[:20]) == ("", whole[:20], [])
    assert read(ChosenCall(), "[1]") == ("", "[1]", [])


PIECES = [
    "<think>", "</think>", CALLS, CALLS_END, CALL, CALL_END, SEPARATOR,
    "function", "get", "\n", " ", "```json\n", "\n```", "`",
    '{"a": "b"}', "{", "}", "<", "<｜", "<｜tool▁", "</",
    "text", "日本", v3_call("f", "{}"), v31_call("g", '{"x": 1}'), json.dumps({"q": CALL_END}),
]  # fmt: skip


@given(
    text=st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
    cuts=st.lists(st.integers(0, 200), max_size=8),
    thinking=st.booleans(),
    tools=st.booleans(),
)
def test_any_cutting_gives_the_same(text: str, cuts: list[int], thinking: bool, tools: bool) -> None:
    whole = read(Splitter(thinking, tools), text)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert read(Splitter(thinking, tools), *pieces) == whole
    assert read(Splitter(thinking, tools), *text) == whole


CALLS_OF_ALL_KINDS = st.lists(
    st.tuples(
        st.from_regex(r"[a-z_]{1,9}", fullmatch=True),
        st.dictionaries(st.text(max_size=9), st.text(max_size=9)),
    )
)


@given(
    thought=st.text(max_size=30).map(str.strip).filter(lambda text: "</think>" not in text),
    content=st.text(max_size=30).map(str.strip).filter(lambda text: "<｜tool" not in text),
    calls=CALLS_OF_ALL_KINDS,
    form=st.sampled_from([v3_call, v31_call]),
)
def test_what_was_written_is_read(thought, content, calls, form) -> None:
    written = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
    text = f"<think>\n{thought}\n</think>\n\n{content}"
    if written:
        text += CALLS + "\n".join(form(*call) for call in written) + CALLS_END
    assert read(Splitter(tools=True), text) == (thought, content, written)
