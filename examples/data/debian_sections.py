"""Write texts of some sections of Debian as a table: ``apt-cache dumpavail | python examples/data/debian_sections.py``.

One package per source package, and one per description, so that no text of the test part is in the training part.
"""

import random
import re
import sys
from pathlib import Path

SECTIONS = ("games", "graphics", "math", "sound", "fonts", "mail")
TRAIN, TEST = 150, 50  # texts per section
LEFT_OUT = re.compile(r"transitional|dummy|metapackage|meta package|debug|^for ", re.IGNORECASE)


def fields(paragraph: str) -> dict[str, str]:
    """Return the fields of a package, with the first line of each."""
    return dict(re.findall(r"^([A-Z][A-Za-z-]*): (.*)$", paragraph, re.MULTILINE))


def main() -> None:
    """Read the packages from the standard input and write the table beside this script."""
    rows: dict[str, list[tuple[str, str]]] = {section: [] for section in SECTIONS}
    packages = sorted(map(fields, sys.stdin.read().split("\n\n")), key=lambda package: package.get("Package", ""))
    seen: set[str] = set()
    for package in packages:
        section, name = package.get("Section"), package.get("Package")
        text = package.get("Description") or package.get("Description-en") or ""
        source = package.get("Source", name or "").split(" ")[0]
        body = re.sub(r"\s*(\([^()]*\)|\s--?\s.*)$", "", text).strip()  # without "(data files)" and "- common files"
        keys = {f"source {source}", f"text {body.lower()}"}
        if section in rows and len(body.split()) >= 3 and not LEFT_OUT.search(text) and not keys & seen:
            seen |= keys
            rows[section].append((str(name), body))
    lines = ["section\tpart\tpackage\tdescription"]
    for section, found in rows.items():
        chosen = random.Random(section).sample(found, TRAIN + TEST)
        for part, some in (("train", chosen[:TRAIN]), ("test", chosen[TRAIN:])):
            lines += [f"{section}\t{part}\t{name}\t{text}" for name, text in some]
    Path(__file__).with_suffix(".tsv").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
