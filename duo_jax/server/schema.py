"""The bodies that the server is sent, in OpenAI's names, with what vLLM adds to them.

Fields that are not named here are ignored, as other servers do: clients send many that say nothing
to a model. Those that would change an answer, and cannot, are named and refused.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from duo_jax.engine.request import MOST_LOGPROBS

_INT32 = 2**31 - 1
_MOST_TEXTS = 2048
_MOST_STOPS = 64
_MOST_BIASES = 4096

Token = Annotated[int, Field(ge=0, le=_INT32)]
# Long lists stop at their first wrong element: an error for each would take seconds and gigabytes.
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Tools = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


def _few(biases: Any) -> Any:
    """Refuse too many before each is looked at."""
    if isinstance(biases, dict) and len(biases) > _MOST_BIASES:
        raise ValueError(f"{len(biases):,} tokens are too many; at most {_MOST_BIASES:,} can be")
    return biases


Biases = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=_MOST_BIASES),
    BeforeValidator(_few),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Logprobs = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]
NewTokens = Annotated[int, Field(ge=0, le=_INT32)]
Messages = Annotated[list["Message"], Field(min_length=1, max_length=100_000, fail_fast=True)]


class Body(BaseModel):
    """What all bodies share: no value is taken for one of another kind ("3" is no 3)."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str | None = None
    """Name of the model; default: the one that is served."""


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False
    """Counts of tokens, in a chunk of their own at the end."""
    continuous_usage_stats: bool = False
    """Counts of tokens in every chunk."""


class JsonSchema(BaseModel):
    """A named JSON schema."""

    model_config = ConfigDict(strict=True, populate_by_name=True)

    name: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(BaseModel):
    """What the answer must be."""

    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Generation(Body):
    """How an answer is written; None: as the model suggests, or the server's flags say."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """How many answers."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT32)] | None = None
    """Of the k most likely tokens; 0 and -1: of all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Biases | None = None
    """Token numbers, as texts, and what is added to their logits."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=_MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=_MOST_STOPS)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None


class CompletionBody(Generation):
    """A body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=_MOST_TEXTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=_MOST_TEXTS)]
    )
    max_tokens: NewTokens | None = None
    """New tokens at most; default: 16. 0: only the prompt is read, for echo with logprobs."""
    echo: bool | None = None
    """The prompt is a part of the text, and its tokens of the logprobs."""
    logprobs: Logprobs | None = None
    suffix: str | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(strict=True)

    type: str
    text: str | None = None


class Message(BaseModel):
    """A message of a chat. Other fields, such as tool_calls, go to the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, Field(min_length=1)]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None


class Chat(Body):
    """A chat, and how it is written out."""

    messages: Messages
    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    """Open the assistant's turn; default: yes, unless the final message is continued."""
    continue_final_message: bool | None = None
    """The answer goes on within the last message."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template, such as {"enable_thinking": false}."""


class ChatBody(Chat, Generation):
    """A body of /v1/chat/completions."""

    max_tokens: NewTokens | None = None
    max_completion_tokens: NewTokens | None = None
    """New tokens at most; default: as many as there is room for."""
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None


class TokenizeBody(Body):
    """A body of /tokenize: a prompt, or the messages of a chat."""

    prompt: str | None = None
    add_special_tokens: bool = True
    messages: Messages | None = None
    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """A body of /detokenize."""

    tokens: Annotated[list[Token], Field(fail_fast=True)]
