"""The layers of the package know those below them alone; each is imported with all others blocked."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / 'spec_mmdet'
GROUND = {
    'errors',
    'files',
    'ops',
    'startup',
    'configs',
}  # modules of no layer, which themselves know errors at the most
LAYERS = ('conditioning', 'models', 'checkpoints', 'data', 'evaluation', 'training', 'commands')
KNOWS = {
    'conditioning': set(),
    'models': {'conditioning'},
    'checkpoints': {'conditioning', 'models'},
    'data': set(),
    'evaluation': {'conditioning', 'data'},
    'training': {'conditioning', 'models', 'checkpoints', 'data', 'evaluation'},
    'commands': set(LAYERS),
}

# The package itself imports all of its layers, for MMDetection's registries: an empty one in its place does not.
IMPORT = """
import importlib, pkgutil, sys, types

layer, blocked = sys.argv[1], set(sys.argv[3:])


class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in blocked:
            raise ImportError(f'{layer} must not know {name}')


sys.meta_path.insert(0, Blocker)
package = types.ModuleType('spec_mmdet')
package.__path__, package.__version__ = [sys.argv[2]], ''
sys.modules['spec_mmdet'] = package
for module in pkgutil.walk_packages([f'{sys.argv[2]}/{layer}'], f'spec_mmdet.{layer}.'):
    importlib.import_module(module.name)
"""


def run(code: str, *args) -> None:
    ended = subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize('layer', LAYERS)
def test_a_layer_is_imported_without_those_it_must_not_know(layer):
    others = {f'spec_mmdet.{other}' for other in LAYERS if other != layer and other not in KNOWS[layer]}
    if layer == 'conditioning':
        others |= {'mmdet', 'mmengine', 'mmcv', 'torchvision', 'pycocotools', 'matplotlib'}
    run(IMPORT, layer, PACKAGE, *others)


def imports(path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it, by their names without the package's."""
    found = set()
    here = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            names = [node.module.split('.')] if node.module else [[alias.name] for alias in node.names]
            found |= {'.'.join([*base, *name]) for name in names}
    return found


def test_no_module_imports_what_imports_it():
    graph = {}
    for path in PACKAGE.rglob('*.py'):
        if '.mim' not in path.parts:
            name = '.'.join(path.relative_to(PACKAGE).with_suffix('').parts).removesuffix('.__init__')
            graph[name] = imports(path) - {name}
    graph.pop('__init__')
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...] = ()) -> None:
        assert name not in above, f'a cycle: {" -> ".join([*above, name])}'
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name)
    for name, imported in graph.items():
        if name.split('.')[0] in GROUND:
            assert {other for other in imported if other.split('.')[0] != name.split('.')[0]} <= {'errors'}, name


def test_tools_are_thin_and_modules_short():
    assert all(len(path.read_text().splitlines()) <= 15 for path in (ROOT / 'tools').iterdir() if path.is_file())
    modules = [path for path in PACKAGE.rglob('*.py') if '.mim' not in path.parts]
    assert all(len(path.read_text().splitlines()) <= 450 for path in modules)
