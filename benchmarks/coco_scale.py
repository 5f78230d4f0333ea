"""Measure train, test, compare and prepare on data of COCO 2017's size, and plain MMDetection on the same data.

    python -m benchmarks.coco_scale ../shared/coco_mini [--fraction 0.25] [--parts train test] [--work-dir DIR]

The data has 118,287 + 5,000 images, which are links to the given real ones, and 860,001 + 36,781 annotations, which are
theirs under new ids; on disk it takes 0.6 GB. The model of `train` is a Mask R-CNN of ResNet-18 on images of 64 pixels,
so that nearly all of the time to the third iteration is for the start. That of `test` returns stored detections, 100
per image: real objects, displaced. Processes communicate through gloo.

Rows are added to DIR/results.csv; those that are there are not measured again. The command prints all rows as a table,
with ratios to plain MMDetection. Seconds are those of the processor. The memory of a process is its resident
set; the memory of all processes counts shared pages once (Linux's PSS).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import cv2
import mmdet
import numpy as np
import torch
from mmdet.registry import HOOKS, MODELS
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.structures import InstanceData
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from spec_mmdet.commands import command_line
from spec_mmdet.commands.common import make_parser
from spec_mmdet.errors import InputError
from spec_mmdet.files import format_csv, write

ROOT = Path(__file__).parents[1]
SIZES = dict(train=(118287, 860001), val=(5000, 36781))
PARTS = ('train', 'test', 'compare', 'prepare')
PER_IMAGE = 100  # detections
COLUMNS = ('part', 'arm', 'fraction', 'processes', 'workers', 'main_s', 'others_s', 'all_s', 'wall_s', 'process_gb',
           'all_gb')  # fmt: skip
CONFIG = """
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['benchmarks.coco_scale'])
data_root = {folder!r}
model = dict(backbone=dict(depth=18, init_cfg=None), neck=dict(in_channels=[64, 128, 256, 512]))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask=False),
    dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(type='PackDetInputs'),
]
loader = dict(num_workers={workers})
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline), **loader)
val_dataloader = dict(dataset=dict(data_root=data_root), **loader)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
test_dataloader = dict(dataset=dict(data_root=data_root, pipeline=test_pipeline), **loader)
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=3, val_begin=1000)
param_scheduler = []
custom_hooks = [dict(type='RecordSeconds', folder={records!r})]
env_cfg = dict(dist_cfg=dict(backend='gloo'))
model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None)  # of several processes on a CPU
"""
REPLAY = "model = dict(_delete_=True, type='ReplayDetector', file={file!r}, mask_head=dict(num_classes=80))\n"


@HOOKS.register_module()
class RecordSeconds(Hook):
    """Hook that writes the processor time of each process until its third iteration, or the end of its test."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def record(self) -> None:
        (self.folder / f'{get_rank()}.txt').write_text(str(time.process_time()))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if batch_idx == 2:
            self.record()

    def after_test(self, runner) -> None:
        self.record()


@MODELS.register_module()
class ReplayDetector(BaseModel):
    """Detector that returns stored detections: entry ``(img_id - 1) % n`` of a pickled list of n."""

    def __init__(self, file: str, mask_head: dict) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.detections = pickle.loads(Path(file).read_bytes())

    def forward(self, inputs: list, data_samples: list, mode: str = 'predict') -> list:
        for sample in data_samples:
            fields = self.detections[(sample.img_id - 1) % len(self.detections)]
            masks = [dict(mask) for mask in fields['masks']]  # MMDetection's metric changes them
            sample.pred_instances = InstanceData(**{**fields, 'masks': masks})
        return data_samples


