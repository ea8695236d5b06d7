"""Chat templates write what they do in transformers."""

import pytest

from duo_jax.errors import InputError
from duo_jax.session.tokenization import Tokenization, load_tokenization
from tests import models

pytestmark = pytest.mark.core
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def tokenization(tmp_path_factory) -> Tokenization:
    return load_tokenization(models.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


TEMPLATES = {
    "ChatML": """{% for message in messages %}
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
""",
    "Llama 2": """{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}
{% else %}
    {% set loop_messages = messages %}{% set system_message = false %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if loop.index0 == 0 and system_message != false %}
        {% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}{% set content = message['content'] %}{% endif %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{ ' ' + content.strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}""",
    "Llama 3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        "+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "Mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the system message, conversation roles must alternate") }}
    {%- endif %}{%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none %}{{- "[AVAILABLE_TOOLS] " + tools|tojson }}{%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- else %}{{- " " + message["content"]|trim + eos_token }}{%- endif %}
{%- endfor %}""",
    "Qwen 3": """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}{{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "generation": """{% for m in messages %}
  {% if m.role == 'assistant' %}
    {% set said = 'a' %}
    {% generation %}{% set said = 'b' %}{{ m.content }} {{ said }}{% endgeneration %}{{ said }}
  {% else %}
    {{ m.content }}
  {% endif %}
{% endfor %}""",
    "break and continue": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
        "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
    ),
    "the date": "{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}",
    "JSON": (
        "{{ messages|tojson }}{{ messages[0]|tojson(indent=2) }}{{ {'b': '<é>', 'a': 1}"
        "|tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}{{ 1.5|tojson }}"
    ),
    "macros, dicts and defaults": (
        "{% macro turn(m, end='.') %}"
        "<{{ m.role|upper }}>{{ m.content|default('-', true) }}{{ end }}"
        "{% endmacro %}{% for m in messages %}{{ turn(m, end=dict(a='!').a) }}{% endfor %}"
        "{% macro twice() %}{{ caller(1) }}{{ caller(2) }}{% endmacro %}"
        "{% call(x) twice() %}{{ x }}{% endcall %}{{ missing }}{{ dict.fromkeys('ab') }}"
        "{{ documents is none }}{{ bos_token }}{{ namespace({'x': 1}, y=2).y }}{{ range(3)|list }}"
    ),
    "half characters": "\ud83d{{ '\ud83d' }}{{ messages[0].content }}",
    "white space": "  {% if 1 %}\n\n a {#- c -#} b\n  {% endif %}\n{{ messages[0].content }}\n\n",
}
# What a template may refuse, and what its sandbox does.
REFUSING = {
    "an attribute of Python's": "{{ ''.__class__.__mro__ }}",
    "a name of Python's": "{% set n = namespace(__class__=1) %}",
    "the type dict": "{{ dict.mro() }}",
    "a change of a list": "{{ messages.append(1) }}",
    "a range": "{{ range(100001) }}",
    "an undefined value": "{{ messages[9].content }}",
    "a filter": "{{ 1|nothing }}",
    "no string": "{{ raise_exception(messages) }}",
    "broken": "{% for x in",
    "an unknown tag": "a\n{% generate %}",
}
# Theirs name their own classes.
OTHER_WORDS = {
    REFUSING["a name of Python's"]: "a namespace cannot hold '__class__'",
    REFUSING["the type dict"]: "has no attribute 'mro'",
}
CHATS = {
    "a question": [USER],
    "a system message": [{"role": "system", "content": "Be brief."}, USER],
    "turns": [USER, {"role": "assistant", "content": "  Hello \n"}, USER],
    "roles in the wrong order": [USER, USER],
    "unicode": [{"role": "user", "content": "\u2028 é \N{GRINNING FACE}\r\n\0\x1b[31m 中文"}],
    "half characters": [{"role": "user", "content": "\ud83d \ud83d\ude00 \udc80"}],
    "empty messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
    "marks of a template": [{"role": "user", "content": "{{ 1 }}{% x %}<s></s>[INST]"}],
}


def write_theirs(tokenization, messages, **settings) -> str:
    try:
        return tokenization.tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    except Exception as error:
        return "refused: " + " ".join(str(error).split())[:250]


