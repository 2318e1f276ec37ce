"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("oracle/**/*.py"), *ROOT.glob("surrogate/**/*.py")])
PLUGIN_FOLDERS = (
    "oracle/methods",
    "surrogate/features",
    "surrogate/models",
    "surrogate/rules",
    "surrogate/training/strategies",
)


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_importing_loads_nothing_heavy():
    code = (
        "import sys, oracle, surrogate; heavy = {'torch', 'transformers', 'lightgbm', 'ray', 'datasets', 'sklearn', 'scipy'};"
        "sys.exit(','.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


def test_oracle_never_imports_surrogate():
    for path in ROOT.glob("oracle/**/*.py"):
        assert not any(name == "surrogate" or name.startswith("surrogate.") for name in _imports(path)), path


@pytest.mark.parametrize("folder", PLUGIN_FOLDERS)
def test_plugins_never_import_a_sibling(folder):
    package = folder.replace("/", ".")
    names = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    for path in (ROOT / folder).glob("*.py"):
        siblings = {f"{package}.{name}" for name in names - {path.stem}}
        assert not siblings & _imports(path), path


def test_imports_have_no_cycle():
    modules = {str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path for path in SOURCES}
    graph = {}
    for name, path in modules.items():
        top_level = {
            n for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom)) for n in _names(node)
        }
        graph[name] = {other for other in top_level if other in modules and other != name}
    visiting, done = set(), set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in visiting, " -> ".join((*trail, name))
        if name in done:
            return
        visiting.add(name)
        for other in sorted(graph[name]):
            visit(other, (*trail, name))
        visiting.remove(name)
        done.add(name)

    for name in graph:
        visit(name, ())


def _names(node: ast.Import | ast.ImportFrom) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    return {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}


def test_the_readme_table_is_the_generated_one():
    from surrogate.catalogue import as_markdown

    assert as_markdown() in (ROOT / "README.md").read_text(), (
        "run `surrogate methods --markdown` and paste its output into README.md"
    )


def test_every_plugin_option_has_a_sentence_of_help():
    from surrogate.catalogue import catalogue

    for kind, rows in catalogue().items():
        for row in rows:
            assert row["summary"].endswith("."), (kind, row["name"])
            for option in row["options"]:
                assert option["help"], (kind, row["name"], option["name"])


def test_every_package_is_listed_for_installation():
    """An editable install hides a missing one."""
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for root in ("oracle", "surrogate")
        for path in (ROOT / root).rglob("__init__.py")
    }
    assert there <= set(listed)
