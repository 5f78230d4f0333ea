"""Without MMDetection each command prints one line that says what to install, and --help imports nothing slow."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from spec_mmdet.commands import COMMANDS, main
from spec_mmdet.data.formats import READERS

BLOCKERS = {
    'absent': 'import sys\nsys.modules.update(mmdet=None, mmengine=None, mmcv=None)\n',
    'refused': """
import sys

class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition('.')[0] in ('mmdet', 'mmengine', 'mmcv'):
            raise ImportError('blocked')

sys.meta_path.insert(0, Blocker)
""",
}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | dict(PYTHONPATH=f'{folder}{os.pathsep}{ROOT}')
    command = [sys.executable, '-m', 'spec_mmdet', *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize('kind', BLOCKERS)
def test_every_command_says_what_to_install(tmp_path, kind):
    (tmp_path / 'sitecustomize.py').write_text(BLOCKERS[kind])
    for name in COMMANDS:
        ended = run(tmp_path, name)
        assert ended.returncode == 1 and not ended.stdout
        (line,) = ended.stderr.splitlines()
        assert line.startswith('error: ') and 'pip install' in line and 'mmdet' in line
        ended = run(tmp_path, name, '--help')
        (line,) = ended.stderr.splitlines()
        assert 'pip install' in line and 'mmdet' in line
    shown = run(tmp_path, 'train', '--help')
    assert shown.returncode == 0 and '--launcher' in shown.stdout
    assert run(tmp_path, '--help').returncode == 0


@pytest.mark.parametrize('name', [None, *COMMANDS])
def test_help_imports_nothing_slow(tmp_path, name):
    code = f'from spec_mmdet.commands import main; main({[name, "--help"] if name else ["--help"]})'
    script = tmp_path / 'spec-mmdet'
    script.write_text(f'import sys\ntry:\n    {code}\nfinally:\n    print(*sys.modules)')
    shown = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    assert f'usage: spec-mmdet {name or "COMMAND"}' in shown
    assert not {'torch', 'mmengine', 'mmdet', 'mmcv', 'cv2', 'numpy', 'matplotlib', 'rich'} & {*shown.split()}


def test_every_option_has_a_description(capsys):
    """Shown by --help; an option without help is a line with only its name."""
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, '--help'])
        printed = capsys.readouterr().out
        assert ended.value.code == 0
        assert name != 'prepare' or all(kind in ' '.join(printed.split()) for kind in READERS)
        options = printed.partition('options:')[2]
        for entry in re.split(r'\n  (?=-)', options.partition('\n\n')[0])[1:]:
            head, _, text = entry.partition('\n') if '\n' in entry else (entry, '', '')
            assert re.search(r'  +\S', head) or text.strip(), f'{name}: {head}'
