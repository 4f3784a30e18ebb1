"""Take the pictures of docs/demo.md: `python -m tests.demo.screenshots docs/images`, on a machine that does nothing else."""

import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from mqt_llava import TINY_CHECKPOINT
from mqt_llava.demo.answers import Answers
from mqt_llava.demo.app import build, settings


def take(page, address, folder: Path, prefix: str):
    page.set_default_timeout(120_000)
    page.goto(address)
    page.get_by_role("button", name="Take the picture of a dog").click()
    page.locator("#picture img[alt*=questions]").wait_for()
    question, number = page.get_by_label("Question", exact=True), page.locator("#m input[type=number]")
    for index, m in enumerate((64, 1)):
        number.fill(str(m))
        number.press("Tab")
        question.fill("List everything.")
        question.press("Enter")
        page.locator("#chat .bot .message-content").nth(2 * index + 1).wait_for()
    save(page, folder / f"{prefix}_ask.png")
    number.fill("4")
    number.press("Tab")
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-button").click()
    page.locator("#cards").get_by_text("Marked").wait_for()
    save(page, folder / f"{prefix}_compare.png")
    number.fill("16")
    number.press("Tab")
    question.fill("What is at the bottom right?")
    page.get_by_role("tab", name="What it looks at").click()
    page.locator("#look-button").click()
    page.locator("#heat img.shown").wait_for()
    save(page, folder / f"{prefix}_look.png")


def save(page, path: Path):
    page.mouse.move(2, 2)
    page.wait_for_timeout(1500)
    page.screenshot(path=path, full_page=True)
    with Image.open(path) as image:
        image.convert("RGB").quantize(256).save(path, optimize=True)


def main(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    launched = build(Answers.from_pretrained(TINY_CHECKPOINT))
    _, address, _ = launched.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **settings())
    with sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        take(browser.new_page(viewport={"width": 1280, "height": 900}), address, folder, "demo")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
