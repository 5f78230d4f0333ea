"""Test spec-mmdet's commands, its errors for wrong names, and MMDetection's own options and scripts."""

import ast
import io
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections import Counter
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import mmdet
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.optim import LinearLR
from torch._utils import ExceptionWrapper

from spec_mmdet import InputError, __version__, find_config
from spec_mmdet.commands import COMMANDS, REMOVED, command_line, main
from spec_mmdet.commands import test as testing
from spec_mmdet.commands import train as training
from spec_mmdet.configs import read_config
from spec_mmdet.status import show_status
from spec_mmdet.training.running import one_line_errors

SCRIPTS = Path(mmdet.__file__).parent / '.mim' / 'tools'


def test_every_command_lists_its_options(monkeypatch, capsys):
    """In 80 columns, with all words of the docstring and none of them broken."""
    monkeypatch.setenv('COLUMNS', '80')
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, '--help'])
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        assert f'usage: spec-mmdet {name}' in printed
        assert max(map(len, printed.splitlines())) <= 80
        doc = import_module(f'spec_mmdet.commands.{name.replace("-", "_")}').__doc__
        assert not Counter(doc.split()) - Counter(printed.split())


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_status_is_shown_in_terminals_only(monkeypatch, capsys):
    @show_status('counting sheep')
    def work():
        print('a result')

    work()
    assert capsys.readouterr() == ('a result\n', '')
    terminal = FakeTerminal()
    monkeypatch.setattr(sys, 'stderr', terminal)
    work()  # stdout is a file
    assert 'counting sheep' in terminal.getvalue() and 'a result' not in terminal.getvalue()
    assert capsys.readouterr().out == 'a result\n'
    monkeypatch.setenv('LOCAL_RANK', '1')
    monkeypatch.setattr(sys, 'stderr', other := FakeTerminal())
    work()
    assert not other.getvalue()


def test_suggestions_for_mistyped_names(capsys):
    for wrong, meant in (
        (['trian'], 'train'),
        (['train', 'config.py', '--eposh', '3'], '--epochs'),
        (['test', 'config.py', 'checkpoint.pth', '--reprot=here'], '--report'),
    ):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2 and f'did you mean {meant}?' in capsys.readouterr().err
    with pytest.raises(InputError, match=r'did you mean xcit_maskrcnn\?'):
        find_config('xcit_maskrcn')


def test_a_shells_script_completes_commands_and_options(tmp_path, capsys):
    pytest.importorskip('shtab', reason='shtab is not installed')
    main(['--print-completion', 'bash'])
    script = tmp_path / 'completion'
    script.write_text(capsys.readouterr().out)

    def complete(*words: str) -> list[str]:
        typed = f'COMP_WORDS=({" ".join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}'
        code = f'{typed}; source {script}; _shtab_spec_mmdet 2> /dev/null; echo "${{COMPREPLY[@]}}"'
        return subprocess.run(['bash', '-c', code], capture_output=True, text=True).stdout.split()

    assert complete('spec-mmdet', 'pre') == ['prepare', 'pretrain', 'predict']
    assert complete('spec-mmdet', 'train', '--epo') == ['--epochs']
    assert complete('spec-mmdet', 'train', '--preset', '') == ['finetune']


def test_what_is_printed_without_a_command(capsys):
    main(['--help'])
    lines = capsys.readouterr().out.splitlines()
    for name, line in COMMANDS.items():
        assert any(shown.split(maxsplit=1) == [name, line] for shown in lines if shown.strip())
    main(['--version'])
    assert capsys.readouterr().out == f'spec_mmdet {__version__}\n'
    for wrong in ([], ['trian'], ['train']):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2
    assert 'no such command: trian' in capsys.readouterr().err


def test_a_removed_command_names_its_replacement(capsys):
    assert not {*REMOVED} & {*COMMANDS}
    for name in REMOVED:
        with pytest.raises(SystemExit) as ended:
            main([name, '--help'])
        printed = capsys.readouterr().err
        assert ended.value.code == 2 and printed.count('\n') == 1 and f'spec-mmdet {name} ' in printed
        for module in re.findall(r'(?:research|benchmarks)\.\w+', printed):
            assert find_spec(module)


