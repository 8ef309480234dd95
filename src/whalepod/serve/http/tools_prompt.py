"""Tools for a chat template that can write calls down but says nothing of what may be called.

DeepSeek's own templates of V3 and V3.1 are such: their model cards have the tools described in the system
prompt. The words are those of V3.1's card, with the marks of whichever of the two forms the template writes.
"""

from __future__ import annotations

import json
from typing import Any

from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from whalepod.serve.http.reply import CALL, CALL_END, CALLS, CALLS_END, SEPARATOR
from whalepod.spec.errors import UserError

Messages = list[dict[str, Any]]


class ToolsPrompt:
    """How tools get into the prompt of one template."""

    def __init__(self, template: str) -> None:
        parsed = ImmutableSandboxedEnvironment().parse(template)
        self._described = "tools" in meta.find_undeclared_variables(parsed)
        self._called = CALL in template
        self._form = f"tool_call_name{SEPARATOR}tool_call_arguments"
        if "```json" in template:  # V3's
            self._form = f"function{SEPARATOR}tool_call_name\n```json\ntool_call_arguments\n```"

    def offer(self, tools: list[dict[str, Any]], messages: Messages) -> tuple[Messages, dict[str, Any]]:
        """The messages with `tools`, and what else the template is to be given."""
        if self._described:
            return messages, {"tools": tools}
        if not self._called:
            raise UserError("the chat template of this model knows no tools")
        text = self._text([tool["function"] for tool in tools])
        if messages[0]["role"] == "system":
            first = messages[0] | {"content": f"{messages[0]['content']}\n\n{text}"}
            return [first, *messages[1:]], {}
        return [{"role": "system", "content": text}, *messages], {}

    def _text(self, functions: list[dict[str, Any]]) -> str:
        about = [
            f"### {function['name']}\nDescription: {function.get('description', '')}\n\n"
            f"Parameters: {json.dumps(function.get('parameters', {}), ensure_ascii=False)}\n\n"
            for function in functions
        ]
        return (
            f"## Tools\nYou have access to the following tools:\n\n{''.join(about)}"
            "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
            f"{CALLS}{CALL}{self._form}{CALL_END}{{additional_tool_calls}}{CALLS_END}\n\n"
            "Where:\n"
            "- `tool_call_name` must be an exact match to one of the available tools\n"
            "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
            "- For multiple tool calls, chain them directly without separators or spaces"
        )
