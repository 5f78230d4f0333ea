"""Test the README and the pages of docs/: pictures, modules, and the tables of tests/docs.py, which runs commands."""

import json
import re
import subprocess
import sys

from conftest import ROOT

from docs import read_page

NOTEBOOK = ROOT / 'docs' / 'guide' / 'own-data.ipynb'
PAGES = [*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md'), NOTEBOOK]


def test_every_picture_is_shown():
    shown = {name for page in PAGES for name in re.findall(r'!\[[^]]*\]\((?:docs/|\.\./)?([\w.]+)\)', read_page(page))}
    assert shown == {picture.name for picture in (ROOT / 'docs').glob('*.[jp][pn]g')}


def test_docs_test_can_run_the_commands_of_all_pages():
    listed = subprocess.run([sys.executable, ROOT / 'tests' / 'docs.py', '--list'], capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    for command in ('spec-mmdet train xcit_maskrcnn --data data/coco', 'spec-mmdet test xcit_maskrcnn'):
        assert re.search(rf'^\S+ +(rm .* && )?{re.escape(command)} ', listed.stdout, re.M)


def test_a_notebook_is_run_cell_by_cell():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())['cells'] if cell['cell_type'] == 'code']
    assert len(cells) >= 8 and not any(cell['outputs'] for cell in cells)
    options = ['--list', '--only', f'{NOTEBOOK.name}:']
    listed = subprocess.run([sys.executable, ROOT / 'tests' / 'docs.py', *options], capture_output=True, text=True)
    for cell, line in zip(cells, listed.stdout.splitlines(), strict=True):
        lines = [text.removesuffix('\n') for text in cell['source']]
        if lines[0].startswith('!'):
            code = ''.join(text.removesuffix('\\') for text in lines)[1:]
        else:
            code = f'python: {lines[0]}'
        assert re.fullmatch(rf'docs/guide/{NOTEBOOK.name}:\d+ +{re.escape(code)} *', line), line


def test_the_container_installs_what_the_page_and_the_makefile_do():
    dockerfile, page = ((ROOT / name).read_text() for name in ('Dockerfile', 'docs/guide/install.md'))
    installed = re.findall(r'pip (?:un)?install .+?(?= \\\n|\n)', dockerfile)
    assert len(installed) == 4
    assert '${TORCH}' in installed[0]
    for line in installed[1:]:
        assert line.replace(' --yes', '') in page
    (torch,) = re.findall('^ARG TORCH="(.+)"$', dockerfile, re.M)
    assert f'TORCH ?= {torch}\n' in (ROOT / 'Makefile').read_text()


def test_every_module_is_on_the_architecture_page():
    page = (ROOT / 'docs' / 'contributing' / 'architecture.md').read_text()
    for path in (ROOT / 'spec_mmdet').glob('*/*.py'):
        if path.parent.name != 'commands' and path.name != '__init__.py':
            assert re.search(rf'`({path.parent.name}/)?{path.name}`', page), path
