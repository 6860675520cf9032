"""Draw a finished run, or a comparison of several, to be read at a width of 700 pixels.

    python notebooks/draw.py RUN run.png
    python notebooks/draw.py compare/compare.json gap.png

RUN is a folder: its training and its test. A compare.json: BLEU under three labels, all items.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

# The colours of Okabe and Ito, told apart by the colour-blind; in grey the markers tell.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "os^Dv<"
CONDITIONS = ["gold", "predicted", "flipped"]
SCORES = ["bleu_gold", "bleu", "bleu_flipped"]  # the same in compare.json
REFERENCE = {"color": "0.3", "linestyle": "--"}


def means_of_parts(values: list[float]) -> list[float]:
    """Of at most 20 parts."""
    return [part.mean() for part in np.array_split(values, min(20, len(values)))]


def draw_training(ax: plt.Axes, log: list[dict], batch_size: int) -> None:
    """P(predicted), validation macro-F1 and dose over the updates of stage 2."""
    steps = []
    p = []
    dose = []
    validations = []  # (update, macro-F1)
    for line in log:
        if line["stage"] == 2:
            steps.append(line["step"])
            p.append(100 * line["p_predicted"])
            dose.append(100 * line.get("wrong_predicted", 0) / batch_size)
        if "val_macro_f1" in line:
            validations.append((line["step"], line["val_macro_f1"]))
    ax.plot(steps, p, color="0.4", linestyle=":", label="P(predicted), %")
    ax.plot(*np.transpose(validations), "o-", label="macro-F1, validation")
    # the dose of one update is noise
    ax.plot(means_of_parts(steps), means_of_parts(dose), "--", label="dose, % of the prompts")
    ax.set(xlabel="update of stage 2", ylim=(-3, 103))


def draw_test(ax: plt.Axes, rationale: dict) -> None:
    """BLEU under each label, with 95 % intervals, and that of the reference explainer."""
    places = []
    bleu = []
    intervals = []
    for place, name in enumerate(CONDITIONS):
        if name in rationale:
            places.append(place)
            bleu.append(rationale[name]["bleu"])
            intervals.append(rationale[name]["bleu_ci95"])
            ax.annotate(f"{bleu[-1]:.1f}", (place, bleu[-1]), (6, 8), textcoords="offset points")
    errors = np.abs(np.transpose(intervals) - bleu)  # (2, n): below and above
    ax.errorbar(places, bleu, errors, marker="o", capsize=4, label="BLEU of the model")
    if not places:
        ax.text(1, 0, "sft explains nothing", ha="center")
    if "ceiling" in rationale:
        reference = [rationale["ceiling_gold"]["bleu"], rationale["ceiling"]["bleu"]]
        ax.plot(reference, **REFERENCE, label="BLEU of the reference explainer")
    ax.set_xticks(range(3), CONDITIONS)
    ax.set(xlabel="label in the prompt", xlim=(-0.4, 2.5))


def draw_items(ax: plt.Axes, rows: dict) -> None:
    """A line for each item of compare.json, thin lines for its seeds: BLEU under three labels."""
    ends = []
    for item, row in rows.items():
        seeds = np.array([row[score]["values"] for score in SCORES], dtype=float)  # (3, seeds)
        means = np.array([row[score]["mean"] for score in SCORES], dtype=float)
        if np.isnan(means[1]):  # sft explains nothing
            continue
        if np.isnan(means[0]):  # the prompts of dss hold no label: its text is always the same
            seeds[:] = seeds[1]
            means[:] = means[1]
        colour = COLOURS[len(ends) % len(COLOURS)]
        ax.plot(seeds, color=colour, linewidth=0.7, alpha=0.5)
        ax.plot(means, color=colour, linewidth=2, marker=MARKERS[len(ends) % len(MARKERS)])
        ends.append((means[2], item, colour))
        reference = [row["ceiling_bleu_gold"]["mean"], row["ceiling_bleu"]["mean"]]
    if not ends:
        raise ValueError("no item has rationales")
    if reference[0] is not None:
        ax.plot(reference, **REFERENCE)
        ax.annotate("reference explainer", (0, reference[0]), (4, 6), textcoords="offset points")
    y, top = ax.get_ylim()
    distance = (top - y) / 18  # so that no label lies on another
    for end, item, colour in sorted(ends):
        y = max(end, y + distance)
        line = {"arrowstyle": "-", "color": colour, "relpos": (0, 0.5)}
        ax.annotate(item, (2, end), (2.15, y), va="center", arrowprops=line)
    ax.set_xticks(range(3), CONDITIONS)
    ax.set_xlabel("label in the prompt", loc="left")
    ax.set(xlim=(-0.1, 3.4), ylabel="BLEU of the rationales")


def draw(source: Path) -> plt.Figure:
    """The picture of a run's folder or of a compare.json."""
    if source.is_file():
        figure, ax = plt.subplots(figsize=(7, 4.2))
        draw_items(ax, json.loads(source.read_text(encoding="utf-8")))
        return figure
    result = json.loads((source / "metrics.json").read_text(encoding="utf-8"))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    log = []
    for line in (source / "log.jsonl").read_text(encoding="utf-8").splitlines():
        log.append(json.loads(line))
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.6))
    draw_training(axes[0], log, config["batch_size"])
    draw_test(axes[1], result.get("rationale", {}))
    for ax in axes:
        ax.legend(loc="lower left", bbox_to_anchor=(-0.05, 1), frameon=False)
    return figure


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 done, 2 bad input."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("draw.py", argparse.SUPPRESS, __doc__, formatter_class=style)
    parser.add_argument("source", type=Path, help="folder of a finished run, or a compare.json")
    parser.add_argument("picture", type=Path, metavar="OUT.png")
    args = parser.parse_args(arguments)
    plt.switch_backend("Agg")  # no window
    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=COLOURS)
    plt.rcParams["axes.spines.top"] = False
    plt.rcParams["axes.spines.right"] = False
    try:
        figure = draw(args.source)
        figure.tight_layout()
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=200)
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
