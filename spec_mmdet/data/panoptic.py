"""Panoptic segmentation on COCO's panoptic layout: a task (see :mod:`tasks`).

A folder contains annotations/panoptic_train2017.json, its PNGs in annotations/panoptic_train2017/, and the images in
train2017/; the same for validation. A pixel of a PNG contains the id of its segment, R + 256 G + 256² B; 0 is void.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import cv2
import numpy as np
from mmdet.datasets import CocoPanopticDataset
from mmdet.datasets.api_wrappers import COCOPanoptic
from mmdet.datasets.transforms import LoadAnnotations, LoadPanopticAnnotations
from mmdet.evaluation import CocoPanopticMetric
from mmdet.registry import DATASETS, METRICS, TRANSFORMS
from mmengine.config import Config
from tqdm import tqdm

from ..configs import find_class, is_kind_of, walk
from ..errors import InputError, list_briefly, prefix_errors
from ..status import show_status
from .checks import ADVICE, LOOKED_AT, check_files, check_ids, check_some_images, print_findings
from .findings import Findings, Place
from .fitting import list_evaluators, require_monitored
from .folders import find_split
from .images import check_images
from .reading import list_entries, pause_garbage_collection, read_json, select_sound_entries
from .rules import decode_ids, find_size_fault

SEGMENT = dict(id=int, category_id=int, bbox=list, area=(int, float))
EXAMPLE = 'xcit_panopticfpn'  # a config
IDS = 256**3  # ids that a PNG can contain
MAX_CLASSES = 254  # MMDetection's maps of classes are bytes, of which 255 is void
METRIC_NAMES = tuple(f'{kind}{part}' for part in ('', '_th', '_st') for kind in ('PQ', 'SQ', 'RQ'))  # _th: of things


class Classes(list):
    """Names of classes, of which the first ``things`` are things and the others stuff."""

    things: int = 0


def read_ids(path: str | Path) -> np.ndarray:
    """Read the segment ids of a PNG, int32, shape (H, W).

    Raises:
        InputError: if it cannot be decoded, or its pixels are not 8-bit RGB.
    """
    content = np.fromfile(path, np.uint8) if Path(path).is_file() else np.empty(0, np.uint8)
    image = cv2.imdecode(content, cv2.IMREAD_UNCHANGED) if content.size else None
    if image is None:
        raise InputError('PNGs of segments that are missing or cannot be decoded')
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError('PNGs of segments that are not RGB with 8 bits per channel')
    return decode_ids(image[..., ::-1])


def read_panoptic(path: Path, found: Findings | None = None) -> dict:
    """Read an annotation file in COCO's panoptic format.

    Args:
        path: a JSON file.
        found: receives invalid images, which are then left out.

    Returns:
        Its content; the categories are sorted, things first, as MMDetection's models require. Images without
        annotations, as in COCO's test set, are allowed.

    Raises:
        InputError: if the file does not exist, is not in this format or has no or too many classes.
    """
    with pause_garbage_collection():
        content = read_json(path)
    coco = dict(content) if isinstance(content, dict) else content
    coco['images'] = select_sound_entries(coco, 'images', path, found)
    categories = select_sound_entries(coco, 'categories', path, found)
    coco['categories'] = sorted(categories, key=lambda category: not category.get('isthing'))
    fault = ''
    if not all(category.get('isthing') in (0, 1) for category in categories):
        fault = 'has categories without "isthing", 0 or 1'
    elif not 0 < len(categories) <= MAX_CLASSES:
        fault = f'has {len(categories)} categories. Use 1 to {MAX_CLASSES}'
    elif len({category['name'] for category in categories}) < len(categories):
        fault = 'has several categories of one name'
    for annotation in list_entries(coco, 'annotations', path) if 'annotations' in coco else ():
        if not isinstance(annotation.get('segments_info'), list) or not isinstance(annotation.get('file_name'), str):
            fault = fault or 'is not in COCO\'s panoptic format: an annotation lacks "segments_info" or "file_name"'
    if fault:
        raise InputError(f'annotation file {path}: {fault}')
    return coco


class PanopticFile(COCOPanoptic):
    """MMDetection's index of an annotation file, read by :func:`read_panoptic`.

    MMDetection's looks up segments by id in all images, which takes a time quadratic in the number of images if each
    numbers its segments from 1.
    """

    def __init__(self, annotation_file: str | None = None) -> None:
        super().__init__()
        if annotation_file is not None:
            self.dataset = read_panoptic(Path(annotation_file))
            with pause_garbage_collection(), redirect_stdout(None):  # pycocotools prints its progress
                self.createIndex()
            self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs
        self.files = {a['image_id']: a['file_name'] for a in self.dataset.get('annotations', ())}

    def get_ann_ids(self, img_ids: Sequence[int]) -> list[dict]:
        """Return the segments of images, which :meth:`load_anns` passes on."""
        return [segment for image in img_ids for segment in self.imgToAnns.get(image, ())]

    def load_anns(self, ids: list[dict]) -> list[dict]:
        """Return segments from :meth:`get_ann_ids`."""
        return ids


@DATASETS.register_module()
class CheckedCocoPanopticDataset(CocoPanopticDataset):
    """MMDetection's CocoPanopticDataset that finds PNGs by the names in the annotation file."""

    COCOAPI = PanopticFile

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """Convert an image's annotations; see MMDetection."""
        result = super().parse_data_info(raw_data_info)
        if (name := self.coco.files.get(result['img_id'])) and result['seg_map_path']:
            result['seg_map_path'] = str(Path(self.data_prefix['seg'], name))
        return result


