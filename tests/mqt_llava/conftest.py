"""Fixtures of the tests that run commands."""

import functools
import http.server
import threading
import warnings

import pytest
from transformers.utils import logging
from typer.testing import CliRunner

from mqt_llava import cli
from tests.mqt_llava.answers import LENGTH
from tests.small_model import make_images


@pytest.fixture
def restore_global_settings(monkeypatch):
    """Commands silence transformers and Python's warnings for the whole process: tests that run one put both back."""
    verbosity, active = logging.get_verbosity(), logging.is_progress_bar_enabled()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with warnings.catch_warnings():
        yield
    logging.set_verbosity(verbosity)
    if active:
        logging.enable_progress_bar()


@pytest.fixture
def files(tmp_path):
    """Paths of two pictures."""
    paths = [tmp_path / "first.png", tmp_path / "second.png"]
    for path, picture in zip(paths, make_images(2)):
        picture.save(path)
    return [str(path) for path in paths]


@pytest.fixture
def ask(checkpoint):
    def invoke(*arguments, stdin=None, model=checkpoint):
        options = [] if model is None else ["--model", str(model), "--max-new-tokens", str(LENGTH)]
        return CliRunner().invoke(cli.app, ["ask", *options, *map(str, arguments)], input=stdin)

    return invoke


@pytest.fixture
def server(tmp_path):
    """Address of a local web server for the files in `tmp_path`."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
