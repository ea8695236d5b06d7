"""The page, in a real browser: Chromium, where it is installed."""

import json
import pathlib
import re
import shutil

import pytest
from playwright import sync_api

from tests.duo_jax.server.conftest import wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        # CI runs as root, for whom Chromium has no sandbox.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, served):
    """Yield the page, loaded; nothing may fail in it, or be fetched from elsewhere."""
    page, wrong = browser.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console", lambda said: said.text.startswith("Failed to load") or wrong.append(said.text)
    )
    page.on("request", lambda r: r.url.startswith((served.url, "data:")) or wrong.append(r.url))
    page.goto(served.url)
    page.wait_for_selector("#state.ready")
    yield page
    page.close()
    assert not wrong


def send(page, text):
    page.fill("#ask", text)
    page.press("#ask", "Enter")


def wait_for_answer(page):
    page.wait_for_selector("#send", state="visible")
    return page.locator(".assistant .said").last.text_content()


def settings(page, **values):
    page.locator("#more").evaluate("more => more.open = true")
    for name, value in values.items():
        page.fill(f"#{name}", str(value))


def test_a_chat_is_answered(page, client):
    settings(page, most=8, temperature=0, system="Be brief.")
    send(page, "Passkey one?")
    first = wait_for_answer(page)
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user"}
    messages = [system, user | {"content": "Passkey one?"}]
    answer = client.chat.completions.create(model="demo", messages=messages, max_tokens=8)
    assert first == answer.choices[0].message.content.lstrip()
    send(page, "And two?")
    second = wait_for_answer(page)
    messages += [answer.choices[0].message, user | {"content": "And two?"}]
    answer = client.chat.completions.create(model="demo", messages=messages, max_tokens=8)
    assert second == answer.choices[0].message.content.lstrip()


def test_the_page_says_how_fast_and_how_large(page, served):
    settings(page, most=250, temperature=0, long="Passkey third interpreter. " * 12)
    send(page, "Which is the third?")
    wait_for_answer(page)
    note = page.locator(".assistant .soft").last.text_content()
    assert re.search(r"\d s to the first token · [\d.]+ tokens/s", note)
    cache, full = map(float, re.search(r"cache ([\d.]+) kB, full ([\d.]+) kB", note).groups())
    read, written = map(int, re.search(r"(\d+) tokens in, .*? (\d+) out", note).groups())
    stats = served.engine.stats()
    pages = -(-(read + written - 1) // stats.page_tokens)
    assert cache == round((pages * stats.page_bytes + stats.ring_bytes) / 1e3, 2)
    assert full == round(pages * stats.full_page_bytes / 1e3, 2)
    assert page.locator(".user .said").text_content().startswith("[324 characters]")
    settings(page, most=4)
    send(page, "And again?")
    wait_for_answer(page)
    note = page.locator(".assistant .soft").last.text_content()
    assert int(re.search(r"(\d+) of them from the cache", note)[1]) >= 64
    assert re.fullmatch(r"\d+%", page.locator("#hits").text_content())


def test_an_answer_can_be_stopped(page, served):
    settings(page, most=400, temperature=0)
    before = served.engine.stats().finished
    send(page, "Passkey first")
    written = page.locator(".assistant .said")
    sync_api.expect(written).to_have_text(re.compile(r"\w\W+\w"), timeout=30_000)
    page.click("#stop")
    wait_for_answer(page)
    assert "stopped" in page.locator(".assistant .soft").text_content()
    wait_for(lambda: served.engine.stats().running == 0)
    assert served.engine.stats().finished == before + 1


def test_what_is_wrong_is_shown_and_text_is_no_html(page):
    settings(page, most=5000)
    send(page, "<img src=x onerror=alert(1)>")
    page.wait_for_selector(".error")
    assert "512 tokens" in page.locator(".error").text_content()
    assert page.locator(".user .said").text_content() == "<img src=x onerror=alert(1)>"
    assert page.locator("img").count() == 0
    page.click("#clear")
    assert page.locator(".turn").count() == 0


def test_an_answer_is_no_html_either(page):
    event = json.dumps({"choices": [{"index": 0, "delta": {"content": "<b>bold</b>"}}]})
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            body=f"data: {event}\n\ndata: [DONE]\n\n", content_type="text/event-stream"
        ),
    )
    send(page, "?")
    assert wait_for_answer(page) == "<b>bold</b>"
    assert page.locator("b", has_text="bold").count() == 0


def test_a_model_without_chat_template_continues_a_text(page, model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    page.reload()
    page.wait_for_selector("#state.ready")
    settings(page, most=8, temperature=0)
    assert not page.locator("#system").is_visible()
    send(page, "Passkey first")
    assert wait_for_answer(page) == model.generate(["Passkey first"], max_new_tokens=8)[0]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_screen(page, scheme, width):
    page.set_viewport_size({"width": width, "height": 700})
    page.emulate_media(color_scheme=scheme)
    settings(page, most=4, temperature=0)
    send(page, "a" * 500)
    wait_for_answer(page)
    wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert page.evaluate(wide)
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back))) < 384) == (scheme == "dark")


def test_the_page_is_part_of_the_package_and_asks_nobody_else():
    import duo_jax.server

    [folder] = duo_jax.server.__path__
    text = (pathlib.Path(folder) / "page.html").read_text(encoding="utf-8")
    assert re.findall(r"https?://[^'\" ]+", text) == ["http://www.w3.org/2000/svg"]
