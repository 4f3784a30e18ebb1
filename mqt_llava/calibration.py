"""Choose when an answer with few visual tokens is sure enough, with a guarantee: the loss against all M visual tokens is at most a
tolerance, by a stated confidence.

The questions are asked once with each number of visual tokens. Any schedule with any thresholds can be judged from that, since
the confidence at a stage is that of the answer with this m. One part of the pictures proposes schedules, from the safest to the
cheapest. The other part tests them one after the other, until one fails: fixed sequence testing, so none of them needs a
correction for the others (Learn then Test, https://arxiv.org/abs/2110.01052). The test is a bet against the hypothesis that the
loss, a mean over questions, is larger than the tolerance (https://arxiv.org/abs/2010.09686). It is laid picture by picture, since
questions about one picture are not independent of each other, and knows no distribution.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np

from .modeling.adaptive_mqt_llava import VisualTokenSchedule


MAX_STAGES = 3
NUM_THRESHOLDS = 12  # tried for each stage
NUM_PROPOSALS = 40
PROPOSING_SHARE = 1 / 3  # of the pictures


@dataclass
class Answers:
    """
    The answers to questions with each number of visual tokens.

    Args:
        num_visual_tokens (`list[int]`): rising; the last one is what others are compared with.
        confidence (`np.ndarray` of shape `(len(num_visual_tokens), num_questions)`): in each answer.
        right (`np.ndarray` of the same shape): from 0 to 1, how right each answer is: by its reference, or by what the largest
            number of visual tokens answers.
        text_tokens (`np.ndarray` of shape `(num_questions,)`): of each prompt.
        new_tokens (`np.ndarray` of shape `(len(num_visual_tokens), num_questions)`): of each answer.
        picture (`np.ndarray` of shape `(num_questions,)`): what each question is about, as integers. Questions about one picture
            are not independent of each other, pictures are.
    """

    num_visual_tokens: list[int]
    confidence: np.ndarray
    right: np.ndarray
    text_tokens: np.ndarray
    new_tokens: np.ndarray
    picture: np.ndarray

    def select(self, questions) -> "Answers":
        """Those to some of the questions."""
        rows = {name: getattr(self, name)[:, questions] for name in ("confidence", "right", "new_tokens")}
        one = {name: getattr(self, name)[questions] for name in ("text_tokens", "picture")}
        return replace(self, **rows, **one)

    def stops(self, schedule: VisualTokenSchedule) -> np.ndarray:
        """At which of `num_visual_tokens` each question is answered."""
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
        """Tokens that the language model computes for each question: the text anew at each stage, visual tokens once, those of the
        answer once (drafts that are taken back not counted)."""
        stages = [self.num_visual_tokens.index(m) for m in schedule.num_visual_tokens]
        visited = sum((stop > stage).astype(int) for stage in stages) + 1
        last = self.new_tokens[stop, np.arange(len(stop))]
        return self.visual_tokens(stop) + visited * self.text_tokens + last - 1 + (visited - 1)

    def loss(self, stop) -> float:
        """By how much the answers are worse than with the largest number of visual tokens, from -1 to 1: a mean over questions."""
        return float((self.right[-1] - self.accuracy(stop)).mean())

    def excess(self, stop, tolerance: float) -> np.ndarray:
        """By how much each picture's answers lose more than the tolerance, at most 1 - tolerance. Its mean over pictures is above 0
        where the loss, as a mean over questions, is above the tolerance: pictures with more questions weigh more."""
        _, picture, count = np.unique(self.picture, return_inverse=True, return_counts=True)
        return np.bincount(picture, self.right[-1] - self.accuracy(stop) - tolerance) / count.max()


def wealth(excess, bet: float) -> float:
    """What one unit has at most become when in each round `bet` of it is laid on an excess below 0. If its mean is above, that is
    more than 1 / p with a probability of at most p."""
    return float(np.exp(np.cumsum(np.log1p(-bet * excess))).max(initial=1.0))


def best_bet(excess, tolerance: float) -> float:
    """The bet that would have grown fastest, of those that cannot lose everything."""
    bets = np.linspace(0, 0.95 / (1 - tolerance), 96)
    return float(bets[np.argmax([np.log1p(-bet * excess).sum() for bet in bets])])


def pictures_needed(tolerance: float, confidence: float, evenness: float = 1.0) -> int:
    """How many pictures a test needs at least, where not one answer changes.

    Args:
        evenness (`float`, *optional*): the mean number of questions about a picture, as a share of the largest.
    """
    growth = np.log1p(0.95 / (1 - tolerance) * tolerance * evenness)
    return int(np.ceil(np.log(1 / (1 - confidence)) / growth))


def propose(answers: Answers) -> list[VisualTokenSchedule]:
    """Schedules from the safest to the cheapest: of those that cost as much, the one that loses least here."""
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
    """Those that propose and those that test, by pictures drawn at random."""
    pictures = np.random.default_rng(seed).permutation(np.unique(answers.picture))
    proposing = np.isin(answers.picture, pictures[: int(PROPOSING_SHARE * len(pictures))])
    return answers.select(proposing), answers.select(~proposing)


def calibrate(answers: Answers, tolerance: float, confidence: float, seed: int = 0) -> VisualTokenSchedule:
    """
    The cheapest schedule whose loss against the largest number of visual tokens is shown to be at most the tolerance.

    Args:
        answers (`Answers`): to questions about pictures that are drawn at random from those that will come.
        tolerance (`float`): as a share of 1.
        confidence (`float`): of 0.95, at most one calibration in twenty chooses a schedule that loses more.
        seed (`int`): of the split. To try several and take the one that is liked best voids the guarantee.

    Returns:
        `VisualTokenSchedule`: the largest number of visual tokens alone, where nothing cheaper can be shown.
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
    The answers of [`~mqt_llava.evaluation.answer_questions`] as a table.

    Args:
        picture (`list[int]`): what each question is about.
        right (`Callable`): how right an answer is, called with the index of a question, its text and that with the largest number of
            visual tokens.
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
