"""python -m duo_jax.generate: what it prints, where, and how it ends."""

import io
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest

import duo_jax
from duo_jax import generate
from duo_jax.checkpoints import pretrained
from duo_jax.cli import model_flags
from duo_jax.errors import InputError
from duo_jax.heads.pattern import Pattern, save_pattern
from duo_jax.session import row_cache
from tests import models
from tests.duo_jax.test_api import GATES, TEMPLATE, TEXT, VOCAB
from tests.processes import without_plugin_log

pytestmark = pytest.mark.usefixtures("unhooked_file", "signals_of_a_terminal")
# A range so long that a decode can be interrupted in the middle; one layer, which compiles faster.
RAW = models.llama(
    vocab_size=VOCAB, num_attention_heads=8, num_key_value_heads=8, head_dim=8,
    num_hidden_layers=1, max_position_embeddings=30_000,
)  # fmt: skip
PATTERN = Pattern(gates=GATES, sink_size=4, recent_size=8)
QUESTION = " What is it?"
SUMMARY = re.compile(
    r"\[([\d,]+) tokens read in [\d.]+ s, ([\d,]+) written at [\d.]+ tokens/s, [\d.]+ s compiling; "
    r"cache ([\d.]+) kB; if all were full, ([\d.]+) kB\]"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = models.write_hf(tmp_path_factory.mktemp("model") / "tiny", RAW)
    models.write_tokenizer(folder, vocab_size=VOCAB)
    save_pattern(PATTERN, folder / "pattern")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def run(folder, capsys):
    """Run the command in this process; return what it printed to stdout and to stderr."""

    def run(*words: object, settings=("--max-new-tokens", 12)) -> tuple[str, str]:
        flags = ["--model", folder, "--prefill-chunk", 16, *settings, *words]
        generate.main([str(word) for word in flags])
        return tuple(capsys.readouterr())

    return run


@pytest.fixture
def error(run, capsys):
    """Run the command with input that cannot be used; return its one line."""

    def error(*words: object) -> str:
        with pytest.raises(SystemExit) as ended:
            run(*words)
        out, err = capsys.readouterr()
        assert ended.value.code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return error


@pytest.fixture(scope="module")
def expected(folder) -> str:
    """What is written after TEXT and QUESTION."""
    model = duo_jax.load(folder, prefill_chunk=16)
    return model.generate([TEXT + QUESTION], max_new_tokens=12)[0]


def test_text_goes_to_stdout_and_the_summary_to_stderr(run, expected, folder):
    out, err = run("--prompt", TEXT + QUESTION)
    assert out == expected + "\n"
    read, written, used, full = SUMMARY.fullmatch(err.strip()).groups()
    tokenizer = pretrained.load_tokenizer(folder)
    assert int(read) == len(tokenizer(TEXT + QUESTION)["input_ids"])
    assert int(written) == 12
    # Four of eight heads have room for 1,024 tokens, the others for 4 + 8; 8 channels each of K, V.
    assert float(used) == round(2 * 8 * 4 * (4 * 1024 + 4 * 12) / 1e3, 2)
    assert float(full) == round(2 * 8 * 4 * 8 * 1024 / 1e3, 2)


def test_a_file_comes_before_the_prompt(run, expected, tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text(TEXT)
    words = ("--prompt", QUESTION)
    assert run("--prompt-file", tmp_path / "book.txt", *words)[0] == expected + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT))
    assert run("--prompt-file", "-", *words)[0] == expected + "\n"


def test_standard_input_without_an_end_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("duo_jax.files.LARGEST_TEXT", 10)
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 11))
    with pytest.raises(SystemExit, match="2"):
        generate.main(["--prompt-file", "-", "--no-compile-cache"])
    assert capsys.readouterr().err == "error: standard input has more than 10 characters\n"


def test_standard_input_that_is_no_text_is_refused_as_a_file_is(monkeypatch, capsys):
    latin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", latin)  # as Python makes it where no language is set
    with pytest.raises(SystemExit, match="2"):
        generate.main(["--prompt-file", "-", "--no-compile-cache"])
    assert capsys.readouterr().err == "error: standard input is not UTF-8 text\n"


def test_a_text_that_ends_where_the_cache_does_says_so(run, expected):
    words = ("--prompt", TEXT + QUESTION)
    tokens = int(SUMMARY.fullmatch(run(*words)[1].strip())[1])
    out, err = run(*words, "--max-len", tokens + 6)
    assert expected.startswith(out.removesuffix("\n"))
    full = f"the text ends here: the cache was made for {tokens + 6}"
    assert err.splitlines()[0] == full


