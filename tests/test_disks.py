"""Every command that writes reports a full or read-only disk in one line and leaves the disk as it was."""

import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import cv2
import mmengine
import numpy as np
import pytest
import torch
from conftest import CONFIG, error_line, options
from mmengine.logging import MMLogger

from research import paper_figures
from spec_mmdet import InputError
from spec_mmdet.commands import demo
from spec_mmdet.data import shapes as generated
from spec_mmdet.data.findings import Findings, Place
from spec_mmdet.evaluation.metrics import DumpPredictions
from spec_mmdet.evaluation.pages import PAGE, make_mark
from spec_mmdet.files import replace_folder

LEFT = 8192  # bytes


class Disk:
    """Mount a small disk, which needs root; otherwise limit the size of files instead."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mount = ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'none', folder]
        self.mounted = shutil.which('mount') and subprocess.run(mount, capture_output=True).returncode == 0
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def spoil(self, how: str) -> None:
        if how == 'full' and not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LEFT, self.limits[1]))
        elif how == 'full':
            (self.folder / 'filler').write_bytes(bytes(shutil.disk_usage(self.folder).free - LEFT))
        elif self.mounted:
            subprocess.run(['mount', '-o', 'remount,ro', self.folder], check=True)
        else:
            pytest.skip('a read-only disk can be mounted by root alone')

    def mend(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        if self.mounted:
            subprocess.run(['mount', '-o', 'remount,rw', self.folder], check=True)
            subprocess.run(['umount', '--lazy', self.folder], check=True)  # a command's logs are still open


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    disk = Disk(tmp_path / 'disk')
    yield disk
    disk.mend()
    MMLogger._instance_dict.clear()


def tree(folder: Path) -> dict[str, bytes | None]:
    paths = [path for path in folder.rglob('*') if path.name != 'filler']
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture
def without_exporting(monkeypatch):
    """PyTorch's exporter is slow: save its output once and use it here."""
    program = SimpleNamespace(
        model=SimpleNamespace(metadata_props={}), save=lambda path: Path(path).write_bytes(bytes(10**5))
    )
    monkeypatch.setattr(torch.export, 'export', lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.onnx, 'export', lambda *args, **kwargs: program)


def clip(folder: Path) -> Path:
    path = folder / 'clip.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 12, (96, 80))
    for _ in range(5):
        writer.write(np.random.default_rng(0).integers(0, 255, (80, 96, 3)).astype(np.uint8))
    writer.release()
    return path


def coco_of(shapes: Path, folder: Path) -> Path:
    (folder / 'annotations').mkdir()
    shutil.copy(shapes / 'annotations' / 'instances_train.json', folder / 'annotations' / 'instances_train2017.json')
    return folder


@dataclass
class Places:
    """Make the inputs of a command: data, a detector, a folder elsewhere, and an old and a new one on the disk."""

    shapes: Path
    trained: Path
    elsewhere: Path
    old: Path
    new: Path

    @property
    def detector(self) -> tuple[Path, Path]:
        return CONFIG, self.trained / 'epoch_1.pth'


FEW = 'test_dataloader.dataset.indices=2'
SMALL = ['--models', 'ours', '--arch', 'nano_12', '--sizes', '64x64', '64x96', '--rounds', 1, '--no-memory']
WRITERS = {
    'convert': lambda p: ['convert', p.detector[1], p.old / 'converted.pth'],
    'report': lambda p: ['test', *p.detector, '--report', p.old, '--work-dir', p.elsewhere, *options(p.shapes), FEW],
    'work directory': lambda p: ['train', CONFIG, '--work-dir', p.old, *options(p.shapes)],
    'predictions': lambda p: ['predict', *p.detector, p.shapes / 'val', '--score', 0, '--out', p.new],
    'prepare': lambda p: ['prepare', p.shapes, '--out', p.new / 'data'],
    'export': lambda p: ['export', *p.detector, p.new / 'backbone.onnx', '--backbone'],
    'a video': lambda p: ['predict', *p.detector, clip(p.elsewhere), '--score', 1, '--out', p.new],
    'safetensors': lambda p: ['convert', p.detector[1], p.new / 'converted.safetensors'],
    'scenes': lambda p: ['research.scenes', p.old, '--train', 3, '--val', 1, '--crops', 6],
    'analyze': lambda p: ['analyze', CONFIG, '--out', p.old],
    'benchmark': lambda p: ['benchmark', *SMALL, '--out', p.new],
    'overfit': lambda p: ['benchmarks.overfit', coco_of(p.shapes, p.elsewhere), '--work-dir', p.old],
}
# The benchmark's files fit into what is left of a full disk.
CASES = [(writer, 'full') for writer in WRITERS if writer != 'benchmark']
CASES += [(writer, 'read-only') for writer in [*list(WRITERS)[:5], 'benchmark']]


