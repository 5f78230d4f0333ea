"""Semantic segmentation on folders of images and label PNGs, with MMSegmentation: a task (see :mod:`tasks`).

A pixel of a label PNG contains the number of its class, from 0 on in the order of the classes; 255 is ignored.
MMSegmentation may be missing: it is imported for its own data sets only.
"""

from __future__ import annotations

import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import mmdet.registry
import numpy as np
from mmengine.config import Config
from PIL import Image
from tqdm import tqdm

from ..configs import find_class, walk
from ..errors import InputError, list_briefly, prefix_errors
from ..files import write_folder_atomically
from .checks import ADVICE, LOOKED_AT
from .findings import Findings, Place
from .fitting import LOOPS, list_configured_classes, list_evaluators, require_monitored
from .images import IMAGE_SUFFIXES, allow_large_images, check_image

IGNORED = 255
SPLITS = dict(train=('train', 'training'), val=('val', 'validation', 'valid'))
# Folders of images and of labels: of ADE20K and of our own copies, of Cityscapes, and of both beside each other.
PLACES = (
    ('images/{}', 'annotations/{}'),
    ('images/{}', 'labels/{}'),
    ('images/{}', 'masks/{}'),
    ('leftImg8bit/{}', 'gtFine/{}'),
    ('{}', 'labels/{}'),
)
VOC = 'ImageSets/Segmentation/{}.txt'
CITYSCAPES = '_leftImg8bit.png', '_gtFine_labelTrainIds.png'
CLASSES = ('classes.txt', 'labelmap.txt')
COLOUR = re.compile(r'^(.+?)[:\s]+(\d+)[,\s]+(\d+)[,\s]+(\d+)(?::.*)?$')
LAYOUTS = (
    'images/train and labels/train (or annotations/training, masks/train; the same for val), or the layout of '
    'Cityscapes or Pascal VOC'
)


EXAMPLE = 'xcit_tiny_12_p16_semanticfpn'  # a config


def reads(dataset: dict) -> bool:
    """Return whether a config's dict is one of MMSegmentation's data sets."""
    kind = dataset.get('type')
    is_named = isinstance(kind, str) and kind not in mmdet.registry.DATASETS.module_dict
    has_maps = is_named and 'seg_map_path' in (dataset.get('data_prefix') or {})
    if not has_maps and dataset.get('_scope_') != 'mmseg' or find_spec('mmseg') is None:
        return False
    from mmseg.datasets import BaseSegDataset

    return issubclass(find_dataset(dataset) or object, BaseSegDataset)


def find_dataset(dataset: dict) -> type | None:
    """Return the class of a data set's config, or None if MMSegmentation has none of this name."""
    return find_class({**dataset, '_scope_': 'mmseg'}, mmdet.registry.DATASETS)


def list_datasets(cfg: Config) -> list[dict]:
    """List the configs of all data sets of this task."""
    return [node for loop in LOOPS for _, node in walk(cfg.get(f'{loop}_dataloader')) if reads(node)]


def find_suffix(folder: Path, suffixes: Iterable[str], kind: str) -> str:
    """Return the only suffix of a folder's files.

    Raises:
        InputError: if there is none, or there are several, which MMSegmentation's data sets do not support.
    """
    found = sorted({path.suffix for path in folder.rglob('*') if path.suffix.lower() in suffixes})
    if len(found) != 1:
        what = f'{kind} of {len(found)} formats, {", ".join(found)}' if found else f'no {kind}'
        raise InputError(f'{folder}: contains {what}. Use one format')
    return found[0]


def find_split(folder: Path, split: str) -> dict | None:
    """Find the images and label PNGs of a split, 'train' or 'val'.

    Returns:
        Arguments of MMSegmentation's data set with its ``type``; None if the folder lacks the split.
    """
    for name in SPLITS[split]:
        if (folder / VOC.format(name)).is_file():
            images, labels, kind = 'JPEGImages', 'SegmentationClass', 'PascalVOCDataset'
            ann_file = dict(ann_file=VOC.format(name))
        else:
            pairs = [(images.format(name), labels.format(name)) for images, labels in PLACES]
            found = (pair for pair in pairs if (folder / pair[0]).is_dir() and any((folder / pair[1]).rglob('*.png')))
            images, labels = next(found, (None, None))  # labels/ of YOLO contains text files
            kind, ann_file = 'ADE20KDataset', {}
        if images is None:
            continue
        if labels.startswith('gtFine'):
            kind, (img_suffix, seg_map_suffix) = 'CityscapesDataset', CITYSCAPES
        else:
            img_suffix = find_suffix(folder / images, IMAGE_SUFFIXES, 'images')
            seg_map_suffix = find_suffix(folder / labels, ('.png',), 'label PNGs')
        suffixes = dict(img_suffix=img_suffix, seg_map_suffix=seg_map_suffix)
        return dict(type=kind, data_prefix=dict(img_path=images, seg_map_path=labels), **suffixes, **ann_file)
    return None


