"""Try a recipe: how often is the trained model at the rule, on 2,000 validation notes?

    python tests/trial.py --lr 0.03 --seed 1

The options are those of r2d.py. Prints a line of JSON: agreement with the rule (0-100), macro-F1
against the gold labels, seconds of training. No test note is looked at.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import metrics
import r2d


def more_validation(sizes: dict[str, int], *arguments: object) -> data.Dataset:
    """The simulated line with 2,000 validation notes in place of 500."""
    return simulate(sizes | {"val": 2000}, *arguments)


simulate = data.simulate
data.simulate = more_validation
with tempfile.TemporaryDirectory() as folder:
    options = r2d.parse_args([*sys.argv[1:], "--out", folder])
    run = r2d.setup(options)
    began = time.perf_counter()
    if options.method == "r2d" and not options.no_stage1:
        r2d.train(run, 1)
    r2d.train(run, 2)
    seconds = time.perf_counter() - began
run.model.eval()
questions, gold, _ = data.columns(run.dataset.val)
predicted = r2d.predict_labels(run, questions)
rule = [data.DISPOSITIONS[data.triage_tier(data.read_facts(question))] for question in questions]
result = {"options": " ".join(sys.argv[1:]), "agreement": metrics.accuracy(rule, predicted)}
result["macro_f1"] = metrics.macro_f1(gold, predicted, run.dataset.labels)
result["ceiling"] = metrics.macro_f1(gold, rule, run.dataset.labels)
print(json.dumps(result | {"seconds": round(seconds, 1)}))
