"""Our metrics beside lmms-eval's."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmms_eval.api.metrics import anls as anls_of_lmms_eval
from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val

from mqt_llava.evaluation.metrics import anls, vqa_accuracy


pytestmark = pytest.mark.lmms

# Contractions as one writes them: of names with and without an apostrophe, VQA v2 takes only certain ones to be the same
WORDS = "a the an two 2 None 10:30 10.5 1,000 1000 $5 a.m. am yes yes. don't dont blue-green blue green (red) red/blue what? - ,"
texts = st.lists(st.sampled_from(WORDS.split()), max_size=3).map(" ".join)


@settings(max_examples=500, deadline=None)
@given(texts, st.lists(texts, min_size=10, max_size=10))
def test_vqa_accuracy(answer, references):
    doc = {"question_id": 0, "answers": [{"answer": text, "answer_id": i} for i, text in enumerate(references)]}
    theirs = vqav2_process_results_val(doc, [answer])["exact_match"]
    assert vqa_accuracy(answer, references) == pytest.approx(theirs)


@settings(max_examples=500, deadline=None)
@given(st.text("abc\u00e9", max_size=8), st.lists(st.text("abC\u00e9", max_size=8), min_size=1, max_size=3))
def test_anls(answer, references):
    theirs = anls_of_lmms_eval(references, [answer])["anls"]
    assert anls(answer, references) == pytest.approx(theirs)
