"""BERTScore of a finished run's rationales, by the encoder of a T5 checkpoint.

    python notebooks/bertscore.py RUN --encoder T5DIR

Only scores by the same encoder can be compared: give all runs and methods the same T5DIR, in the
Hugging Face layout. Writes RUN/bertscore.json and prints it.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metrics
from data import InputError, Tokenizer, reading, write_file
from model import Transformer, load_t5

BATCH = 32  # texts encoded together
NAMES = ["precision", "recall", "f1"]


def read_rows(path: Path) -> list[dict]:
    """The rows that have a gold rationale."""
    rows = []
    with reading(path, "give the folder of a finished run"):
        for line in path.read_text(encoding="utf-8").strip("\n").split("\n"):
            row = json.loads(line)
            if row["rationale"]:
                rows.append(row)
    return rows


def bertscore(
    x: np.ndarray, y: np.ndarray, x_idf: np.ndarray | None = None, y_idf: np.ndarray | None = None
) -> tuple[float, float, float]:
    """BERTScore (Zhang et al. 2020) of x (T, D) for y (S, D): precision, recall, F1, 0-100."""
    if len(x) == 0 or len(y) == 0:
        return 0.0, 0.0, 0.0
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    y = y / np.linalg.norm(y, axis=1, keepdims=True)
    cosine = x @ y.T  # (T, D) x (D, S) -> (T, S)
    precision = 100 * float(np.average(cosine.max(axis=1), weights=x_idf))
    recall = 100 * float(np.average(cosine.max(axis=0), weights=y_idf))
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return precision, recall, f1


@torch.no_grad()
def vectors(model: Transformer, tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """For each text (tokens, D): what the encoder says of each token but the end token."""
    ids = tokenizer.to_ids(texts, 512)  # (B, S); 0 is padding, 1 the end
    encoded = model.encode(ids.to(model.embedding.weight.device)).cpu().numpy()  # (B, S, D)
    return [matrix[row > 1] for row, matrix in zip(ids.numpy(), encoded, strict=True)]


def condition_scores(model: Transformer, tokenizer: Tokenizer, rows: list[dict], key: str) -> dict:
    """{n, precision, recall, f1, with intervals} of the texts under `key` against the gold ones."""
    triples = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        texts = vectors(model, tokenizer, [row[key] for row in batch])
        golds = vectors(model, tokenizer, [row["rationale"] for row in batch])
        triples += map(bertscore, texts, golds)
    scores = {"n": len(rows)}
    for name, values in zip(NAMES, np.array(triples).T, strict=True):
        scores |= metrics.bootstrap(name, np.mean, values)
    return scores


def score(run: Path, encoder: Path, device: str) -> dict:
    """{encoder, condition: scores}: what bertscore.json holds."""
    path = run / "predictions.jsonl"
    rows = read_rows(path)
    if not rows or "rationale_given_predicted" not in rows[0]:
        raise InputError(f"{path}: no rationales of a model to score")
    tokenizer = Tokenizer.load(encoder / "spiece.model")
    with reading(encoder):
        model = load_t5(encoder).to(device).eval()
    result = {"encoder": str(encoder)}
    for condition in metrics.LABEL_KEYS:
        key = f"rationale_given_{condition}"
        if key in rows[0]:
            result[condition] = condition_scores(model, tokenizer, rows, key)
    return result


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 done, 2 bad input."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "bertscore.py", argparse.SUPPRESS, __doc__, formatter_class=style
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--encoder", type=Path, required=True, metavar="T5DIR", help="a T5 folder")
    devices = ["cpu", str(torch.accelerator.current_accelerator(check_available=True) or "cpu")]
    parser.add_argument("--device", choices=devices, default="cpu")
    args = parser.parse_args(arguments)
    try:
        result = score(args.run, args.encoder, args.device)
        content = json.dumps(result, indent=2, allow_nan=False)
        write_file(args.run / "bertscore.json", content.encode())
    except (ValueError, LookupError, OSError) as error:  # an InputError is a ValueError
        print("bertscore.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"BERTScore by {result.pop('encoder')}, 0-100, ± half of the 95 % interval")
    print("given label         n    precision       recall           f1")
    for condition, scores in result.items():
        line = condition.replace("_", " ").ljust(15) + f"{scores['n']:6}"
        for name in NAMES:
            low, high = scores[f"{name}_ci95"]
            line += f"{scores[name]:.1f} ±{(high - low) / 2:.1f}".rjust(13)
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
