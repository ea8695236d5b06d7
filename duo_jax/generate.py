"""python -m duo_jax.generate: continue a text or answer a question in the terminal."""

if __name__ == "__main__":  # a signal ends what follows in one line: jax takes seconds to import
    from duo_jax.process import startup

    startup.begin()


import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from duo_jax import cli, files
from duo_jax.checkpoints import pretrained
from duo_jax.cli import presets
from duo_jax.cli.cluster import ClusterFlags
from duo_jax.cli.model_flags import ModelFlags
from duo_jax.errors import InputError
from duo_jax.process import signals
from duo_jax.schema.json_reader import parse_json
from duo_jax.schema.kinds import Count, Seed, Size
from duo_jax.serve.sampling import SamplingConfig
from duo_jax.session.conversation import Conversation
from duo_jax.session.generation_config import suggested_sampling
from duo_jax.session.tokenization import check_variables

_DESCRIPTION = """\
Continue a prompt with a model whose attention heads are split: retrieval heads keep the whole text,
streaming heads only its first and latest tokens.

Without flags this asks the demo model that ships with duo_jax for a passkey hidden in a text.
Tokens are drawn as the model's generation_config.json suggests, unless flags say otherwise; without
such a file, the most probable one is taken.
"""
_DEMO_PROMPT = "prompt.txt"  # in a model's folder: its prompt where none is given
_SHOWN = 20  # characters of it that are shown, and the rest of their line


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(ModelFlags, ClusterFlags):
    """Flags of the command."""

    prompt: str | None = None
    """Text to continue, or with --chat the message to answer."""
    prompt_file: pathlib.Path | None = None
    """File whose text comes before --prompt; "-" reads standard input."""
    chat: bool = False
    """Format the prompt with the model's chat template. Without a prompt it opens a conversation in
    the terminal, line by line; what is piped in is one message."""
    system: str | None = None
    """System message of the chat; it replaces the one that the template has, even where it is empty
    ("")."""
    chat_template_kwargs: str = "{}"
    """Variables for the chat template, a JSON object: '{"enable_thinking": false}' for Qwen3."""
    load_cache: pathlib.Path | None = None
    """Folder that --save-cache wrote. Its text comes first, and is not read again."""
    save_cache: pathlib.Path | None = None
    """New folder in which text and cache are saved at the end, for --load-cache."""

    max_new_tokens: Size = 256
    """Maximum number of tokens to write; 0 only reads the prompt, to save its cache."""
    stop: tuple[str, ...] = ()
    """Strings at which the text stops."""
    seed: Seed = 0
    """Random seed; the same seed gives the same text."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=SamplingConfig
    )
    """By default as the model's generation_config.json suggests; --temperature 0 always takes the
    most probable token."""

    max_len: Count | None = None
    """Number of tokens the cache can hold. Default: as many as are needed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_cluster()
        if "" in self.stop:
            raise InputError("a stop string is empty; nothing could be written before it")
        if self.system is not None and not self.chat:
            raise InputError("--system belongs to a chat; add --chat")
        if self.template_variables and not self.chat:
            raise InputError("--chat-template-kwargs belongs to a chat; add --chat")

    @property
    def template_variables(self) -> dict[str, Any]:
        """Return the variables for the chat template."""
        return check_variables(parse_json(self.chat_template_kwargs, "--chat-template-kwargs"))


def generate(flags: GenerateConfig) -> None:
    """Read the prompt, continue it, and sum up in one line; maybe in several processes.

    Raises:
      InputError: a flag cannot be used.
    """
    with flags.joined():
        _generate(flags)


def _generate(flags: GenerateConfig) -> None:
    if flags.save_cache is not None:
        files.check_new_folder(flags.save_cache)
    prompt, shown = _prompt(flags)
    loaded = flags.load()
    settings: dict[str, Any] = {"max_len": flags.max_len}
    if flags.template_variables:
        settings["chat_template_kwargs"] = flags.template_variables
    if flags.load_cache is not None:
        conversation = loaded.load_conversation(flags.load_cache, **settings)
    else:
        conversation = loaded.conversation(**settings)
    print(shown, end="", flush=True)
    if flags.system is not None:
        conversation.tell(flags.system, role="system")
    try:
        for text in _turns(prompt):
            try:
                _turn(flags, conversation, text)
            except InputError as error:
                if prompt is not None:
                    raise
                print(f"error: {error}", file=sys.stderr)  # the chat is not over
    except BaseException as error:
        if not (signals.is_interruption(error) or isinstance(error, OSError)):
            if shown and not shown.endswith("\n"):  # an error has a line of its own
                print(flush=True)
            raise
        # What was read and written is worth saving.
        with contextlib.suppress(OSError):
            print(flush=True)
        _finish(flags, conversation)
        raise
    _finish(flags, conversation)