@TRANSFORMS.register_module()
class CheckedLoadPanopticAnnotations(LoadPanopticAnnotations):
    """MMDetection's LoadPanopticAnnotations that does not need panopticapi."""

    def __init__(
        self, with_bbox: bool = True, with_label: bool = True, with_mask: bool = True, with_seg: bool = True, **kwargs
    ) -> None:
        LoadAnnotations.__init__(
            self, with_bbox=with_bbox, with_label=with_label, with_mask=with_mask, with_seg=with_seg, **kwargs
        )
        self.rgb2id = decode_ids


def reads(dataset: dict) -> bool:
    """Return whether a config's dict is a data set in COCO's panoptic format."""
    return is_kind_of(dataset, DATASETS, CocoPanopticDataset)


def list_metrics(cfg: Config, loop: str) -> list[dict]:
    """List the configs of a loop's evaluators for PQ."""
    return [e for e in list_evaluators(cfg, loop) if is_kind_of(e, METRICS, CocoPanopticMetric)]


def use_split(dataset: dict, evaluators: list[dict], folder: Path, split: str) -> None:
    """Point a data set and evaluators at a split, 'train' or 'val', of a folder; changes them.

    An evaluator of boxes and masks uses COCO's instances, or is removed if the folder does not have them.

    Raises:
        InputError: if the folder lacks the split.
    """
    found = find_split(folder, split, 'panoptic')
    if found is None:
        raise InputError(f'--data {folder}: lacks annotations/panoptic_{split}*.json, the folder of the same name with '
                         f'PNGs, and the folder {split}* of images. Copy them there')  # fmt: skip
    ann_file, images = found
    segments = ann_file.with_suffix('')
    dataset['data_root'] = f'{folder}/'
    dataset['ann_file'] = ann_file.relative_to(folder).as_posix()
    dataset['data_prefix'] = {
        key: f'{path.relative_to(folder).as_posix()}/' for key, path in (('img', images), ('seg', segments))
    }
    instances = ann_file.with_name(ann_file.name.replace('panoptic', 'instances', 1))
    for evaluator in list(evaluators):
        if is_kind_of(evaluator, METRICS, CocoPanopticMetric):
            evaluator['ann_file'], evaluator['seg_prefix'] = str(ann_file), str(segments)
        elif 'ann_file' in evaluator and instances.is_file():
            evaluator['ann_file'] = str(instances)
        elif 'ann_file' in evaluator:
            print(f'{evaluator["type"]}: removed from the evaluators, because {instances} does not exist')
            evaluators.remove(evaluator)