@pytest.mark.parametrize(('writer', 'how'), CASES)
def test_a_command(monkeypatch, shapes, trained, without_exporting, disk, tmp_path, writer, how):
    old = disk.folder / 'old'
    (old / 'train').mkdir(parents=True)
    (old / PAGE).write_text(make_mark('report'))
    for name in ('converted.pth', 'detections.bbox.json', 'xcit_spec_shapes.py', 'train/000001.png',
                 'projections.csv', 'annotations.json'):  # fmt: skip
        (old / name).write_text(f'the old {name}')
    before = tree(disk.folder)
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    command = WRITERS[writer](Places(shapes, trained, elsewhere, old, disk.folder / 'new'))
    disk.spoil(how)
    says = error_line(monkeypatch, *command)
    assert 'could not be written (' in says or 'cannot be written (' in says
    after = tree(disk.folder)
    if writer == 'work directory':  # the part that shows the reason
        after = {name: content for name, content in after.items() if name in before or name.endswith('.partial')}
    assert after == before


def test_other_files(disk):
    """Test the checkpoints' file backend, the results of test --out, and prepare's findings."""
    files = {name: disk.folder / name for name in ('results.pkl', 'data.pkl', 'findings.csv')}
    for path in files.values():
        path.write_text('old')
    disk.spoil('full')
    results, found = [dict(img_id=i) for i in range(10**4)], Findings()
    found.warnings['tiny'] = [Place('train.json', f'{i}.png') for i in range(1000)]
    for write in (
        lambda: DumpPredictions(str(files['results.pkl']), []).compute_metrics(results),
        lambda: mmengine.dump(results, files['data.pkl'], backend_args=dict(backend='atomic')),
        lambda: found.write(files['findings.csv']),
    ):
        with pytest.raises(InputError, match='could not be written'):
            write()
    assert tree(disk.folder) == {name: b'old' for name in files}


@pytest.mark.parametrize('command', [demo, paper_figures])
def test_an_earlier_run_comes_back(monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    old = command.WORK / 'last_checkpoint'
    old.parent.mkdir(parents=True)
    old.write_text('old')

    def fail(name, *args) -> None:
        assert not old.exists()
        if name == 'train':
            old.parent.mkdir(exist_ok=True)
            old.write_text('new')
            raise InputError('this step failed')

    for module in (command, generated):
        monkeypatch.setattr(module, 'write_shapes', lambda folder: None, raising=False)
    monkeypatch.setattr(command, 'run_command', fail)
    with pytest.raises(InputError, match='this step failed'):
        command.main([])
    assert tree(tmp_path / 'work_dirs') == {
        f'{command.WORK.name}': None,
        f'{command.WORK.name}/last_checkpoint': b'old',
    }


def test_a_run_that_was_killed_is_replaced(tmp_path):
    folder = tmp_path / 'demo'
    for path, text in ((tmp_path / '.demo.before', 'first'), (folder, 'half of the second')):
        path.mkdir()
        (path / 'text').write_text(text)
    with pytest.raises(InputError), replace_folder(folder):
        raise InputError('')
    assert tree(tmp_path) == {'demo': None, 'demo/text': b'first'}
    with replace_folder(folder):
        folder.mkdir()
        (folder / 'text').write_text('third')
    assert tree(tmp_path) == {'demo': None, 'demo/text': b'third'}
