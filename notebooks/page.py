"""Flip the label: one page that shows what finished runs write under every label.

python notebooks/page.py RUN [RUN ...] page.html
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import draw  # the script beside this one

import metrics
import r2d
from data import InputError, columns, reading, write_file

TEXTS = 1000  # of a run, about: more than five labels leave fewer than 200 notes
KEYS = ["rationale_given_flipped", "argues_given_flipped", "ungrounded_given_flipped"]


def read_run(folder: Path) -> tuple[dict, dict]:
    """What all runs share, and what this one writes under each label. Raises InputError."""
    with reading(folder / "metrics.json", "give the folder of a finished run"):
        scores = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        sentences = [line for line in metrics.table(scores).split("\n") if line.endswith(".")]
    o = r2d.parse_args(["--out", str(folder)])
    if o.method == "sft":
        raise InputError(f"{folder}: a run of --method sft writes no rationales")
    run = r2d.setup(o)
    r2d.load(run, "stage2.pt")
    labels = run.dataset.labels
    questions, gold, _ = columns(run.dataset.test[: min(200, 1 + TEXTS // len(labels))])
    rows = [{"label": label, "question": text} for label in labels for text in questions]
    prompts = r2d.explain_prompts(run, [row["label"] for row in rows], questions * len(labels))
    for row, text in zip(rows, r2d.generate_texts(run, prompts, o.max_target), strict=True):
        row["rationale"] = row["rationale_given_flipped"] = text  # where add_verdicts looks
    r2d.add_verdicts(run, rows)
    name, colour, marker = draw.METHODS[draw.item_of(vars(o))]
    shown = {"name": f"{draw.SYMBOLS[marker]} {folder.resolve().name}", "colour": colour}
    shown |= {"method": name, "sentences": " ".join(sentences)}
    shown["predicted"] = r2d.predict_labels(run, questions)
    shown["answers"] = [[row.get(key) for key in KEYS] for row in rows]
    return {"labels": labels, "questions": questions, "gold": gold}, shown


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser("page.py", argparse.SUPPRESS, __doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="its folder")
    parser.add_argument("page", type=Path, metavar="page.html", help="the file to write")
    args = parser.parse_args(arguments)
    if args.page.suffix != ".html" or not args.page.parent.is_dir():
        parser.error(f"{args.page}: needs a name that ends in .html, in a folder that exists")
    try:
        pairs = [read_run(folder) for folder in args.runs]
        for folder, (shared, _) in zip(args.runs, pairs, strict=True):
            if shared != pairs[0][0]:
                raise InputError(f"{folder}: has other test notes or labels than {args.runs[0]}")
        content = {**pairs[0][0], "runs": [shown for _, shown in pairs]}
        text = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")  # no </script>
        write_file(args.page, PAGE.replace("DATA", text).encode())
    except (InputError, OSError, UnicodeError) as error:
        print("page.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


PAGE = """<!doctype html><html lang="en"><title>Flip the label</title>
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: auto; padding: 1rem; overflow-wrap: anywhere }
button, input, select { font: inherit; white-space: pre-line }
div { display: grid; gap: 0.7rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)) }
#runs { grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)) }
article, blockquote { margin: 0; padding: 0 1rem; border: 2px solid }
:focus-visible { outline: 3px solid #E69F00; outline-offset: 2px }
[aria-pressed=true] { background: CanvasText; color: Canvas }
article [aria-live] { min-height: 3em }
</style>
<main hidden><h1>Flip the label: does the rationale follow?</h1>
<p>Give the models a wrong label: which of them argues for it? <mark>Yellow</mark>: words that are
not in the text under the predicted label. Flipped: a wrong label that is not predicted.</p>
<label>Search the notes <input id="search" type="search"></label>
<button id="next">Next note</button> <button id="wrong">Next with a wrong prediction</button>
<h2 id="place" aria-live="polite"></h2><blockquote><p id="note" dir="auto"></p></blockquote>
<h2 id="choice">Label in the prompt</h2><section role="group" aria-labelledby="choice"></section>
<h2>Rationales</h2><div id="runs"></div><script>
const { labels, questions, gold, runs } = DATA;
const get = (query) => document.querySelector(query);
const add = (to, tag, more) => to.appendChild(Object.assign(document.createElement(tag), more));
const kinds = labels.length > 8 ? ["select", "option"] : ["div", "button"];
const list = add(get("section"), kinds[0], { ariaLabel: "Label in the prompt" });
let note, label;
function show(newNote, newLabel) {
  [note, label] = [newNote, newLabel];
  get("#place").textContent = `Note ${note + 1} of ${questions.length}`;
  get("#note").textContent = questions[note];
  labels.forEach((name, i) => {
    const lines = name == gold[note] ? [name, "gold label"] : [name];
    for (const run of runs) if (run.predicted[note] == name) lines.push(`${run.name[0]} predicts`);
    list.children[i].textContent = lines.join("\\n");
    list.children[i].ariaPressed = i == label;
  });
  list.selectedIndex = label;
  for (const run of runs) {
    const answer = (i) => run.answers[i * questions.length + note];  // under label i
    const [text, argues, ungrounded] = answer(label);
    const own = answer(labels.indexOf(run.predicted[note]))?.[0] ?? text;
    run.text.textContent = "";
    for (const word of text.split(" ")) {
      add(run.text, own.split(" ").includes(word) ? "span" : "mark", { textContent: `${word} ` });
    }
    run.verdict.textContent = `Predicts ${run.predicted[note]}, argues for ${argues ?? "none"}.`;
    if (run.predicted[note] != labels[label] && text == own) run.verdict.append(" Text unchanged.");
    if (ungrounded?.length) run.verdict.append(` Not in the note: ${ungrounded.join(", ")}.`);
  }
}
function go(first, wanted = () => true) {
  const words = get("#search").value.toLowerCase();
  const order = questions.map((_, i) => (note + first + i) % questions.length);
  const next = order.find((i) => wanted(i) && questions[i].toLowerCase().includes(words));
  if (next === undefined) get("#place").textContent = "No such note";
  else show(next, label);
}
labels.forEach((_, i) => add(list, kinds[1], { onclick: () => show(note, i) }));
list.onchange = () => show(note, list.selectedIndex);
for (const run of runs) {
  const card = add(get("#runs"), "article", { style: `border-color: ${run.colour}` });
  add(card, "h3", { textContent: `${run.name}: ${run.method}` });
  run.text = add(card, "p", { ariaLive: "polite", dir: "auto" });
  run.verdict = add(card, "p", { ariaLive: "polite" });
  add(card, "p", { textContent: `All test notes: ${run.sentences}` });
}
get("#search").oninput = () => go(0);
get("#next").onclick = () => go(1);
get("#wrong").onclick = () => go(1, (i) => runs.some((run) => run.predicted[i] != gold[i]));
const pairs = questions.flatMap((_, i) => labels.map((_, l) => [i, l]));
const follow = (i, l) => runs.map((run) => run.answers[l * questions.length + i][1] == labels[l]);
const flipped = (i, l) => labels[l] != gold[i] && runs.every((run) => run.predicted[i] == gold[i]);
const differ = ([i, l]) => flipped(i, l) && new Set(follow(i, l)).size > 1;
show(...(pairs.find(differ) ?? [0, 0]));  // begin where the runs differ
get("main").hidden = false;  // all at once: nothing moves
</script>
"""

if __name__ == "__main__":
    sys.exit(main())
