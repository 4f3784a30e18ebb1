"""Draw how MQT-LLaVA works, after figure 2 of the paper (arXiv 2405.19315): `python docs/images/model.py [model.svg]`."""

import sys
from pathlib import Path

import matplotlib


matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "model"  # the same file every time
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image


HERE = Path(__file__).parent
TOWER, QUERY, TEXT, GREY = "#c7d8f0", "#f6c99f", "#cfe3c8", "#e3e3e3"


def box(axes, x, y, width, height, label, color):
    style = "round,pad=0,rounding_size=0.15"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor="black"))
    axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=11)


def squares(axes, x, y, colors, side=0.32, columns=1):
    """A grid of squares in raster order, whose top left corner is at (x, y)."""
    for i, color in enumerate(colors):
        row, column = divmod(i, columns)
        corner = x + column * side, y - (row + 1) * side
        axes.add_patch(Rectangle(corner, side, side, facecolor=color, edgecolor="white", linewidth=1))


def arrow(axes, start, end, bend=0.0):
    style = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.2, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", end, start, arrowprops=style)


def draw(path: Path, m: int = 4, num_queries: int = 9):
    figure, axes = plt.subplots(figsize=(11, 4.9))
    axes.set(xlim=(0, 15.2), ylim=(0.3, 7.1), aspect="equal")
    axes.axis("off")
    note = {"ha": "center", "va": "center", "fontsize": 9.5, "color": "#444444"}

    # The image, through the vision tower: patch features
    picture = Image.open(HERE.parents[1] / "examples" / "scene.png").convert("RGB").resize((112, 112))
    axes.imshow(np.asarray(picture), extent=(0.1, 2.1, 1.3, 3.3), aspect="auto", zorder=1)
    axes.text(1.1, 0.95, "image", **note)
    box(axes, 2.7, 1.6, 1.7, 1.4, "vision\ntower", TOWER)
    side = 6
    shades = plt.get_cmap("Blues")(np.random.default_rng(1).uniform(0.25, 0.75, side * side))
    squares(axes, 5.0, 3.3, shades, side=2 / side, columns=side)
    axes.text(6.0, 0.95, "patch features", **note)

    # Positions make the keys
    squares(axes, 5.0, 5.9, plt.get_cmap("Greys")(np.linspace(0.15, 0.6, side * side)), side=2 / side, columns=side)
    axes.text(6.0, 6.2, "positions of the patches", **note)

    # The queries, of which the first m are used
    colors = [*plt.get_cmap("Oranges")(np.linspace(0.75, 0.35, m)), *[GREY] * (num_queries - m)]
    squares(axes, 8.44, 6.75, colors[:m], columns=m)
    squares(axes, 8.44 + m * 0.32, 6.75, colors[m:], columns=num_queries - m)
    axes.text(9.9, 6.98, "M queries: the first m are used", **note)
    box(axes, 8.3, 2.0, 2.9, 3.6, "query\ntransformer\n\ncross-attention", QUERY)
    axes.text(7.65, 5.12, "keys", **note)
    axes.text(7.65, 2.62, "values", **note)

    # The visual tokens stand for <image> in the prompt
    squares(axes, 11.75, 4.48, colors[:m], columns=m)
    axes.text(12.35, 4.75, "m visual tokens", **note)
    squares(axes, 11.75 + m * 0.32, 4.48, [TEXT] * 5, columns=5)
    axes.text(13.85, 4.75, "question", **note)
    box(axes, 11.9, 1.6, 2.7, 1.4, "language\nmodel", TEXT)
    axes.text(13.25, 0.55, "answer", **note)

    for start, end in (
        ((2.15, 2.3), (2.7, 2.3)),
        ((4.4, 2.3), (5.0, 2.3)),
        ((7.05, 2.4), (8.3, 2.4)),
        ((7.05, 4.9), (8.3, 4.9)),
        ((9.1, 6.4), (9.1, 5.6)),
        ((11.2, 4.32), (11.75, 4.32)),
        ((13.25, 4.1), (13.25, 3.0)),
        ((13.25, 1.6), (13.25, 0.75)),
    ):
        arrow(axes, start, end)
    figure.tight_layout(pad=0.2)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "model.svg")
