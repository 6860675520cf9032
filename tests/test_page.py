"""The page of notebooks/page.py, read as a file and used in a browser, if there is Chromium."""

import json
import re
import shutil
from pathlib import Path

import page
import picture
import pytest
from helpers import TINY, lines, read, refusal, status, write_notes
from playwright.sync_api import sync_playwright

import data
import r2d

pytestmark = pytest.mark.usefixtures("here")
BAD = "</script><script>document.title = 'bad'</script><img src=x onerror=alert(1)>"
TEXTS = [BAD, "\"double\" 'single' `back` ${1} \\n &amp;", "🚑 call \u2028 it", "<!-- b"]
TEXTS.append("שלום עולם abc")


def content(html: Path) -> dict:
    """What the page holds as JSON."""
    return json.loads(re.search(r"^const {.*} = ({.*});$", html.read_text("utf-8"), re.M)[1])


def write_page(path: Path, labels: list[str], texts: list[str], monkeypatch) -> None:
    """A page of two runs that say what we want: `texts` are its notes, labels included in answers.

    Run A says "text LABEL" to each label and predicts the first; B says the text and is right."""
    questions = [f"note {i} {text}" for i, text in enumerate(texts)]
    gold = [labels[i % 2] for i in range(len(texts))]
    runs = []
    for name, predicted in (("● A", [labels[0]] * len(texts)), ("■ B", gold)):
        answers = []
        for label in labels:
            for text in texts:
                said = f"{text} {label}" if name == "● A" else text
                answers.append([said, label if name == "● A" else None, ["made up"]])
        run = {"name": name, "method": f"method {name[-1]}", "colour": "#0072B2"}
        runs.append(run | {"predicted": predicted, "answers": answers, "sentences": "Sentence."})
    shared = {"labels": labels, "questions": questions, "gold": gold}
    monkeypatch.setattr(page, "read_run", lambda folder: (shared, runs[folder == Path("B")]))
    assert status(page.main, "A", "B", path) == 0


# ---- The file
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny runs: sampling, gold only and sft on the nurse line; one on other data."""
    folder = tmp_path_factory.mktemp("page")
    own = ["--data", str(write_notes(folder / "own.csv"))]
    runs = {"a": [], "b": ["--schedule", "none"], "sft": ["--method", "sft"], "own": own}
    for name, options in runs.items():
        assert r2d.main([*TINY, *options, "--out", str(folder / name)]) == 0
    return folder


def test_page_holds_what_the_runs_say(folder: Path, monkeypatch) -> None:
    """Catches a text under another label, note or run, and another verdict than the run's own."""
    out = folder / "page.html"
    assert status(page.main, folder / "a", folder / "b", out) == 0
    found = content(out)
    labels = found["labels"]
    assert [run["method"] for run in found["runs"]] == ["scheduled sampling", "gold labels only"]
    for name, run in zip("ab", found["runs"], strict=True):
        rows = lines(folder / name / "predictions.jsonl")
        assert found["questions"] == [row["question"] for row in rows]
        assert found["gold"] == [row["label"] for row in rows]
        assert run["predicted"] == [row["predicted_label"] for row in rows]
        own = [rows[0][f"{fact}_given_gold"] for fact in ("rationale", "argues", "ungrounded")]
        assert run["answers"][labels.index(rows[0]["label"]) * len(rows)] == own
        following = read(folder / name / "metrics.json")["exposure"]["following"]
        assert f"Given a flipped label, {following:.1f} % of the rationales" in run["sentences"]
    monkeypatch.setattr(r2d, "generate_texts", lambda run, prompts, limit: prompts)
    assert status(page.main, folder / "a", out) == 0
    answers = iter(content(out)["runs"][0]["answers"])
    for label in labels:
        for question in found["questions"]:
            prompt = f"given label: {label}, explain: {question}"
            assert next(answers) == [prompt, label, data.ungrounded(prompt, question)]


