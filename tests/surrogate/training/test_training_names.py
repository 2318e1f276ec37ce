"""The public names of `surrogate.training`, loaded only when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import surrogate.training


def test_importing_the_package_loads_no_framework():
    code = (
        "import sys, surrogate.training; heavy = {'torch', 'transformers', 'accelerate', 'datasets'};"
        "sys.exit(','.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


def test_every_name_is_found_and_no_other():
    for name in surrogate.training.__all__:
        assert getattr(surrogate.training, name).__name__ == name
        assert name in dir(surrogate.training)
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = surrogate.training.Other
