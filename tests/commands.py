"""What tests of the commands share; fixtures are in mqt_llava/conftest.py."""

import re


QUESTION = "What is this?"


def assert_refused(result, *words):
    """Exit code 2, one line on stderr with `words` in it, nothing on stdout."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert re.fullmatch(r"Error: [^\n]+\n", result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
