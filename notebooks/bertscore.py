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
import r2d
from data import InputError, Tokenizer
from model import Transformer, load_t5

BATCH = 32  # texts encoded together
NAMES = ["precision", "recall", "f1"]


def read_rows(path: Path) -> list[dict]:
    """The rows that have a gold rationale."""
    rows = []
    try:
        for line in path.read_text(encoding="utf-8").strip("\n").split("\n"):
            row = json.loads(line)
            if row["rationale"]:
                rows.append(row)
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: not of a finished run ({type(error).__name__})") from None
    return rows


def load_encoder(folder: Path, device: str) -> tuple[Transformer, Tokenizer]:
    tokenizer = Tokenizer.load(folder / "spiece.model")
    model = load_t5(folder).eval()
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(f"{folder}: spiece.model is not the tokenizer of these weights")
    try:
        return model.to(device), tokenizer
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {device}: this machine has none; use --device cpu") from None


@torch.no_grad()
def vectors(model: Transformer, tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """For each text (tokens, D): what the encoder says of each token but the end token."""
    ids = tokenizer.encode(texts, 512)  # (B, S); 0 is padding, 1 the end
    encoded = model.encode(ids.to(model.embedding.weight.device)).cpu().numpy()  # (B, S, D)
    return [matrix[row > 1] for row, matrix in zip(ids.numpy(), encoded, strict=True)]


def condition_scores(model: Transformer, tokenizer: Tokenizer, rows: list[dict], key: str) -> dict:
    """{n, precision, recall, f1, with intervals} of the texts under `key` against the gold ones."""
    triples = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        texts = vectors(model, tokenizer, [row[key] for row in batch])
        golds = vectors(model, tokenizer, [row["rationale"] for row in batch])
        triples += map(metrics.bertscore, texts, golds)
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
    model, tokenizer = load_encoder(encoder, device)
    result = {"encoder": str(encoder)}
    for condition in metrics.CONDITIONS:
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
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], default="cpu")
    args = parser.parse_args(arguments)
    try:
        result = score(args.run, args.encoder, args.device)
        content = json.dumps(result, indent=2, allow_nan=False)
        r2d.write_file(args.run / "bertscore.json", content.encode())
    except (ValueError, LookupError, OSError) as error:  # an InputError is a ValueError
        print(f"bertscore.py: {error}", file=sys.stderr)
        return 2
    print(f"BERTScore by {result.pop('encoder')}, 0-100, ± half of the 95 % interval")
    print("given label         n    precision       recall           f1")
    for condition, scores in result.items():
        line = condition.replace("_", " ").ljust(15) + f"{scores['n']:6}"
        for name in NAMES:
            line += metrics.show(scores, name).rjust(13)
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
