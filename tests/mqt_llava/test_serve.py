"""`mqt-llava serve`, up to the server: tests/serving runs one, and test_placement.py looks at memory."""

import importlib

import pytest
from typer.testing import CliRunner

from mqt_llava import cli
from tests.commands import assert_refused


pytestmark = pytest.mark.usefixtures("restore_global_settings")


def test_server_without_its_packages(monkeypatch):
    """The packages of transformers' own server, not vLLM's."""
    serve = importlib.import_module("mqt_llava.cli.serve")
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name in ("fastapi", "openai") else name)
    result = CliRunner().invoke(cli.app, ["serve"])
    assert_refused(result, "fastapi and openai is missing", "pip install 'transformers[serving]'")
