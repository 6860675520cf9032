"""A slope chart, for a width of 700 pixels: BLEU under the gold, the predicted, a flipped label.

    python notebooks/draw.py RUN gap.png
    python notebooks/draw.py compare/compare.json gap.png

RUN is the folder of a finished run. Of a compare.json every item has a line, thin for each seed.
Notebook 2 draws what happens in training.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

# The colours of Okabe and Ito, told apart by the colour-blind; in grey the markers tell.
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "os^Dv<P"
CONDITIONS = ["gold", "predicted", "flipped"]
SCORES = ["bleu_gold", "bleu", "bleu_flipped"]  # the same in compare.json
NAMES = {  # of items
    "r2d": "scheduled sampling",
    "r2d,schedule=none": "gold labels only",
    "r2d,cap=0.5": "sampling, cap 0.5",
    "r2d,warmup=0,ramp=0,cap=1": "own labels from the start",
}


def read_rows(source: Path) -> dict:
    """The rows of a compare.json, or of a run as if it were an item with one seed."""
    if source.is_file():
        return json.loads(source.read_text(encoding="utf-8"))
    result = json.loads((source / "metrics.json").read_text(encoding="utf-8"))
    rationale = result.get("rationale", {})
    row = {}
    conditions = [*CONDITIONS, "ceiling_gold", "ceiling"]
    scores = [*SCORES, "ceiling_bleu_gold", "ceiling_bleu"]
    for condition, score in zip(conditions, scores, strict=True):
        bleu = rationale.get(condition, {}).get("bleu")
        row[score] = {"values": [bleu], "mean": bleu}
    return {f"{result['method']}, seed {result['seed']}": row}


def draw_line(ax: plt.Axes, row: dict, colour: str, marker: str) -> np.ndarray | None:
    """One item; the three heights of its line, or None if it explains nothing."""
    seeds = np.array([row[score]["values"] for score in SCORES], dtype=float)  # (3, seeds)
    means = np.array([row[score]["mean"] for score in SCORES], dtype=float)
    if np.isnan(means[1]):  # sft
        return None
    if np.isnan(means[0]):  # the prompts of dss hold no label: its text is always the same
        seeds[:] = seeds[1]
        means[:] = means[1]
    ax.plot(seeds, color=colour, linewidth=0.7, alpha=0.5)
    ax.plot(means, color=colour, linewidth=2, marker=marker)
    for place, offset in ((0, (-32, -3)), (2, (6, 5))):
        text = f"{means[place]:.1f}"
        ax.annotate(text, (place, means[place]), offset, textcoords="offset points", fontsize=9)
    return means


def draw(rows: dict) -> plt.Figure:
    figure, ax = plt.subplots(figsize=(7, 4.2))
    ends, own = [], []
    for i, (item, row) in enumerate(rows.items()):
        colour = COLOURS[i % len(COLOURS)]
        heights = draw_line(ax, row, colour, MARKERS[i % len(MARKERS)])
        if heights is not None:
            ends.append((heights[2], NAMES.get(item, item), colour))
            own.append(heights[1])
            ceiling = [row["ceiling_bleu_gold"]["mean"], row["ceiling_bleu"]["mean"]]
    if not ends:
        raise ValueError("no item has rationales")
    text = f"{min(own):.1f} to {max(own):.1f}" if max(own) > min(own) else f"{own[0]:.1f}"
    ax.annotate(text, (1, max(own)), (8, 10), textcoords="offset points", fontsize=9)
    if ceiling[0] is not None:
        ax.plot(ceiling, color="0.3", linestyle="--")
        ax.annotate("ceiling", (0, ceiling[0]), (10, 2), textcoords="offset points", color="0.3")
    y, top = ax.get_ylim()
    distance = (top - y) / 18  # so that no label lies on another
    for end, name, colour in sorted(ends):
        y = max(end, y + distance)
        line = {"arrowstyle": "-", "color": colour, "relpos": (0, 0.5)}
        ax.annotate(name, (2, end), (2.2, y), va="center", color=colour, arrowprops=line)
    ax.set_xticks(range(3), CONDITIONS)
    ax.set_xlabel("label in the prompt", x=0.37)
    ax.set(xlim=(-0.4, 3.4), ylabel="BLEU of the rationales")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines["bottom"].set_bounds(0, 2)
    figure.tight_layout()
    return figure


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 done, 2 bad input."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("draw.py", argparse.SUPPRESS, __doc__, formatter_class=style)
    parser.add_argument("source", type=Path, help="folder of a finished run, or a compare.json")
    parser.add_argument("picture", type=Path, metavar="OUT.png")
    args = parser.parse_args(arguments)
    plt.switch_backend("Agg")  # no window
    try:
        png = io.BytesIO()
        draw(read_rows(args.source)).savefig(png, format="png", dpi=200)
        args.picture.write_bytes(png.getvalue())
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        problem = f"cannot be drawn: {type(error).__name__}: {error}"
        print(f"draw.py: {args.source} {problem}", file=sys.stderr)
        return 2
    finally:
        plt.close("all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
