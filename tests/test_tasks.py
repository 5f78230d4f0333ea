"""A task is a module in data/ and one in evaluation/; nothing above these layers asks for it."""

import ast
import re

from conftest import ROOT

from spec_mmdet.data import tasks as reading
from spec_mmdet.evaluation import tasks as measuring

PAGE = (ROOT / 'docs' / 'contributing' / 'architecture.md').read_text()


def test_a_task_supplies_what_the_page_lists():
    rows = re.findall(r'^\| *(`[^|]*/TASK\.\w+`)? *\| (.*?) \|', PAGE[PAGE.index('## Tasks') :].split('\n## ')[0], re.M)
    names, layer = {'data': set(), 'evaluation': set()}, ''
    for place, listed in rows:
        layer = place.strip('`').partition('/')[0] or layer
        if not place.endswith('.html`'):
            names[layer] |= {name.partition('(')[0] for name in re.findall('`(.*?)`', listed)}
    assert len(names['data']) >= 5 and len(names['evaluation']) >= 6
    for task in reading.TASKS:
        name = task.__name__.rpartition('.')[2]
        for layer, module in (('data', task), ('evaluation', measuring.TASKS[name])):
            assert module.__name__ == f'spec_mmdet.{layer}.{name}' and names[layer] <= {*dir(module)}
        assert (ROOT / 'spec_mmdet' / 'evaluation' / f'{name}.html').is_file()


def test_nothing_above_asks_for_a_task():
    names = {f'{layer}.{name}' for layer in ('data', 'evaluation') for name in measuring.TASKS}
    for layer in ('training', 'inference', 'commands'):
        for path in (ROOT / 'spec_mmdet' / layer).glob('*.py'):
            imported = {
                f'{node.module}.{alias.name}'
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }
            assert not {name for name in names for found in imported if f'{found}.'.startswith(f'{name}.')}, path
