"""Wall time of a preset of every analysis, one after another: a JSON line per analysis, and the total.

    python benchmarks/presets.py [--preset default] [NAME ...]

An analysis without the preset is left out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time

from curvlab.analyze import ANALYSES, load_analysis


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
            started = time.perf_counter()
            code = subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode
            seconds = time.perf_counter() - started
        total += seconds
        print(
            json.dumps({"analysis": name, "preset": given.preset, "seconds": round(seconds, 1), "code": code}),
            flush=True,
        )
    print(json.dumps({"preset": given.preset, "total_seconds": round(total, 1)}))


if __name__ == "__main__":
    main()
