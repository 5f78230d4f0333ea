"""Fixtures and helpers that all tests share."""

import fcntl
import gc
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

# The tensors are small, and on a busy machine threads wait for each other longer than they compute.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import pretend_gpu
import pytest
import torch

if os.environ.get('PRETEND_GPU'):
    with suppress(Exception):
        pretend_gpu.install()  # before MMEngine is imported, which looks for a GPU

import mmengine.config.config
import yapf.yapflib.yapf_api
from hypothesis import settings
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import init_default_scope
from mmengine.visualization import Visualizer
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from spec_mmdet.commands import command_line, run
from spec_mmdet.compat import cache_packages
from spec_mmdet.data.shapes import write_split
from spec_mmdet.evaluation.drawing import LabelVisualizer

# They need a process of their own: make test-gpu.
collect_ignore = [] if os.environ.get('PRETEND_GPU') else ['gpu']
ROOT = Path(__file__).parent.parent
BARE = ROOT / 'tests' / 'bare'
CONFIG = ROOT / 'configs' / 'xcit_spec_shapes.py'
REPORTS = Path(os.environ.get('SPEC_REPORTS', ROOT.parent / 'shared' / 'reports'))
init_default_scope('mmdet')
settings.register_profile('untimed', deadline=None)
settings.load_profile('untimed')
_CACHE = cache_packages()  # tests read hundreds of configs, also by MMEngine's own function
_CACHE.__enter__()
for _module in (mmengine.config.config, yapf.yapflib.yapf_api):  # the fork imports it when needed
    _module.FormatCode = lambda text, **style: (text, True)  # formatting a config's text takes 0.3 s
gc.freeze()  # MMDetection collects garbage often: exclude what has been imported

# Modules of end-to-end tests: trainings, exports, other libraries. They run on one of the two MMDetection stacks, and
# first, the longest ones before the others.
SLOW = [
    'test_families', 'test_train_and_test', 'test_cases', 'test_export', 'test_inert', 'test_forged',
    'test_gpu_check', 'test_predict', 'test_first_contact', 'test_convert', 'test_options', 'test_prepare',
    'test_launchers', 'test_resuming', 'test_report', 'test_torture', 'test_several_processes', 'test_configs',
    'test_benchmark', 'test_arrows', 'test_recipes', 'test_zoo', 'test_experiment', 'test_systems', 'test_formats',
    'test_pretrain', 'test_saving', 'test_monitoring', 'test_verification', 'test_workers', 'test_processes',
    'test_compare', 'test_schedule', 'test_disks', 'test_publish', 'test_reported_runs', 'test_listops',
    'test_scenes', 'test_docs', 'test_semantic', 'test_ade20k',
]  # fmt: skip
# Both stacks must add names only, train, evaluate with pycocotools' AP, and resume.
ON_BOTH = [
    'test_an_import_only_adds_names', 'test_reported_ap_is_pycocotools_own',
    'test_features_equal_those_of_mmpretrain', 'test_resuming_continues_where_training_stopped',
    'test_a_missing_name_is_an_attribute_error', 'test_train_test_and_predict',
    'test_logits_of_the_authors_segmentors',
]  # fmt: skip
INDEPENDENT = ('conditioning', 'research')  # folders whose tests do not use MMDetection


def pytest_configure(config) -> None:
    """Make processes that tests start use this checkout, without libraries that take seconds to import."""
    if getattr(config.option, 'numprocesses', None) and not hasattr(config, 'workerinput'):
        return  # the tests' own processes need those libraries
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, (str(BARE), str(ROOT), os.environ.get('PYTHONPATH'))))


def pytest_collection_modifyitems(items) -> None:
    """Mark end-to-end tests as slow, and put the longest modules first."""
    for item in items:
        independent = item.path.parent.name in INDEPENDENT
        if (item.path.stem in SLOW or independent) and item.originalname not in ON_BOTH:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


@pytest.fixture(autouse=True)
def detection_scope():
    """Give the next test MMDetection's scope, which a test with a segmentor leaves as MMSegmentation's."""
    yield
    init_default_scope('mmdet')


def run_tool(monkeypatch, name: str, *args) -> None:
    """Run a command of spec-mmdet, or the main of a module of research or benchmarks, in this process."""
    # A run is named by the second of its start; one would log to the previous test's.
    for known in (Visualizer, LabelVisualizer, MMLogger, MessageHub):
        known._instance_dict.clear()
    argv = [*map(str, args)]
    monkeypatch.setattr(sys, 'argv', ['spec-mmdet', name, *argv])
    if '.' in name:
        with command_line():
            import_module(name).main(argv)
    else:
        run(name, argv)


def read_metrics(work: Path) -> dict[str, float]:
    """Return the metrics that the only run in a work directory logged last."""
    (log,) = work.glob('*/*.json')
    return json.loads(log.read_text().splitlines()[-1])


def in_processes(count: int, folder: Path, train: Callable[[], None]) -> None:
    """Run a function in connected forks; all must end."""
    folder.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ['LOCAL_RANK'] = str(rank)
            try:
                where = f'file://{folder}/meeting'
                torch.distributed.init_process_group('gloo', where, rank=rank, world_size=count)
                train()
                if torch.distributed.is_initialized():  # a command leaves the group itself
                    torch.distributed.barrier()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count


