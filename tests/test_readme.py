"""Every `python r2d.py ...` of the README, at a tiny size."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from test_compare import write_t5
from test_llm import Endpoint, says
from test_r2d import ROOT, TINY

import r2d


def commands() -> list[str]:
    """In blocks and in sentences, each once, but for `-h` and the bare `python r2d.py`."""
    found = re.findall(r"python r2d\.py ([^`#\n]*)", (ROOT / "README.md").read_text(encoding="utf-8"))
    return [command for command in dict.fromkeys(map(str.strip, found)) if command not in ("", "-h")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's commands name: data of one's own, a T5 checkpoint, a finished run."""
    folder = tmp_path_factory.mktemp("readme")
    examples = [{"question": f"note {i}", "label": "ab"[i % 2], "rationale": f"because {i}"} for i in range(30)]
    (folder / "folder").mkdir()
    for name in ("notes", "folder/train", "folder/val", "folder/test"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, examples)), encoding="utf-8")
    (folder / "notes.csv").write_text("question,label,rationale\n" + "q,a,r\nq,b,s\n" * 15, encoding="utf-8")
    answers = [{"final_decision": ("yes", "no", "maybe")[i % 3], "QUESTION": "q", "CONTEXTS": ["c"]} for i in range(30)]
    pubmedqa = {str(i): {**answer, "LONG_ANSWER": "r"} for i, answer in enumerate(answers)}
    (folder / "ori_pqal.json").write_text(json.dumps(pubmedqa), encoding="utf-8")
    write_t5(folder / "flan-t5-small")
    assert r2d.main([*TINY, "--out", str(folder / "out")]) == 0
    return folder


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_runs(command: str, files: Path, tmp_path: Path, monkeypatch) -> None:
    """Catches a README that shows an option that no longer exists."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    answer = {"label": "home care", "rationale": "It is mild.", "supports": 5, "grounded": 4, "agrees": 3}
    with Endpoint((), says(json.dumps(answer))) as server:
        arguments = shlex.split(command.replace("http://localhost:8000/v1", server.url))
        if not {"--eval", "--ask"} & {*arguments}:
            shutil.rmtree(tmp_path / "out")
        if "--seeds" in arguments:
            arguments = [*arguments[: arguments.index("--seeds")], "--seeds", "0"]
        pairs = [TINY[i : i + 2] for i in range(0, len(TINY), 2)]
        shape = {"--width", "--heads", "--layers", "--vocab-size"} if "--init" in arguments else set()
        tiny = [word for pair in pairs if pair[0] not in {*arguments} | shape for word in pair]
        assert r2d.main([*tiny, *arguments]) == 0
        server.shutdown()
