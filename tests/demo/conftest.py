"""The page, running, and a browser."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest


if find_spec("gradio") is None or find_spec("playwright") is None:
    collect_ignore_glob = ["test_*.py"]

ROOT = Path(__file__).parents[2]
SCENE = ROOT / "examples" / "scene.png"


@pytest.fixture(scope="session")
def answers():
    """Of the shipped checkpoint, which gets a schedule for "auto" where it has none."""
    from mqt_llava import TINY_CHECKPOINT, VisualTokenSchedule
    from mqt_llava.cli.models import load_schedule
    from mqt_llava.demo.answers import Answers

    answers = Answers.from_pretrained(TINY_CHECKPOINT)
    if answers.schedule is None:
        schedule = VisualTokenSchedule.default(answers.num_query_tokens)
        answers.model.generation_config.visual_token_schedule = schedule.to_dict()
        answers.schedule = load_schedule(answers.model)
    return answers


@pytest.fixture(scope="session")
def address(answers):
    from mqt_llava.demo.app import build, settings

    page = build(answers)
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **settings())
    yield address
    page.close(verbose=False)


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert chromium, "no chromium: install it, or let CHROMIUM name it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()
