"""Draw the README's pictures.

python notebooks/draw.py out notebooks/figures/run.png
    a finished run: the two stages; stage 2 over the steps; what the rationales argue for under each condition
python notebooks/draw.py notebooks/results/compare.json notebooks/figures/gap.png
    a comparison: BLEU under the gold and the own label; their gap; how often a flipped label is followed
"""

import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

GREYS = {"argues_given": "0.25", "argues_gold": "0.75"}


def box(ax: plt.Axes, x: float, y: float, text: str, fill: str = "white") -> None:
    style = {"boxstyle": "round,pad=0.35", "facecolor": fill, "edgecolor": "0.2"}
    ax.text(x, y, text, ha="center", va="center", fontsize=8.5, bbox=style)


def arrow(ax: plt.Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "0.2", "shrinkA": 2, "shrinkB": 2})
    ax.text((start[0] + end[0]) / 2 + 0.02, (start[1] + end[1]) / 2, text, fontsize=7.5, va="center", color="0.25")


def draw_stages(ax: plt.Axes) -> None:
    """The data flow of training: one model, three prompts."""
    ax.axis("off")
    ax.set(xlim=(0, 1), ylim=(0, 1.1), title="one model, three prompts")
    box(ax, 0.24, 0.92, "explain: {question}", "0.93")
    box(ax, 0.8, 0.92, "rationale")
    arrow(ax, (0.44, 0.92), (0.68, 0.92), "")
    ax.text(0.02, 1.04, "stage 1", fontsize=9, weight="bold", va="center")
    ax.text(0.02, 0.75, "stage 2", fontsize=9, weight="bold", va="center")
    box(ax, 0.24, 0.63, "predict: {question}", "0.93")
    box(ax, 0.8, 0.63, "label")
    arrow(ax, (0.44, 0.63), (0.72, 0.63), "")
    box(ax, 0.6, 0.36, "coin: P(predicted)")
    box(ax, 0.16, 0.36, "gold label")
    arrow(ax, (0.8, 0.57), (0.66, 0.42), "greedy")
    arrow(ax, (0.29, 0.36), (0.42, 0.36), "")
    box(ax, 0.32, 0.08, "given label: {label},\nexplain: {question}", "0.93")
    box(ax, 0.86, 0.08, "gold\nrationale")
    arrow(ax, (0.55, 0.3), (0.38, 0.17), "")
    arrow(ax, (0.57, 0.08), (0.76, 0.08), "")


def draw_run(ax: plt.Axes, log: list[dict], ceiling: float | None) -> None:
    """Stage 2: P(predicted) and validation macro-F1 over the steps."""
    stage2 = [line for line in log if line["stage"] == 2]
    checked = [line for line in stage2 if "val_macro_f1" in line]
    ax.plot([x["step"] for x in stage2], [100 * x.get("p_predicted", 0) for x in stage2], "--", color="0.5")
    ax.plot([x["step"] for x in checked], [x["val_macro_f1"] for x in checked], "o-", color="0.1", markersize=3)
    ax.text(0.98, 0.62, "- - P(predicted), %\n—o— macro-F1, validation", transform=ax.transAxes, ha="right", fontsize=8)
    if ceiling:
        ax.axhline(ceiling, color="0.6", linewidth=0.8)
        ax.text(0, ceiling + 1, "best that any model can reach", fontsize=7.5, color="0.4")
    ax.set(xlabel="stage 2 step", ylabel="0-100", ylim=(0, 105), title="scheduled sampling")


def draw_conditions(ax: plt.Axes, rationale: dict) -> None:
    """Share of rationales that argue for the label in the prompt, and for gold, with 95 % intervals."""
    names = [name for name in ("gold", "predicted", "predicted_wrong", "flipped") if name in rationale]
    for shift, (key, grey) in zip((-0.2, 0.2), GREYS.items(), strict=True):
        for i, name in enumerate(names):
            value, (low, high) = rationale[name][key], rationale[name][f"{key}_ci95"]
            error = [[value - low], [high - value]]
            label = {"argues_given": "label in the prompt", "argues_gold": "gold label"}[key] if i == 0 else None
            ax.bar(i + shift, value, 0.38, color=grey, yerr=error, capsize=3, label=label, edgecolor="0.2")
    ax.set_xticks(range(len(names)), [name.replace("_", ",\n") for name in names])
    ax.set(xlabel="label in the explain prompt", ylabel="% of test rationales", ylim=(0, 125), title="argues for ...")
    ax.set_yticks(range(0, 101, 20))
    ax.legend(fontsize=8, loc="upper center", ncols=2, frameon=False)


def draw_score(ax: plt.Axes, rows: dict, key: str, shift: float = 0, marker: str = "o", label: str = "") -> None:
    """One score of a compare.json, a line per item: a dot per seed, the mean and its 95 % interval over seeds."""
    for i, row in enumerate(rows.values()):
        mean, seeds = row[key]["mean"], [value for value in row[key]["values"] if value is not None]
        if mean is None:
            text = "" if shift else "has none"
            ax.text(0.06, i, text, transform=ax.get_yaxis_transform(), fontsize=8, color="0.4", va="center")
            continue
        low, high = row[key]["ci95"] or (mean, mean)
        ax.plot(seeds, [i + shift + 0.16] * len(seeds), ".", color="0.65", markersize=5)
        style = {"color": "0.1", "markerfacecolor": "white" if shift < 0 else "0.1", "capsize": 3, "markersize": 6}
        ax.errorbar(mean, i + shift, xerr=[[mean - low], [high - mean]], fmt=marker, label=label, **style)
        label = ""  # one entry in the legend
    ax.set_yticks(range(len(rows)), [item.replace(",", ",\n", 1) for item in rows], fontsize=9)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.spines[["top", "right"]].set_visible(False)


def draw_gap(axes: list[plt.Axes], rows: dict) -> None:
    """Three panels: BLEU under both labels, the gap between them, and how often a flipped label is followed."""
    rows = {item: row for item, row in rows.items() if row["bleu"]["mean"] is not None}
    draw_score(axes[0], rows, "bleu_gold", -0.2, "^", "under the gold label")
    draw_score(axes[0], rows, "bleu", 0.15, "o", "under the own label")
    axes[0].legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, handletextpad=0.2)
    axes[0].set_xlabel("BLEU of the rationales (0-100)")
    draw_score(axes[1], rows, "bleu_gap")
    axes[1].axvline(0, color="0.6", linewidth=0.8)
    axes[1].set_title("dots: seeds; bars: mean, 95 % interval", fontsize=8)
    axes[1].set_xlabel("gap: gold minus own label (BLEU)")
    draw_score(axes[2], rows, "following")
    axes[2].set_xlabel("follows a flipped label (%)")
    axes[2].set_xlim(left=0)


def main(source: str, target: str) -> None:
    matplotlib.use("Agg")  # no window
    if source.endswith(".json"):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.1), sharey=True)
        draw_gap(axes, json.loads(Path(source).read_text(encoding="utf-8")))
    else:
        log = [json.loads(line) for line in (Path(source) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        result = json.loads((Path(source) / "metrics.json").read_text(encoding="utf-8"))
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
        draw_stages(axes[0])
        draw_run(axes[1], log, result["label"].get("ceiling_macro_f1"))
        draw_conditions(axes[2], result["rationale"])
        for ax in axes[1:]:
            ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
