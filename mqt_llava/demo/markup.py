"""HTML for what Gradio has no component for. Colours are those of the theme, light or dark."""

import base64
import io
from difflib import SequenceMatcher
from html import escape
from math import log2
from pathlib import Path

from PIL import Image


SIDE = 448  # pixels of pictures on the page

CSS = """
.dark { --color-accent: #818cf8 !important; }
.html-container { padding: 0 !important; }
#chat .bot .message + .message .md { color: var(--body-text-color-subdued); font-size: 0.85em; }
#chat .message-content { overflow-wrap: anywhere; white-space: pre-wrap; }
.pictures { display: flex; gap: 8px; }
.pictures button { flex: 1; max-width: 72px; aspect-ratio: 1; padding: 0; margin: 0; border: 1px solid var(--border-color-primary); border-radius: 8px; overflow: hidden; cursor: pointer; }
.pictures button:hover { border-color: var(--color-accent); }
.pictures button:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 2px; }
.pictures img { width: 100%; height: 100%; object-fit: cover; margin: 0; }
.hint { color: var(--body-text-color-subdued); margin-top: 8px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); gap: 10px; list-style: none; margin: 0; padding: 0; }
.cards li { display: flex; flex-direction: column; border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 10px; margin: 0; background: var(--block-background-fill); }
.cards .chosen { border: 2px solid var(--color-accent); padding: 9px; }
.cards h2 { margin: 0 0 6px; font-size: 1em; }
.cards .answer { flex: 1; min-height: 3em; margin: 0 0 10px; font-size: 1.1em; overflow-wrap: anywhere; white-space: pre-wrap; }
.cards mark { background: #fde68a; color: #1f2937; border-radius: 3px; padding: 0 2px; }
.cards .figure { display: grid; grid-template-columns: auto auto; justify-content: space-between; gap: 2px 8px; font-size: 0.8em; }
.cards .figure span + span { text-align: right; }
.cards .bar { grid-column: 1 / -1; height: 4px; border-radius: 2px; background: var(--border-color-primary); margin-bottom: 4px; }
.cards .bar span { display: block; height: 100%; border-radius: 2px; background: var(--color-accent); }
.chart { width: 100%; max-width: 640px; height: auto; display: block; }
.chart text { fill: var(--body-text-color); font-size: 13px; }
.chart .grid { stroke: var(--border-color-primary); }
.chart .line { stroke: var(--color-accent); stroke-width: 2.5; fill: none; }
.chart .dot { fill: var(--color-accent); }
.chart .here { stroke: var(--body-text-color); stroke-dasharray: 4 4; }
.chart .here-dot { fill: var(--body-text-color); }
.look { display: grid; grid-template-columns: minmax(0, 448px) minmax(180px, 1fr); gap: 16px; }
.look img { width: 100%; border-radius: 8px; display: none; margin: 0; }
.look img.shown { display: block; }
.look .words { display: flex; flex-wrap: wrap; gap: 6px; }
.look button { margin: 0; border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 6px 10px; min-height: 32px; cursor: pointer; background: var(--block-background-fill); color: var(--body-text-color); font: inherit; }
.look button[aria-pressed="true"] { border-color: var(--color-accent); box-shadow: 0 0 0 1px var(--color-accent); }
.look button:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 1px; }
.bars { display: flex; align-items: flex-end; height: 72px; gap: 1px; border-bottom: 1px solid var(--border-color-primary); }
.bars span { flex: 1; min-width: 1px; background: var(--color-accent); border-radius: 2px 2px 0 0; }
.maps { display: grid; gap: 3px; max-width: 480px; }
.maps img { width: 100%; image-rendering: pixelated; border-radius: 2px; display: block; margin: 0; }
.maps .unused { opacity: 0.2; }
@media (max-width: 640px) { .chart text { font-size: 20px; } .look { grid-template-columns: 1fr; } .cards { grid-template-columns: 1fr 1fr; } }
"""