def set_classes(cfg: Config, classes: Sequence[str]) -> None:
    """Set the classes of a config's data sets and of the heads of its model; changes ``cfg``.

    Args:
        cfg: the complete config.
        classes: their names, things first. A list without the number of things must be that of the config's data sets.

    Raises:
        InputError: if the number of things is unknown.
    """
    datasets = [node for _, node in walk({**cfg}) if reads(node)]
    if not isinstance(classes, Classes):
        metainfo = dict(find_class(datasets[0], DATASETS).METAINFO, **(datasets[0].get('metainfo') or {}))
        if list(classes) != list(metainfo['classes']):
            raise InputError(
                f'the classes of the checkpoint ({list_briefly(list(classes))}) are not those of the config, so the '
                "number of things is unknown. Pass the config that was written in the training's folder"
            )
        things = len(metainfo['thing_classes'])
    else:
        things = classes.things
    names = tuple(classes)
    for dataset in datasets:
        counted = dict(classes=names, thing_classes=names[:things], stuff_classes=names[things:])
        palette = (dataset.get('metainfo') or {}).get('palette')
        dataset['metainfo'] = {**(dataset.get('metainfo') or {}), **counted}
        if palette is None and names != CocoPanopticDataset.METAINFO['classes']:
            dataset['metainfo']['palette'] = None  # COCO's is for its own classes
    for name, node in walk(cfg.get('model') or {}):
        path = name.split('.')
        if 'num_things_classes' in node:
            node['num_things_classes'], node['num_stuff_classes'] = things, len(names) - things
            for _, loss in walk(node):
                weights = loss.get('class_weight')
                if isinstance(weights, (list, tuple)) and len({*weights[:-1]}) == 1:
                    loss['class_weight'] = [weights[0]] * len(names) + [weights[-1]]
        elif 'num_classes' in node and 'rpn_head' not in path and any(part.endswith('head') for part in path):
            node['num_classes'] = things


def check_segments(coco: dict, name: str, found: Findings) -> None:
    """Check the entries of an annotation file, without its images and PNGs.

    Args:
        coco: the content, from :func:`read_panoptic`.
        name: the file's name in findings.
        found: receives the faults.
    """
    check_ids({'images': coco['images'], 'annotations': []}, name, found)
    images = {image['id']: image for image in coco['images']}
    categories = {category['id']: category for category in coco['categories']}
    count = Counter(annotation.get('image_id') for annotation in coco['annotations'])
    for image in coco['images']:
        if fault := find_size_fault(image['width'], image['height']):
            found.errors[fault].append(Place(name, image['file_name']))
        if count[image['id']] != 1:
            kind = 'images with several annotations' if count[image['id']] else 'images without an annotation'
            found.errors[kind].append(Place(name, image['file_name']))
    used = set()
    for annotation in coco['annotations']:
        image = images.get(annotation.get('image_id'))
        if image is None:
            found.errors['annotations with an unknown image_id'].append(Place(name, annotation['file_name']))
            continue
        seen = set()
        for segment in annotation['segments_info']:
            if fault := find_segment_fault(segment, categories, seen):
                index = segment.get('id', '') if isinstance(segment, dict) else ''
                found.errors[fault].append(Place(name, image['file_name'], index))
            else:
                used.add(segment['category_id'])
                seen.add(segment['id'])
    for category in coco['categories']:
        if category['id'] not in used:
            found.warnings['classes without a segment'].append(Place(name, detail=category['name']))


