"""Rules of the design that a reader of one file cannot see: imports, weight, documentation."""

import ast
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import pluribus

SOURCE = Path(pluribus.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
LONGEST = 600  # lines of a file
COMMANDS = ("cli/", "__main__.py", "docs.py")  # what people start, and may print
HEAVY = {"torch", "transformers", "pydantic", "numpy", "numba", "ml_dtypes", "typer", "rich"}


def inside(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def family(module: str) -> str:
    """`pluribus.core.fold` -> `core`; the package itself -> ``."""
    return [*module.split("."), ""][1]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Modules of pluribus that a file imports anywhere, also inside functions."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{inside(path)}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            own = node.module == "pluribus"
            yield from names if own else [str(node.module)]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@cache
def families() -> dict[str, dict[str, set[str]]]:
    """Importing family -> imported family -> files that do so."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    names = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in FILES}
    for path in FILES:
        own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if own == "__init__":  # offers the public names, each imported on its first use
            continue
        for module in imports(path):
            other = family(module)
            if module.split(".")[0] == "pluribus" and other in names and other != own:
                found[own][other].add(inside(path))
    return found


# -- directions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "allowed"),
    [
        ("core", {"kernels"}),
        ("kernels", {"core"}),
        ("engine", {"core", "kernels"}),
        ("tokenizer", {"core"}),
        ("report", {"core"}),
        ("tasks", {"core", "engine", "recipe", "report"}),
        ("loss", {"core"}),
    ],
)
def test_the_lower_packages_know_no_family(one, allowed):
    wrong = {other: files for other, files in families()[one].items() if other not in allowed}
    assert not wrong


def test_merge_methods_know_core_alone():
    """But for `engine.reference`, which runs a merger over arrays inside another one."""
    for path in (SOURCE / "merge").rglob("*.py"):
        if path == SOURCE / "merge" / "__init__.py":  # `pluribus.merge(...)` calls the driver
            continue
        for module in imports(path):
            if module.split(".")[0] == "pluribus":
                known = family(module) in ("core", "kernels", "merge")
                assert known or module == "pluribus.engine.reference", (inside(path), module)


def test_imports_between_packages_go_one_way():
    """No circle among them, kernels apart, which are a part of core in a folder of their own."""
    graph = {
        one: {other for other in others if {one, other} != {"core", "kernels"}}
        for one, others in families().items()
    }
    done: set[str] = set()

    def visit(one: str, path: tuple[str, ...]) -> None:
        assert one not in path, " -> ".join([*path[path.index(one) :], one])
        if one in done:
            return
        for other in sorted(graph.get(one, ())):
            visit(other, (*path, one))
        done.add(one)

    for one in sorted(graph):
        visit(one, ())


def test_nothing_but_the_command_line_knows_the_command_line():
    for one, others in families().items():
        if one not in ("cli", "__main__", "docs", "ui"):  # pages are served as models are
            assert not {"cli", "serve"} & set(others), (one, dict(others))


# -- weight ----------------------------------------------------------------------------------------


def loaded(code: str, *arguments: object) -> set[str]:
    """Top-level modules that a process has loaded once it ran `code`."""
    path = os.pathsep.join([str(SOURCE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    tell = "\nimport json, sys\nprint('MODULES' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code + tell, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.rpartition("MODULES")[2]))


def test_import_pluribus_loads_next_to_nothing():
    found = loaded("import pluribus")
    assert not found & HEAVY
    assert {name for name in found if name.startswith("pluribus")} == {"pluribus"}
    plain = loaded("")
    assert len(found - plain) < 100


def test_the_command_line_starts_without_the_library():
    """`pluribus --help` must not wait for numpy."""
    assert not loaded("import pluribus.cli") & {"torch", "transformers", "numba", "numpy"}


def test_torch_is_loaded_for_nothing_that_can_do_without(tmp_path):
    """A merge of safetensors by elements, folds over the whole model and the check included."""
    code = """
import sys
from pathlib import Path
import numpy as np
from pluribus.core.pool import Pool
from pluribus.core.weights import Weights
from pluribus.engine.driver import merge
from pluribus.engine.provenance import verify
folder = Path(sys.argv[1])
for number, name in enumerate(("base", "e0", "e1")):
    draw = np.random.default_rng(number)
    Weights.of({"w": draw.standard_normal((300, 9)), "v": np.ones(3, np.float32)}).save(
        folder / f"{name}.safetensors")
pool = Pool(folder / "base.safetensors", [folder / "e0.safetensors", folder / "e1.safetensors"])
for number, text in enumerate(("linear", "ties(density=0.2, scope='model', tie='global')",
                               "trim(density=0.2) >> elect >> mean", "dare_ties(density=0.5)")):
    merge(pool, text, folder / str(number), threads=2)
    assert not list(verify(folder / str(number)))
"""
    found = loaded(code, tmp_path)
    assert "pluribus.engine.run" in found
    assert not found & {"torch", "transformers", "threadpoolctl", "ray", "typer", "rich"}


# -- files -----------------------------------------------------------------------------------------


def test_files_stay_short():
    sizes = {inside(path): path.read_text("utf-8").count("\n") for path in FILES}
    assert not {name: lines for name, lines in sizes.items() if lines > LONGEST}


def test_annotations_are_real():
    """Tests execute them; `from __future__ import annotations` would make text of them."""
    assert not [
        inside(path)
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.module == "__future__"
    ]


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    for node in body:
        kind = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        if isinstance(node, kind) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


def test_everything_public_is_documented():
    bare = []
    for path in FILES:
        module = tree(path)
        if not ast.get_docstring(module):
            bare.append(inside(path))
        for name, node in public(module.body):
            if not ast.get_docstring(node):
                bare.append(f"{inside(path)}: {name}")
    assert not bare


def test_libraries_do_not_print():
    assert not [
        f"{inside(path)}:{node.lineno}"
        for path in FILES
        if not inside(path).startswith(COMMANDS)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("print", "input")
    ]


def test_modules_that_tests_share_have_names_of_their_own():
    """They are imported by their bare names, in one process: the first of a name would win."""
    tests = list(Path(__file__).parent.rglob("*.py"))
    imported = {
        name
        for path in tests
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
    }
    places = defaultdict(list)
    for path in tests:
        if path.stem in imported and not path.name.startswith(("test_", "conftest")):
            places[path.name].append(path.parent.name)
    assert places["members.py"] == ["decode"]
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
