"""Metrics that score an answer against references, from 0 to 1."""

import importlib
import re
from collections.abc import Callable


Metric = Callable[[str, list[str]], float]
NUMBERS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}


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
    (https://visualqa.org/evaluation.html). Articles and punctuation are ignored, number words become digits. With fewer than four
    references, an answer that equals any of them scores 1."""
    answer, references = _normalize_vqa(answer), [_normalize_vqa(reference) for reference in references]
    same = references.count(answer)
    if len(references) < 4:
        return float(same > 0)
    return sum(min(1.0, (same - (reference == answer)) / 3) for reference in references) / len(references)


def _normalize_vqa(text: str) -> str:
    text = re.sub(r"(?<=\d),(?=\d)", "", text.casefold())
    text = re.sub("['\u2019`]", "", text)
    text = re.sub(r"(?!(?<=\d)\.(?=\d))[^\w\s]", " ", text)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def anls(answer: str, references: list[str]) -> float:
    """Average normalized Levenshtein similarity (https://arxiv.org/abs/1905.13648): 1 minus the edit distance to the nearest
    reference divided by the length of the longer text, or 0 if that is below 0.5."""
    from rapidfuzz.distance import Levenshtein

    answer = " ".join(answer.casefold().split())
    nearest = max(Levenshtein.normalized_similarity(answer, " ".join(r.casefold().split())) for r in references)
    return nearest if nearest >= 0.5 else 0.0


def multiple_choice(answer: str, references: list[str]) -> float:
    """Whether the answer begins with the right letter or is the text of that option. The references are the letter and the text."""
    letter, *texts = references
    chosen = re.match(
        r"\s*(?:the )?(?:answer|option)?(?: is)?\s*:?\s*\(?([A-Za-z])(?:[.:),]|\s*$)", answer, re.IGNORECASE
    )
    if normalize(answer) in map(normalize, texts):
        return 1.0
    return float(chosen is not None and chosen[1].upper() == letter.strip("() .").upper())


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
        `Callable[[str, list[str]], float]`: scores an answer against its references, from 0 to 1.

    Raises:
        `ValueError`: for an unknown name, and for a function that cannot be imported.
    """
    if name in METRICS:
        return METRICS[name]
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(
            f"There is no metric {name!r}; choose from {', '.join(METRICS)}, or pass your own as module:function."
        )
    try:
        metric = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The metric {name!r} cannot be loaded: {error}.") from None
    if not callable(metric):
        raise ValueError(f"The metric {name!r} is not a function.")
    return metric
