"""Chat data: rendered as transformers renders it, and only the answers are learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from whalepod.models.transformer import Transformer, init_weights, target_windows
from whalepod.spec.errors import UserError
from whalepod.spec.presets import load_model_spec
from whalepod.text.chat import ChatTemplate, conversations, encoded, seen_only
from whalepod.text.tokenizer import EOS, Tokenizer, load_tokenizer, train_tokenizer
from whalepod.train.data import PackedTokens
from whalepod.train.prepare import prepare

# As DeepSeek's are: bos, system text as it is, marks for the roles, eos behind an answer; R1 drops reasoning.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'user' %}<User>{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}<Answer>{% if loop.last %}{{ m['content'] }}"
    "{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<Answer>{% endif %}"
)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALK = [message("system", "Be short."), message("user", "two plus two?"), message("assistant", "four"),
        message("user", "and three?"), message("assistant", "seven, 七")]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    text = folder / "text.txt"
    text.write_text("two plus two is four and three is seven. Be short. <User> <Answer>\n" * 40)
    train_tokenizer(str(text), 320, cache_dir=folder / "cache").save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def split(ids: list[int], tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """Runs of what is learnt and what is seen, as text."""
    runs: list[tuple[bool, list[int]]] = []
    for i in ids:
        learnt = i >= 0
        if not runs or runs[-1][0] != learnt:
            runs.append((learnt, []))
        runs[-1][1].append(i if learnt else seen_only(i))
    return [(learnt, tokenizer.decode(part, skip_special=False)) for learnt, part in runs]


@pytest.mark.parametrize("prompt", [False, True])
def test_rendered_as_transformers_does(folder: Path, prompt: bool) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": "ä"}}}]
    for more in ({}, {"tools": tools}):
        expected = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=prompt, **more)
        assert ChatTemplate(folder).render(TALK, prompt, **more) == expected


def test_only_answers_are_learnt(folder: Path, tokenizer: Tokenizer) -> None:
    ids = encoded({"messages": TALK}, ChatTemplate(folder), tokenizer)
    bos = "<｜begin▁of▁sentence｜>"
    assert split(ids, tokenizer) == [
        (False, f"{bos}Be short.<User>two plus two?<Answer>"),
        (True, f"four{EOS}"),
        (False, "<User>and three?<Answer>"),
        (True, f"seven, 七{EOS}"),
    ]


def test_a_turn_that_the_template_rewrites_is_seen_only(folder: Path, tokenizer: Tokenizer) -> None:
    talk = [
        TALK[1],
        message("assistant", "<think>hm</think>four"),
        TALK[3],
        message("assistant", "<think>so</think>seven"),
    ]
    learnt = [
        text
        for flag, text in split(encoded({"messages": talk}, ChatTemplate(folder), tokenizer), tokenizer)
        if flag
    ]
    assert learnt == [f"<think>so</think>seven{EOS}"]
    with pytest.raises(UserError, match="no turn of the assistant"):
        encoded({"messages": talk[:1]}, ChatTemplate(folder), tokenizer)


def test_the_loss_is_that_of_the_answers(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": TALK}) + "\n" for _ in range(20)))
    files = prepare(str(file), tokenizer, tmp_path / "cache", 0.2, chat=ChatTemplate(folder))
    assert files.train.dtype == "int32"
    rows = torch.from_numpy(PackedTokens(files.train.path, 48, seed=0, extra=2).batch(0, 4))
    spec = load_model_spec("v3-mini").with_(num_hidden_layers=2, vocab_size=320)
    model = Transformer(spec)
    init_weights(model, 0)
    true = torch.where(rows < 0, -1 - rows, rows)
    with torch.no_grad():
        losses = model(true[:, :48], target_windows(rows[:, 1:], 1))
        logits = model(true[:, :48])
        expected = F.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:49].flatten().clamp_min(-1), ignore_index=-1, reduction="sum"
        )
        # MTP reads the true next token, whether that one is learnt or not.
        alone = model(true[:, :48], target_windows(true[:, 1:], 1))
        half = model(true[:, :48], torch.stack((true[:, 1:49], rows[:, 2:50]), -1))
    assert losses.main == pytest.approx(float(expected), rel=1e-5)
    assert float(losses.main) < 0.8 * float(alone.main)
    assert torch.equal(losses.mtp[0], half.mtp[0])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"messages": [}', "line 2 is not JSON"),
        ('{"message": []}', 'line 2: expected {"messages"'),
        ('{"messages": []}', 'line 2: expected {"messages"'),
        ('{"messages": [{"role": "user"}]}', 'line 2: expected {"messages"'),
        ('{"messages": [3]}', 'line 2: expected {"messages"'),
        ("[" * 200_000, "line 2 is not JSON"),
    ],
)
def test_bad_lines_are_named(line: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": TALK}) + "\n" + line + "\n")
    with pytest.raises(UserError) as error:
        list(conversations(file))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ raise_exception('no') }}",
        "{{ messages.nothing.at_all }}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_bad_templates_are_one_line(template: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError) as error:
        ChatTemplate(tmp_path).render(TALK)
    assert "\n" not in str(error.value)


def test_without_a_template(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        ChatTemplate(tmp_path)


def train_values(folder: Path, file: Path, out: Path) -> dict[str, Any]:
    return {
        "model": {"preset": "v3-mini", "num_hidden_layers": 2, "vocab_size": 320},
        "layout": {"micro_batch": 2, "global_batch": 4, "precision": "fp32"},
        "data": {
            "source": str(file),
            "chat": True,
            "tokenizer": str(folder),
            "sequence_length": 32,
            "validation_fraction": 0.2,
        },
        "optimizer": {"learning_rate": 1e-2},
        "train": {"steps": 12, "evaluate_every": 0, "checkpoint_every": 0},
        "threads_per_worker": 1,
        "out": str(out),
    }


def test_a_run_learns_the_answers(folder: Path, tmp_path: Path) -> None:
    from whalepod.spec.run import make_run
    from whalepod.train.start import train

    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": TALK}) + "\n" for _ in range(60)))
    result = train(make_run(train_values(folder, file, tmp_path / "run")), quiet=True)
    assert result.validation_loss is not None
    assert result.validation_loss < 2.0  # of ln 320 = 5.8: the same answers, learnt by heart
    values = train_values(folder, file, tmp_path / "other")
    values["data"]["tokenizer"] = None
    with pytest.raises(UserError, match=r"data\.chat needs a model's own tokenizer"):
        train(make_run(values), quiet=True)
