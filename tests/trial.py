"""Try a recipe: how often is the trained model at the rule, on 2,000 notes?

    python tests/trial.py --lr 0.03 --seed 1

The options are those of r2d.py. Prints a line of JSON: agreement with the rule (0-100), macro-F1
against the gold labels, seconds up to the test. The notes are drawn here, from another seed: no
test note is looked at.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

BEGAN = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import metrics  # noqa: E402
import r2d  # noqa: E402


def try_out(run: r2d.Run) -> None:
    """In the place of the test."""
    result = {"options": " ".join(sys.argv[1:]), "seconds": round(time.perf_counter() - BEGAN, 1)}
    fresh = {"seed": f"trial {run.options.seed}", "notes": 2000, "stage1_notes": 1, "limit": None}
    dataset = data.simulate(argparse.Namespace(**{**vars(run.options), **fresh}))
    questions, gold, _ = data.columns(dataset.train)
    predicted = r2d.predict_labels(run, questions)
    tiers = [data.triage_tier(data.read_facts(question)) for question in questions]
    rule = [data.DISPOSITIONS[tier] for tier in tiers]
    hits = [guess == right for guess, right in zip(predicted, rule, strict=True)]
    result["agreement"] = 100 * sum(hits) / len(hits)
    result["macro_f1"] = metrics.macro_f1(gold, predicted, dataset.labels)
    result["ceiling"] = metrics.macro_f1(gold, rule, dataset.labels)
    print(json.dumps(result))


r2d.evaluate = try_out
with tempfile.TemporaryDirectory() as folder:
    sys.exit(r2d.main([*sys.argv[1:], "--out", folder]))