def copy_reports(folder: Path) -> Path:
    """Return a writable copy of the cases that users of such tools reported, which are outside of this repository."""
    if not REPORTS.is_dir():
        pytest.skip(f'no reports at {REPORTS}; set SPEC_REPORTS')
    shutil.copytree(REPORTS, folder)
    subprocess.run(['chmod', '-R', 'u+w', folder], check=True)
    return folder


def assert_ap_is_that_of_pycocotools(reported: dict, ann_file: Path, **results: list[dict]) -> None:
    """Compare AP reported by MMDetection with pycocotools' AP for COCO results of bbox and segm."""
    coco = COCO(str(ann_file))
    for kind, found in results.items():
        evaluation = COCOeval(coco, coco.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        for name, value in zip(('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l'), evaluation.stats):
            assert reported[f'coco/{kind}_{name}'] == round(float(value), 3), (kind, name)
        assert evaluation.stats[1] > 0


def error_line(monkeypatch, name: str, *args) -> str:
    """Return the one-line error of a command that rejects its arguments."""
    with pytest.raises(SystemExit) as stopped:
        run_tool(monkeypatch, name, *args)
    message = str(stopped.value.code)
    assert message.startswith('error: ') and '\n' not in message
    return message


def as_prediction(detections: list[dict]) -> dict:
    """Convert an image's detections in COCO's results format to a detector's; labels are category ids less 1."""
    boxes = torch.tensor([d['bbox'] for d in detections], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    pred = dict(bboxes=boxes, scores=torch.tensor([d['score'] for d in detections], dtype=torch.float64))
    pred['labels'] = torch.tensor([d['category_id'] - 1 for d in detections], dtype=torch.long)
    pred['masks'] = [dict(d['segmentation']) for d in detections]
    return pred


# Ends a page for a browser that prints its document: whether it fits, and its numbers of images and intact images.
CHECK = """
<script>addEventListener('load', () => {
  const images = [...document.images], root = document.documentElement;
  root.dataset.images = images.length + ' ' + images.filter(image => image.complete && image.naturalWidth > 0).length;
  root.dataset.fits = root.scrollWidth <= innerWidth;
})</script></body>"""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def coco_mini() -> Path:
    """A folder of real COCO data; tests skip without it."""
    folder = Path(os.environ.get('COCO_MINI', ROOT.parent / 'shared' / 'coco_mini'))
    if not folder.is_dir():
        pytest.skip(f'no COCO data at {folder}; set COCO_MINI')
    return folder


def options(root: Path) -> list[str]:
    """Return arguments that point the shapes config at a data set and make it small."""
    settings = {'train_dataloader.batch_size': 4, 'train_cfg.max_epochs': 1, 'param_scheduler.0.end': 5}
    return ['--data', root, '--cfg-options', *(f'{key}={value}' for key, value in settings.items())]


def make_once(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """Return a folder that one of the processes of pytest-xdist fills for all."""
    root = factory.getbasetemp()
    folder = (root.parent if 'PYTEST_XDIST_WORKER' in os.environ else root) / name
    with Path(f'{folder}.lock').open('a+') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            fill(folder)
    return folder


@pytest.fixture(scope='session')
def shapes(tmp_path_factory) -> Path:
    def fill(folder: Path) -> None:
        for split, images in dict(train=160, val=12).items():
            write_split(folder, split, images, 128, np.random.default_rng(len(split)))

    return make_once(tmp_path_factory, 'shapes', fill)


@pytest.fixture(scope='session')
def trained(tmp_path_factory, shapes) -> Path:
    """The work directory of one epoch: forty steps of the command, started outside the repository.

    The AP is small, but not zero. terminal.txt contains the command's output.
    """

    def fill(work: Path) -> None:
        command = [sys.executable, ROOT / 'tools' / 'train.py', CONFIG, '--work-dir', work, *options(shapes)]
        command.append('default_hooks.conditioning.interval=20')
        with (work / 'terminal.txt').open('w') as file:
            subprocess.run(command, cwd=work, check=True, stdout=file, stderr=subprocess.STDOUT)

    return make_once(tmp_path_factory, 'work', fill)


# Parts of the reasons for which a test may skip in CI: what its machines lack, and tests of the other stack.
EXPECTED_SKIPS = (
    *('another version of MMDetection', 'is not installed', 'transformers', 'no chromium', 'no script(1)'),
    *('mounting a small /dev/shm', 'the plain form overflows', 'there is a GPU'),
    *('no simulated GPU', 'no reports at', 'no cases at', 'no COCO data at', 'panopticapi'),
)


def pytest_terminal_summary(terminalreporter) -> None:
    """Count the skipped tests by reason."""
    skipped = terminalreporter.stats.get('skipped', ())
    for reason, count in Counter(report.longrepr[2].removeprefix('Skipped: ') for report in skipped).most_common():
        terminalreporter.write_line(f'{count} skipped: {reason}')


def pytest_sessionfinish(session, exitstatus) -> None:
    """Fail a run in CI if a test was skipped for an unexpected reason."""
    reporter = session.config.pluginmanager.get_plugin('terminalreporter')
    if reporter is None or not os.environ.get('CI'):
        return
    reasons = {report.longrepr[2] for report in reporter.stats.get('skipped', ())}
    if unexpected := [reason for reason in reasons if not any(part in reason for part in EXPECTED_SKIPS)]:
        print(f'\nunexpected skips: {unexpected}')
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
