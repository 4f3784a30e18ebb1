"""How right an answer is, from 0 to 1."""

import importlib
import re
from collections.abc import Callable


Metric = Callable[[str, list[str]], float]
NUMBERS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}


def normalize(text: str) -> str:
    """Without case, outer space and a full stop."""
    return " ".join(text.casefold().split()).rstrip(".").rstrip()


def exact_match(answer: str, references: list[str]) -> float:
    """Whether the answer is a reference, case and a full stop apart."""
    return float(normalize(answer) in map(normalize, references))


def contains(answer: str, references: list[str]) -> float:
    """Whether a reference stands in the answer, as whole words."""
    return float(any(re.search(rf"(?<!\w){re.escape(normalize(r))}(?!\w)", normalize(answer)) for r in references))


def vqa_accuracy(answer: str, references: list[str]) -> float:
    """VQA v2's accuracy: how many of the other people say the same, three for the whole point, as a mean over leaving each one
    out (https://visualqa.org/evaluation.html). Articles, punctuation and apostrophes do not count, number words are
    figures. Fewer than four references are equals."""
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
    """Average normalized Levenshtein similarity: 1 less the edit distance by the longer text's length to the nearest reference,
    below a half 0 (https://arxiv.org/abs/1905.13648)."""
    from rapidfuzz.distance import Levenshtein

    answer = " ".join(answer.casefold().split())
    nearest = max(Levenshtein.normalized_similarity(answer, " ".join(r.casefold().split())) for r in references)
    return nearest if nearest >= 0.5 else 0.0


def multiple_choice(answer: str, references: list[str]) -> float:
    """Whether the answer begins with the right letter, or is the text of that option: references are letter and text."""
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
    A metric by its name, or as `module:function`, a function of an answer and its references that returns a number from 0 to 1.

    Raises:
        `ValueError`: for what is neither.
    """
    if name in METRICS:
        return METRICS[name]
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(
            f"There is no metric {name!r}; there are {', '.join(METRICS)}, and module:function for one's own."
        )
    try:
        metric = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The metric {name!r} cannot be loaded: {error}.") from None
    if not callable(metric):
        raise ValueError(f"The metric {name!r} is no function.")
    return metric
