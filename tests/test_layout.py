"""Modules of mmasl import only from lower layers and without cycles; names follow the rules of CONTRIBUTING.md."""
import ast
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the lowest to the highest. Packages of one layer do not import each other.
LAYERS = (
    ('mmasl.errors', ), ('mmasl.ops', ), ('mmasl.models.losses', ), ('mmasl.utils', ), ('mmasl.registry', ),
    ('mmasl.datasets', 'mmasl.evaluation', 'mmasl.models'), ('mmasl.engine', ), ('mmasl.analysis', ), ('mmasl.apis', ),
    ('mmasl.reproduce', ))
UTILS_MAY_IMPORT = ('mmasl.errors', 'mmasl.utils')
# Renamed, without aliases.
OLD_NAMES = (
    'MultiLabelReport', 'multilabel_report', 'mmasl.EMAHook', 'inverse_posterior', 'posterior_cap', 'write_whole',
    'pass_over', 'FitCheck', 'plain_errors', 'mmasl.cli', 'mmasl.paper', 'mmasl/paper', 'tools/benchmarks',
    "reduction='rows'", "sys.modules['mmasl")
OWN = ('tests/test_layout.py', )
BINARY = ('.png', '.npz', '.svg', '.csv')


def modules() -> dict[str, Path]:
    """Path of each module by its dotted name."""
    found = {}
    for path in sorted((ROOT / 'mmasl').rglob('*.py')):
        parts = path.relative_to(ROOT).with_suffix('').parts
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return found


MODULES = modules()


def imports(name: str, path: Path, *, lazy: bool = True) -> Iterator[str]:
    """Modules of mmasl that a module imports; without ``lazy`` only those at its top level, which run at import."""
    tree = ast.parse(path.read_text())
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    for node in ast.walk(tree) if lazy else _at_import(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split('.')
            base = '.'.join(parts[:len(parts) - node.level + 1]) if node.level else ''
            source = '.'.join(filter(None, (base, node.module)))
            targets = [inner if (inner := f'{source}.{alias.name}') in MODULES else source for alias in node.names]
        else:
            continue
        yield from (target for target in targets if target in MODULES and target != name)


def _at_import(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test):
            continue
        yield node
        yield from _at_import(node)


def layer(name: str) -> tuple[int, str] | None:
    """Number and package of a module's layer; None for mmasl itself and for packages that only hold others."""
    found = [(len(package), number, package) for number, packages in enumerate(LAYERS) for package in packages
             if name == package or name.startswith(f'{package}.')]
    return max(found)[1:] if found else None


def test_every_module_has_a_layer():
    assert [name for name in MODULES if name != 'mmasl' and layer(name) is None] == []


def test_imports_come_from_lower_layers():
    wrong = []
    for name, path in MODULES.items():
        own = layer(name)
        for target in imports(name, path) if own else ():
            other = layer(target)
            below = other is not None and other[0] < own[0]
            if own[1] == 'mmasl.utils':
                below = target.startswith(UTILS_MAY_IMPORT)
            if not below and other != own:
                wrong.append(f'{name} imports {target}')
    assert not wrong


def test_no_import_cycles():
    """Among modules; a package's __init__.py counts as a module that its modules do not import."""
    graph = {name: set(imports(name, path, lazy=False)) for name, path in MODULES.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(' imports '.join(error.args[1][::-1])) from None


def test_packages_import_each_other_one_way():
    """Imports inside functions count, too."""
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        if own := layer(name):
            targets = {other[1] for target in imports(name, path) if (other := layer(target))}
            graph.setdefault(own[1], set()).update(targets - {own[1]})
    tuple(TopologicalSorter(graph).static_order())


def test_no_function_has_the_name_of_a_module_beside_it():
    """The function would hide the module: `import package.name` would give the function."""
    taken = []
    for package in (name for name, path in MODULES.items() if path.name == '__init__.py'):
        inside = {module for module in MODULES if module.rpartition('.')[0] == package}
        defined = {node.name for module in {package, *inside} for node in ast.parse(MODULES[module].read_text()).body
                   if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        taken += [f'{package}.{name}' for name in defined & {module.rpartition('.')[2] for module in inside}]
    assert not taken


def test_relative_imports_stay_in_their_package():
    wrong = [name for name, path in MODULES.items() for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.ImportFrom) and node.level > 1]
    assert not wrong


def test_old_names_are_gone():
    tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    if not tracked:
        pytest.skip('needs a git checkout')
    found = {}
    for name in tracked:
        if name not in OWN and not name.endswith(BINARY) and (ROOT / name).is_file():
            text = (ROOT / name).read_text(errors='ignore')
            if old := [word for word in OLD_NAMES if word in text]:
                found[name] = old
    assert not found
