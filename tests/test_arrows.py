"""The layers of the package import only the layers below them; each is imported with all others blocked."""

import ast
import json
import re
import subprocess
import sys

from conftest import ROOT

from spec_mmdet.commands import COMMANDS

PACKAGE = ROOT / 'spec_mmdet'
GROUND = {
    'compat',
    'errors',
    'files',
    'ops',
    'startup',
    'configs',
    'processes',
    'status',
}  # modules outside the layers, which import errors at most
LAYERS = ('conditioning', 'models', 'checkpoints', 'data', 'evaluation', 'training', 'inference', 'commands')
KNOWS = {
    'conditioning': set(),
    'models': {'conditioning'},
    'checkpoints': {'conditioning', 'models'},
    'data': set(),
    'evaluation': {'conditioning', 'data'},
    'training': {'conditioning', 'models', 'checkpoints', 'data', 'evaluation'},
    'inference': {'conditioning', 'models', 'checkpoints', 'data', 'evaluation', 'training'},
    'commands': set(LAYERS),
}

# The package itself imports all of its layers for MMDetection's registries: an empty package replaces it.
# Each layer in a fork: the first with only Python, the others beside MMDetection, which is imported once.
IMPORT = """
import importlib, json, os, pkgutil, sys, traceback, types

package = types.ModuleType('spec_mmdet')
package.__path__, package.__version__ = [sys.argv[1]], ''


def import_layer(layer, blocked):
    class Blocker:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name in blocked:
                raise ImportError(f'{layer} must not know {name}')

    sys.meta_path.insert(0, Blocker)
    sys.modules['spec_mmdet'] = package
    for module in pkgutil.walk_packages([f'{sys.argv[1]}/{layer}'], f'spec_mmdet.{layer}.'):
        importlib.import_module(module.name)


statuses = {}
for layer, blocked in json.loads(sys.argv[2]).items():
    if 'mmdet' not in blocked:
        import mmdet.apis
    if os.fork() == 0:
        status = 1
        try:
            import_layer(layer, blocked)
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)
    statuses[layer] = os.wait()[1]
print(json.dumps(statuses))
"""
FOREIGN = ['mmdet', 'mmengine', 'mmcv', 'torchvision', 'pycocotools', 'matplotlib']  # to the first layer


def test_layers_are_imported_without_the_layers_above():
    others = {
        layer: [f'spec_mmdet.{other}' for other in LAYERS if other not in {layer, *KNOWS[layer]}] for layer in LAYERS
    }
    others['conditioning'] += FOREIGN
    command = [sys.executable, '-c', IMPORT, str(PACKAGE), json.dumps(others)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert json.loads(ended.stdout.splitlines()[-1]) == dict.fromkeys(LAYERS, 0), ended.stderr


def imports(path) -> set[str]:
    """Return the modules of this package that a file imports, anywhere in it, without the package's name."""
    found = set()
    here = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            parts = [node.module.split('.')] if node.module else []
            names = parts + [[*sum(parts, []), alias.name] for alias in node.names]
            found |= {'.'.join([*base, *name]) for name in names}
    return found


def test_there_are_no_import_cycles():
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
            assert {other.split('.')[0] for other in imported} - {name.split('.')[0]} <= {'compat', 'errors'}, name


def test_no_command_imports_a_command():
    commands = {f'commands.{name.replace("-", "_")}' for name in COMMANDS}
    files = [PACKAGE / 'commands' / f'{name.rpartition(".")[2]}.py' for name in commands]
    assert len(files) > 10
    for path in [*files, PACKAGE / 'commands' / 'common.py', PACKAGE / 'commands' / 'options.py']:
        assert not imports(path) & commands, path


def test_private_members_of_others_are_used_in_one_module():
    """Return the objects of MMEngine and PyTorch, by the names of the package's variables for them."""
    ours = r'(?<![\w.])(self\.)?(runner|loader|loop|cfg|optimizer|optim_wrapper|module|preprocessor)\._(?!_)\w+'
    for path in PACKAGE.rglob('*.py'):
        text = path.read_text()
        if path.name != 'compat.py' and '.mim' not in path.parts:
            assert not re.search(ours, text), (path, re.search(ours, text)[0])
            assert not re.search(r'unittest|torch\._dynamo|import _weights_only', text), path


def test_tools_are_thin_and_modules_short():
    tools = {'train.py', 'test.py', 'convert_checkpoint.py', 'dist_train.sh', 'dist_test.sh'}
    assert {path.name for path in (ROOT / 'tools').iterdir() if path.is_file()} == tools
    assert all(len(path.read_text().splitlines()) <= 15 for path in (ROOT / 'tools').iterdir() if path.is_file())
    modules = [path for path in PACKAGE.rglob('*.py') if '.mim' not in path.parts]
    assert all(len(path.read_text().splitlines()) <= 450 for path in modules)
