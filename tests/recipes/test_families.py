"""The yardstick of another hand measures what it says."""

import os
from collections import Counter

import pytest

from recipes.tiny import families


pytestmark = pytest.mark.skipif(not os.path.exists(families.FONT), reason="needs fonts-noto-color-emoji")


@pytest.mark.parametrize("family", families.FAMILIES)
def test_pictures_show_what_is_asked_of_them(family):
    for seed in range(4):
        picture, colour, things = families.paint(family, seed)
        again, *same = families.paint(family, seed)
        assert picture.tobytes() == again.tobytes() and same == [colour, things]
        width, height = picture.size
        assert (family == "landscape") == (width > height)
        background = picture.getpixel((0, 0))
        covered = sum(count for count, value in picture.getcolors(width * height) if value != background)
        assert 0.002 * len(things) < covered / (width * height) < 0.1 * len(things)
        for _, row, column in things:
            if row is not None:
                middle = ((column + 0.5) * width / 3, (row + 0.5) * height / 3)
                box = [round(middle[i % 2] + (i // 2 * 2 - 1) * height / 16) for i in range(4)]
                assert picture.crop(box).getcolors(1) is None  # something is there


def test_a_list_in_any_order_is_right():
    things = Counter({"cat": 2, "apple": 1, "number 4": 1})
    for answer in (
        "A cat, a cat, an apple and the number 4.",
        " An apple, the number 4, a cat and a cat.",
        "An apple, two cats and the number 4.",
    ):
        assert families.read_list(answer) == things
    assert families.read_list("A cat.") != things


class Knowing:
    """In place of a model: says what it is told for a question, and something else in lists where it is to be at odds."""

    def __init__(self, family, lists_are_right):
        self.truth = {}
        for seed in range(3):
            _, colour, things = families.paint(family, seed)
            self.truth[seed] = colour, things
        self.lists_are_right = lists_are_right

    def answer(self, seed, question):
        _, things = self.truth[seed]
        counts = Counter(name for name, *_ in things)
        known = {asked: answer for _, asked, answer in families.questions(*self.truth[seed], seed)}
        if question == "List everything.":
            names = list(counts.elements()) if self.lists_are_right else ["unicorn"]
            return " and ".join(map(families.with_article, names)).capitalize() + "."
        for name in families.GLYPHS:
            if question == f"Is there {families.with_article(name)}?":
                return "Yes." if counts[name] else "No."
            if question == f"How many {families.plural(name)} are there?":
                return f"{families.WORDS[counts[name]]}."
        if question == "How many things are there?":
            return f"{families.WORDS[len(things)]}."
        for name, row, column in things:
            if row is not None and question == f"What is {families.place(row, column)}?":
                return f"{families.with_article(name).capitalize()}."
        return known[question]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_right_answers_score_all_and_odd_lists_are_found(family, monkeypatch):
    seeds = {families.paint(family, seed)[0].tobytes(): seed for seed in range(3)}

    def answer_all(model, processor, samples, m):
        return [model.answer(seeds[picture.tobytes()], question) for picture, question in samples]

    monkeypatch.setattr(families, "answer_all", answer_all)
    found = families.evaluate(Knowing(family, True), None, family, 3, 1)
    assert found == {"all": 100, "list": 100, "contradictions": 0}
    found = families.evaluate(Knowing(family, False), None, family, 3, 1)
    assert found["list"] == 0 and found["all"] == 80 and found["contradictions"] > 30
