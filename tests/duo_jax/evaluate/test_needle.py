"""Needles: the documents, their scores, the command that draws the heat map."""

import dataclasses
import json

import numpy as np
import pytest

import duo_jax
from duo_jax.data.documents import load_documents
from duo_jax.errors import InputError
from duo_jax.evaluate import __main__ as command
from duo_jax.evaluate.needle import command as needle_command
from duo_jax.evaluate.needle.documents import Haystack, NeedleTemplates
from duo_jax.evaluate.results import scores
from duo_jax.session.session import Session
from duo_jax.session.tokenization import load_tokenization
from tests import sentencepiece_style

TEMPLATES = NeedleTemplates(
    intro="Read this.\n",
    needle="\nThe colour is {answer}.\n",
    answer="{words} and grey",
    answer_words=3,
    question="\nWhat colour? The colour is",
)


pytestmark = pytest.mark.usefixtures("little_text")


@pytest.fixture(scope="module")
def tokenization():
    return duo_jax.load("demo").tokenization


@pytest.fixture(scope="module")
def haystack(tokenization):
    return Haystack(TEMPLATES, tokenization, load_documents(()), seed=3)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [64, 200, 1000])
def test_a_document_has_its_length_and_its_needle_at_the_depth(
    haystack, tokenization, length, depth
):
    document = haystack.document(length=length, depth=depth)
    assert len(document.tokens) == length
    text = tokenization.tokenizer.decode(document.tokens, skip_special_tokens=True)
    assert text.startswith("Read this.\n")
    assert text.endswith(TEMPLATES.question)
    before, after = text.split(f"\nThe colour is {document.answer}.\n")
    size = len(tokenization.tokenizer(after[: -len(TEMPLATES.question)]).input_ids)
    assert size / length == pytest.approx(1 - document.depth, abs=60 / length)
    assert document.depth == pytest.approx(depth, abs=0.05)
    if depth in (0.0, 1.0):
        assert document.depth == depth
    elif length == 1000:  # a sentence has ended nearby
        assert before.rstrip(" ").endswith((".", "\n", "!", "?"))


@pytest.mark.parametrize("chat", [True, False])
def test_parts_of_a_document_gain_no_spaces(chat, tmp_path):
    """With a tokenizer that puts one before every text."""
    tokenization = load_tokenization(sentencepiece_style.write(tmp_path))
    haystack = Haystack(TEMPLATES, tokenization, ["One.\nTwo."] * 200, seed=3, chat=chat)
    document = haystack.document(length=400, depth=0.5)
    text = tokenization.tokenizer.decode(document.tokens)
    beginning = "<s>[INST] Read this.\n" if chat else "<s> Read this.\n"
    assert text.startswith(beginning)
    assert "  " not in text
    assert "\n " not in text


def test_documents_depend_on_all_that_names_them(haystack, tokenization):
    same = haystack.document(length=200, depth=0.5, sample=1)
    assert haystack.document(length=200, depth=0.5, sample=1) == same
    other_seed = Haystack(TEMPLATES, tokenization, load_documents(()), seed=4)
    others = [
        haystack.document(length=200, depth=0.5, sample=2),
        haystack.document(length=200, depth=0.6, sample=1),
        haystack.document(length=201, depth=0.5, sample=1),
        other_seed.document(length=200, depth=0.5, sample=1),
    ]
    assert len({tuple(other.tokens) for other in [same, *others]}) == 5


def test_a_short_text_begins_again(tokenization):
    haystack = Haystack(TEMPLATES, tokenization, ["Only one sentence. Or two."], seed=0)
    document = haystack.document(length=500, depth=0.5)
    assert len(document.tokens) == 500
    assert tokenization.tokenizer.decode(document.tokens).count("Only one sentence") > 10


def test_a_length_without_room_is_refused(haystack):
    with pytest.raises(InputError, match="20 tokens have no room for the needle and its question"):
        haystack.document(length=20, depth=0.5)
    assert haystack.document(length=haystack.shortest() + 1, depth=0.5)


@pytest.mark.parametrize(
    ("written", "exact", "recall"),
    [
        (" Blue, red, and GREY.", 1, 1),
        ("blue red", 0, 0.5),
        ("It is grey and blue red", 0, 1),
        ("a blue red and greyish", 0, 0.75),
        ("", 0, 0),
    ],
)
def test_scores(written, exact, recall):
    assert scores.exact_match(written, "blue red and grey") == exact
    assert scores.word_recall(written, "blue red and grey") == recall