def test_a_saved_book_answers_as_if_read_now(run, expected, tmp_path):
    read_only = ("--max-new-tokens", 0)
    out, err = run("--prompt", TEXT, "--save-cache", tmp_path / "book", settings=read_only)
    assert out == ""
    saved, summary = err.splitlines()
    tokens = SUMMARY.fullmatch(summary)[1]
    assert saved == f"cache of {tokens} tokens saved in {tmp_path / 'book'}"
    assert SUMMARY.fullmatch(summary)[2] == "0"
    out, err = run("--load-cache", tmp_path / "book", "--prompt", QUESTION)
    assert out == expected + "\n"
    assert 0 < int(SUMMARY.fullmatch(err.strip())[1]) < int(tokens)
    continued = run("--load-cache", tmp_path / "book")[0]
    assert continued == run("--prompt", TEXT)[0]


def test_a_chat_goes_through_the_template_and_the_cache(run, folder, tmp_path, monkeypatch):
    chat = duo_jax.load(folder, prefill_chunk=16).conversation()
    chat.tell("Be brief.", role="system")
    answers = ["".join(chat.chat(text, max_new_tokens=12)) for text in ("Hello", "And then?")]
    first = ("--chat", "--system", "Be brief.", "--prompt", "Hello")
    assert run(*first, "--save-cache", tmp_path / "chat")[0] == answers[0] + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("And then?"))  # where --prompt is missing
    assert run("--chat", "--load-cache", tmp_path / "chat")[0] == answers[1] + "\n"


def test_variables_and_an_empty_system_message_reach_the_template(error, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "chat_template.jinja").write_text(
        "{{ raise_exception(messages|tojson ~ (think|default('no'))) }}"
    )
    words = ("--model", other, "--chat", "--prompt", "Hi")
    for more, seen in (
        ((), '[{"role": "user", "content": "Hi"}]no'),
        (("--chat-template-kwargs", '{"think": false}'), '"content": "Hi"}]False'),
        (("--system", ""), '[{"role": "system", "content": ""}, {"role": "user"'),
    ):
        assert seen in error(*words, *more)


SAMPLING = {"do_sample": True, "temperature": 2.0, "top_k": 50, "top_p": None, "eos_token_id": 1}


@pytest.mark.slow
def test_tokens_are_drawn_as_the_model_suggests_unless_flags_say_otherwise(
    run, expected, folder, tmp_path
):
    other = shutil.copytree(folder, tmp_path / "other")
    file, prompt = other / "generation_config.json", ("--prompt", TEXT + QUESTION)

    def text(*words):
        return run("--model", other, *prompt, *words)[0]

    file.write_text(json.dumps(SAMPLING))
    drawn = run(*prompt, "--temperature", 2.0, "--top-k", 50)[0]
    assert text() == drawn != expected + "\n"
    assert text("--temperature", 0) == expected + "\n"
    assert text("--top-k", 1) == expected + "\n"
    assert text("--top-k", 0) == run(*prompt, "--temperature", 2.0)[0]
    file.write_text(json.dumps(SAMPLING | {"do_sample": False}))
    assert text() == expected + "\n"
    file.write_text(json.dumps({"repetition_penalty": 5.0}))
    assert text() == run(*prompt, "--repetition-penalty", 5.0)[0] != expected + "\n"
    # Python's own calls stay greedy, and so do evaluations.
    file.write_text(json.dumps(SAMPLING))
    model = duo_jax.load(other, prefill_chunk=16)
    assert model.generate([TEXT + QUESTION], max_new_tokens=12) == [expected]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_sample": True, "top_p": 3}, "generation_config.json, top_p is 3: expected a number"),
        ({"do_sample": True, "top_k": "x"}, "generation_config.json, top_k is 'x': expected"),
        ({"do_sample": "yes"}, "generation_config.json: do_sample is 'yes': expected"),
    ],
)
def test_suggestions_that_cannot_be_used_are_one_line(error, folder, tmp_path, values, message):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "generation_config.json").write_text(json.dumps(values))
    assert message in error("--model", other, "--prompt", "a")


