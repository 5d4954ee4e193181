"""What is imported only when it is used: it would delay every command and every worker of a sweep."""

import subprocess
import sys

import pytest

SLOW = ("matplotlib", "pandas", "sklearn", "torchvision", "scipy.stats", "scipy.optimize")


@pytest.mark.parametrize("code", ["import curvlab", "import curvlab.analyze.masq.fim_diagonality, curvlab.grid"])
def test_large_libraries_are_imported_when_used(code: str) -> None:
    code = f"{code}\nimport sys\nprint(*[name for name in {SLOW} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_plots_have_every_name() -> None:
    from curvlab import plots

    assert "line_panels" in dir(plots)
    assert all(callable(getattr(plots, name)) for name in plots.__all__)