def read_classes(folder: Path) -> tuple[list[str], list[list[int]] | None]:
    """Read the classes of a folder from classes.txt or labelmap.txt (CVAT's): a name per line, or a name and a colour.

    Returns:
        The names, and their colours, RGB, or None. Both are empty without a file.

    Raises:
        InputError: if the file is empty, or has a name twice or more names than a label PNG can number.
    """
    path = next((folder / name for name in CLASSES if (folder / name).is_file()), None)
    if path is None:
        return [], None
    lines = [line.strip() for line in path.read_text('utf-8').splitlines()]
    lines = [line for line in lines if line and not line.startswith('#')]
    matches = [COLOUR.match(line) for line in lines]
    coloured = bool(lines) and all(matches)
    names = [match[1] for match in matches] if coloured else lines
    if not 0 < len(names) <= IGNORED or len({*names}) < len(names):
        raise InputError(f'{path}: contains {len(names)} names, {len({*names})} different ones. Use 1 to {IGNORED}')
    return names, [[int(part) for part in match.groups()[1:]] for match in matches] if coloured else None


def use_split(dataset: dict, evaluators: Sequence[dict], folder: Path, split: str) -> None:
    """Point a data set at a split, 'train' or 'val', of a folder; changes it. The evaluators read no file.

    The classes are those of the folder's text file, or else those of the data set with this layout.

    Raises:
        InputError: if the folder lacks the split.
    """
    found = find_split(folder, split)
    if found is None:
        raise InputError(f'--data {folder}: lacks the images and label PNGs of {split}. Use {LAYOUTS}')
    names, palette = read_classes(folder)
    if names:
        found['type'] = 'BaseSegDataset'
        found['metainfo'] = dict(classes=names, **(dict(palette=palette) if palette else {}))
    for key in ('ann_file', 'metainfo', 'reduce_zero_label', 'img_suffix', 'seg_map_suffix'):
        dataset.pop(key, None)
    for step in dataset.get('pipeline') or ():
        step.pop('reduce_zero_label', None)  # the data set's applies
    dataset.update(_scope_='mmseg', data_root=f'{folder}/', **found)


def set_classes(cfg: Config, classes: Sequence[str]) -> None:
    """Set the classes, in this order, of a config's data sets and of the heads of its model; changes ``cfg``."""
    for dataset in list_datasets(cfg):
        if not {*classes} <= {*(find_dataset(dataset).METAINFO.get('classes') or classes)}:
            dataset['type'] = 'BaseSegDataset'
        dataset['metainfo'] = {**(dataset.get('metainfo') or {}), 'classes': tuple(classes)}
    model = cfg.get('model') or {}
    for name in ('decode_head', 'auxiliary_head'):
        for place, head in walk(model.get(name), f'model.{name}'):
            weights = head.get('class_weight')
            if 'num_classes' in head:
                head['num_classes'] = len(classes)
            elif isinstance(weights, (list, tuple)) and len(weights) != len(classes):
                raise InputError(f'{place}.class_weight in the config has {len(weights)} numbers for {len(classes)} '
                                 'classes. Use one for each class')  # fmt: skip


def open_dataset(dataset: dict) -> tuple[list[tuple[Path, Path]], bool]:
    """Open a data set's config.

    Returns:
        Paths of its images and label PNGs, and whether labels count from 1, and 0 is ignored (``reduce_zero_label``).

    Raises:
        InputError: if it has no images, or its list of names cannot be read.
    """
    arguments = {key: value for key, value in dataset.items() if key not in ('type', '_scope_', 'pipeline')}
    try:
        opened = find_dataset(dataset)(**arguments, lazy_init=True)
        entries = opened.load_data_list()
    except (OSError, AssertionError, ValueError) as error:
        raise InputError(f'{dataset.get("data_root")}: {error}. Correct data_root or data_prefix') from error
    if not entries:
        prefix = dataset['data_prefix']['img_path']
        raise InputError(f'{Path(dataset.get("data_root") or "", prefix)}: contains no images. Copy them there')
    return [(Path(entry['img_path']), Path(entry['seg_map_path'])) for entry in entries], opened.reduce_zero_label


