"""The bodies that the server sends, in OpenAI's names."""

from typing import Any, Literal

from pydantic import BaseModel

Finish = Literal["stop", "length"]


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TextLogprobs(BaseModel):
    """Log-probabilities of /v1/completions, an entry per token."""

    tokens: list[str]
    """What each token adds to the text; together they are the text."""
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One of several texts, or a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Finish | None = None


class Answer(BaseModel):
    """What answers share."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str | None = None


class Completion(Answer):
    """The answer of /v1/completions, and each chunk of its stream."""

    choices: list[TextChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token of a chat's answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat's answer."""

    content: list[ChatLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """The message that answers a chat."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One of several messages."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish


class ChatCompletion(Answer):
    """The answer of /v1/chat/completions."""

    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """A piece of a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """A piece of one of several messages."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None


class ChatChunk(Answer):
    """A chunk of the stream of /v1/chat/completions."""

    choices: list[ChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "duo_jax"
    root: str
    max_model_len: int


class Models(BaseModel):
    """All models that are served: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Tokenized(BaseModel):
    """Tokens of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """The text of tokens."""

    prompt: str


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The body of an answer whose status is 400 or above."""

    error: Error


class TokenizerInfo(BaseModel):
    """What clients that render chats themselves need to know."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
    model_max_length: int
    max_model_len: int
    vocab_size: int
    stop_token_ids: list[int]


class Health(BaseModel):
    """Whether requests are answered."""

    status: str


class Version(BaseModel):
    """Of what serves."""

    version: str
    jax: str


Stats = dict[str, Any]
