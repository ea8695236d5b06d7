"""Chat templates are rendered within bounds of time, memory, depth and output."""

import sys
import time

import pytest

from duo_jax.checkpoints.chat_template_files import LONGEST_TEMPLATE
from duo_jax.errors import InputError
from duo_jax.session.chat_template import Bounds, Renderer

DEEP = "{% set n = namespace(s=[]) %}{% for i in range(99999) %}{% set n.s = [n.s] %}{% endfor %}"


@pytest.fixture
def renderer():
    made = Renderer()
    yield made
    made.close()


@pytest.fixture
def hasty():
    made = Renderer(Bounds(seconds=0.3))
    yield made
    made.close()


def show(renderer: Renderer, template: str, content: str = "Hi") -> str:
    return renderer.render(template, {"messages": [{"role": "user", "content": content}]})


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "template",
    [
        "{% set r = range(99999)|list %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for x in [1]|slice(10**12) %}{% endfor %}",  # an endless generator
        "{{ 10**(10**10) }}",  # one operation, which no thread of Python's can interrupt
        "{{ ('a-' * 2000000)|wordwrap(1) }}",  # a regular expression's backtracking
        "{{ a }}" * 140_000,  # the compiler's time
    ],
    ids=lambda template: template[:40],
)
def test_time_is_bounded(hasty, template):
    start = time.monotonic()
    with pytest.raises(InputError, match=r"takes longer than 0\.3 s, and was stopped$"):
        show(hasty, template)
    assert time.monotonic() - start < 5  # with the process's start, on a busy machine
    assert hasty.render("{{ x }}", {"x": "Hi"}) == "Hi"


@pytest.mark.one_in(7)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit memory")
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 3000000000 }}",
        "{{ '{:>2000000000}'.format(1) }}",
        "{{ '%2000000000d' % 1 }}",
        "{{ 'a'|center(2000000000) }}",
        "{% set n = namespace(s='x') %}{% for i in range(99) %}"
        "{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
        "{{ strftime_now('%A' * 300000000) }}",
    ],
    ids=lambda template: template[:40],
)
def test_memory_is_bounded(renderer, template):
    with pytest.raises(InputError, match=r"takes more than 1 GiB of memory, and was stopped$"):
        show(renderer, template)
    assert show(renderer, "{{ messages[0].content }}") == "Hi"


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "template",
    [
        "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
        "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}",
        "{% if 1 %}" * 10_000 + "{% endif %}" * 10_000,
        DEEP + "{{ n.s }}",
        DEEP + "{{ raise_exception(n.s) }}",
    ],
    ids=lambda template: template[-30:],
)
def test_depth_is_bounded(renderer, template):
    with pytest.raises(InputError, match="template nests, or calls itself, too deeply"):
        show(renderer, template)


def test_output_is_bounded(renderer):
    with pytest.raises(InputError, match=r"template writes more than 1,04\d,\d{3} characters"):
        show(renderer, "{% for i in range(100) %}{{ 'x' * 1000000 }}{% endfor %}")
    with pytest.raises(InputError, match=r"template writes more than 1,04\d,\d{3} characters"):
        show(renderer, "{% for i in range(99999) %}{{ 'some text of 24 letters.' }}{% endfor %}")
    assert len(show(renderer, "{{ 'x' * 1000000 }}")) == 1_000_000
    # A long chat may be written out, whatever its length.
    text = "\N{GRINNING FACE}" + "five " * 600_000
    assert show(renderer, "{{ messages[0].content|tojson }}", text) == f'"{text}"'


def test_sizes_are_bounded(renderer):
    with pytest.raises(InputError, match=r"has 3,000,000 characters; at most 1,048,576 are"):
        show(renderer, "x" * 3_000_000)
    assert len(show(renderer, "x" * LONGEST_TEMPLATE)) == LONGEST_TEMPLATE
    small = Renderer(Bounds(memory=2**23))
    with pytest.raises(InputError, match=r"chat has 2,000,0.. bytes; at most 1,048,576 go through"):
        show(small, "", "x" * 2_000_000)


def test_what_a_template_says_is_one_short_line(renderer):
    for said in ("é" * 4_000_000, "a\n\x1b[31m" * 999):
        with pytest.raises(InputError, match="template refuses this: ") as refused:
            renderer.render("{{ raise_exception(said) }}", {"said": said})
        assert len(str(refused.value)) < 400
        assert str(refused.value).isprintable()
        assert str(refused.value).endswith("...")
    with pytest.raises(InputError, match=r"refuses this: TemplateError$"):
        show(renderer, "{{ raise_exception('') }}")
