"""Drills for the language model of `mqt-llava-tiny`: questions about nine things that fill the 3 x 3 cells of a picture which is never
drawn.

With few things in a picture one guesses well without looking where they are, and what is where is not learned: after 300
steps of the questions that real scenes admit, 45 % of the answers to what is at a place were right, perfect labels given. What is
learned first is an answer right behind what it hangs on ("top left crab"); the same in whole questions follows.
"""

import numpy as np

from . import scenes
from .make_data import GRID, turns
from .pretrain_vision import NAMES, patch_places


FIRST = 14_400  # samples of the first six types alone
CELLS = patch_places(scenes.Scene(0, "grey", "plain", 1.0, 1.0, 512, ()), GRID)  # of a square picture's patches
MIDDLES = [np.flatnonzero(cell == CELLS)[np.sum(cell == CELLS) // 2] for cell in range(9)]
NO_TOTAL = scenes.MAX_THINGS + 1  # nine things are more than any picture has
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # rows and columns


def some(names, rng):
    """Up to nine kinds, about half of them there, none of them oftener than there is a word for."""
    pools = (names or scenes.KINDS, scenes.KINDS)
    kinds = [pool[rng.integers(len(pool))] for pool in (pools[i] for i in rng.integers(2, size=9))]
    return [kind for kind in dict.fromkeys(kinds) if names.count(kind) <= scenes.MAX_THINGS]


def tell(question, answers):
    return [(question, ", ".join(f"{name} {answer}" for name, answer in answers.items()) + ".")]


def tell_places(names, colour, rng):
    return tell("What is where?", {scenes.PLACES[cell]: names[cell] for cell in rng.permutation(9)})


def ask_places(names, colour, rng):
    return [
        (f"What is {scenes.where(cell)}?", scenes.sentence(scenes.noun(names[cell]))) for cell in rng.permutation(9)
    ]


def tell_whether(names, colour, rng):
    return tell("What is there?", {kind: "yes" if kind in names else "no" for kind in some(names, rng)})


def ask_whether(names, colour, rng):
    return [(f"Is there {scenes.noun(kind)}?", "Yes." if kind in names else "No.") for kind in some(names, rng)]


def count(names, rng):
    return {kind: scenes.NUMBER_WORDS[names.count(kind)] for kind in some(names, rng)}


def tell_numbers(names, colour, rng):
    return tell("How many of what?", count(names, rng))


def ask_numbers(names, colour, rng):
    counts = count(names, rng)
    return [(f"How many {scenes.plural(kind)} are there?", scenes.sentence(counts[kind])) for kind in counts]


def ask_beside(names, colour, rng):
    pairs = []
    for cell in rng.permutation(9):
        direction = list(STEPS)[rng.integers(4)]
        row, column = np.add(divmod(cell, 3), STEPS[direction])
        if names.count(names[cell]) == 1:
            is_inside = 0 <= row < 3 and 0 <= column < 3
            answer = scenes.sentence(scenes.noun(names[3 * row + column])) if is_inside else "Nothing."
            pairs.append((f"What is {direction} the {names[cell]}?", answer))
    return pairs or ask_places(names, colour, rng)


def describe(names, colour, rng):
    return [("Describe the picture.", scenes.describe(colour, list(enumerate(names))))]


TYPES = (tell_places, ask_places, tell_whether, ask_whether, tell_numbers, ask_numbers, ask_beside, describe)


def tell_scene(scene):
    """The turns that tell of a scene what is where, or how many of what. None where there is nothing to tell."""
    rng = np.random.default_rng([scene.seed, 9])
    if rng.random() < 0.5:
        names = [thing.name for thing in scene.things if not thing.is_number]
        counts = {"things": scenes.NUMBER_WORDS[len(scene.things)]} | count(names, rng)
        ((question, answer),) = tell("How many of what?", counts)
        return turns((f"<image>\n{question}", answer))
    occupied, empty = scenes.clear_cells(scene)
    names = {cell: occupied[cell].name for cell in occupied} | dict.fromkeys(empty[:2], "nothing")
    if not names:
        return None
    ((question, answer),) = tell(
        "What is where?", {scenes.PLACES[cell]: names[cell] for cell in rng.permutation([*names])}
    )
    return turns((f"<image>\n{question}", answer))


def drill(seed):
    """`(turns, labels)`: LLaVA's list of turns, and the labels of patches as [`pretrain_vision`] has them."""
    rng = np.random.default_rng([seed, 7])
    ask = TYPES[rng.integers(6 if seed < FIRST else len(TYPES))]
    # All different, or a few kinds several times
    number = 9 if ask in (tell_places, ask_places) or rng.random() < 0.5 else rng.integers(2, 7)
    kinds = rng.choice(len(scenes.KINDS), number, replace=False)
    kinds = rng.permutation(np.concatenate([kinds, rng.choice(kinds, 9 - number)]))
    colour = int(rng.integers(len(scenes.COLOURS)))
    centres = np.zeros(len(CELLS), dtype=np.int64)
    centres[MIDDLES] = 1 + kinds
    (question, answer), *pairs = ask([NAMES[kind] for kind in kinds], scenes.COLOURS[colour], rng)
    numbers = np.bincount(kinds)[kinds].clip(max=scenes.MAX_THINGS)  # of more of a kind, none are counted
    labels = ((1 + kinds)[CELLS], centres, numbers[CELLS], CELLS, colour, NO_TOTAL)
    return turns((f"<image>\n{question}", answer), *pairs), labels