def test_many_labels_leave_fewer_notes(folder: Path, monkeypatch) -> None:
    """Catches a page that grows with the labels, and the nurse line's checker on other data."""
    monkeypatch.setattr(page, "TEXTS", 10)
    assert status(page.main, folder / "own", folder / "own.html") == 0
    found = content(folder / "own.html")
    assert len(found["labels"]) == 2 and len(found["questions"]) == 6
    answers = found["runs"][0]["answers"]
    assert len(answers) == 12 and {answer[2] for answer in answers} == {None}
    assert "A classifier reads" in found["runs"][0]["sentences"]


def test_bad_input_ends_in_one_line(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Catches a traceback, a page of runs that differ, and a run overwritten by the page."""
    a, out = folder / "a", tmp_path / "page.html"
    unfinished = Path(shutil.copytree(a, tmp_path / "unfinished"))
    (unfinished / "stage2.pt").unlink()
    for run in (folder / "nix", folder / "sft", folder / "own", unfinished):
        assert run.name in refusal(capsys, page.main, a, run, out)
    monkeypatch.setattr(page, "read_run", None)  # what follows ends before a run is read
    for target in (folder / "b", a / "stage2.pt", tmp_path / "nix" / "page.html"):
        assert str(target) in refusal(capsys, page.main, a, target)


# ---- In a browser
@pytest.fixture(scope="module")
def browser():
    if not picture.CHROMIUM:
        pytest.skip("needs the browser Chromium on the PATH, such as apt-get install chromium")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=picture.CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def visit(browser, tmp_path: Path, monkeypatch):
    """Opens a page of such labels and texts; what it does wrong fails the test."""
    problems = []

    def visit(labels: list[str], texts: list[str] = TEXTS, **options):
        write_page(tmp_path / "page.html", labels, texts, monkeypatch)
        tab = browser.new_page(**options)
        tab.set_default_timeout(5000)
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda request: problems.append(request.url))
        tab.goto((tmp_path / "page.html").as_uri())
        assert problems.pop(0).startswith("file:")  # the page itself
        return tab

    yield visit
    assert problems == []


def shown(tab) -> list[tuple[str, str]]:
    """The text and the verdict of each run."""
    cards = tab.get_by_role("article").all()
    return [tuple(card.locator("p").all_inner_texts()[:2]) for card in cards]


LABELS = ["one", "two", "<b>three</b>"]


def test_every_label_shows_its_texts(visit) -> None:
    """Catches a button without effect or of another label, marks at the wrong words, a label that
    is not named as gold or predicted, a request or an error of the page; one without language or
    headings, texts that change unannounced, a focus that is lost by pressing a button."""
    tab = visit(LABELS, ["first text", "second text"])
    assert tab.evaluate("document.documentElement.lang") == "en"
    headings = [tab.get_by_role("heading", level=level).count() for level in (1, 2, 3)]
    assert headings == [1, 3, 2]
    live = tab.locator("[aria-live=polite]").all_inner_texts()
    assert live == ["Note 1 of 2", *[text for card in shown(tab) for text in card]]
    buttons = tab.get_by_role("group", name="Label in the prompt").get_by_role("button")
    names = ["one\ngold label\n● predicts\n■ predicts", *LABELS[1:]]
    assert buttons.all_inner_texts() == names
    for i, label in [*enumerate(LABELS), (0, "one")]:
        buttons.nth(i).press("Enter")  # so that all works by keyboard, too
        assert tab.evaluate("document.activeElement.ariaPressed") == "true"
        pressed = [button.get_attribute("aria-pressed") for button in buttons.all()]
        assert pressed == [str(k == i).lower() for k in range(3)]
        said = f"Predicts one, argues for {label}. Not in the note: made up."
        same = "" if label == "one" else " Text unchanged."
        nothing = f"Predicts one, argues for none.{same} Not in the note: made up."
        assert shown(tab) == [(f"first text {label}", said), ("first text", nothing)]
        assert tab.locator("article mark").all_inner_texts() == ([] if label == "one" else [label])


def test_notes_are_found(visit) -> None:
    """Catches a search, a `next` or a `wrong` that goes nowhere, ends, or forgets the label."""
    tab = visit(LABELS, ["apple", "pear", "Apple pie", "plum"])
    place, note = tab.locator("#place"), tab.locator("#note")
    tab.get_by_role("button", name="two").click()
    for number in (2, 3, 4, 1):
        tab.get_by_role("button", name="Next note").click()
        assert place.inner_text() == f"Note {number} of 4"
        assert note.inner_text().startswith(f"note {number - 1} ")
        assert shown(tab)[0][0].endswith(" two")
    for number in (2, 4, 2):  # A is wrong in these
        tab.get_by_role("button", name="Next with a wrong prediction").click()
        assert place.inner_text() == f"Note {number} of 4"
    search = tab.get_by_role("searchbox", name="Search the notes")
    search.fill("APPLE")
    assert note.inner_text() == "note 2 Apple pie"
    tab.get_by_role("button", name="Next note").click()
    assert note.inner_text() == "note 0 apple"
    search.fill("cherry")
    assert place.inner_text() == "No such note"


def test_any_text_is_shown_as_text(visit) -> None:
    """Catches a text that ends the script of the page or begins a comment in it or becomes markup,
    lost quotes or emoji, Hebrew set from the left."""
    tab = visit(["one", BAD])
    kinds = "[...new Set([...document.querySelectorAll('article *')].map(e => e.localName))].sort()"
    for i, text in enumerate(TEXTS):
        assert tab.locator("#note").text_content() == f"note {i} {text}"
        assert tab.locator("article p").first.text_content() == f"{text} {BAD} "
        assert set(tab.evaluate(kinds)) <= {"h3", "mark", "p", "span"}
        tab.get_by_role("button", name="Next note").click()
    assert tab.title() == "Flip the label" and tab.locator("img").count() == 0
    tab.get_by_role("searchbox").fill("שלום")
    direction = "getComputedStyle(document.querySelector('article p')).direction"
    assert tab.evaluate(direction) == "rtl"


def test_more_than_eight_labels_are_a_list(visit) -> None:
    """Catches a wall of buttons, and a list that shows another label than the texts."""
    labels = [f"label {i}" for i in range(9)]
    tab = visit(labels, ["first", "second"])
    box = tab.get_by_role("combobox", name="Label in the prompt")
    assert tab.get_by_role("group").get_by_role("button").count() == 0
    assert box.input_value().split("\n")[0] == "label 1" and shown(tab)[0][0] == "first label 1"
    box.focus()
    tab.keyboard.press("ArrowDown")
    assert shown(tab)[0][0] == "first label 2"
    tab.get_by_role("button", name="Next note").click()
    assert shown(tab)[0][0] == "second label 2" and box.evaluate("box => box.selectedIndex") == 2


def test_phone_and_dark(visit) -> None:
    """Catches a page wider than a phone, runs not side by side on a screen, one colour scheme."""
    white, black = "rgb(255, 255, 255)", "rgb(0, 0, 0)"
    for width, scheme, colour in ((360, "dark", white), (900, "light", black)):
        size = {"width": width, "height": 700}
        tab = visit([*LABELS, "x" * 60], viewport=size, color_scheme=scheme)
        one, two = [card.bounding_box() for card in tab.get_by_role("article").all()]
        assert (one["y"] == two["y"]) == (width == 900)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("getComputedStyle(document.body).color") == colour


def test_nothing_moves_at_first_paint(visit) -> None:
    """Catches a page whose texts arrive after its first paint."""
    tab = visit(LABELS, ["many words " * 40] * 100)
    moved = """() => new Promise(done => new PerformanceObserver(list => done(list.getEntries()))
        .observe({ type: "layout-shift", buffered: true }) ?? setTimeout(() => done([]), 500))"""
    assert tab.evaluate(moved) == []
