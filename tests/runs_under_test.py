"""Functions that tests execute as runs, in a module of their own so that their processes import nothing else."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

NAME = __name__


def plain(config, place):
    return [{"value": config["a"] * 0.1, "word": "w"}]


def everything(config, place):
    values = {
        "none": None,
        "yes": True,
        "large": 2**62,
        "third": 1 / 3,
        "tiny": 5e-324,
        "inf": math.inf,
        "no": -math.inf,
    }
    return [values | {"numpy": np.float32(0.1), "tensor": torch.tensor(2), "text": "naïve ½"}, {"other": 1}]


def drawn(config, place):
    """Depend on all that could differ between processes, but must not."""
    a = torch.randn(300, 300, generator=torch.Generator().manual_seed(config["seed"]))
    for _ in range(5):
        a = torch.tanh(a @ a / 17)
    words = "".join({f"{word}" for word in ("a", "b", "c", "d", "e")})
    return [
        {"sum": float(a.sum()), "torch": float(torch.rand(())), "order": words}
        | {"numpy": float(np.random.rand())}  # noqa: NPY002
        | {"python": random.random(), "threads": torch.get_num_threads()}
    ]


def troubled(config, place):
    print("heard of", config["how"], flush=True)
    match config["how"]:
        case "raises":
            raise ValueError("one\ntwo")
        case "exits":
            sys.exit("away")
        case "killed":
            bytearray(400_000_000)
            os.kill(os.getpid(), signal.SIGKILL)
        case "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "vanishes":
            os._exit(3)
        case "sleeps":
            (place.folder / "started").write_text(str(subprocess.Popen(["sleep", "1234"]).pid))
            time.sleep(1000)
        case "nan":
            return [{"x": 1.0}, {"x": math.nan, "y": 2}]
        case "nested":
            return [{"x": [1, 2]}]
        case "huge":
            return [{"x": 2**63}]
        case "memory":
            raise MemoryError
        case "escapes":
            raise ValueError("\udc80 \x1b[2J")
        case "not UTF-8":
            return [{"x": "\udc80"}]
        case "named so":
            return [{"\udc80": 1}]
        case "nothing":
            return None
        case "dictionary":
            return {"x": 1}
        case "column":
            return [{"seeds": 1}]
        case "prefix":
            return [{"config.how": 1}]
    return [{"x": 1.0}]


def counting(config, place):
    """Go on from a checkpoint; fail until there are enough."""
    file = place.folder / "count"
    count = int(file.read_text()) + 1 if file.exists() else 1
    file.write_text(str(count))
    if count < config["enough"]:
        raise RuntimeError(f"only {count}")
    return [{"count": count}]


def timed(config, place):
    begun = time.monotonic()
    time.sleep(0.3)
    return [{"begun": begun, "ended": time.monotonic()}]


def gated(config, place):
    """Wait until the number in a file beside the sweep exceeds the seed of the run."""
    (place.folder / "begun").write_text("")
    while int(Path("go").read_text()) <= config["seed"]:
        time.sleep(0.01)
    return drawn(config, place)


def twice(config, place):
    """Kill the process that has started this one."""
    file = place.folder / "begun"
    begun = int(file.read_text()) + 1 if file.exists() else 1
    file.write_text(str(begun))
    if begun <= config["kills"]:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    return [{"begun": begun}]


def steps(config, place):
    return [{"step": step, "loss": config["seed"] + 0.1 * step} for step in range(3)]


def imported(config, place):
    return [{name: name in sys.modules for name in ("torch._dynamo", "sklearn.datasets")}]


def forgetful(config, place):
    return [{"started": subprocess.Popen(["sleep", "4321"]).pid}]


def loud(config, place):
    os.write(1, b"first line\n")
    for _ in range(config["lines"]):
        os.write(1, b"x" * 999 + b"\n")
    os.write(2, "last ½\n".encode())
    match config["how"]:
        case "raises":
            raise ValueError("y" * 1_000_000)
        case "crashes":
            os.kill(os.getpid(), signal.SIGKILL)
        case "text":
            return [{"text": "z" * 1_000_001}]
        case "leaves":
            subprocess.Popen(["setsid", "timeout", "60", "yes"])
        case "for ever":
            while True:
                os.write(1, b"z" * 999 + b"\n")
    return [{"x": 1}]


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def where(config, place):
    return [{"runner": parent(os.getppid())}]


def kills_its_worker(config, place):
    if config["seed"] == 1:
        os.kill(parent(os.getppid()), signal.SIGKILL)
        time.sleep(60)
    return [{"x": 1.0}]
