"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them and lm-evaluation-harness asks."""

from fastapi import APIRouter, Request

from duo_jax.data import tokenizer_calls
from duo_jax.server import messages
from duo_jax.server.answers import Detokenized, Tokenized, TokenizerInfo
from duo_jax.server.errors import RESPONSES, ApiError
from duo_jax.server.schema import DetokenizeBody, TokenizeBody
from duo_jax.server.service import Service

router = APIRouter(responses=RESPONSES)


@router.post("/tokenize", response_model_exclude_unset=True)
async def tokenize(body: TokenizeBody, request: Request) -> Tokenized:
    """Return the tokens of a prompt, or of a chat."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either a prompt or messages", param="prompt")
    if body.prompt is None:
        tokens = await service.tokenizing(messages.encode, body, service)
    else:
        encode = service.engine.model.tokenization.encode_plain
        tokens = await service.tokenizing(encode, body.prompt, special=body.add_special_tokens)
    found = Tokenized(count=len(tokens), max_model_len=service.engine.max_len, tokens=tokens)
    if body.return_token_strs:
        found.token_strs = [service.vocabulary.piece(token) for token in tokens]
    return found


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> Detokenized:
    """Return the text of tokens, special ones included."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    service.vocabulary.check(body.tokens, param="tokens")
    text = await service.tokenizing(
        tokenizer_calls.decode,
        service.engine.model.tokenizer,
        body.tokens,
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    return Detokenized(prompt=text)


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> TokenizerInfo:
    """Return what clients that render chats themselves need to know."""
    service: Service = request.app.state.service
    engine = service.engine
    tokenizer, template = engine.model.tokenizer, engine.model.tokenizer.chat_template
    return TokenizerInfo(
        tokenizer_class=type(tokenizer).__name__,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
        chat_template=template if isinstance(template, str) else None,
        model_max_length=engine.max_len,
        max_model_len=engine.max_len,
        vocab_size=service.vocabulary.size,
        stop_token_ids=list(engine.model.tokenization.stop_tokens),
    )
