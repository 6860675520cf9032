"""The grader's child process: it loads a graded file and calls its functions on piped inputs.

No expected value is in this process: the answers go back to the grader, which compares them. So a
graded file that looks around here finds nothing to copy, and one that loops, crashes or exits ends
this process and not the grader.
Printing goes nowhere. This is a fence against accidents and cheap tricks, not a jail.
"""

import json
import os
import queue
import random
import sys
import threading
import types
from pathlib import Path

# What a graded file may not do. The first group takes a path, which may be in the working folder.
PATHS = set(
    "os.remove os.rename os.rmdir os.mkdir os.truncate os.link os.symlink os.chmod os.scandir"
    " os.listdir shutil.rmtree shutil.move shutil.copyfile".split()
)
REFUSED = set(
    "subprocess.Popen os.system os.exec os.posix_spawn os.spawn os.startfile os.fork os.forkpty"
    " os.kill os.killpg".split()
)
READING = {"os.scandir", "os.listdir"}
LARGEST = 100_000  # items of an answer


def guard(grader: str, home: str) -> None:
    """From here on nothing of the grader can be read, nothing outside `home` written or started."""

    normcase = os.path.normcase  # kept here: graded code may replace them in `os`
    realpath = os.path.realpath

    def inside(path: str | bytes, folder: str) -> bool:
        full = normcase(realpath(os.fsdecode(path)))
        return full == folder or full.startswith(folder + os.sep)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            if not isinstance(path, (str, bytes)):
                return
            write = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or (
                mode and set(mode) & set("wax+")
            )
            if inside(path, grader) or (write and path != os.devnull and not inside(path, home)):
                raise PermissionError(
                    "the grader and files outside the working folder are closed to graded code"
                )
        elif event in PATHS:
            for path in arguments[:2]:
                if isinstance(path, (str, bytes)) and (
                    inside(path, grader) or (event not in READING and not inside(path, home))
                ):
                    raise PermissionError(
                        "the grader and files outside the working folder are closed to graded code"
                    )
        elif event in REFUSED:
            raise PermissionError(f"{event}: graded code starts and ends no processes")

    grader, home = (normcase(realpath(folder)) for folder in (grader, home))
    sys.addaudithook(hook)


