"""Train the nine runs of the experiment with your method.py, and write the tables of the report.

    python experiment.py --try      one short run, to see whether everything works
    python experiment.py            all runs; given again, it goes on where it stopped

A run is a folder in runs/. Your exposure gap, interval, following, dose and error by position are
computed from its files; the tables are in tables.md.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from verify import ITEMS, OPTIONS, SEEDS, as_markdown, run_numbers, tables, token_numbers

import r2d

HERE = Path(__file__).resolve().parent
SHORT = "--limit=60 --stage1-steps=12 --stage2-steps=24 --eval-every=12 --max-target=24".split()
N_NOTES = 200  # whose tokens are looked at one by one


@torch.no_grad()
def write_tokens(arguments: list[str]) -> None:
    """tokens.jsonl: for some test notes the tokens of the gold rationale, and what the model writes
    after the true and after its own prefix. The prompt shows the gold label."""
    o = r2d.parse_args(arguments)
    run = r2d.setup(o)
    r2d.load(run, "stage2.pt")
    run.model.eval()
    questions, labels, rationales = r2d.columns(run.dataset.test[:N_NOTES])
    prompts = r2d.explain_prompts(run, labels, questions)
    input_ids = run.tokenizer.to_ids(prompts, o.max_source).to(o.device)
    targets = run.tokenizer.to_ids(rationales, o.max_target).to(o.device)
    true = run.model(input_ids, targets).argmax(-1)  # the decoder reads your shift_right(targets)
    written = run.model.generate(input_ids, targets.shape[1])
    own = torch.zeros_like(targets)  # padded: the model may have stopped early
    own[:, : written.shape[1]] = written
    lines = []
    for row in zip(targets.tolist(), true.tolist(), own.tolist(), strict=True):
        lines.append(json.dumps(dict(zip(("target", "true", "own"), row, strict=True))) + "\n")
    r2d.write_file(o.out / "tokens.jsonl", "".join(lines).encode())


def train(folder: Path, arguments: list[str]) -> None:
    """One run, if it is not there yet. Ends the program if it fails."""
    arguments = [*OPTIONS, *arguments, f"--out={folder}"]
    print("\nr2d.py", *arguments, flush=True)
    status = r2d.main(arguments)
    if status != 0:
        sys.exit(status)
    if not (folder / "tokens.jsonl").exists():
        write_tokens(arguments)


def main() -> None:
    try:
        if sys.argv[1:] == ["--try"]:
            folder = HERE / "runs" / "try"
            shutil.rmtree(folder, ignore_errors=True)  # method.py may have changed
            train(folder, [*ITEMS["sampling"], *SHORT])
            print(as_markdown({"run": {"try": run_numbers(folder)}}))
            print(as_markdown({"error by position": {"try": token_numbers(folder)}}))
            return
        if sys.argv[1:]:
            sys.exit(__doc__)
        for seed in SEEDS:
            for item, options in ITEMS.items():
                train(HERE / "runs" / f"{item}-{seed}", [*options, f"--seed={seed}"])
    except NotImplementedError:
        sys.exit("experiment.py: a function of method.py is not written yet; see grade.py")
    text = as_markdown(tables(HERE / "runs"))
    (HERE / "tables.md").write_text(text, encoding="utf-8")
    print("\n" + text)


if __name__ == "__main__":
    main()
