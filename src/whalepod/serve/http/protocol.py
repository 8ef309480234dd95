"""What the server takes: OpenAI's chat completions and completions, with the extensions of vLLM in use.

Types are strict: a wrong one is an error, not converted. A field that is not listed is ignored, as clients of
the OpenAI API expect; one that would change the answer and that we cannot honour is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from whalepod.serve.http.api_error import ApiError
from whalepod.serve.http.schema import call_schema, regex_grammar, schema_grammar
from whalepod.serve.request import MAX_LOGPROBS, Grammar, Sampling
from whalepod.spec.errors import UserError

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_TOOLS = 256
MAX_INT = 2**31 - 1

# What the template is given by us, and so not by chat_template_kwargs.
_TEMPLATE_NAMES = {
    "self", "messages", "prompt", "add_generation_prompt", "tools", "documents", "bos_token", "eos_token",
}  # fmt: skip


def _must_be(forms: str) -> WrapValidator:
    """One sentence for a choice of types, in place of one error for each of them."""

    def check(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise UserError(f"must be {forms}") from None

    return WrapValidator(check)


Count = Annotated[int, Field(ge=1, le=MAX_INT)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None,
    _must_be(f"a string of up to {MAX_STOP_LENGTH} characters, not empty, or a list of up to {MAX_STOPS}"),
]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
Prompt = Annotated[
    str | list[str] | list[TokenId] | list[list[TokenId]],
    _must_be("a string, a list of strings, a list of token ids or a list of such lists"),
]


AskedT = TypeVar("AskedT", bound="Asked")


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(_Model):
    include_usage: bool | None = None


class StructuredOutputs(_Model):
    """vLLM's form. What else it knows must not be dropped in silence: the output would be free."""

    model_config = ConfigDict(strict=True, extra="forbid")
    regex: str | None = None
    json_: dict[str, Any] | None = Field(default=None, alias="json")
    json_object: bool | None = None


class Asked(_Model):
    """What both endpoints take."""

    refused: ClassVar[frozenset[str]] = frozenset(
        {"logit_bias", "prompt_logprobs", "guided_choice", "guided_grammar", "use_beam_search"}
    )

    model: str | None = None
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Count | None = None
    best_of: Literal[1] | None = None
    stop: Stop = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    guided_regex: str | None = None
    guided_json: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        for name in cls.refused & values.keys() if isinstance(values, dict) else ():
            if values[name] not in (None, False, "", 0, {}, []):
                raise UserError(f"{name} is not supported")
        return values

    @model_validator(mode="after")
    def _check_options(self) -> Asked:
        if self.stream_options is not None and not self.stream:
            raise UserError("stream_options is only for stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, defaults: Sampling) -> Sampling:
        names = (
            "temperature", "top_p", "seed", "min_p",
            "repetition_penalty", "presence_penalty", "frequency_penalty",
        )  # fmt: skip
        asked = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.top_k is not None:
            asked["top_k"] = max(self.top_k, 0)  # vLLM says "all" by -1 too
        merged = {name: getattr(defaults, name) for name in (*names, "top_k")} | asked
        return Sampling(**merged)

    def grammars(self) -> list[Grammar]:
        """All that were asked for; more than one is too many."""
        outputs = self.structured_outputs or StructuredOutputs()
        found = [regex_grammar(text) for text in (self.guided_regex, outputs.regex) if text is not None]
        found += [
            schema_grammar(schema) for schema in (self.guided_json, outputs.json_) if schema is not None
        ]
        if outputs.json_object:
            found.append(Grammar("json_object"))
        return found


class CompletionAsked(Asked):
    refused = Asked.refused | {"echo", "suffix"}

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class Function(_Model):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Model):
    type: Literal["function"]
    function: Function


class CalledFunction(_Model):
    name: str
    arguments: str


class Called(_Model):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(_Model):
    type: Literal["text"]
    text: str


Content = Annotated[
    str | list[TextPart] | None,
    _must_be('a string, or a list of {"type": "text", "text": "..."}: these models read text only'),
]


class Message(_Model):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Called] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise UserError(f"a message of the {self.role} needs a content")
        return self

    def for_template(self) -> dict[str, Any]:
        """As templates know it: content always there, the rest only if it was given."""
        found = self.model_dump(exclude_none=True)
        parts = self.content if isinstance(self.content, list) else None
        found["content"] = "".join(part.text for part in parts) if parts is not None else self.content
        found["role"] = "system" if self.role == "developer" else self.role  # OpenAI's newer word for it
        if not self.tool_calls:
            found.pop("tool_calls", None)
        return found


class JsonSchema(_Model):
    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise UserError("of type json_schema it needs a json_schema")
        return self


class ToolName(_Model):
    name: str


class NamedTool(_Model):
    type: Literal["function"]
    function: ToolName


Choice = Annotated[
    Literal["none", "auto", "required"] | NamedTool | None,
    _must_be('"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'),
]


class ChatAsked(Asked):
    refused = Asked.refused | {"functions", "function_call", "audio"}

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Choice = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_kwargs(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if taken := _TEMPLATE_NAMES & (given or {}).keys():
            raise UserError(f"must not set {', '.join(sorted(taken))}")
        return given

    @model_validator(mode="after")
    def _check_together(self) -> ChatAsked:
        if self.top_logprobs is not None and not self.logprobs:
            raise UserError("top_logprobs needs logprobs: true")
        if self.forced and not self.tools:
            raise UserError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in self.tool_names:
            raise UserError("tool_choice names a function that is not among the tools")
        return self

    @property
    def tool_names(self) -> list[str]:
        return [tool.function.name for tool in self.tools or ()]

    @property
    def forced(self) -> bool:
        """Whether the reply must be a tool call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def offered(self) -> list[Tool]:
        """The tools that the reply may call."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools or () if tool.function.name == self.tool_choice.function.name]
        return [] if self.tool_choice == "none" else list(self.tools or ())

    def grammars(self) -> list[Grammar]:
        found = super().grammars()
        if self.forced:
            functions = [tool.function for tool in self.offered]
            found.append(
                schema_grammar(call_schema([(f.name, f.parameters or {"type": "object"}) for f in functions]))
            )
        form = self.response_format
        if form and form.type == "json_object":
            found.append(Grammar("json_object"))
        if form and form.type == "json_schema" and form.json_schema:
            found.append(schema_grammar(form.json_schema.schema_))
        return found


def validated(kind: type[AskedT], values: Any) -> AskedT:
    """`values` as a `kind`. Raises ApiError for the first thing that is wrong with them."""
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(map(str, first["loc"]))[:200] or None
        cause = first.get("ctx", {}).get("error")  # what a validator of ours said
        message = str(cause) if isinstance(cause, UserError) else first["msg"]
        raise ApiError(400, f"{param}: {message}" if param else message, param=param) from None
