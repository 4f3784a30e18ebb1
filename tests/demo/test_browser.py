"""The page as a person uses it, in a headless chromium."""

import re
import time
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from mqt_llava.cli.conversation import AnswerStreamer
from tests.demo.conftest import ROOT, SCENE


pytestmark = pytest.mark.demo

PATIENCE = 120_000  # ms: machines of tests are busy
expect.set_options(timeout=PATIENCE)


@pytest.fixture(params=[{}], ids=["light"])
def page(request, browser, address):
    """A page that has been opened, which asks no other host for anything and logs no error."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | request.param))
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    hosts, errors = set(), []
    page.on("request", lambda sent: hosts.add(urlsplit(sent.url).netloc))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    expect(question(page)).to_be_visible()
    yield page
    assert hosts <= {urlsplit(address).netloc, ""}  # "": data in the page itself
    assert not errors
    context.close()


def question(page):
    return page.get_by_label("Question", exact=True)


def upload(page, path=SCENE):
    page.locator("#picture input[type=file]").set_input_files(str(path))
    expect(page.locator("#picture img[alt*='questions']")).to_be_visible()


def ask(page, text):
    question(page).fill(text)
    question(page).press("Enter")


def said(page):
    """What the model said, and the line below it, one after the other."""
    return page.locator("#chat .bot .message-content")


def toast(page):
    return page.get_by_test_id("toast-body")


def choose_m(page, m):
    number = page.locator("#m input[type=number]")
    number.fill(str(m))
    number.press("Tab")


def check_accessible(page):
    violations = Axe().run(page).response["violations"]
    serious = [
        (one["id"], [node["html"][:200] for node in one["nodes"]])
        for one in violations
        if one["impact"] in ("serious", "critical")
    ]
    assert not serious


def test_upload_ask_and_ask_again(page):
    upload(page)
    ask(page, "What is at the top left?")
    expect(said(page).nth(0)).to_have_text("A dog.")
    expect(said(page).nth(1)).to_contain_text("64 visual tokens")
    expect(question(page)).to_have_value("")
    choose_m(page, 16)
    ask(page, "List everything.")
    expect(said(page).nth(3)).to_contain_text("16 visual tokens")
    expect(page.locator("#chat .user .message-content")).to_have_text(["What is at the top left?", "List everything."])
    page.get_by_role("button", name="Start over").click()
    expect(said(page)).to_have_count(0)


def test_the_slider_says_what_m_means(page, answers):
    expect(page.locator("#meaning")).to_contain_text(f"{answers.accuracy[64]:.1f} %")
    slider = page.locator("#m input[type=range]")
    slider.focus()
    slider.press("Home")
    expect(page.locator("#meaning")).to_contain_text(f"{answers.accuracy[1]:.1f} %")
    page.get_by_role("tab", name="Compare").click()
    expect(page.locator("#chart svg")).to_have_attribute("aria-label", re.compile("Chosen: 1[.]"))


def test_pictures_and_questions_to_try(page, answers):
    page.get_by_role("button", name="tiger").click()
    expect(page.locator("#picture img[alt*='questions']")).to_be_visible()
    page.get_by_role("button", name="Which number is printed?").click()
    expect(question(page)).to_have_value("Which number is printed?")
    page.get_by_role("button", name="Ask", exact=True).click()
    *_, row = answers.ask(str(ROOT / "mqt_llava" / "demo" / "pictures" / "10000018.png"), "Which number is printed?")
    expect(said(page).nth(0)).to_have_text(row["answer"])
    upload(page)  # another picture is another conversation
    expect(said(page)).to_have_count(0)


def test_compare(page, answers):
    upload(page)
    choose_m(page, 4)
    ask(page, "List everything.")
    expect(said(page).nth(1)).to_contain_text("4 visual tokens")
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Compare", exact=True).click()  # of the question that was asked last
    cards = page.locator("#cards li")
    expect(cards).to_have_count(len(answers.compared))
    expect(page.locator("#cards")).to_contain_text("Marked")
    rows = list(answers.compare(str(SCENE), "List everything."))
    for index, row in enumerate(rows):
        card = cards.nth(index)
        expect(card).to_contain_text(row["answer"])
        expect(card).to_contain_text("KV cache")
        differs = row["answer"] != rows[-1]["answer"]
        assert (card.locator("mark").count() > 0) == differs
    expect(page.locator("#cards li.chosen h2")).to_have_text("4 visual tokens")


def test_what_it_looks_at(page):
    upload(page)
    page.get_by_role("tab", name="What it looks at").click()
    question(page).fill("What is at the top left?")
    page.get_by_role("button", name="Show what it looks at").click()
    shown = page.locator("#heat img.shown")
    expect(shown).to_have_attribute("alt", re.compile("the whole answer.*top left"))
    word = page.locator("#heat").get_by_role("button", name="dog.")
    word.hover()
    expect(shown).to_have_attribute("alt", re.compile("“dog.”"))
    page.mouse.move(0, 0)
    expect(shown).to_have_attribute("alt", re.compile("the whole answer"))
    word.focus()
    page.keyboard.press("Enter")
    page.locator("#m input[type=number]").focus()
    expect(shown).to_have_attribute("alt", re.compile("“dog.”"))
    expect(word).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="What each visual token reads").click()
    expect(page.locator("#maps img")).to_have_count(64)
    expect(page.locator("#maps img.unused")).to_have_count(0)


def test_auto_says_where_it_stopped_and_why(page, answers):
    upload(page)
    page.get_by_label("Auto").check()
    expect(page.locator("#m input[type=range]")).to_be_disabled()
    ask(page, "What is at the top left?")
    *_, row = answers.ask(str(SCENE), "What is at the top left?", auto=True)
    expect(said(page).nth(0)).to_have_text(row["answer"])
    expect(said(page).nth(2)).to_contain_text(f"Auto stopped at {row['num_visual_tokens']} of 64")
    expect(said(page).nth(2)).to_contain_text(f"{row['confidence']:.2f}")


def test_mistakes_are_messages_and_nothing_is_lost(page, tmp_path):
    ask(page, "What is this?")
    expect(toast(page)).to_contain_text("Choose a picture first")
    expect(question(page)).to_have_value("What is this?")
    expect(page.locator("#chat .user .message-content")).to_have_count(1)  # and it has no answer
    page.get_by_test_id("toast-close").click()
    wrong = tmp_path / "wrong.png"
    wrong.write_text("no picture at all")
    page.locator("#picture input[type=file]").set_input_files(str(wrong))
    page.wait_for_timeout(1000)
    ask(page, "What is this?")
    expect(toast(page)).to_contain_text("Not an image")
    page.get_by_test_id("toast-close").click()
    page.locator("#picture").get_by_role("button", name="Remove Image").click()
    upload(page)
    ask(page, " ")
    expect(toast(page)).to_contain_text("The question is empty")
    ask(page, "What is at the top left?")
    expect(said(page).nth(0)).to_have_text("A dog.")
    ask(page, "List everything.")
    expect(said(page).nth(2)).to_contain_text("dog")
    expect(page.locator("#chat .user .message-content")).to_have_count(2)


def test_markup_in_a_question_stays_text(page):
    upload(page)
    text = "<img src=x onerror=alert(1)> <b>What</b> is &lt; at the top left?"
    ask(page, text)
    expect(page.locator("#chat .user .message-content")).to_have_text(text)
    expect(said(page).nth(1)).to_contain_text("64 visual tokens")
    ask(page, "List everything.")  # with what was said before
    expect(said(page).nth(3)).to_contain_text("64 visual tokens")
    expect(page.locator("#chat .user .message-content").first).to_have_text(text)
    question(page).fill(text)
    page.get_by_role("tab", name="What it looks at").click()
    page.get_by_role("button", name="Show what it looks at").click()
    expect(page.locator("#heat p").first).to_contain_text("<img src=x")
    assert page.locator("img[src='x']").count() == 0


def test_stop_ends_an_answer(page, answers, monkeypatch):
    put = AnswerStreamer.put

    def slow(self, ids):
        time.sleep(0.4)
        put(self, ids)

    monkeypatch.setattr(AnswerStreamer, "put", slow)
    upload(page)
    ask(page, "List everything.")
    expect(said(page).nth(0)).to_contain_text("A")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_timeout(2000)
    text = said(page).nth(0).inner_text()
    page.wait_for_timeout(2000)
    assert said(page).nth(0).inner_text() == text and not text.endswith("fish.")
    monkeypatch.undo()
    page.get_by_role("button", name="Start over").click()
    ask(page, "What is at the top left?")
    expect(said(page).nth(0)).to_have_text("A dog.")


def test_closing_the_tab_ends_the_answer(page, browser, address, monkeypatch):
    made, put = [], AnswerStreamer.put

    def slow(self, ids):
        made.append(ids)
        time.sleep(0.5)
        put(self, ids)

    other = browser.new_page()
    other.goto(address)
    upload(other)
    monkeypatch.setattr(AnswerStreamer, "put", slow)
    ask(other, "List everything.")
    expect(said(other).nth(0)).to_contain_text("A")
    other.close()
    monkeypatch.undo()
    upload(page)  # the next one is served when that answer has ended
    ask(page, "What is at the top left?")
    expect(said(page).nth(0)).to_have_text("A dog.")
    assert len(made) < 14


def test_with_the_keyboard_alone(page):
    """Choose a picture, move the slider, ask: with Tab, Enter and arrows."""

    def tab_to(element):
        for _ in range(40):
            page.keyboard.press("Tab")
            if element.evaluate("element => element === document.activeElement"):
                return
        raise AssertionError("not reached with Tab")

    tab_to(page.get_by_role("button", name="dog"))
    page.keyboard.press("Enter")
    expect(page.locator("#picture img[alt*='questions']")).to_be_visible()
    tab_to(page.locator("#m input[type=range]"))
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    expect(page.locator("#m input[type=number]")).to_have_value("61")
    tab_to(page.get_by_role("button", name="What is at the top left?"))
    page.keyboard.press("Enter")
    tab_to(page.get_by_role("button", name="Ask", exact=True))
    page.keyboard.press("Enter")
    expect(said(page).nth(0)).to_have_text("A dog.")
    expect(said(page).nth(1)).to_contain_text("61 visual tokens")


NARROW = {"viewport": {"width": 390, "height": 844}}
LOOKS = [{}, {"color_scheme": "dark"}, NARROW, NARROW | {"color_scheme": "dark"}]


@pytest.mark.parametrize("page", LOOKS, ids=["light", "dark", "narrow", "narrow-dark"], indirect=True)
def test_every_tab_is_accessible_and_fits(page, request):
    upload(page)
    ask(page, "List everything.")
    expect(said(page).nth(1)).to_contain_text("64 visual tokens")
    check_accessible(page)
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator("#cards")).to_contain_text("Marked")
    check_accessible(page)
    page.get_by_role("tab", name="What it looks at").click()
    page.get_by_role("button", name="Show what it looks at").click()
    expect(page.locator("#heat img.shown")).to_be_visible()
    page.get_by_role("button", name="What each visual token reads").click()
    expect(page.locator("#maps img").first).to_be_visible()
    check_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def test_pictures_of_the_page_are_those_of_the_repository():
    folder = ROOT / "mqt_llava" / "demo" / "pictures"
    originals = {path.name: path for path in (ROOT / "examples").rglob("*.png")}
    for path in folder.iterdir():
        assert path.read_bytes() == originals[path.name].read_bytes()
