"""From the messages of a chat to tokens, by the model's chat template."""

import json
from typing import Any

from duo_jax.errors import InputError
from duo_jax.server.errors import ApiError
from duo_jax.server.schema import Chat, Message, TokenizeBody
from duo_jax.server.service import Service
from duo_jax.session.tokenization import check_variables


def encode(body: Chat | TokenizeBody, service: Service) -> list[int]:
    """Return the tokens of a chat.

    Raises:
      ApiError: the messages hold what is no text, or the template refuses them.
      InputError: variables for the template cannot be used, or the chat is too long.
    """
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        message = "a message cannot be continued and answered: leave out add_generation_prompt"
        raise ApiError(400, message, param="add_generation_prompt")
    variables = check_variables(body.chat_template_kwargs)
    if body.tools and getattr(body, "tool_choice", None) != "none":
        variables["tools"] = body.tools
    plain = [_plain(message, f"messages[{i}]") for i, message in enumerate(body.messages or [])]
    if continues and not plain[-1]["content"]:
        raise ApiError(400, "the last message has no text to continue", param="messages")
    tokenization = service.engine.model.tokenization
    if not tokenization.tokenizer.chat_template:
        message = "this model has no chat template: use /v1/completions"
        raise ApiError(400, message, param="messages", code="no_chat_template")
    try:
        text = tokenization.render_chat(
            plain,
            answer=body.add_generation_prompt is not False and not continues,
            continues=continues,
            variables=variables,
        )
    except InputError as error:
        raise ApiError(422, str(error), param="messages", code="chat_template") from None
    return tokenization.encode_markup(text)


def _plain(message: Message, where: str) -> dict[str, Any]:
    """Return a message as templates expect it: its content a text."""
    content, role = message.content, message.role
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                text = f"{where}: content of type {part.type[:40]!r} cannot be read; only text can"
                raise ApiError(400, text, param="messages")
        content = "\n".join(part.text or "" for part in content)
    if content is None and role != "assistant":
        raise ApiError(400, f"{where} has no content", param="messages")
    # OpenAI's newer name, which templates do not know.
    role = "system" if role == "developer" else role
    more = dict(message.model_extra or {})
    if isinstance(calls := more.get("tool_calls"), list):
        more["tool_calls"] = [_with_arguments(call) for call in calls]
    return {**more, "role": role, "content": content or ""}


def _with_arguments(call: Any) -> Any:
    """Return a call with its arguments as an object, as templates expect them, not as JSON."""
    match call:
        case {"function": {"arguments": str() as text} as function}:
            try:
                arguments = json.loads(text)
            except (ValueError, RecursionError):
                return call
            if isinstance(arguments, dict):
                return {**call, "function": {**function, "arguments": arguments}}
    return call
