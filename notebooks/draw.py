"""Draw the README's picture from the files of a finished run: python notebooks/draw.py out notebooks/figures/run.png

Left, the two stages. Middle, stage 2 over the steps. Right, what the rationales argue for under each condition.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
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


def main(run: str, target: str) -> None:
    log = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    result = json.loads((Path(run) / "metrics.json").read_text(encoding="utf-8"))
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