def test_a_conversation_in_a_terminal_ends_with_its_input(run, monkeypatch):
    terminal = io.StringIO("Hello\n\nAnd then?\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    out, err = run("--chat")
    assert out.count("> ") == 4
    assert SUMMARY.fullmatch(err.splitlines()[-1])[2] == "24"


def test_a_message_too_long_does_not_end_the_chat(run, monkeypatch):
    terminal = io.StringIO("Hello\n" + "much too long " * 400 + "\nBye\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    _, err = run("--chat", "--max-len", 1024)
    assert "tokens are too many: the cache was made for 1,024" in err
    assert SUMMARY.fullmatch(err.splitlines()[-1])[2] == "24"


def test_a_byte_order_mark_is_no_text(run, expected, tmp_path):
    (tmp_path / "text").write_text(TEXT + QUESTION, encoding="utf-8-sig")
    assert run("--prompt-file", tmp_path / "text")[0].rstrip("\n") == expected


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "words",
    [
        ("--pattern", "none"),
        ("--sparsity", 0.75),
        ("--threshold", 0.75),
        ("--recent", 3),
        pytest.param(("--sink", 1), marks=pytest.mark.slow),
        ("--prefill-mode", "chunk"),
        ("--sampling.temperature", 2.0),
        ("--sampling.repetition-penalty", 5.0),
    ],
    ids=str,
)
def test_flags_change_the_text(run, expected, words):
    words = [str(word).replace("--sampling.", "--") for word in words]
    assert run("--prompt", TEXT + QUESTION, *words)[0] != expected + "\n"


@pytest.mark.slow
def test_drawing_flags(run, expected):
    prompt = ("--prompt", TEXT + QUESTION)
    hot = (*prompt, "--temperature", 2.0)
    texts = {run(*hot, *words)[0] for words in ((), ("--seed", 1), ("--seed", 2))}
    assert len(texts) == 3
    assert run(*hot, "--seed", 1)[0] in texts
    for words in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1.0)):
        assert run(*hot, *words)[0] == expected + "\n"
    assert run(*prompt, "--stop", expected[4:8])[0] == expected[:4] + "\n"


@pytest.mark.slow
def test_sizes_and_dtype_show_in_the_summary(run):
    def used(*words):
        reads = run("--prompt", TEXT, *words, settings=("--max-new-tokens", 0))
        return SUMMARY.fullmatch(reads[1].strip())[3]

    small = used("--max-len", 64)
    assert float(small) < float(used())
    assert float(used("--max-len", 64, "--dtype", "bfloat16")) == pytest.approx(
        float(small) / 2, abs=0.01
    )


def test_errors_are_one_line(error, folder, tmp_path):
    for words, message in [
        ((), "there is no prompt; give --prompt or --prompt-file"),
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "a", "--prompt-file", tmp_path / "no"), "No such file"),
        (("--prompt-file", tmp_path), "cannot be read: Is a directory"),
        (("--prompt", TEXT, "--max-len", 20), "too many: the cache was made for 20"),
        (("--prompt", "a " * 31_000), "too many: the model's range is 30,000"),
        (("--prompt", "a", "--max-len", 0), "max_len 0 is not a whole number from 1"),
        (("--prompt", "a", "--sparsity", 2), "sparsity 2.0 is not a number from 0 to 1"),
        (("--prompt", "a", "--sparsity", 0.5, "--threshold", 0.5), "not both"),
        (("--prompt", "a", "--pattern", tmp_path), "does not exist; a pattern folder holds"),
        (("--prompt", "a", "--system", "b"), "--system belongs to a chat; add --chat"),
        (("--prompt", "a", "--chat-template-kwargs", '{"b": 1}'), "belongs to a chat; add --chat"),
        (("--chat", "--prompt", "a", "--chat-template-kwargs", "{b"), "kwargs is not JSON"),
        (("--chat", "--prompt", "a", "--chat-template-kwargs", "3"), "3 is not a dict of texts"),
        (
            ("--prompt", "a", "--max-new-tokens", -1),
            "max_new_tokens -1 is not a whole number from 0",
        ),
        (("--prompt", "a", "--max-new-tokens", 10**20), "is not a whole number from 0"),
        (("--prompt", "a", "--seed", 2**32), "seed 4294967296 is not a whole number from 0"),
        (("--prompt", "a", "--stop", ""), "a stop string is empty"),
        (("--prompt", "a", "--threshold", "nan"), "threshold nan is not a number from 0 to 1"),
        (("--prompt", "caf\udce9"), "half characters"),
        (
            ("--prompt", "a", "--temperature", -1),
            "temperature -1.0 is not a number from 0",
        ),
        (("--prompt", "a", "--prefill-mode", "fast"), "fast"),
        (("--prompt", "a", "--load-cache", tmp_path), "is no saved cache"),
        (("--prompt", "a", "--save-cache", tmp_path), "already exists"),
        (("--prompt", "a", "--model", tmp_path / "no"), "no such model"),
    ]:
        assert message in error(*words)
    save_pattern(Pattern(gates=GATES[:, :4], sink_size=4, recent_size=8), tmp_path / "pattern")
    line = error("--prompt", "a", "--pattern", tmp_path / "pattern")
    assert "pattern has 1 layers x 4 KV heads, the model has 1 x 8" in line
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "chat_template.jinja").unlink()
    assert "no chat template" in error("--model", other, "--chat", "--prompt", "a")
    (other / "config.json").write_text(json.dumps(RAW | {"model_type": "mamba"}))
    assert "mamba" in error("--model", other, "--prompt", "a")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in error("--prompt-file", tmp_path / "bytes")


