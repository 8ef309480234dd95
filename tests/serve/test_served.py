"""`whalepod serve` as its users meet it: the process, the openai client, a model that learnt something."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from learnt import PROMPTS

from whalepod.serve.generate import generate, load_model

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}def {{ message.content }}("
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)


class Served:
    """A server process and what it says."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "whalepod", "serve", str(folder), "--port", "0", "--dtype", "fp32"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "WHALEPOD_API_KEY": "secret"}
        self.process = subprocess.Popen(
            [*command, "--cache-gib", "0.01", *options],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.said: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"http://[\d.:]+", line):
                self.url = found.group()
                break
        else:
            raise AssertionError("".join(self.said))
        threading.Thread(target=self._read, daemon=True).start()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="secret", max_retries=0)

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.said += list(self.process.stderr)

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", headers={"Authorization": "Bearer secret"}).text
        return float(re.findall(rf"^{name} (\S+)$", text, re.MULTILINE)[0])

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def chatty(learnt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chatty") / "hf"
    shutil.copytree(learnt / "hf", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text('{"temperature": 0.0}')
    return folder


@pytest.fixture(scope="module", params=["one device", "dp 2 ep 2"])
def served(request: pytest.FixtureRequest, chatty: Path) -> Iterator[Served]:
    options = ["--dp", "2", "--ep", "2"] if request.param != "one device" else []
    served = Served(chatty, "--speculate", "--max-running", "8", *options)
    yield served
    assert served.end() == 0
    assert not any("Traceback" in line for line in served.said), served.said


@pytest.mark.slow
def test_answers_are_those_of_generate(served: Served, chatty: Path) -> None:
    model, tokenizer = load_model(chatty, "fp32")
    name = served.client.models.list().data[0].id
    assert name == "hf"
    for text in PROMPTS:
        expected = generate(model, tokenizer, text, 20).text
        whole = served.client.completions.create(model=name, prompt=text, max_tokens=20)
        assert whole.choices[0].text == expected
        pieces = served.client.completions.create(model=name, prompt=text, max_tokens=20, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == expected
    both = served.client.completions.create(model=name, prompt=list(PROMPTS), max_tokens=20, n=2)
    assert len(both.choices) == 2 * len(PROMPTS)
    assert both.choices[1].text == both.choices[0].text  # greedy
    chat = served.client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": "function_1_1"}], max_tokens=12
    )
    bos = tokenizer.bos_id
    assert bos is not None
    from whalepod.serve.generate import generate_ids
    from whalepod.serve.request import Sampling

    ids = [bos, *tokenizer.encode("def function_1_1(")]
    assert chat.choices[0].message.content == tokenizer.decode(generate_ids(model, ids, 12, Sampling()))


@pytest.mark.slow
def test_structured_output(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = served.client.chat.completions.create(
        model="hf",
        messages=[{"role": "user", "content": "f"}],
        max_tokens=150,
        response_format=form,
        temperature=1.0,
        seed=1,
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"ok", "kind"}


@pytest.mark.slow
def test_clients_that_leave_take_nothing_with_them(served: Served) -> None:
    for _ in range(12):
        stream = served.client.completions.create(model="hf", prompt="def ", max_tokens=900, stream=True)
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 30
    while served.metric("whalepod_pages_in_use") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert served.metric("whalepod_pages_in_use") == 0
    assert served.metric("whalepod_running") == 0


@pytest.mark.slow
def test_what_is_wrong_is_said(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="token"):
        served.client.completions.create(model="hf", prompt="a " * 5000, max_tokens=5)
    with pytest.raises(openai.AuthenticationError):
        served.client.with_options(api_key="wrong").models.list()
    assert httpx.get(f"{served.url}/health").status_code == 200
    assert httpx.get(f"{served.url}/ready").status_code == 200
    assert "<html" in httpx.get(served.url).text


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--dp", "2", "--ep", "2")], ids=["one device", "dp 2 ep 2"])
def test_a_signal_to_all_processes_lets_an_answer_finish(chatty: Path, options: tuple[str, ...]) -> None:
    served = Served(chatty, *options)
    stream = served.client.completions.create(model="hf", prompt="def ", max_tokens=300, stream=True)
    pieces = [next(iter(stream))]
    os.killpg(served.process.pid, signal.SIGTERM)
    pieces += list(stream)
    assert pieces[-1].choices[0].finish_reason == "length"
    assert served.process.wait(timeout=60) == 0


@pytest.mark.slow
def test_a_dead_worker_is_told_and_nobody_waits_for_ever(chatty: Path) -> None:
    served = Served(chatty, "--tp", "2")
    (forks,) = [pid for pid in _children(served.process.pid) if b"forkserver" in _command(pid)]
    workers = _children(forks)
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGKILL)
    with pytest.raises(openai.InternalServerError):
        served.client.completions.create(model="hf", prompt="def ", max_tokens=5, timeout=60)
    assert httpx.get(f"{served.url}/health").status_code == 503
    assert served.end() == 0


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