def read_labels(path: Path, palette: Sequence[Sequence[int]] | None = None) -> np.ndarray:
    """Read a label PNG.

    Args:
        path: the PNG.
        palette: colours of the classes, RGB, to convert a PNG of colours; None rejects it.

    Returns:
        Labels, uint8, shape (H, W).

    Raises:
        InputError: with the kind of fault.
    """
    if not path.is_file():
        raise InputError('images without a label PNG')
    try:
        with allow_large_images(), Image.open(path) as image:
            mode = image.mode
            pixels = np.asarray(image.convert('RGB') if mode in ('RGB', 'RGBA') else image)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError('label PNGs that cannot be decoded') from error
    if pixels.ndim == 2 and mode in ('1', 'L', 'P'):
        return pixels.astype(np.uint8)
    if mode not in ('RGB', 'RGBA'):
        raise InputError(f'label PNGs that are not one band of 8 bits (Pillow: {mode}), for instance of 16 bits')
    if palette is None:
        raise InputError('label PNGs of colours (RGB). "prepare --out" converts them by the colours in classes.txt')
    codes = pixels.astype(np.int64) @ [256**2, 256, 1]
    known = np.asarray(palette, np.int64) @ [256**2, 256, 1]
    order = np.argsort(known)
    place = np.searchsorted(known, codes, sorter=order).clip(max=len(known) - 1)
    if (known[order[place]] != codes).any():
        raise InputError('label PNGs with a colour that no class has')
    return order[place].astype(np.uint8)


def check_labels(
    pair: tuple[Path, Path],
    classes: int,
    from_one: bool,
    name: str,
    found: Findings,
    palette: Sequence[Sequence[int]] | None = None,
) -> np.ndarray | None:
    """Check a label PNG and its image.

    Args:
        pair: paths of the image and of the PNG.
        classes: the number of classes.
        from_one: whether labels count from 1, and 0 is ignored (``reduce_zero_label``).
        name: of the split, in findings.
        found: receives the faults.
        palette: see :func:`read_labels`.

    Returns:
        Labels from 0 on, :data:`IGNORED` for ignored pixels, shape (H, W); None with an error.
    """
    image, path = pair
    place = Place(name, path.name if path.is_file() else image.name)
    try:
        labels = read_labels(path, palette)
    except InputError as error:
        found.errors[str(error)].append(place)
        return None
    fault, doubts, _ = check_image(image, *labels.shape)
    if fault:
        kind = 'images whose size is not that of their label PNG' if 'size differs' in fault else fault
        found.errors[kind].append(Place(name, image.name))
    for doubt in doubts:
        found.warnings[doubt].append(Place(name, image.name))
    if from_one:
        labels = np.where(labels == IGNORED, IGNORED, labels - np.uint8(1))  # 0 becomes 255
    present = np.unique(labels)
    if beyond := [str(label + from_one) for label in present.tolist() if classes <= label < IGNORED]:
        rule = f'{int(from_one)} to {classes - 1 + from_one}, or {IGNORED} where ignored'
        place = Place(name, path.name, detail=f'label {list_briefly(beyond)}')
        found.errors[f'labels beyond the {classes} classes. Use {rule}'].append(place)
    elif not (present < classes).any():
        found.warnings['label PNGs in which every pixel is ignored'].append(place)
    return None if fault or beyond else labels


def check_split(
    pairs: Sequence[tuple[Path, Path]], classes: Sequence[str], name: str, found: Findings, **options: object
) -> Iterator[tuple[Path, np.ndarray]]:
    """Check label PNGs and images of a split, and yield valid ones; see :func:`check_labels` for ``options``."""
    seen = np.zeros(IGNORED + 1, bool)
    for pair in tqdm(pairs, f'labels of {name}', leave=False, disable=None, delay=1):
        labels = check_labels(pair, len(classes), name=name, found=found, **options)
        if labels is not None:
            seen[np.unique(labels)] = True
            yield pair[0], labels
    for label, of_class in enumerate(classes):
        if not seen[label] and not found.errors:
            found.warnings['classes without a pixel'].append(Place(name, detail=of_class))


