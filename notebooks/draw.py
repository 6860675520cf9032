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
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

# Items of compare.py: the name, colour and marker of each method in every picture of the project.
# The colours are those of Okabe and Ito, told apart by the colour-blind; in grey the markers tell.
METHODS = {
    "r2d": ("scheduled sampling", "#0072B2", "s"),
    "r2d,schedule=none": ("gold labels only", "#D55E00", "o"),
    "dss": ("DSS", "#CC79A7", "D"),
    "sft": ("SFT", "#E69F00", "v"),
    "r2d,no-stage1": ("sampling, no stage 1", "#56B4E9", "^"),
    "r2d,no-stage1,schedule=none": ("gold only, no stage 1", "#7F7F7F", "P"),
    "r2d,cap=0.5": ("sampling, cap 0.5", "#009E73", "<"),
    "r2d,warmup=0,ramp=0,cap=1": ("own labels from the start", "#000000", "X"),
}
SYMBOLS = dict(zip("soDv^P<X", "■●◆▼▲✚◀✖", strict=True))  # the markers as letters of a text
CONDITIONS = ["gold", "predicted", "flipped"]
SCORES = ["bleu_gold", "bleu", "bleu_flipped"]  # the same in compare.json


def item_of(config: dict) -> str:
    """The item of METHODS that a run is, by its config.json."""
    item = config["method"]
    if item == "r2d" and config["no_stage1"]:
        item += ",no-stage1"
    if item.startswith("r2d") and config["schedule"] == "none":
        item += ",schedule=none"
    return item


def styles(items: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Name, colour and marker of each item; one of your own has those of a method not shown."""
    free = [METHODS[method] for method in METHODS if method not in items]
    found = {}
    for item in items:
        if item in METHODS:
            found[item] = METHODS[item]
        else:
            _, colour, marker = free.pop() if free else METHODS["r2d"]
            found[item] = (item, colour, marker)
    return found


def read_rows(source: Path) -> dict:
    """The rows of a compare.json, or of a run as if it were an item with one seed."""
    if source.is_file():
        return json.loads(source.read_text(encoding="utf-8"))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    result = json.loads((source / "metrics.json").read_text(encoding="utf-8"))
    rationale = result.get("rationale", {})
    row = {}
    conditions = [*CONDITIONS, "ceiling_gold", "ceiling"]
    scores = [*SCORES, "ceiling_bleu_gold", "ceiling_bleu"]
    for condition, score in zip(conditions, scores, strict=True):
        bleu = rationale.get(condition, {}).get("bleu")
        row[score] = {"values": [bleu], "mean": bleu}
    return {item_of(config): row}


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
    return means


def label_ends(ax: plt.Axes, x: float, lines: list[tuple], names: bool) -> None:
    """The height of each line at x and, if wanted, its name; none on another."""
    bottom, top = ax.get_ylim()
    y = bottom - top  # below all
    for heights, name, colour in sorted(lines, key=lambda line: line[0][x]):
        y = max(heights[x], y + (top - bottom) / 18)
        arrow = {"arrowstyle": "-", "color": colour, "relpos": (0 if names else 1, 0.5)}
        style = {"va": "center", "color": colour, "arrowprops": arrow}
        if names:
            ax.annotate(f"{heights[x]:.1f}  {name}", (x, heights[x]), (x + 0.12, y), **style)
        else:
            ax.annotate(f"{heights[x]:.1f}", (x, heights[x]), (x - 0.12, y), ha="right", **style)


def draw(rows: dict) -> plt.Figure:
    figure, ax = plt.subplots(figsize=(7, 4.2))
    lines = []  # the three heights of each, its name and colour
    costs = []  # BLEU lost to a flipped label, and by what
    for item, (name, colour, marker) in styles(rows).items():
        row = rows[item]
        heights = draw_line(ax, row, colour, marker)
        if heights is not None:
            lines.append((heights.tolist(), name, colour))
            ceiling = [row["ceiling_bleu_gold"]["mean"], row["ceiling_bleu"]["mean"]]
            if row["bleu_gold"]["mean"] is not None:  # dss is shown no label
                costs.append((round(heights[0] - heights[2]), name))
    if not lines:
        raise ValueError("no item has rationales")
    if ceiling[0] is not None:
        ax.plot(ceiling, color="0.3", linestyle="--")
        ax.annotate("ceiling", (0, ceiling[0]), (10, 2), textcoords="offset points", color="0.3")
    own = sorted(heights[1] for heights, _, _ in lines)
    text = f"{own[0]:.1f} to {own[-1]:.1f}" if own[-1] > own[0] else f"{own[0]:.1f}"
    ax.annotate(text, (1, own[-1]), (8, 10), textcoords="offset points", fontsize=9)
    label_ends(ax, 0, lines, names=False)
    label_ends(ax, 2, lines, names=True)
    ends = sorted({min(costs), max(costs)}, reverse=True) if costs else []
    lost = [f"{cost} ({name})" for cost, name in ends]
    ax.set_title(f"BLEU lost to a flipped label: {', '.join(lost) or 'none'}", x=0.45, fontsize=10)
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