def repeat_images(coco: dict, images: int, annotations: int | None = None) -> dict:
    """Repeat the images of an annotation file under new ids, with all annotations or an even share of this number."""
    of_image = defaultdict(list)
    for annotation in coco['annotations']:
        of_image[annotation['image_id']].append(annotation)
    sources = list(itertools.islice(itertools.cycle(coco['images']), images))
    share = annotations / sum(len(of_image[source['id']]) for source in sources) if annotations else 1
    repeated, seen = dict(coco, images=[], annotations=[]), 0
    for new_id, source in enumerate(sources, start=1):
        suffix = source['file_name'].rpartition('.')[2]
        repeated['images'].append(dict(source, id=new_id, file_name=f'{new_id:012}.{suffix}'))
        for annotation in of_image[source['id']]:
            seen += share
            if len(repeated['annotations']) < round(seen):
                new = dict(annotation, id=len(repeated['annotations']) + 1, image_id=new_id)
                repeated['annotations'].append(new)
    return repeated


def displace(annotation: dict, image: dict, rng: np.random.Generator) -> tuple[list[float], dict]:
    """Move and stretch an object with polygons; return its box x0, y0, x1, y1 and its mask as RLE."""
    corner, extent = np.array(annotation['bbox']).reshape(2, 2)
    new_extent = extent * np.exp(rng.normal(0, rng.choice([0.02, 0.3]), 2))
    new_corner = corner + extent * rng.normal(0, rng.choice([0.02, 0.3]), 2)
    parts = [np.reshape(part, (-1, 2)) for part in annotation['segmentation']]
    parts = [((part - corner) / extent * new_extent + new_corner).ravel().tolist() for part in parts]
    mask = mask_utils.merge(mask_utils.frPyObjects(parts, image['height'], image['width']))
    return [*new_corner, *(new_corner + new_extent)], mask


def make_detections(coco: dict) -> list[dict]:
    """Make detections of each image of an annotation file: displaced objects, 40 % of them of a random class."""
    rng, found = np.random.default_rng(0), []
    labels = {category['id']: i for i, category in enumerate(coco['categories'])}
    of_image = defaultdict(list)
    for annotation in coco['annotations']:
        if not annotation['iscrowd']:
            of_image[annotation['image_id']].append(annotation)
    for image in coco['images']:
        objects = of_image[image['id']]
        chosen = [objects[i] for i in rng.integers(len(objects), size=PER_IMAGE if objects else 0)]
        placed = [displace(annotation, image, rng) for annotation in chosen]
        random = rng.integers(len(labels), size=len(chosen))
        classes = [labels[a['category_id']] if rng.random() < 0.6 else int(k) for a, k in zip(chosen, random)]
        found.append(
            dict(
                bboxes=torch.tensor([box for box, _ in placed]).reshape(-1, 4),
                scores=torch.from_numpy(rng.random(len(chosen), np.float32)),
                labels=torch.tensor(classes, dtype=torch.long),
                masks=[mask for _, mask in placed],
            )
        )
    return found


def build_data(source: Path, folder: Path, fraction: float) -> None:
    """Write the links, annotation files, and stored detections with their checkpoint, unless they exist."""
    if (folder / 'complete').exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / 'annotations').mkdir(parents=True)
    for split, (images, objects) in SIZES.items():
        coco = json.loads((source / 'annotations' / f'instances_{split}2017.json').read_bytes())
        if split == 'val':
            classes = [category['name'] for category in coco['categories']]
            (folder / 'detections.pkl').write_bytes(pickle.dumps(make_detections(coco)))
            meta = dict(dataset_meta=dict(classes=tuple(classes)))
            torch.save(dict(state_dict=dict(weight=torch.zeros(1)), meta=meta), folder / 'replay.pth')
        originals = [(source / f'{split}2017' / image['file_name']).resolve() for image in coco['images']]
        coco = repeat_images(coco, round(images * fraction), round(objects * fraction))
        (folder / f'{split}2017').mkdir()
        for image, original in zip(coco['images'], itertools.cycle(originals)):
            os.symlink(original, folder / f'{split}2017' / image['file_name'])
        (folder / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(coco))
        print(f'{split}: {len(coco["images"])} images, {len(coco["annotations"])} annotations')
    (folder / 'complete').touch()


def list_processes(root: int) -> list[int]:
    """List a process and its descendants."""
    parents = {}
    for path in Path('/proc').glob('[0-9]*/stat'):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(')')[2].split()[1])
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def read_memory(file: str, key: str) -> float:
    """Read an entry in kB of a file in /proc, in GB; 0 if the process has ended."""
    with suppress(OSError):
        return next((int(line.split()[1]) / 1e6 for line in open(file) if line.startswith(key)), 0.0)
    return 0.0


