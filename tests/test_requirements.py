"""What the packages import is asked for in pyproject.toml, not only by another package."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_every_package_that_is_imported_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = sum(project["optional-dependencies"].values(), [])
    asked = {plain(re.match(r"[\w.-]+", line)[0]) for line in project["dependencies"] + extras}
    ours = {"coatnet_jax", "input_pipeline", "configs"}
    paths = [path for folder in ours for path in (ROOT / folder).rglob("*.py")]
    found = {name for path in paths for name in imported(path)}
    found -= sys.stdlib_module_names | ours
    installed = packages_distributions()
    missing = {
        name
        for name in found & installed.keys()
        if not asked & {plain(package) for package in installed[name]}
    }
    assert "numpy" in found and not missing


def plain(name):
    return name.lower().replace("_", "-")
