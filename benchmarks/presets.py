"""Wall time and CPU time of a preset of every analysis, one after another: a JSON line per analysis, and the total.

    python benchmarks/presets.py [--preset default] [NAME ...]

An analysis without the preset is left out. On a busy machine, half the CPU time tells what two idle cores would need
at least.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time

from curvlab.analyze import ANALYSES, load_analysis


def cpu_seconds() -> float:
    """Return the CPU time of all processes that have been started and have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Run the commands and print their times."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="analyses; all of them if none is given")
    parser.add_argument("--preset", default="default")
    given = parser.parse_args()
    total = 0.0
    for name in given.names or ANALYSES:
        if given.preset not in load_analysis(name).presets:
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-m",
                "curvlab.analyze",
                name,
                "--preset",
                given.preset,
                "--out",
                f"{folder}/run",
            ]
            started, before = time.perf_counter(), cpu_seconds()
            code = subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode
            seconds = time.perf_counter() - started
        total += seconds
        times = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds() - before, 1)}
        print(json.dumps({"analysis": name, "preset": given.preset, **times, "code": code}), flush=True)
    print(
        json.dumps(
            {"preset": given.preset, "total_seconds": round(total, 1), "total_cpu_seconds": round(cpu_seconds(), 1)}
        )
    )


if __name__ == "__main__":
    main()