@pytest.mark.slow
def test_a_document_may_be_longer_than_any_prompt(tokenization):
    """A haystack is cut from it; only prompts are bounded by the model's range."""
    bounded = dataclasses.replace(tokenization, max_tokens=512)
    text = "Some words that go on.\n" * 25_000
    with pytest.raises(InputError, match="characters are too many"):
        bounded.encode(text, continues=True)
    document = Haystack(TEMPLATES, bounded, [text], seed=3).document(length=400, depth=0.5)
    assert len(document.tokens) == 400


# A tokenizer of 600 words spells the default needle in hundreds of tokens.
SHORT = {"intro": "Read.", "needle": " It is {answer}.", "answer": "red", "question": " It is"}
FLAGS = "--lengths 60 96 --depths 0 0.5 1 --max-new-tokens 6 --batch 2 --prefill-chunk 32".split()
FLAGS += [word for name, text in SHORT.items() for word in (f"--{name}", text)]


def run(folder, workdir, *more: str) -> dict:
    command.main(["needle", "--model", str(folder), "--workdir", str(workdir), *FLAGS, *more])
    return json.loads((workdir / "needle.json").read_text())


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """Return work folder and result of a whole evaluation, with all three kinds of caches."""
    workdir = tmp_path_factory.mktemp("runs") / "needle"
    return workdir, run(folder, workdir, "--all-streaming")


def test_rows_say_what_was_measured(finished):
    workdir, result = finished
    assert len(result["rows"]) == 3 * 2 * 3  # caches, lengths, depths
    duo, full, streaming = (
        [r for r in result["rows"] if r["caches"] == c] for c in ("duo", "full", "streaming")
    )
    # 2 of 4 heads in 16 slots instead of 102; a key and a value of 8 float32 channels each.
    assert {r["cache_bytes"] for r in full} == {4 * 102 * 8 * 2 * 4}
    assert {r["cache_bytes"] for r in duo} == {(2 * 102 + 2 * 16) * 8 * 2 * 4}
    assert {r["cache_bytes"] for r in streaming} == {4 * 16 * 8 * 2 * 4}
    assert result["sparsity"] == 0.5
    assert (result["sink"], result["recent"], result["prefill_chunk"]) == (4, 12, 32)
    assert (result["kv"], result["weights"], result["prefill_mode"]) == ("model", "model", "exact")
    assert [r["written"] for r in duo] != [r["written"] for r in full]
    assert (workdir / "needle.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_true_answer_is_scored_whatever_was_written(finished, folder):
    """Its likelihood is that of the answer's tokens in a text of which they are the end."""
    _, result = finished
    model = duo_jax.load(folder, prefill_chunk=32)
    haystack = Haystack(NeedleTemplates(**SHORT), model.tokenization, load_documents(()), seed=0)
    answer = model.tokenizer(" red", add_special_tokens=False).input_ids
    for row in result["rows"]:
        assert row["exact"] == row["tokens"] == 0
        assert (row.get("kl") is None) == (row["caches"] == "full")
        if row["caches"] == "duo":
            document = haystack.document(length=row["length"], depth=row["depth"])
            assert document.answer_tokens == answer
            logprobs = []
            for count in range(len(answer)):
                session = Session(model.runtime)
                session.append([document.tokens + answer[:count]])
                logits = np.asarray(session.snapshot().logits[0], np.float64)
                logprobs.append(logits[answer[count]] - np.log(np.exp(logits).sum()))
            assert row["nll"] == pytest.approx(-np.mean(logprobs), abs=1e-4)
            assert row["kl"] > 1e-4


def test_an_answer_begins_anew_in_a_chat_and_after_a_space(tokenization):
    for question, answer in (("It is", " red"), ("It is\n", "red")):
        templates = NeedleTemplates(**SHORT | {"question": question})
        haystack = Haystack(templates, tokenization, load_documents(()), seed=0)
        document = haystack.document(length=60, depth=0.5)
        assert tokenization.tokenizer.decode(document.answer_tokens) == answer


def test_needles_of_digits_are_the_pass_keys_that_small_models_recall():
    templates = NeedleTemplates(words="digits", intro="Look.")
    assert templates.needle == "\n\nThe pass key is {answer}. Remember it.\n\n"
    assert (templates.answer, templates.answer_words, templates.intro) == ("{words}", 1, "Look.")


def test_full_caches_may_be_left_out(finished, folder, capsys):
    """They and the streaming ones may be asked for, or not, in the folder of a finished run."""
    workdir, whole = finished
    result = run(folder, workdir, "--no-full")
    assert result["rows"] == [row for row in whole["rows"] if row["caches"] == "duo"]
    assert "| DuoAttention, 50% streaming | 6 |" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_written_is_what_generate_writes(finished, folder):
    _, result = finished
    model = duo_jax.load(folder, prefill_chunk=32)
    haystack = Haystack(NeedleTemplates(**SHORT), model.tokenization, load_documents(()), seed=0)
    for row in result["rows"]:
        if row["caches"] == "duo":
            document = haystack.document(length=row["length"], depth=row["depth"])
            text = model.tokenizer.decode(document.tokens, skip_special_tokens=True)
            assert row["written"] == model.generate([text], max_new_tokens=6)[0]
            assert row["answer"] == document.answer


@pytest.mark.slow
def test_a_killed_run_goes_on_and_repeats_no_cell(finished, folder, tmp_path, monkeypatch):
    _, expected = finished
    answer, calls = needle_command._answer, []

    def killed(*args, **settings):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(None)
        return answer(*args, **settings)

    monkeypatch.setattr(needle_command, "_answer", killed)
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "killed", "--all-streaming")
    kept = (tmp_path / "killed" / "rows.jsonl").read_text()
    assert 3 <= kept.count("\n") < 18
    counted = []
    monkeypatch.setattr(
        needle_command,
        "_answer",
        lambda *args, **settings: counted.extend(args[2]) or answer(*args, **settings),
    )
    resumed = run(folder, tmp_path / "killed", "--all-streaming")
    assert len({cell.key for cell in counted}) == len(counted)
    repeated = [cell for cell in counted if f'"{cell.key}"' in kept]
    assert len(counted) - len(repeated) == 18 - kept.count("\n")
    # Rows stay as they are, but others are compared with what full caches make of their texts.
    assert {cell.caches for cell in repeated} == {"full"}
    assert (tmp_path / "killed" / "rows.jsonl").read_text().startswith(kept)
    assert resumed["rows"] == expected["rows"]
    counted.clear()
    assert run(folder, tmp_path / "killed", "--all-streaming")["rows"] == expected["rows"]
    assert counted == []