# Report which of the pictures to try was clicked
CHOOSE_PICTURE = """
element.addEventListener('click', event => {
    const button = event.target.closest('button[data-name]');
    if (button) trigger('select', {name: button.dataset.name});
});
"""

# A word's heat map is shown while the word is hovered over or focused, and stays after a click
SHOW_WORDS = """
const show = (word, stay) => {
    for (const image of element.querySelectorAll('img[data-word]')) image.classList.toggle('shown', image.dataset.word === word);
    if (stay) for (const button of element.querySelectorAll('button[data-word]'))
        button.setAttribute('aria-pressed', button.dataset.word === word);
};
const pressed = () => element.querySelector('button[aria-pressed="true"]')?.dataset.word;
for (const [name, stay] of [['mouseover', false], ['focusin', false], ['click', true]])
    element.addEventListener(name, event => {
        const button = event.target.closest('button[data-word]');
        if (button) show(button.dataset.word, stay); else if (name === 'mouseover') show(pressed(), false);
    });
for (const name of ['mouseleave', 'focusout']) element.addEventListener(name, () => show(pressed(), false));
"""


def pictures_to_try(pictures: dict[Path, str]) -> str:
    """Thumbnails of picture files, with their descriptions."""
    buttons = []
    for path, what in pictures.items():
        with Image.open(path) as image:
            image = image.convert("RGB")
        image.thumbnail((144, 144))
        url = as_url(image, "JPEG")
        buttons.append(
            f'<button data-name="{path.name}" title="{what}"><img src="{url}" alt="Take the picture of {what}"></button>'
        )
    return f'<div class="pictures">{"".join(buttons)}</div>'


def hint(text: str) -> str:
    return f'<p class="hint">{escape(text)}</p>'


def tokens(number: int) -> str:
    return "1 visual token" if number == 1 else f"{number} visual tokens"


