"""Python imports this at its start where the folder is on its path: see ``killing.py``."""

import os
import signal
from pathlib import Path

_COUNT, _NAME, _RUN = os.environ["KILLED_WHEN_WRITTEN"].split()
_MAIN = int(os.environ.setdefault("KILLED_PROCESS", str(os.getpid())))
_replace = os.replace


def _watched(source, target, **options):
    _replace(source, target, **options)
    if Path(target).name == _NAME and len(list(Path(_RUN).rglob(_NAME))) >= int(_COUNT):
        os.kill(_MAIN, signal.SIGKILL)
        while True:
            signal.pause()


os.replace = _watched