def limit_memory(gibibytes: float) -> bool:
    """At most so much more address space. False where the system cannot (Windows, macOS)."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + int(gibibytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, OSError, ValueError):
        return False
    return True


def plain(value: object, depth: int = 0) -> object:
    """A value as JSON can carry it. What it cannot becomes {"type": its name}."""
    import torch

    if value is None or isinstance(value, (bool, int, float, str)):
        return value[:LARGEST] if isinstance(value, str) else value
    if isinstance(value, torch.Tensor) and value.numel() <= LARGEST:
        dtype = str(value.dtype).removeprefix("torch.")
        return {
            "type": "Tensor",
            "dtype": dtype,
            "shape": list(value.shape),
            "values": value.detach().tolist(),
        }
    if isinstance(value, (list, tuple)) and len(value) <= LARGEST and depth < 4:
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, dict) and len(value) <= LARGEST and depth < 4:
        return {
            "type": "dict",
            "items": [[plain(k, depth + 1), plain(v, depth + 1)] for k, v in value.items()],
        }
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return plain(value.item(), depth + 1)
    return {"type": type(value).__name__}


def scripted_model(scripts: list[list], training: bool, size: int, notes: dict) -> object:
    """A model that is right only for the right prefix: `scripts` has pairs (source, target).

    With START and the target so far as decoder input, and in eval mode, it gives the next token of
    the target, and 8 after its end. For another prefix or source it gives 9; in training mode each
    token is one higher, as if by dropout.
    """
    import torch

    class Scripted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, source: torch.Tensor, decoder_input: torch.Tensor) -> torch.Tensor:
            notes["calls"] += 1
            notes["gradients"] |= torch.is_grad_enabled()
            notes["trained"] |= self.training
            logits = torch.zeros(*decoder_input.shape, size)
            for b, (row, prefix) in enumerate(
                zip(source.tolist(), decoder_input.tolist(), strict=True)
            ):
                target = next((target for known, target in scripts if known == row), None)
                for t in range(len(prefix)):
                    right = (
                        target is not None
                        and prefix[: t + 1] == [0, *target, *[0] * len(prefix)][: t + 1]
                    )
                    token = 9 if not right else target[t] if t < len(target) else 8
                    logits[b, t, token + self.training] = 1
            return logits * self.weight

    notes |= {"calls": 0, "gradients": False, "trained": False}
    return Scripted().train(training)


def build(spec: object, seen: dict) -> object:
    """An argument from its JSON form; what is watched while it is used goes into `seen`."""
    import torch

    if not isinstance(spec, dict) or "make" not in spec:
        return spec
    if spec["make"] == "tensor":
        return torch.tensor(spec["values"], dtype=getattr(torch, spec["dtype"])).requires_grad_(
            spec["grad"]
        )
    if spec["make"] == "generator":
        return torch.Generator().manual_seed(spec["seed"])
    if spec["make"] == "model":
        return scripted_model(spec["scripts"], spec["training"], 12, seen)

    def predict(questions: list[str]) -> list[str]:
        seen["asked"] += list(questions)
        unknown = [question for question in questions if question not in spec["table"]]
        if unknown:
            raise ValueError(
                f"predict was asked about {unknown[0]!r:.60}, which is no question of the batch"
            )
        return [spec["table"][question] for question in questions]

    seen["asked"] = []
    return predict


def call(module: types.ModuleType, request: dict) -> dict:
    import torch

    function = getattr(module, request["call"], None)
    if not callable(function):
        return {"missing": True}
    seen: dict = {}
    arguments = [build(spec, seen) for spec in request["arguments"]]
    watched = [i for i, a in enumerate(arguments) if isinstance(a, (list, torch.Tensor))]
    before = [plain(arguments[i]) for i in watched]
    torch.manual_seed(random.SystemRandom().getrandbits(32))
    state = torch.get_rng_state()
    torch.set_grad_enabled(True)
    values = [function(*arguments) for _ in range(request["repeat"])]
    seen["gradients_on"] = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    seen["global_rng_moved"] = not torch.equal(state, torch.get_rng_state())
    seen["changed"] = [plain(arguments[i]) for i in watched] != before
    for argument in arguments:
        if isinstance(argument, torch.nn.Module):
            seen["training"] = argument.training
        if isinstance(argument, torch.Tensor) and argument.requires_grad:
            if (
                isinstance(values[-1], torch.Tensor)
                and values[-1].requires_grad
                and values[-1].ndim == 0
            ):
                values[-1].backward()
            seen["grad"] = None if argument.grad is None else argument.grad.tolist()
    return {"values": [plain(value) for value in values], "seen": seen}


def describe(error: BaseException, path: str) -> dict:
    """{error: the class, message: one line, line: where in the graded file}."""
    line, trace = (
        getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None,
        error.__traceback__,
    )
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == path else line
        trace = trace.tb_next
    return {
        "error": type(error).__name__,
        "message": " ".join(str(error).split())[:200],
        "line": line,
    }


def serve(requests: "queue.Queue[bytes]", replies: object) -> None:
    module, path = types.ModuleType("adapters"), ""
    while True:
        request = json.loads(requests.get())
        try:
            if "load" in request:
                path = request["load"]
                module = sys.modules["adapters"] = types.ModuleType("adapters")
                module.__file__ = path
                exec(compile(request["source"], path, "exec"), module.__dict__)
                reply = {"loaded": True}
            else:
                reply = call(module, request)
            line = json.dumps({"id": request["id"], **reply})
        except (
            BaseException
        ) as error:  # SystemExit and MemoryError as well: whatever it is, it is the answer
            try:
                reply = describe(error, path)
            except BaseException:
                reply = {"error": "an exception that cannot be shown", "message": "", "line": None}
            line = json.dumps({"id": request["id"], **reply})
        replies.write(line.encode() + b"\n")
        replies.flush()


def main() -> None:
    here, home, gibibytes = str(Path(__file__).resolve().parent), os.getcwd(), float(sys.argv[1])
    sys.path[:] = [
        folder
        for folder in sys.path
        if folder and os.path.realpath(folder) != os.path.realpath(here)
    ]
    sys.dont_write_bytecode = True
    incoming, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    requests: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        for line in incoming:
            requests.put(line)
        os._exit(0)  # the grader is gone: end with it, also in the middle of an endless loop

    threading.Thread(target=read, daemon=True).start()
    try:
        import torch

        torch.set_num_threads(1)
        ready = {"id": 0, "torch": torch.__version__, "memory": limit_memory(gibibytes)}
    except ImportError as error:
        ready = {"id": 0, "fatal": str(error)}
    replies.write(json.dumps(ready).encode() + b"\n")
    replies.flush()
    guard(here, home)
    serve(requests, replies)


if __name__ == "__main__":
    main()
