"""Metrics that score an answer against references, from 0 to 1."""

import contextlib
import importlib
import re
import sys
from collections.abc import Callable


Metric = Callable[[str, list[str]], float]
NUMBERS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # that VQA v2 removes
SAID_BEFORE = (
    r"(?:(?:so |therefore,? )?(?:the )?(?:correct |right |best )?(?:answer|option|choice)(?: is| would be)?\s*:?\s*)"
)


def normalize(text: str) -> str:
    """Remove case, surrounding spaces and a final full stop."""
    return " ".join(text.casefold().split()).rstrip(".").rstrip()


def exact_match(answer: str, references: list[str]) -> float:
    """Whether the answer equals a reference, except for case and a final full stop."""
    return float(normalize(answer) in map(normalize, references))


def contains(answer: str, references: list[str]) -> float:
    """Whether the answer contains a reference as whole words."""
    return float(any(re.search(rf"(?<!\w){re.escape(normalize(r))}(?!\w)", normalize(answer)) for r in references))


def vqa_accuracy(answer: str, references: list[str]) -> float:
    """VQA v2's accuracy, min(number of annotators with this answer / 3, 1), averaged over leaving each annotator out
    (https://visualqa.org/evaluation.html), whose rules for punctuation, articles and number words are followed. Apostrophes are
    removed, where VQA v2 adds those that contractions lack. With fewer than four references, an answer that equals any of them scores
    1."""
    answer, references = _normalize_vqa(answer), [_normalize_vqa(reference) for reference in references]
    same = references.count(answer)
    if len(references) < 4:
        return float(same > 0)
    return sum(min(1.0, (same - (reference == answer)) / 3) for reference in references) / len(references)


def _normalize_vqa(text: str) -> str:
    before = text = re.sub(r"[\n\t]", " ", text).strip()
    has_thousands = re.search(r"\d,+\d", before) is not None
    for mark in PUNCTUATION:
        is_removed = has_thousands or f"{mark} " in before or f" {mark}" in before
        text = text.replace(mark, "" if is_removed else " ")
    text = re.sub(r"\.(?!\d)|['\u2019]", "", text)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def anls(answer: str, references: list[str]) -> float:
    """Average normalized Levenshtein similarity (https://arxiv.org/abs/1905.13648): 1 minus the edit distance to the nearest
    reference divided by the length of the longer text, or 0 if that is below 0.5."""
    from rapidfuzz.distance import Levenshtein

    answer = " ".join(answer.casefold().split())
    nearest = max(Levenshtein.normalized_similarity(answer, " ".join(r.casefold().split())) for r in references)
    return nearest if nearest >= 0.5 else 0.0


def multiple_choice(answer: str, references: list[str]) -> float:
    """Whether the answer is the right letter, as in "B", "(B) a dog" or "The correct answer is B.", or the text of that option. The
    references are the letter, the text, or both."""
    letters, texts = set(), set()
    for reference in map(str.strip, references):
        named = re.match(r"\(?([A-Za-z])(?:[.:)]\s*|$)", reference)
        letters |= {named[1].upper()} if named else set()
        texts.add(normalize(reference[named.end() :] if named else reference))
    answer = re.sub(r"[*#`]", "", answer).strip()  # Markdown
    if normalize(answer) and normalize(answer) in texts:
        return 1.0
    chosen = re.match(rf"{SAID_BEFORE}?\(?([A-Za-z])(?:[.:),\n]|\s+-|$)", answer, re.IGNORECASE)
    chosen = chosen or re.match(rf"{SAID_BEFORE}\(?((?-i:[A-Z]))\b", answer, re.IGNORECASE)
    if chosen is not None:
        return float(chosen[1].upper() in letters)
    letter, _, text = answer.partition(" ")  # of "B a dog"
    return float(letter in letters and normalize(text) in texts)


METRICS: dict[str, Metric] = {
    metric.__name__: metric for metric in (exact_match, contains, vqa_accuracy, anls, multiple_choice)
}


def load_metric(name: str) -> Metric:
    """
    Load a metric.

    Args:
        name (`str`): `"exact_match"`, `"contains"`, `"vqa_accuracy"`, `"anls"` or `"multiple_choice"`; or your own function as
            `module:function`.

    Returns:
        `Callable[[str, list[str]], float]`: scores an answer against its references, from 0 to 1. Your own raises a `ValueError`
            where it gives anything else.

    Raises:
        `ValueError`: for an unknown name, and for a function that cannot be imported.
    """
    if name in METRICS:
        return METRICS[name]
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(
            f"There is no metric {name!r}; choose from {', '.join(METRICS)}, or pass your own as module:function."
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as for `python -m`
    try:
        metric = getattr(importlib.import_module(module), function)
    except Exception as error:  # a module may raise anything
        raise ValueError(f"The metric {name!r} cannot be loaded: {error}.") from None
    if not callable(metric):
        raise ValueError(f"The metric {name!r} is not a function.")

    def checked(answer: str, references: list[str]) -> float:
        score = metric(answer, list(references))
        with contextlib.suppress(TypeError, ValueError):
            if 0 <= float(score) <= 1:
                return float(score)
        raise ValueError(f"{name} must give a number from 0 to 1; it gave {score!r} for {answer!r}")

    return checked