def find_segment_fault(segment: object, categories: dict[int, dict], seen: set[int]) -> str:
    """Describe the fault of a segment's entry; '' for a valid one.

    Args:
        segment: the entry.
        categories: the categories by id.
        seen: ids of the image's earlier segments.
    """
    if not isinstance(segment, dict) or not all(isinstance(segment.get(key), kind) for key, kind in SEGMENT.items()):
        return 'segments without an id, a category_id, a bbox or an area'
    if segment['category_id'] not in categories:
        return 'segments with an unknown category_id'
    if not 0 < segment['id'] < IDS:
        return 'segments whose id is not from 1 to 256³ - 1'
    if segment['id'] in seen:
        return 'segments with an id that the image has already'
    if len(segment['bbox']) != 4 or segment['area'] <= 0 or min(segment['bbox'][2:]) < 1:
        return 'segments with an area of 0, or a box below one pixel, which training does not use'
    return ''


def check_maps(coco: dict, annotations: Iterable[dict], folder: Path, name: str, found: Findings) -> None:
    """Decode PNGs, and compare them with the annotation file.

    Args:
        coco: the content, from :func:`read_panoptic`, without errors.
        annotations: those to check.
        folder: the folder of the PNGs.
        name: the annotation file's name in findings.
        found: receives the faults.
    """
    images = {image['id']: image for image in coco['images']}
    for annotation in tqdm(list(annotations), f'PNGs of {name}', leave=False, disable=None, delay=1):
        image, file = images[annotation['image_id']], annotation['file_name']
        try:
            ids = read_ids(folder / file)
        except InputError as error:
            found.errors[str(error)].append(Place(str(folder), file))
            continue
        if ids.shape != (image['height'], image['width']):
            found.errors['PNGs of segments whose size is not that of the image'].append(Place(str(folder), file))
            continue
        areas = dict(zip(*(values.tolist() for values in np.unique(ids, return_counts=True))))
        listed = {segment['id']: segment['area'] for segment in annotation['segments_info']}
        for index in listed.keys() - areas.keys():
            found.errors['segments without pixels'].append(Place(name, image['file_name'], index))
        for index in areas.keys() - listed.keys() - {0}:
            kind = 'pixels of a segment that the annotation file does not list'
            found.errors[kind].append(Place(name, image['file_name'], index))
        for index in listed.keys() & areas.keys():
            if listed[index] != areas[index]:
                kind = 'segments whose area is not their number of pixels'
                found.warnings[kind].append(Place(name, image['file_name'], index))


def can_prepare(folder: Path, with_boxes: bool) -> bool:
    """Return whether a folder has COCO's panoptic layout, either beside COCO's instances or alone."""
    return any(list_splits(folder)) and any(folder.glob('annotations/instances_*.json')) == with_boxes


def list_splits(folder: Path) -> list[str]:
    """List the splits of a folder in COCO's panoptic layout."""
    return [split for split in ('train', 'val') if any(folder.glob(f'annotations/panoptic_{split}*.json'))]


def prepare(folder: Path, out: Path | None, drop: bool, found: Findings) -> dict[str, int]:
    """Check each segment, PNG and image of a folder in COCO's panoptic layout.

    Args:
        folder: see :func:`can_prepare`.
        out, drop: must be None; unused.
        found: receives the faults.

    Returns:
        The number of images of each split.

    Raises:
        InputError: if there are errors.
    """
    if out:
        raise InputError(f'--out {out}: panoptic labels are only checked. Leave it out')
    counts = {}
    for split in list_splits(folder):
        ann_file, images = find_split(folder, split, 'panoptic')
        coco = read_panoptic(ann_file, found)
        check_segments(coco, ann_file.name, found)
        if not found.errors:
            check_images(enumerate(coco['images']), images, ann_file.name, found)
            check_maps(coco, coco['annotations'], ann_file.with_suffix(''), ann_file.name, found)
        counts[split] = len(coco['images'])
    with prefix_errors(f'{folder}: the panoptic labels are not ready for training'):
        found.require_none('Correct them; the full list contains all')
    return counts