def amount(value: float, unit: str) -> str:
    """A number with an SI prefix and three significant digits: `1.23 GFLOP`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def summary(row: dict) -> str:
    """The cost of an answer in one line."""
    parts = [tokens(row["num_visual_tokens"]), duration(row["seconds"])]
    if row["flops"] is not None:
        parts.append(amount(row["flops"], "FLOP"))
    return " · ".join(parts)


def reason(row: dict, schedule) -> str:
    """At which stage "auto" stopped, and why."""
    stage, stages = row["stage"], schedule.num_visual_tokens
    doubts = [
        f"with {tokens(m)} its confidence fell below {threshold:.2f}"
        for m, threshold in zip(stages[:stage], schedule.thresholds)
    ]
    last = f"with {tokens(stages[stage])} it is {row['confidence']:.2f}"
    last += (
        f", enough for the threshold of {schedule.thresholds[stage]:.2f}"
        if stage < len(schedule.thresholds)
        else ", and there is no larger step"
    )
    return f"Auto stopped at {stages[stage]} of {stages[-1]}: " + ", ".join([*doubts, last]) + "."


def describe(m: int, cost, accuracy: dict[int, float]) -> str:
    """The cost and accuracy of a number of visual tokens, for the line below the slider."""
    parts = []
    if cost is not None:
        parts.append(f"A short question: {amount(cost.flops, 'FLOP')} up to the first word")
        parts.append(f"{amount(cost.kv_cache_bytes, 'B')} of KV cache")
    if accuracy:
        known = "" if m in accuracy else "about "
        parts.append(f"{known}{accuracy_at(m, accuracy):.1f} % right on its own test questions")
    return hint(" · ".join(parts)) if parts else ""


def accuracy_at(m: int, accuracy: dict[int, float]) -> float:
    """The accuracy at m, interpolated linearly in log m."""
    below = max((known for known in accuracy if known <= m), default=min(accuracy))
    above = min((known for known in accuracy if known >= m), default=max(accuracy))
    share = 0 if below >= above else (log2(m) - log2(below)) / (log2(above) - log2(below))
    return (1 - share) * accuracy[below] + share * accuracy[above]


def mark_differences(answer: str, reference: str) -> str:
    """Mark the words of an answer that differ from a reference."""
    words, others = answer.split(), reference.split()
    marked = []
    for kind, start, end, *_ in SequenceMatcher(None, words, others, autojunk=False).get_opcodes():
        text = escape(" ".join(words[start:end]))
        if text:
            marked.append(text if kind == "equal" else f"<mark>{text}</mark>")
    return " ".join(marked)


def comparison(rows: list[dict], number: int, chosen: int, num_query_tokens: int) -> str:
    """Answers side by side, as far as the `number` runs are done.

    Args:
        chosen (`int`): m of the slider, whose card is highlighted.
    """
    most = {name: max(row[name] or 0 for row in rows) for name in ("seconds", "flops", "kv_cache_bytes")}
    cards = []
    for row in rows:
        figures = [("Time", "seconds", duration(row["seconds"]))]
        if row["flops"] is not None:
            figures.append(("Compute", "flops", amount(row["flops"], "FLOP")))
            figures.append(("KV cache", "kv_cache_bytes", amount(row["kv_cache_bytes"], "B")))
        listed = "".join(
            f'<div class="figure"><span>{label}</span><span>{value}</span>'
            f'<div class="bar"><span style="width: {100 * row[name] / most[name]:.0f}%"></span></div></div>'
            for label, name, value in figures
        )
        answer = mark_differences(row["answer"], rows[-1]["answer"]) or "<i>no answer</i>"
        m = row["num_visual_tokens"]
        cards.append(
            f'<li{" class=chosen" if m == chosen else ""}><h2>{tokens(m)}</h2><p class="answer">{answer}</p>{listed}</li>'
        )
    note = (
        f"Marked: words that are not in the answer with all {num_query_tokens} visual tokens. Time and compute are those of the whole "
        "answer, including the picture, which was encoded once."
        if len(rows) == number
        else f"{len(rows)} of {number} …"
    )
    return f'<ul class="cards">{"".join(cards)}</ul>{hint(note)}'


def accuracy_chart(accuracy: dict[int, float], m: int) -> str:
    """A chart of a checkpoint's accuracy against m, with the chosen m marked."""
    if len(accuracy) < 2:
        return hint("This checkpoint has no accuracy figures: `mqt-llava evaluate` and `mqt-llava card` add them.")
    width, height, left, right, top, bottom = 640, 250, 52, 20, 24, 44
    smallest, largest = min(accuracy), max(accuracy)
    low = 5 * int(min(accuracy.values()) / 5)
    high = min(100, 5 * int(max(accuracy.values()) / 5) + 5)

    def at(number, percent):
        share = log2(number / smallest) / log2(largest / smallest)
        x = left + min(max(share, 0), 1) * (width - left - right)
        return x, top + (high - percent) / (high - low) * (height - top - bottom)

    step = max(5, 5 * round((high - low) / 20))
    parts = []
    for percent in range(low, high + 1, step):
        y = at(smallest, percent)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>')
    points = [at(*point) for point in accuracy.items()]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(f'<polyline class="line" points="{line}"/>')
    for number, (x, y) in zip(accuracy, points):
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{number}</text>')
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 6}" text-anchor="middle">visual tokens (m)</text>')
    here = accuracy_at(m, accuracy)
    x, y = at(m, here)
    parts.append(f'<line class="here" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
    parts.append(f'<circle class="here-dot" cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
    anchor = "end" if x > width - 110 else "start" if x < left + 60 else "middle"
    parts.append(f'<text x="{x:.1f}" y="{top - 8}" text-anchor="{anchor}">m = {m}: {here:.1f} %</text>')
    figures = ", ".join(f"{percent:.1f} % with {number}" for number, percent in accuracy.items())
    label = f"Accuracy against the number of visual tokens: {figures}. Chosen: {m}."
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def heat_maps(explanation) -> str:
    """The heat maps of an answer and of its words, shown one at a time; see `SHOW_WORDS`."""
    entries: list[tuple[str, str, int | None]] = [("", "The whole answer", None)]
    entries += [(str(index), word, index) for index, word in enumerate(explanation.words)]
    buttons, images = [], []
    for key, text, index in entries:
        picture = explanation.draw(index)
        picture.thumbnail((SIDE, SIDE))
        what = "the whole answer" if index is None else f"the word “{text}”"
        alt = escape(f"What {what} depends on, as colours over the picture: {where(explanation.heat(index)[0])}")
        shown = ' class="shown"' if index is None else ""
        images.append(f'<img data-word="{key}"{shown} src="{as_url(picture, "JPEG")}" alt="{alt}">')
        pressed = "true" if index is None else "false"
        chance = "" if index is None else f' title="probability {float(explanation.log_probs[index].exp()):.2f}"'
        buttons.append(f'<button data-word="{key}" aria-pressed="{pressed}"{chance}>{escape(text)}</button>')
    importance = explanation.importance()
    bars = "" if importance is None else importance_bars(importance[0])
    return (
        f'<div class="look"><div>{"".join(images)}</div><div><p>Point at a word, or click it:</p>'
        f'<div class="words">{"".join(buttons)}</div>{bars}</div></div>'
    )


def where(heat) -> str:
    """The ninth of the picture with the largest part of a heat map, in words."""
    side = len(heat)
    rows, columns = (["top", "middle", "bottom"], ["left", "middle", "right"])
    ninths = [[0.0] * 3 for _ in range(3)]
    for row in range(side):
        for column in range(side):
            ninths[3 * row // side][3 * column // side] += float(heat[row][column])
    row, column = max(((r, c) for r in range(3) for c in range(3)), key=lambda cell: ninths[cell[0]][cell[1]])
    name = " ".join(dict.fromkeys((rows[row], columns[column])))
    return f"most of it is at the {name}, {100 * ninths[row][column]:.0f} %" if ninths[row][column] else "nothing"


def importance_bars(importance) -> str:
    """A bar chart of each visual token's importance for the answer."""
    levels = importance.clamp(min=0)
    levels = levels / levels.max().clamp(min=1e-12)
    first = int(levels.argmax()) + 1
    bars = "".join(f'<span style="height: {100 * float(level):.0f}%"></span>' for level in levels)
    label = f"Importance of each of {tokens(len(levels))} for the answer; number {first} is the most important"
    return f'<p>{escape(label)}:</p><div class="bars" role="img" aria-label="{escape(label)}">{bars}</div>'


def map_grid(maps, m: int) -> str:
    """The patches that each visual token attends to, token by token in reading order. Tokens beyond m are faint.

    Args:
        maps (`torch.Tensor` of shape `(M, side, side)`): see [`~mqt_llava.explain.token_maps`].
    """
    number = len(maps)
    per_row = round(number**0.5)
    levels = (255 * maps / maps.amax((1, 2), keepdim=True)).round().byte().numpy()
    palette = [channel for level in range(256) for channel in (level, level * level // 300, 60 + level // 8)]
    images = []
    for index, of_token in enumerate(levels):
        image = Image.fromarray(of_token, "L").convert("P")
        image.putpalette(palette)
        faint = "" if index < m else ' class="unused"'
        images.append(f'<img{faint} src="{as_url(image, "PNG")}" alt="" title="visual token {index + 1}">')
    label = f"Which parts of the picture each of {number} visual tokens reads; the first {m} are in use"
    return f'<div class="maps" role="img" aria-label="{label}" style="grid-template-columns: repeat({per_row}, 1fr)">{"".join(images)}</div>'


def as_url(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, kind, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
