"""Run the programs of docs/method/recipes.md as they are written; the distributed one also in two processes."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PAGE = (ROOT / 'docs' / 'method' / 'recipes.md').read_text()
RECIPES = dict(re.findall(r'^## ([^\n]+)\n\n```python\n(.+?)^```$', PAGE, re.MULTILINE | re.DOTALL))
DISTRIBUTED = RECIPES['DDP and FSDP2']


@pytest.mark.filterwarnings('ignore')  # the tools' own warnings
@pytest.mark.parametrize('title', RECIPES)
def test_a_recipe_runs_as_written(title, tmp_path, monkeypatch):
    needed = re.findall(r'^from (accelerate|peft)\b', RECIPES[title], re.MULTILINE)
    for name in [*needed, *(['accelerate'] if 'Trainer' in RECIPES[title] else [])]:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f'{name} is not installed')
    assert 'assert_close' in RECIPES[title]
    monkeypatch.chdir(tmp_path)
    for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, '')  # restored afterwards
        monkeypatch.delenv(name)
    exec(compile(RECIPES[title], title, 'exec'), {'__name__': '__main__'})


def test_the_page_has_only_these_programs():
    assert PAGE.count('```python') == len(RECIPES) == 5


def test_the_distributed_recipe_in_two_processes(tmp_path):
    (tmp_path / 'recipe.py').write_text(DISTRIBUTED)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', 'recipe.py']
    ended = subprocess.run(command, cwd=tmp_path, env=dict(os.environ, OMP_NUM_THREADS='1'), capture_output=True)
    assert ended.returncode == 0, ended.stderr.decode()