@show_status('checking annotations')
def check_dataset(
    dataset: dict, loop: str, classes: Sequence[str] | None, thorough: bool, annotated: bool = True
) -> Classes:
    """Check that the annotations, images, PNGs and classes of a data set exist, agree, and are valid.

    Args:
        dataset: the data set's config.
        loop: 'train', 'val' or 'test'.
        classes: the required classes, if known.
        thorough: whether to check each annotation, and to decode images and PNGs.
        annotated: whether segments are needed; COCO's test images have none.

    Returns:
        The classes.

    Raises:
        InputError: if not.
    """
    root, prefix = Path(dataset.get('data_root') or ''), dataset['data_prefix']
    ann_file = root / dataset['ann_file']
    for key in ('img', 'seg')[: 1 + annotated]:
        if not prefix.get(key) or not (root / prefix[key]).is_dir():
            raise InputError(f'{loop}_dataloader: data_prefix.{key} is {prefix.get(key)!r}, and {root} has no such '
                             'folder. Correct data_root or data_prefix, or pass --data')  # fmt: skip
    found = Findings()
    coco = read_panoptic(ann_file, found)
    found.require_none(ADVICE)
    names = Classes(category['name'] for category in coco['categories'])
    names.things = sum(category['isthing'] for category in coco['categories'])
    if classes is not None and list(classes) != names:
        raise InputError(
            f'annotation file {ann_file}: its categories, things first ({list_briefly(names)}), are not the '
            f'{len(classes)} trained classes ({list_briefly(list(classes))}). Use the same categories'
        )
    if not names.things:
        raise InputError(f'annotation file {ann_file}: has no category with "isthing": 1. Train semantic segmentation')
    annotations = list_entries(coco, 'annotations', ann_file) if annotated else []
    if thorough and annotated:
        check_segments(coco, ann_file.name, found)
        found.require_none(ADVICE)
    check_files(coco, root / prefix['img'])
    if annotated:
        check_files({'images': annotations}, root / prefix['seg'])
    if thorough:
        check_some_images(coco, ann_file.name, root / prefix['img'], found)
        step = -(-len(annotations) // LOOKED_AT) or 1
        check_maps(coco, annotations[::step], root / str(prefix.get('seg')), ann_file.name, found)
        found.require_none(ADVICE)
        print_findings(coco, ann_file.name, loop, found)
    return names


def adapt(
    cfg: Config, loops: Sequence[str], classes: Sequence[str] | None, check: bool, thorough: bool
) -> Sequence[str] | None:
    """Adapt a config to the data that a run reads, after checking it if wanted; see :func:`detection.adapt`."""
    if check:
        best = find_best_metric(cfg)
        if 'train' in loops and best and len(list_metrics(cfg, 'val')) == len(list_evaluators(cfg, 'val')):
            require_monitored(cfg, [f'{best.removesuffix("PQ")}{name}' for name in METRIC_NAMES])
        for loop in loops:
            for _, dataset in walk(cfg.get(f'{loop}_dataloader')):
                if reads(dataset):
                    annotated = not any(evaluator.get('format_only') for evaluator in list_metrics(cfg, loop))
                    classes = check_dataset(dataset, loop, classes, thorough, annotated)
        print(f'{len(classes)} classes, of which {classes.things} are things: {list_briefly(classes)}')
    if classes:
        set_classes(cfg, classes)
    return classes


def find_best_metric(cfg: Config) -> str | None:
    """Return the metric that chooses the best checkpoint, PQ; None if it is not evaluated."""
    metrics = list_metrics(cfg, 'val')
    return f'{metrics[0].get("prefix") or CocoPanopticMetric.default_prefix}/PQ' if metrics else None
