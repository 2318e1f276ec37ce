"""The list of files that the package begins with is complete, and its order is that in which files import each other."""

from __future__ import annotations

import re
from pathlib import Path

import surrogate.scoring

FOLDER = Path(surrogate.scoring.__file__).parent


def test_files_import_those_that_stand_before_them_only():
    lines = re.findall(r"^    ((?:\w+, )*\w+)  +\S", surrogate.scoring.__doc__, re.MULTILINE)
    order = [name for line in lines for name in line.split(", ")]
    files = {path.relative_to(FOLDER): path for path in FOLDER.rglob("*.py") if path != FOLDER / "__init__.py"}
    assert {path.parts[0].removesuffix(".py") for path in files} == set(order) and len(set(order)) == len(order)
    for path, file in files.items():
        used = re.findall(r"^ *from surrogate\.scoring\.(\w+)", file.read_text(), re.MULTILINE)
        own = order.index(path.parts[0].removesuffix(".py"))
        assert all(order.index(name) < own for name in used), (path, used)


def test_every_public_name_can_be_loaded():
    assert all(getattr(surrogate.scoring, name) is not None for name in surrogate.scoring.__all__)
