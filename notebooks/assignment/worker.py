"""The child process of the grader: it loads a graded file and calls its functions on given inputs.

No expected value is in this process. Inputs come and answers go through a pipe, a line of JSON
each; the grader compares. What a function under test calls back, a model or `predict`, is answered
by the grader, too. So a graded file that looks around here finds nothing to copy, and one that
loops, crashes or exits ends this process and not the grader. It is a fence and no jail.
"""

import json
import math
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

# Libraries that hold a solution. Graded code may use torch, numpy and Python's own library.
SCORERS = {"sacrebleu", "nltk", "sklearn", "transformers", "evaluate", "torchmetrics", "torcheval"}
# Events of sys.addaudithook that graded code may not raise: other processes, and the network.
REFUSED = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile")
REFUSED += ("os.fork", "os.kill", "socket.", "sqlite3.", "ctypes.dlopen", "resource.prlimit")
CHANGING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link")
CHANGING += ("os.symlink", "os.chmod", "os.chown", "os.utime", "shutil.")
LISTING = ("os.listdir", "os.scandir")
LARGEST = 100_000  # items of an answer
LONGEST = 2**22  # bytes of an answer


def guard(closed: list[str], home: str) -> None:
    """From here on: nothing in `closed` is read, nothing outside `home` is written, no network.

    It stops accidents and plain attempts. Names are bound here, since graded code may change them.
    """
    real, decode, is_folder, separator = os.path.realpath, os.fsdecode, os.path.isdir, os.sep
    refused, changing, listing, scorers = REFUSED, CHANGING, LISTING, frozenset(SCORERS)
    is_a, text, whole_number = isinstance, (str, bytes), int
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    nowhere = os.devnull

    def inside(full: str, folder: str) -> bool:
        return full == folder or full.startswith(folder + separator)

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(refused):
            raise PermissionError("graded code starts no process and uses no network")
        if event == "open":
            paths = arguments[:1]
            flags = arguments[2]
            writes = is_a(flags, whole_number) and flags & writing
        elif event.startswith(changing + listing):
            paths = arguments[:2]
            writes = event.startswith(changing)
        else:
            return
        for path in paths:
            if not is_a(path, text):
                continue
            full = real("".join([decode(path)]))  # a plain text, whatever class the path has
            shut = event == "open" and is_folder(full)  # os.open with dir_fd would begin there
            for folder in closed:
                shut = shut or inside(full, folder)
            if shut or scorers.intersection(full.replace("\\", "/").split("/")):
                raise PermissionError("graded code does not read solutions or the grader")
            if writes and full != nowhere and not inside(full, home):
                raise PermissionError("graded code writes into its working folder alone")

    closed = [real(folder) for folder in closed]
    home = real(home)
    sys.addaudithook(hook)


def limit(cpu_seconds: float, gibibytes: float | None = None) -> None:
    """Computing time from now on, and memory beside what is in use. Linux and macOS only.

    Graded code could lift both; the grader's time of waiting holds even so.
    """
    try:
        import resource
    except ImportError:  # Windows
        return

    def at_most(what: int, value: int) -> None:
        hard = resource.getrlimit(what)[1]
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (soft, hard))

    at_most(resource.RLIMIT_CPU, math.ceil(time.process_time() + cpu_seconds))
    pages = Path("/proc/self/statm")
    if gibibytes and pages.exists():  # Linux
        now = int(pages.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        at_most(resource.RLIMIT_AS, now + int(gibibytes * 2**30))


def plain(value: object, depth: int = 0) -> object:
    """A value as JSON can carry it. What it cannot becomes {"type": its name}."""
    import numpy
    import torch

    if isinstance(value, numpy.floating):
        value = float(value)
    elif isinstance(value, numpy.generic):
        value = value.item()
    if type(value) is str:
        return value[:LARGEST]
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, (torch.Tensor, numpy.ndarray)) and math.prod(value.shape) <= LARGEST:
        kind = "tensor" if isinstance(value, torch.Tensor) else "array"
        dtype = str(value.dtype).removeprefix("torch.")
        return {"type": kind, "dtype": dtype, "shape": list(value.shape), "values": value.tolist()}
    if isinstance(value, (list, tuple)) and len(value) <= LARGEST and depth < 4:
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, dict) and len(value) <= LARGEST and depth < 4:
        items = {str(key): plain(item, depth + 1) for key, item in value.items()}
        return {"type": "dict", "items": items}
    return {"type": type(value).__name__}


class Pipe:
    """Lines of JSON to the grader and from it."""

    def __init__(self) -> None:
        self.incoming = os.fdopen(os.dup(0), "rb")
        self.outgoing = os.fdopen(os.dup(1), "wb")
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):  # printing goes nowhere
            os.dup2(nothing, stream)

    def send(self, message: dict) -> None:
        line = json.dumps(message).encode()
        if len(line) > LONGEST:
            error = {"error": "ValueError", "message": "the answer is larger than 4 MB"}
            line = json.dumps({"id": message["id"], **error}).encode()
        self.outgoing.write(line + b"\n")
        self.outgoing.flush()

    def receive(self) -> dict:
        line = self.incoming.readline()
        if not line:  # the grader is gone
            os._exit(0)
        return json.loads(line)