def test_exit_codes_and_one_line_errors(tmp_path):
    def run(*args):
        command = [sys.executable, '-m', 'spec_mmdet', *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    ended = run('train', 'absent.py')
    assert ended.returncode == 1 and ended.stderr.count('\n') == 1
    assert ended.stderr.startswith('error: config absent.py: no such file') and 'xcit_spec_maskrcnn' in ended.stderr
    assert not list(tmp_path.iterdir())

    (tmp_path / 'cv2.py').write_text("raise ImportError('libGL.so.1: cannot open shared object file')\n")
    ended = run('train', 'absent.py')
    assert ended.returncode == 1 and ended.stderr.count('\n') == 1 and 'opencv-python-headless' in ended.stderr


def options_of(script: Path) -> set[str]:
    """Return the options that a script of MMDetection's adds to its parser, read from its source."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    added = [call.args for call in calls if getattr(call.func, 'attr', '') == 'add_argument']
    return {arg.value for args in added for arg in args if arg.value.startswith('--')}


ARGUMENTS = {
    '--work-dir': ['work'],
    '--resume': ['last.pth'],
    '--cfg-options': ['a.b=1', 'c=[2,3]'],
    '--launcher': ['pytorch'],
    '--local_rank': ['1'],
    '--local-rank': ['1'],
    '--out': ['found.pkl'],
    '--show-dir': ['drawn'],
    '--wait-time': ['0.5'],
}


@pytest.mark.parametrize(('name', 'parse'), [('train', training.parse), ('test', testing.parse)])
def test_every_option_of_mmdetections_script_is_accepted(name, parse):
    options = options_of(SCRIPTS / f'{name}.py')
    assert len(options) >= 7
    positional = ['config.py'] + ['checkpoint.pth'] * (name == 'test')
    for option in options:
        values = ARGUMENTS.get(option, [])
        args = vars(parse([*positional, option, *values]))
        given = args[option.removeprefix('--').replace('-', '_')]
        assert given != vars(parse(positional))[option.removeprefix('--').replace('-', '_')]
        if option == '--cfg-options':
            assert given == {'a.b': 1, 'c': [2, 3]}
        elif values:
            assert str(given).endswith(values[0])


def test_the_predictions_file_must_be_a_pickle():
    with pytest.raises(InputError, match='must end in .pkl'):
        testing.parse(['config.py', 'checkpoint.pth', '--out', 'results.json'])


def test_configs_are_found_by_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = find_config('xcit_spec_maskrcnn')
    assert shipped.samefile(ROOT / 'configs' / 'xcit_spec_maskrcnn.py')
    for name in (
        'spec_mmdet::xcit/xcit_spec_maskrcnn.py',
        'spec_mmdet::xcit_spec_maskrcnn.py',
        'xcit_spec_maskrcnn.py',
    ):
        assert find_config(name) == shipped
    own = tmp_path / 'mine.py'
    own.write_text("_base_ = 'spec_mmdet::xcit/xcit_spec_maskrcnn.py'\nmodel = dict(backbone=dict(arch='nano_12'))\n")
    assert find_config('mine.py').samefile(own)
    cfg = Config.fromfile(own)
    assert (cfg.model.backbone.type, cfg.model.backbone.arch) == ('SpecXCiT', 'nano_12')
    cfg.model.backbone.arch = 'small_12'
    assert without_scopes(cfg.model) == without_scopes(Config.fromfile(shipped).model)
    own.write_text("_base_ = 'spec_mmdet::_base_/runtime.py'\nmodel = dict(type='MaskRCNN', backbone=_base_.xcit)\n")
    assert Config.fromfile(own).model.backbone.type == 'SpecXCiT'
    own.write_text("_base_ = 'spec_mmdet::xcit/xcit_spec_maskrcnn.py'\nmodel = dict(backbone=dict(arch='nano_12'))\n")
    own.write_text(own.read_text().replace('xcit/', ''))  # for our commands alone
    wrong = tmp_path / 'wrong.py'
    wrong.write_text("_base_ = 'spec_mmdet::nothing.py'\n")
    with pytest.raises(InputError, match='config .*wrong.py'):
        read_config(wrong)
    inheriting = tmp_path / 'inheriting.py'
    inheriting.write_text("_base_ = 'mine.py'\nmax_epochs = _base_.max_epochs + 1\n")
    cfg = read_config(inheriting)
    assert (cfg.model.backbone.arch, cfg.max_epochs, Path(cfg.filename)) == ('nano_12', 37, inheriting)


def without_scopes(node: object) -> object:
    """Return a config without the scopes that MMEngine adds to parts inherited from a package."""
    if isinstance(node, dict):
        return {key: without_scopes(value) for key, value in node.items() if key != '_scope_'}
    return [without_scopes(value) for value in node] if isinstance(node, (list, tuple)) else node


def test_mmdetections_own_script_runs_beside_it(tmp_path):
    """Run in an environment whose mmcv has no compiled operators, for any order of imports."""
    (tmp_path / 'begin.py').write_text("""
import runpy, sys
try:
    runpy.run_path(sys.argv[1], run_name='__main__')
except SystemExit as ended:
    assert ended.code == 0
import mmdet.apis
assert 'spec_mmdet' not in sys.modules
import mmcv.ops, spec_mmdet
""")
    command = [sys.executable, 'begin.py', SCRIPTS / 'train.py', '--help']
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert '--cfg-options' in ended.stdout


def test_an_error_of_a_loader_worker_is_one_line():
    try:
        raise InputError('image a.png: damaged')
    except InputError:
        passed_on = ExceptionWrapper(where='in DataLoader worker process 0')
    with pytest.raises(InputError) as refused, one_line_errors():
        passed_on.reraise()
    assert str(refused.value) == 'image a.png: damaged'


def test_a_notebooks_matplotlib_backend_is_unchanged(monkeypatch):
    for name, stays in (('module://matplotlib_inline.backend_inline', False), ('agg', True)):
        monkeypatch.setenv('MPLBACKEND', name)
        with command_line():
            assert ('MPLBACKEND' in os.environ) == stays


def test_a_command_leaves_the_environment_as_it_was(monkeypatch):
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)
    monkeypatch.setenv('MPLBACKEND', 'module://inline')
    before = dict(os.environ)
    with pytest.raises(SystemExit), command_line():
        assert os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] == '1' and 'MPLBACKEND' not in os.environ
        os.environ['LOCAL_RANK'] = '3'
        raise InputError('stop')
    assert dict(os.environ) == before


@pytest.mark.parametrize(('context', 'count'), [(nullcontext, 1), (command_line, 0)])
def test_accumulation_does_not_warn_of_a_schedule_before_the_first_step(context, count):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        with context():
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
            LinearLR(optimizer, start_factor=0.5, end=4).step()
    assert len(warned) == count