def measure(command: Sequence[str | Path], records: Path, log: Path) -> dict:
    """Run a command; return its seconds and the peaks of its memory, see :data:`COLUMNS`.

    Raises:
        InputError: if it fails.
    """
    shutil.rmtree(records, ignore_errors=True)
    records.mkdir(parents=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    environment = os.environ | dict(PYTHONPATH=path, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    start, peaks = time.perf_counter(), dict(process_gb=0.0, all_gb=0.0)
    with log.open('w') as file:
        child = subprocess.Popen([sys.executable, *map(str, command)], stdout=file, stderr=file, env=environment)
        while (ended := os.wait4(child.pid, os.WNOHANG))[0] == 0:
            processes = list_processes(child.pid)
            everything = sum(read_memory(f'/proc/{process}/smaps_rollup', 'Pss:') for process in processes)
            largest = max(read_memory(f'/proc/{process}/status', 'VmHWM:') for process in processes)
            peaks = dict(process_gb=max(peaks['process_gb'], largest), all_gb=max(peaks['all_gb'], everything))
            time.sleep(1)
    child.returncode = os.waitstatus_to_exitcode(ended[1])
    if child.returncode:
        raise InputError(f'exit status {child.returncode}: {" ".join(map(str, command))}. See {log}')
    used = ended[2].ru_utime + ended[2].ru_stime
    seconds = {int(file.stem): float(file.read_text()) for file in records.glob('*.txt')}
    others = [value for rank, value in seconds.items() if rank]
    return dict(main_s=seconds.get(0, used), others_s=max(others, default=''), all_s=used,
                wall_s=time.perf_counter() - start, **peaks)  # fmt: skip


def list_runs(part: str) -> list[tuple[str, int, int]]:
    """List the runs of a part: arm, processes, and workers of each process; MMEngine's gloo processes need a GPU."""
    if part == 'train':
        return [('plain', 1, 4), ('ours', 1, 4), ('ours', 1, 8), ('ours', 2, 4)]
    if part == 'test':
        return [('plain', 1, 4), ('ours', 1, 4), ('with report', 1, 4), ('ours', 2, 4)]
    return [('plain', 1, 0), ('ours', 1, 0)] if part == 'prepare' else [('ours', 1, 0)]


def make_command(part: str, arm: str, processes: int, workers: int, data: Path, work: Path) -> list[str | Path]:
    """Write the config of a run, and return its command."""
    run = work / f'{part}_{arm.replace(" ", "_")}_{processes}_{workers}'
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    ours = ['-m', 'spec_mmdet']
    if part == 'prepare':
        if arm == 'plain':
            return ['-m', 'benchmarks.coco_scale', data, '--read-only']
        return [*ours, 'prepare', data, '--findings', run / 'findings.csv']
    if part == 'compare':
        report, runs = work / 'test_with_report_1_4' / 'report', []
        if not report.is_dir():
            raise InputError(f'compare needs the report in {report}. Run the part test first, in the same --work-dir')
        for i, (name, seed) in enumerate(itertools.product(('one', 'other'), range(3))):
            folder = run / f'{i}' / 'report'
            folder.mkdir(parents=True)
            record = json.loads((report / 'data.json').read_bytes())
            record['weights'].update(sha256=f'{i}', seed=seed)
            (folder / 'data.json').write_text(json.dumps(record))
            os.link(report / 'detections.segm.json', folder / 'detections.segm.json')
            boxes = (report / 'detections.bbox.json').read_bytes()
            (folder / 'detections.bbox.json').write_bytes(boxes + b' ' * i)  # compare rejects copies
            (run / f'{i}' / 'run.json').write_text(json.dumps(dict(seed=seed, started=f'{i}')))
            runs.append(f'{name}={run / str(i)}')
        return [*ours, 'compare', *runs, '--out', run / 'out']
    config, text = run / 'config.py', CONFIG + (REPLAY if part == 'test' else '')
    config.write_text(text.format(folder=f'{data}/', workers=workers, records=str(work / 'records'),
                                  file=str(data / 'detections.pkl')))  # fmt: skip
    tools = Path(mmdet.__file__).parent / '.mim' / 'tools'
    command = [*ours, part] if arm != 'plain' else [tools / f'{part}.py']
    if processes > 1:
        command = ['-m', 'torch.distributed.run', '--nproc_per_node', processes, '--master_port', 29517, *command]
    command += [config, *([data / 'replay.pth'] if part == 'test' else []), '--work-dir', run]
    command += ['--report', run / 'report'] if arm == 'with report' else []
    return [*command, '--launcher', 'pytorch'] if processes > 1 else command


def read_only(data: Path) -> None:
    """Read both annotation files with pycocotools, and decode a twentieth of the images 20 times each, by OpenCV."""
    for split in SIZES:
        coco = COCO(data / 'annotations' / f'instances_{split}2017.json')
        for image in list(coco.imgs.values())[::20]:
            for _ in range(20):
                cv2.imread(str(data / f'{split}2017' / image['file_name']))


def print_table(rows: list[dict]) -> None:
    """Print all rows in Markdown.

    The ratio is that of the main process to plain MMDetection's at the same size. The slope is the time of the main
    process beyond that at the smallest size, divided by the difference in size: it is constant if growth is linear.
    """
    headers = 'part', 'run', 'processes x workers', 'fraction', 'main, s', 'ratio', 'slope, s', 'others, s', 'all, s', \
        'wall, s', 'a process, GB', 'all, GB'  # fmt: skip
    print('|', ' | '.join(headers), '|\n' + '|---' * len(headers) + '|')
    seconds = {tuple(row[key] for key in COLUMNS[:5]): float(row['main_s']) for row in rows}
    for case, main_s in sorted(seconds.items(), key=lambda item: (PARTS.index(item[0][0]), item[0])):
        (row,) = (row for row in rows if tuple(row[key] for key in COLUMNS[:5]) == case)
        part, arm, fraction, processes, workers = case
        plain = [value for other, value in seconds.items() if other[:3] == (part, 'plain', fraction)]
        ratio = f'{main_s / plain[0]:.2f}' if plain else ''
        least = min((float(o[2]), value) for o, value in seconds.items() if o[:2] == case[:2] and o[3:] == case[3:])
        step = float(fraction) - least[0]
        slope = f'{(main_s - least[1]) / step:.0f}' if step else ''
        values = [f'{float(row[key]):.1f}' if row[key] else '' for key in COLUMNS[6:]]
        cells = [part, arm, f'{processes} x {workers}', fraction, f'{main_s:.1f}', ratio, slope, *values]
        print('|', ' | '.join(cells), '|')


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('benchmarks.coco_scale', __doc__, 'python -m')
    options.add_argument('coco', type=Path, help='a folder in the layout of COCO 2017 with a few hundred images')
    options.add_argument('--fraction', type=float, default=1, help="of COCO's size (default: 1)")
    options.add_argument('--parts', nargs='*', choices=PARTS, default=PARTS, help='default: all')
    options.add_argument('--work-dir', type=Path, default=Path('work_dirs/coco_scale'))
    options.add_argument('--read-only', action='store_true', help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    if args.read_only:
        return read_only(args.coco)
    work = args.work_dir.resolve() / f'{args.fraction:g}'
    data, table = work / 'data', args.work_dir / 'results.csv'
    build_data(args.coco, data, args.fraction)
    rows = list(csv.DictReader(table.open())) if table.exists() else []
    for part in args.parts:
        for run in list_runs(part):
            case = dict(zip(COLUMNS, map(str, (part, run[0], args.fraction, *run[1:]))))
            if any(case.items() <= row.items() for row in rows):
                continue
            print(*case.values(), flush=True)
            log = work / f'{part}_{run[0]}_{run[1]}_{run[2]}.log'
            rows.append(case | measure(make_command(part, *run, data, work), work / 'records', log))
            write(table, format_csv(rows))
    print_table(rows)


if __name__ == '__main__':
    with command_line():
        main()
