"""The code that README and the pages of docs/ show, to be run as it is written."""

import re
from pathlib import Path

from mqt_llava.modeling.budget_mqt_llava import CACHE_NAME


ROOT = Path(__file__).parents[1]
PAGES = [str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def run_python(page: str, replace: dict[str, str] | None = None) -> dict:
    """Run the page's blocks of Python one after the other in one namespace, which is returned.

    What `replace` has is replaced, so that a test takes less time or another port; it must be there.
    """
    namespace = {}
    code = blocks(page, "python")
    for old, new in (replace or {}).items():
        assert any(old in block for block in code), f"{page} does not say {old}"
        code = [block.replace(old, new) for block in code]
    for block in code:
        block = block.replace("cache=cache", f"{CACHE_NAME}=cache")  # written as for the newest transformers
        exec(compile(block, page, "exec"), namespace)
    return namespace