def main(args: list[str] | None = None) -> None:
    """Run the command on a list of words; default: the process's own."""
    cli.run(
        generate,
        GenerateConfig,
        prog="python -m duo_jax.generate",
        description=_DESCRIPTION,
        default=lambda: presets.defaults(args, pretrained.DEMO, _defaults),
        args=args,
    )


def _defaults(_: str, folder: pathlib.Path) -> GenerateConfig:
    return GenerateConfig(sampling=suggested_sampling(folder))


def _prompt(flags: GenerateConfig) -> tuple[str | None, str]:
    """Return the text to continue (None: a chat in the terminal), and what to show of it."""
    parts, shown = [], ""
    if flags.prompt_file is not None:
        parts.append(_read_file(flags.prompt_file))
    if flags.prompt is not None:
        parts.append(flags.prompt)
    if not parts and flags.chat:
        if sys.stdin is not None and sys.stdin.isatty():
            return None, shown
        parts.append(_read_file(pathlib.Path("-")))
    if not parts and flags.load_cache is None:
        own = pretrained.resolve(flags.model) / _DEMO_PROMPT
        if not files.is_file(own):
            raise InputError("there is no prompt; give --prompt or --prompt-file")
        text = _read_file(own)
        end = text[text.rfind("\n", 0, -_SHOWN) + 1 :]
        shown = f"[{len(text):,} characters from {own.parent.name}/{own.name}]\n...\n{end}"
        parts.append(text)
    prompt = "".join(parts)
    if parts and not prompt:
        raise InputError("the prompt is empty")
    return prompt, shown


def _read_file(file: pathlib.Path) -> str:
    if str(file) != "-":
        return files.read_text(file, pipes=True).removeprefix("\ufeff")
    if sys.stdin is None:
        raise InputError("standard input is closed")
    with files.reading("standard input"):
        text = sys.stdin.read(files.LARGEST_TEXT + 1)  # as of a file; a pipe may have no end
        text.encode()  # Python may have let bytes through that are no characters
        if len(text) > files.LARGEST_TEXT:
            raise InputError(f"standard input has more than {files.LARGEST_TEXT:,} characters")
        return text


def _turns(prompt: str | None) -> Iterator[str]:
    """Yield what the user says, turn by turn."""
    if prompt is not None:
        yield prompt
        return
    print("A chat: one line per message, Ctrl-D ends it.", file=sys.stderr)
    while True:
        with contextlib.suppress(EOFError):
            text = input("> ").strip()
            if text:
                yield text
            continue
        print(file=sys.stderr)
        return


def _turn(flags: GenerateConfig, conversation: Conversation, text: str) -> None:
    """Read one text and print what the model writes."""
    # An interrupt in the middle of a step would lose the cache, which is donated to the step.
    bar = tqdm(desc="prefill", unit="token", unit_scale=True, leave=False, disable=None)
    with bar, signals.between_steps() as step_done:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if done == total:
                bar.close()
            step_done()

        if flags.max_new_tokens == 0:
            read = conversation.tell if flags.chat else conversation.append
            read(text, progress=progress)
            return
        settings = {
            "max_new_tokens": flags.max_new_tokens,
            "stop": flags.stop,
            "seed": flags.seed,
            "progress": progress,
            **dataclasses.asdict(flags.sampling),
        }
        if flags.chat:
            pieces = conversation.chat(text, **settings)
        else:
            pieces = conversation.stream(text, **settings)
        with contextlib.closing(pieces):  # an answer belongs to the chat, however it ends
            for piece in pieces:
                print(piece, end="", flush=True)
                step_done()
        print()
    if (why := conversation.session.no_room()) is not None:
        print(f"the text ends here: {why}", file=sys.stderr)


def _finish(flags: GenerateConfig, conversation: Conversation) -> None:
    """Save the cache and sum up."""
    if flags.save_cache is not None and conversation.session.cache is None:
        print("nothing saved: the cache was lost in the middle of a step", file=sys.stderr)
    elif flags.save_cache is not None:
        conversation.save(flags.save_cache)
        tokens = f"{conversation.num_tokens:,} tokens"
        print(f"cache of {tokens} saved in {flags.save_cache}", file=sys.stderr)
    print(_summary(conversation), file=sys.stderr)


def _summary(conversation: Conversation) -> str:
    timing = conversation.session.timing
    used, full = conversation.cache_bytes()
    speed = timing.decode_tokens / timing.decode_seconds if timing.decode_seconds else 0.0
    return (
        f"[{timing.prefill_tokens:,} tokens read in {timing.prefill_seconds:.2f} s, "
        f"{timing.decode_tokens:,} written at {speed:.1f} tokens/s, "
        f"{timing.compile_seconds:.1f} s compiling; "
        f"cache {_bytes(used)}; if all were full, {_bytes(full)}]"
    )


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


if __name__ == "__main__":
    main()