def write(tokenization, messages, *, answer=False, **settings) -> str:
    try:
        return tokenization.render_chat(messages, answer=answer, **settings)
    except InputError as error:
        message = str(error).removeprefix("the model's chat template refuses this: ")
        return "refused: " + message[:250]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_writes_what_it_does_in_transformers(tokenization, monkeypatch, template):
    monkeypatch.setattr(tokenization.tokenizer, "chat_template", template)
    written = {name: write(tokenization, CHATS[name]) for name in CHATS}
    assert written == {name: write_theirs(tokenization, CHATS[name]) for name in CHATS}
    assert "Hi" in written["a question"]
    for name in CHATS:
        expected = write_theirs(tokenization, CHATS[name], add_generation_prompt=True)
        assert write(tokenization, CHATS[name], answer=True) == expected, name


@pytest.mark.parametrize("template", REFUSING.values(), ids=REFUSING)
def test_a_template_is_refused_as_in_transformers(tokenization, monkeypatch, template):
    monkeypatch.setattr(tokenization.tokenizer, "chat_template", template)
    expected = write_theirs(tokenization, [USER])
    assert expected.startswith("refused: ")
    written = write(tokenization, [USER])
    if template in OTHER_WORDS:
        assert OTHER_WORDS[template] in written
    else:
        assert written == expected


def test_a_chat_may_end_within_its_last_message(tokenization, monkeypatch):
    left_out = 0
    for template in TEMPLATES.values():
        monkeypatch.setattr(tokenization.tokenizer, "chat_template", template)
        if "content" not in template:  # newer transformers refuse all of these
            continue
        for content in ("The answer is", " 中\n", "<s>", ""):
            chat = [USER, {"role": "assistant", "content": content}]
            expected = write_theirs(tokenization, chat, continue_final_message=True)
            if expected.startswith("refused: "):
                left_out += 1
                with pytest.raises(InputError, match="does not show the message to continue"):
                    tokenization.render_chat(chat, answer=False, continues=True)
            else:
                chat_text = tokenization.render_chat(chat, answer=False, continues=True)
                assert chat_text == expected
    assert 0 < left_out < 2 * len(TEMPLATES)


def test_variables_reach_the_template(tokenization, monkeypatch):
    monkeypatch.setattr(tokenization.tokenizer, "chat_template", TEMPLATES["Qwen 3"])
    for values in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        expected = write_theirs(tokenization, [USER], add_generation_prompt=True, **values)
        assert write(tokenization, [USER], answer=True, variables=values) == expected
        assert ("<think>" in expected) == (values.get("enable_thinking") is False)
    seen = "{{ bos_token }}{{ tools|tojson }}{{ x|tojson }}"
    monkeypatch.setattr(tokenization.tokenizer, "chat_template", seen)
    values = {"bos_token": "é", "tools": [{"type": "function"}], "x": {"a": [1, 2.5, None, True]}}
    expected = write_theirs(tokenization, [USER], **values)
    assert write(tokenization, [USER], variables=values) == expected


def test_of_several_templates_the_default_one_is_taken(tokenization, monkeypatch):
    several = {"tool_use": "tools", "default": "{{ messages[0].content }}"}
    monkeypatch.setattr(tokenization.tokenizer, "chat_template", several)
    assert write(tokenization, [USER]) == write_theirs(tokenization, [USER]) == "Hi"
    del several["default"]
    assert "several chat templates, none named default" in write(tokenization, [USER])
    monkeypatch.setattr(tokenization.tokenizer, "chat_template", {"default": 5})
    assert "chat template is no text" in write(tokenization, [USER])


def test_a_chat_without_messages_and_with_half_characters_is_refused(tokenization, monkeypatch):
    monkeypatch.setattr(tokenization.tokenizer, "chat_template", TEMPLATES["ChatML"])
    for continues in (False, True):
        with pytest.raises(InputError, match="the chat has no messages"):
            tokenization.render_chat([], continues=continues)
    with pytest.raises(InputError, match="the chat holds half characters"):
        tokenization.encode_chat(CHATS["half characters"])