def test_an_unwritable_place_is_refused_before_any_work(error, tmp_path, monkeypatch):
    monkeypatch.setattr(model_flags, "load", None)
    (tmp_path / "file").touch()
    assert "is not a folder" in error("--prompt", "a", "--save-cache", tmp_path / "file/cache")
    # Root may write anywhere but to what the kernel makes up.
    assert "/proc/cache cannot be written" in error("--prompt", "a", "--save-cache", "/proc/cache")


def test_an_interrupt_while_reading_ends_cleanly(run, capsys, tmp_path, monkeypatch):
    prefill, calls = row_cache._prefill, []

    def interrupted(*args, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return prefill(*args, **settings)

    monkeypatch.setattr(row_cache, "_prefill", interrupted)
    with pytest.raises(SystemExit) as ended:
        run("--prompt", TEXT, "--save-cache", tmp_path / "cache")
    assert ended.value.code == 130
    nothing, summary, last = capsys.readouterr().err.splitlines()
    assert nothing.startswith("nothing saved")
    assert summary.startswith("[16 tokens read")
    assert last == "interrupted"
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_between_two_chunks_keeps_what_was_read(
    run, expected, tmp_path, monkeypatch, capsys
):
    prefill = row_cache._prefill

    def signalled(*args, **settings):
        signal.raise_signal(signal.SIGINT)
        return prefill(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(row_cache, "_prefill", signalled)
        with pytest.raises(SystemExit):
            run("--prompt", TEXT + QUESTION, "--save-cache", tmp_path / "cache")
    marker = json.loads((tmp_path / "cache/cache.json").read_text())
    assert marker["lengths"] == [16]
    capsys.readouterr()
    assert run("--load-cache", tmp_path / "cache")[0] == expected + "\n"


def test_an_interrupted_answer_belongs_to_the_chat(run, tmp_path, monkeypatch):
    write = generate.Conversation._write

    def signalled(*args):
        for number, pieces in enumerate(write(*args)):
            if number == 2:
                signal.raise_signal(signal.SIGINT)
            yield pieces

    with monkeypatch.context() as patch:
        patch.setattr(generate.Conversation, "_write", signalled)
        with pytest.raises(SystemExit):
            run("--chat", "--prompt", "Hello", "--save-cache", tmp_path / "cache")
    messages = json.loads((tmp_path / "cache/cache.json").read_text())["extra"]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert run("--chat", "--load-cache", tmp_path / "cache", "--prompt", "And then?")[0]


@pytest.mark.slow
def test_an_interrupt_while_writing_keeps_the_text(folder, run, tmp_path):
    """A real process and a real signal; the test before this one interrupts this process."""
    words = ["--model", folder, "--prefill-chunk", 16, "--max-new-tokens", 20_000]
    words += ["--prompt", TEXT, "--save-cache", tmp_path / "cache"]
    process = subprocess.Popen(
        [sys.executable, "-m", "duo_jax.generate", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=pathlib.Path(__file__).parents[2],
    )
    begun = process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert b"Traceback" not in err
    saved, summary, last = without_plugin_log(err.decode()).splitlines()
    assert process.returncode == 130
    assert last == "interrupted"
    written = int(re.search(r"([\d,]+) written", summary)[1].replace(",", ""))
    assert 0 < written < 20_000
    assert len(begun + rest) > 30
    assert saved.endswith(f"saved in {tmp_path / 'cache'}")
    more = ("--prompt", QUESTION)
    _, err = run("--load-cache", tmp_path / "cache", *more, settings=("--max-new-tokens", 0))
    tokens = pretrained.load_tokenizer(folder)(QUESTION)["input_ids"]
    # The last token that was written has not been read yet.
    assert SUMMARY.fullmatch(err.strip())[1] == str(1 + len(tokens))


def test_an_error_after_the_prompt_was_shown_has_a_line_of_its_own(folder, capsys, monkeypatch):
    def refuse(*_, **__):
        raise InputError("this cannot be read")

    monkeypatch.setattr(generate.Conversation, "stream", refuse)
    monkeypatch.setattr(generate, "_prompt", lambda _: (TEXT, "[the end of a prompt]"))
    with pytest.raises(SystemExit):
        generate.main(["--model", str(folder)])
    out, err = capsys.readouterr()
    assert (out, err) == ("[the end of a prompt]\n", "error: this cannot be read\n")