def adapt(
    cfg: Config, loops: Sequence[str], classes: Sequence[str] | None, check: bool, thorough: bool
) -> Sequence[str] | None:
    """Adapt a config to the data that a run reads, after checking it if wanted; see :mod:`detection`."""
    if check:
        prefixes, evaluators = list_prefixes(cfg), list_evaluators(cfg, 'val')
        only_iou = all(evaluator.get('iou_metrics', ['mIoU']) == ['mIoU'] for evaluator in evaluators)
        if 'train' in loops and only_iou and 0 < len(prefixes) == len(evaluators):
            require_monitored(cfg, [f'{prefix}{name}' for prefix in prefixes for name in ('mIoU', 'mAcc', 'aAcc')])
        checked = []
        for loop in loops:
            for dataset in (node for _, node in walk(cfg.get(f'{loop}_dataloader')) if reads(node)):
                names = list_configured_classes(dataset)
                if not names:
                    raise InputError(f'{loop}_dataloader: the classes are unknown. Write them to classes.txt in the '
                                     'folder of --data, one name per line, or set metainfo.classes')  # fmt: skip
                classes = list(classes or names)
                if names != classes:
                    raise InputError(
                        f'the classes of {loop}_dataloader ({list_briefly(names)}) are not the {len(classes)} of the '
                        f'checkpoint or of the training data ({list_briefly(classes)}). Use the same list'
                    )
                pairs, from_one = open_dataset(dataset)
                if pairs in checked:
                    continue
                checked.append(pairs)
                found = Findings()
                step = -(-len(pairs) // LOOKED_AT)
                some = pairs[::step] if thorough else ()
                deque(check_split(some, classes, loop, found, from_one=from_one), maxlen=0)
                if len(some) < len(pairs):
                    found.warnings.pop('classes without a pixel', None)
                found.require_none(ADVICE)
                print(f'{loop}: {len(pairs)} images with label PNGs in {dataset.get("data_root")}')
                found.print()
        print(f'{len(classes)} classes: {list_briefly(classes)}')
    set_classes(cfg, classes)
    return classes


def list_prefixes(cfg: Config) -> list[str]:
    """Return the prefixes of mIoU's names in the validation: of our metric, and of MMSegmentation's if it has mIoU."""
    from mmseg.evaluation import IoUMetric

    kinds = IoUMetric, mmdet.registry.METRICS.get('SemanticMetric')
    prefixes = []
    for evaluator in list_evaluators(cfg, 'val'):
        kind = find_class({**evaluator, '_scope_': 'mmseg'}, mmdet.registry.METRICS)
        if kind and issubclass(kind, kinds) and 'mIoU' in evaluator.get('iou_metrics', ('mIoU',)):
            prefixes.append(evaluator.get('prefix') or kind.default_prefix)
    return [f'{prefix}/' if prefix else '' for prefix in prefixes]


def find_best_metric(cfg: Config) -> str | None:
    """Return the metric that chooses the best checkpoint: mIoU; None if it is not evaluated."""
    prefixes = list_prefixes(cfg)
    return f'{prefixes[0]}mIoU' if prefixes else None


def can_prepare(folder: Path, with_boxes: bool) -> bool:
    """Return whether a folder has a layout of :func:`find_split`; never beside boxes of COCO or Pascal VOC."""
    if with_boxes or any(folder.glob('annotations/*.json')) or (folder / 'Annotations').is_dir():
        return False
    return any(find_split(folder, split) for split in SPLITS)


def prepare(folder: Path, out: Path | None, drop: bool, found: Findings) -> dict[str, int]:
    """Check every image and label PNG of a folder, and copy it with labels from 0 on and classes.txt.

    Args:
        folder: see :func:`can_prepare`.
        out: the folder to write, or None.
        drop: whether to leave out images with an error.
        found: receives the faults.

    Returns:
        The number of images of each split.

    Raises:
        InputError: if the classes are unknown, or there are errors.
    """
    if find_spec('mmseg') is None:
        raise InputError(f'{folder}: label PNGs need MMSegmentation. Run: pip install spec_mmdet[seg]')
    names, palette = read_classes(folder)
    counts = {}
    with write_folder_atomically(out) if out else nullcontext() as temporary:
        for split in (split for split in SPLITS if find_split(folder, split)):
            dataset: dict = {}
            use_split(dataset, (), folder.absolute(), split)
            classes = names or list_configured_classes(dataset)
            pairs, from_one = open_dataset(dataset)
            images = Path(dataset['data_root'], dataset['data_prefix']['img_path'])
            counts[split] = 0
            for image, labels in check_split(
                pairs, classes, split, found, from_one=from_one, palette=palette if out else None
            ):
                counts[split] += 1
                if out:
                    name = image.relative_to(images).as_posix().removesuffix(dataset['img_suffix'])
                    for place, suffix in (('images', image.suffix), ('labels', '.png')):
                        (temporary / place / split / f'{name}{suffix}').parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(image, temporary / 'images' / split / f'{name}{image.suffix}')
                    Image.fromarray(labels).save(temporary / 'labels' / split / f'{name}.png')
        if drop:
            found.drop_errors()
        with prefix_errors(f'{folder}: not ready for training'):
            found.require_none('Fix them, or pass --drop --out DIR to leave out these images')
        if out:
            lines = [
                ' '.join(map(str, (name, *colour))) for name, colour in zip(classes, palette or [()] * len(classes))
            ]
            (temporary / 'classes.txt').write_text('\n'.join(lines) + '\n', 'utf-8')
    return counts
