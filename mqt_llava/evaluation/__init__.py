"""Evaluate accuracy against the number of visual tokens, on any questions."""

from .answers import Answer, answer_questions
from .metrics import METRICS, load_metric
from .questions import Question, read_questions


__all__ = ["METRICS", "Answer", "Question", "answer_questions", "load_metric", "read_questions"]