def test_a_model_brings_its_own_needle(folder, tmp_path):
    needle = SHORT | {"question": "\nWhat?"}
    preset = {"needle": {"max_new_tokens": 6, "needle": needle}}
    (folder / "evaluate.json").write_text(json.dumps(preset))
    try:
        flags = [
            *("--lengths", "96", "--depths", "0.5", "--no-full"),
            *("--batch", "2", "--prefill-chunk", "32", "--workdir", str(tmp_path / "a")),
        ]
        command.main(["needle", "--model", str(folder), *flags])
        result = json.loads((tmp_path / "a" / "needle.json").read_text())
        assert result["max_new_tokens"] == 6
        config = json.loads((tmp_path / "a" / "config.json").read_text())
        assert config["needle"]["question"] == "\nWhat?"
        (folder / "evaluate.json").write_text('{"needle": {"no_such": 1}}')
        with pytest.raises(SystemExit):
            command.main(["needle", "--model", str(folder), *flags])
    finally:
        (folder / "evaluate.json").unlink()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lengths 600", "length 600: with the answer the model has room for 506"),
        ("--lengths 9", "needs at least"),
        ("--depths 1.5", "depths 1.5 is not a number from 0 to 1"),
        ("--lengths 100 100", "--lengths names a length twice"),
        ("--max-new-tokens 0", "max_new_tokens 0 is not a whole number"),
        ("--batch 0", "batch 0 is not a whole number"),
        ("--needle no-answer", "the needle must hold {answer} once"),
        ("--text nowhere.txt", "no such text: nowhere.txt"),
        ("--chat", "no chat template"),
    ],
)
def test_errors_are_one_line(folder, tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as ended:
        run(folder, tmp_path / "a", *flags.split())
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "a").exists()


def test_an_unknown_command_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["nedle"])
    assert ended.value.code == 2
    assert "'nedle' is not one of needle, passkeys" in capsys.readouterr().err
    command.main([])
    assert "usage: python -m duo_jax.evaluate COMMAND" in capsys.readouterr().out


def test_a_chat_wraps_text_and_question(folder):
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    try:
        model = duo_jax.load(folder)
        haystack = Haystack(TEMPLATES, model.tokenization, load_documents(()), seed=0, chat=True)
        document = haystack.document(length=200, depth=0.5)
        text = model.tokenizer.decode(document.tokens)
        assert len(document.tokens) == 200
        assert text.startswith("<user>Read this.\n")
        assert text.endswith("The colour is</user><assistant>")
        assert f"The colour is {document.answer}." in text
        for template in ("nothing", "{{ messages[0].content }}" * 2):
            model.tokenizer.chat_template = template
            with pytest.raises(InputError, match="does not show a message exactly once"):
                haystack.document(length=200, depth=0.5)
    finally:
        (folder / "chat_template.jinja").unlink()
