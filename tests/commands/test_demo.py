"""The demo trains in connected processes where there is no GPU."""

import sys
from pathlib import Path

import pytest

from spec_mmdet import InputError
from spec_mmdet.commands import common, demo
from spec_mmdet.data import shapes


@pytest.fixture
def python(tmp_path, monkeypatch):
    """Return a function that makes a line of sh the interpreter that commands are started with."""

    def write(line: str) -> None:
        path = tmp_path / 'python'
        path.write_text(f'#!/bin/sh\n{line}\n')
        path.chmod(0o755)
        monkeypatch.setattr(sys, 'executable', str(path))

    return write


def test_connected_processes(python, capfd):
    python('echo $RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $OMP_NUM_THREADS $MKL_NUM_THREADS "$*"')
    common.run_in_processes(2, 3, 'train', Path('config.py'))
    printed, *lines = capfd.readouterr().out.strip().splitlines()
    arguments = '-m spec_mmdet train config.py --launcher pytorch'
    assert printed == f'$ OMP_NUM_THREADS=3 torchrun --nproc_per_node 2 {arguments}'
    port = lines[0].split()[3].removeprefix('127.0.0.1:')
    assert int(port) > 0
    assert sorted(lines) == [f'{rank} {rank} 2 127.0.0.1:{port} 3 3 {arguments}' for rank in range(2)]


def test_a_failing_process_ends_the_others(python, monkeypatch, tmp_path):
    monkeypatch.setattr(common, 'GRACE', 0.1)
    python(f'test $RANK = 1 && exit 1; sleep 60; touch {tmp_path}/slept')
    with pytest.raises(InputError, match='"spec-mmdet train config.py" failed'):
        common.run_in_processes(2, 1, 'train', 'config.py')
    assert not (tmp_path / 'slept').exists()


@pytest.mark.parametrize(
    ('device', 'threads', 'training'),
    [('cpu', 5, [(2, 2), '--batch-size', '4']), ('cpu', 1, []), ('cuda', 5, [])],
)
def test_without_a_gpu_two_processes_train(monkeypatch, tmp_path, device, threads, training):
    ran = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('mmengine.device.get_device', lambda: device)
    monkeypatch.setattr('torch.get_num_threads', lambda: threads)
    monkeypatch.setattr(shapes, 'write_shapes', lambda folder: None)

    def run(*command) -> None:
        ran.append(command)
        demo.WORK.mkdir(parents=True, exist_ok=True)
        (demo.WORK / 'last_checkpoint').write_text('epoch_3.pth')

    monkeypatch.setattr(demo, 'run_command', run)
    monkeypatch.setattr(demo, 'run_in_processes', lambda *args: run(args[:2], *args[2:]))
    demo.main([])
    train, test = ran
    count, further = training[:1], training[1:]
    assert train == (*count, 'train', demo.CONFIG, '--work-dir', demo.WORK, *further)
    assert test[:3] == ('test', demo.CONFIG, demo.WORK / 'epoch_3.pth')


def test_an_unknown_config_is_found_before_the_data_is_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match='absent'):
        demo.main(['--config', 'absent'])
    assert not list(tmp_path.iterdir())
