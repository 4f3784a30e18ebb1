"""Calibrate a schedule with a guarantee: at a given confidence, its loss in accuracy against all M visual tokens is at most a given
tolerance.

Each question is answered once with each number of visual tokens. That is enough to evaluate any schedule with any thresholds,
since the confidence in a stage is that of the answer with its m. The images are split in two. One part proposes schedules, from
the safest to the cheapest. The other part tests them one by one until one fails: fixed sequence testing, which needs no correction
for multiple tests (Learn then Test, https://arxiv.org/abs/2110.01052). Each test bets against the hypothesis that the loss, a mean
over questions, exceeds the tolerance (https://arxiv.org/abs/2010.09686). It bets image by image, since questions about the same
image are not independent, and assumes nothing about the distribution.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np

from .modeling.adaptive_mqt_llava import VisualTokenSchedule


MAX_STAGES = 3
NUM_THRESHOLDS = 12  # candidates per stage
NUM_PROPOSALS = 40
PROPOSING_SHARE = 1 / 3  # of the images


@dataclass
class Answers:
    """
    The answers to questions with each number of visual tokens.

    Args:
        num_visual_tokens (`list[int]`): in ascending order. The others are compared with the last one.
        confidence (`np.ndarray` of shape `(len(num_visual_tokens), num_questions)`): the confidence in each answer, from 0 to 1.
        right (`np.ndarray` of the same shape): the score of each answer, from 0 to 1, against its reference or against the answer
            with the largest number of visual tokens.
        text_tokens (`np.ndarray` of shape `(num_questions,)`): the number of text tokens of each prompt.
        new_tokens (`np.ndarray` of shape `(len(num_visual_tokens), num_questions)`): the number of tokens of each answer.
        picture (`np.ndarray` of shape `(num_questions,)`): an integer for the image that each question is about. Images are
            independent of each other, questions about the same image are not.
    """

    num_visual_tokens: list[int]
    confidence: np.ndarray
    right: np.ndarray
    text_tokens: np.ndarray
    new_tokens: np.ndarray
    picture: np.ndarray

    def select(self, questions) -> "Answers":
        """The answers to a subset of the questions."""
        rows = {name: getattr(self, name)[:, questions] for name in ("confidence", "right", "new_tokens")}
        one = {name: getattr(self, name)[questions] for name in ("text_tokens", "picture")}
        return replace(self, **rows, **one)

    def stops(self, schedule: VisualTokenSchedule) -> np.ndarray:
        """The index into `num_visual_tokens` at which the schedule accepts an answer, for each question."""
        stages = [self.num_visual_tokens.index(m) for m in schedule.num_visual_tokens]
        stop = np.full(self.confidence.shape[1], stages[-1])
        for stage, threshold in reversed(list(zip(stages, schedule.thresholds))):
            stop = np.where(self.confidence[stage] >= threshold, stage, stop)
        return stop

    def accuracy(self, stop) -> np.ndarray:
        return self.right[stop, np.arange(self.right.shape[1])]

    def visual_tokens(self, stop) -> np.ndarray:
        return np.array(self.num_visual_tokens)[stop]

    def language_model_tokens(self, schedule, stop) -> np.ndarray:
        """The number of tokens that the language model processes for each question: text once per stage, visual tokens and the
        answer once. Rejected drafts are not counted."""
        stages = [self.num_visual_tokens.index(m) for m in schedule.num_visual_tokens]
        visited = sum((stop > stage).astype(int) for stage in stages) + 1
        last = self.new_tokens[stop, np.arange(len(stop))]
        return self.visual_tokens(stop) + visited * self.text_tokens + last - 1 + (visited - 1)

    def loss(self, stop) -> float:
        """The mean loss in score against the largest number of visual tokens, from -1 to 1."""
        return float((self.right[-1] - self.accuracy(stop)).mean())

    def excess(self, stop, tolerance: float) -> np.ndarray:
        """For each image, by how much its loss exceeds the tolerance, at most 1 - tolerance. Images are weighted by their number of
        questions, so the mean is above 0 if and only if the mean loss over questions exceeds the tolerance."""
        _, picture, count = np.unique(self.picture, return_inverse=True, return_counts=True)
        return np.bincount(picture, self.right[-1] - self.accuracy(stop) - tolerance) / count.max()


def wealth(excess, bet: float) -> float:
    """The largest capital that a start of 1 reaches if each round bets the share `bet` on an excess below 0. If the mean excess is
    above 0, it exceeds 1 / p with a probability of at most p."""
    return float(np.exp(np.cumsum(np.log1p(-bet * excess))).max(initial=1.0))


def best_bet(excess, tolerance: float) -> float:
    """The bet with the fastest growth, among those that cannot lose everything."""
    bets = np.linspace(0, 0.95 / (1 - tolerance), 96)
    return float(bets[np.argmax([np.log1p(-bet * excess).sum() for bet in bets])])


def pictures_needed(tolerance: float, confidence: float, evenness: float = 1.0) -> int:
    """The smallest number of images with which a test can pass, which suffices if no answer changes.

    Args:
        evenness (`float`, *optional*, defaults to 1.0): the mean number of questions per image as a share of the largest.
    """
    growth = np.log1p(0.95 / (1 - tolerance) * tolerance * evenness)
    return int(np.ceil(np.log(1 / (1 - confidence)) / growth))


def propose(answers: Answers) -> list[VisualTokenSchedule]:
    """Schedules from the safest to the cheapest: those that no other schedule beats in both cost and loss."""
    sizes, found = answers.num_visual_tokens, []
    grid = [np.unique(np.quantile(confidence, np.linspace(0, 1, NUM_THRESHOLDS))) for confidence in answers.confidence]
    for number in range(1, MAX_STAGES + 1):
        for stages in itertools.combinations(range(len(sizes)), number):
            for thresholds in itertools.product(*(grid[stage] for stage in stages[:-1])):
                schedule = VisualTokenSchedule([sizes[s] for s in stages], [round(float(t), 4) for t in thresholds])
                stop = answers.stops(schedule)
                loss = answers.loss(stop)
                cost = float(answers.language_model_tokens(schedule, stop).mean())
                found.append((cost, loss, schedule))
    found.sort(key=lambda entry: entry[:2])
    frontier, least = [], np.inf
    for _, loss, schedule in found:
        if loss < least:
            frontier.append(schedule)
            least = loss
    frontier.reverse()
    chosen = np.unique(np.linspace(0, len(frontier) - 1, NUM_PROPOSALS).round().astype(int))
    return [frontier[i] for i in chosen]


def split(answers: Answers, seed: int = 0) -> tuple[Answers, Answers]:
    """Split the answers at random, by image, into those that propose schedules and those that test them."""
    pictures = np.random.default_rng(seed).permutation(np.unique(answers.picture))
    proposing = np.isin(answers.picture, pictures[: int(PROPOSING_SHARE * len(pictures))])
    return answers.select(proposing), answers.select(~proposing)


def calibrate(answers: Answers, tolerance: float, confidence: float, seed: int = 0) -> VisualTokenSchedule:
    """
    The cheapest schedule whose loss against the largest number of visual tokens is shown to be at most the tolerance.

    Args:
        answers (`Answers`): answers about images that are a random sample of those in use.
        tolerance (`float`): the largest loss in accuracy, from 0 to 1.
        confidence (`float`): at 0.95, at most one calibration in twenty chooses a schedule that loses more.
        seed (`int`, *optional*, defaults to 0): seed of the split. Trying several and picking the best voids the guarantee.

    Returns:
        `VisualTokenSchedule`: a single stage with the largest number of visual tokens if nothing cheaper passes the test.
    """
    best = VisualTokenSchedule(answers.num_visual_tokens[-1:], [])
    proposer, tester = split(answers, seed)
    if not (len(proposer.picture) and len(tester.picture)):
        return best
    rng = np.random.default_rng(seed)
    for schedule in propose(proposer):
        bet = best_bet(proposer.excess(proposer.stops(schedule), tolerance), tolerance)
        excess = rng.permutation(tester.excess(tester.stops(schedule), tolerance))
        if wealth(excess, bet) < 1 / (1 - confidence):
            break
        best = schedule
    return best


def doubling(num_query_tokens: int) -> list[int]:
    """1, 2, 4, ... and M."""
    return sorted({*(2**i for i in range(num_query_tokens.bit_length())), num_query_tokens})


def collect(answers, num_questions: int, num_visual_tokens: list[int], picture, right) -> Answers:
    """
    Collect the answers of [`~mqt_llava.evaluation.answer_questions`] in arrays.

    Args:
        picture (`list[int]`): the index of the image that each question is about.
        right (`Callable[[int, str, str], float]`): scores an answer from 0 to 1. Called with the index of the question, the answer,
            and the answer with the largest number of visual tokens.

    Raises:
        `ValueError`: if an answer has an error.
    """
    shape = len(num_visual_tokens), num_questions
    texts, confidence, new_tokens = np.empty(shape, object), np.zeros(shape), np.zeros(shape, int)
    text_tokens = np.zeros(num_questions, int)
    for answer in answers:
        if answer.error:
            raise ValueError(answer.error)
        place = num_visual_tokens.index(answer.num_visual_tokens), answer.index
        texts[place], confidence[place], new_tokens[place] = answer.text, answer.confidence, answer.num_new_tokens
        text_tokens[answer.index] = answer.num_text_tokens
    scores = [[right(i, text, texts[-1, i]) for i, text in enumerate(row)] for row in texts]
    return Answers(num_visual_tokens, confidence, np.array(scores, float), text_tokens, new_tokens, np.array(picture))