def make_model(ask: Callable) -> object:
    """A model whose logits (B, t, V) come from the grader, with a dropout layer inside."""
    import torch

    grad_enabled = torch.is_grad_enabled

    class Remote(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = torch.nn.Dropout(0.1)
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, source: torch.Tensor, decoder_input: torch.Tensor) -> torch.Tensor:
            mode = {"training": self.training or self.dropout.training, "grad": grad_enabled()}
            logits = ask([plain(source), plain(decoder_input), mode])
            return torch.tensor(logits) * self.weight

    return Remote()


def build(spec: object, ask: Callable, seen: dict) -> object:
    """An argument from its JSON form. Calls of a statistic are counted in `seen`."""
    import numpy
    import torch

    if not isinstance(spec, dict) or "make" not in spec:
        return spec
    if spec["make"] == "tensor":
        tensor = torch.tensor(spec["values"], dtype=getattr(torch, spec["dtype"]))
        return tensor.requires_grad_(spec["grad"])
    if spec["make"] == "array":
        return numpy.array(spec["values"], dtype=float)
    if spec["make"] == "generator":
        return torch.Generator().manual_seed(spec["seed"])
    if spec["make"] == "rng":
        return numpy.random.default_rng(spec["seed"])
    if spec["make"] in ("mean", "median", "ratio"):

        def statistic(rows: numpy.ndarray) -> float:
            seen["draws"] = seen.get("draws", 0) + 0.5  # two calls for a draw
            if spec["make"] == "ratio":  # of sums, like nats per token: no mean over rows
                return float(100 * rows[:, 0].sum() / rows[:, 1].sum())
            return float(getattr(numpy, spec["make"])(rows))

        return statistic
    if spec["make"] == "predict":
        return lambda questions: ask([list(questions)])
    return make_model(ask).train(spec["training"])  # "model"


def call(module: types.ModuleType | None, request: dict, pipe: Pipe) -> dict:
    """Call one function; report what it returned and how it left its arguments."""
    import torch

    def ask(arguments: list) -> object:
        pipe.send({"id": request["id"], "ask": arguments})
        reply = pipe.receive()
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["value"]

    function = getattr(module, request["call"], None)
    if not callable(function):
        return {"error": "AttributeError", "message": f"the file has no {request['call']}"}
    reply: dict = {}
    arguments = [build(spec, ask, reply) for spec in request["arguments"]]
    torch.seed()  # so that nothing is the same by the global random state
    state = torch.get_rng_state()
    torch.set_grad_enabled(request["grad"])
    values = [function(*arguments) for _ in range(request["repeat"])]
    reply["grad_enabled"] = torch.is_grad_enabled()
    reply["global_rng_moved"] = not torch.equal(state, torch.get_rng_state())
    torch.set_grad_enabled(True)
    reply["arguments"] = [plain(argument) for argument in arguments]
    for argument in arguments:
        if isinstance(argument, torch.nn.Module):
            reply["training"] = argument.training and argument.dropout.training
            reply["eval"] = not argument.training and not argument.dropout.training
        if isinstance(argument, torch.Tensor) and argument.requires_grad:
            loss = values[-1]
            if isinstance(loss, torch.Tensor) and loss.requires_grad and loss.ndim == 0:
                loss.backward()
            reply["grad"] = None if argument.grad is None else argument.grad.tolist()
    reply["values"] = [plain(value) for value in values]
    return reply


def describe(error: BaseException, path: str) -> dict:
    """The class of an error, its message in one line, and its line in the graded file."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    message = " ".join(str(error).split())[:200]
    return {"error": type(error).__name__, "message": message, "line": line}


def serve(pipe: Pipe) -> None:
    module = None
    path = ""
    while True:
        request = pipe.receive()
        limit(request["seconds"])
        try:
            if "load" in request:
                path = request["load"]
                module = sys.modules["adapters"] = types.ModuleType("adapters")
                module.__file__ = path
                exec(compile(request["source"], path, "exec"), module.__dict__)
                reply = {"loaded": True}
            else:
                reply = call(module, request, pipe)
        except BaseException as error:  # SystemExit and MemoryError as well are the answer
            try:
                reply = describe(error, path)
            except BaseException:
                reply = {"error": "an exception that cannot be shown", "message": "", "line": None}
        pipe.send({"id": request["id"], **reply})


def main() -> None:
    """Arguments: GiB of memory, then the files and folders that are closed to graded code."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder or ".") != here]
    sys.dont_write_bytecode = True
    pipe = Pipe()
    try:
        import numpy  # noqa: F401
        import torch
    except ImportError as error:
        pipe.send({"id": 0, "fatal": str(error)})
        return
    torch.set_num_threads(1)
    limit(1000, gibibytes=float(sys.argv[1]))
    guard(sys.argv[2:], os.getcwd())
    pipe.send({"id": 0, "torch": torch.__version__})
    serve(pipe)


if __name__ == "__main__":
    main()
