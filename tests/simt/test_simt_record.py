"""What the performance model takes from the emulated machine."""

import subprocess
import sys

import pytest

from paths import REPOSITORY
from simt import build


@pytest.mark.slow  # it needs 8.0's PTX, which g++ takes minutes for
def test_the_record_is_current():
    """`python tests/simt/record.py --write` renews it. In a process of its own: this one may have
    loaded the library without PTX."""
    build.require_nvcc()
    command = [sys.executable, str(REPOSITORY / "tests" / "simt" / "record.py")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
