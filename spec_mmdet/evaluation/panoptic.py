"""The evaluation of panoptic segmentation: panoptic quality, drawings, results and the report (see :mod:`tasks`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from mmdet.evaluation import INSTANCE_OFFSET, CocoPanopticMetric
from mmdet.registry import METRICS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.fileio import get
from mmengine.logging import print_log
from terminaltables import AsciiTable

from ..configs import is_kind_of, walk
from ..data.fitting import list_configured_classes
from ..data.images import decode
from ..data.panoptic import PanopticFile, list_metrics, read_ids
from ..data.rules import encode_ids
from ..data.tasks import list_datasets
from ..errors import InputError
from ..files import PARTIAL, display_path, write
from .drawing import Mark, convert_map_to_marks, convert_to_marks, draw, to_rgb_bytes, use_font_for
from .metrics import PatientMetric
from .pages import record_data
from .plots import COLOURS, SHOWN, write_example

MIN_IOU = 0.5  # of a match, which is unique above
LABELS = {'coco_panoptic/PQ': 'PQ', 'coco_panoptic/PQ_th': 'PQ of things', 'coco_panoptic/PQ_st': 'PQ of stuff'}
ENVELOPE = '{"annotations": [', ']}'  # around the results of predict, COCO's panoptic format
PNGS, IMAGES = 'panoptic', 'images'
COUNTS = ('true positives', 'false positives', 'false negatives')
WORST = 4 * SHOWN  # images in the report


@dataclass
class Segments:
    """The segments of an image.

    Attributes:
        places: for each pixel the place of its segment in the lists below, -1 for void; int, shape (H, W).
        labels: the class of each segment, int, shape (N,).
        crowd: whether each segment is a crowd, bool, shape (N,).
    """

    places: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray

    @classmethod
    def from_ids(cls, ids: np.ndarray, segments: Sequence[dict], label_of: dict[int, int]) -> Segments:
        """Make them from a map of ids and a list of segments in COCO's panoptic format.

        Args:
            ids: from a PNG, shape (H, W); ids that are not in the list are void.
            segments: with id, category_id and, of crowds, iscrowd.
            label_of: the labels by category id.
        """
        numbers, places = np.unique(ids, return_inverse=True)
        place_of = {segment['id']: place for place, segment in enumerate(segments)}
        table = np.array([place_of.get(number, -1) for number in numbers.tolist()])
        labels = np.array([label_of[segment['category_id']] for segment in segments], int)
        crowd = np.array([bool(segment.get('iscrowd')) for segment in segments], bool)
        return cls(table[places.reshape(ids.shape)], labels, crowd)

    @classmethod
    def from_prediction(cls, panoptic: np.ndarray, classes: int) -> Segments:
        """Make them from MMDetection's map, label + instance * INSTANCE_OFFSET, of a model with so many classes."""
        numbers, places = np.unique(panoptic, return_inverse=True)
        labels = numbers % INSTANCE_OFFSET
        known = labels < classes
        table = np.where(known, np.cumsum(known) - 1, -1)
        return cls(table[places.reshape(panoptic.shape)], labels[known], np.zeros(known.sum(), bool))


@dataclass
class Match:
    """The matches of an image's segments.

    Attributes:
        pairs: matched segments of the truth and of the prediction, int, shape (N, 2).
        ious: IoU of the pairs, shape (N,).
        false_positives: unmatched predicted segments that are not ignored.
        ignored: unmatched predicted segments that are mostly void or crowd.
        false_negatives: unmatched segments of the truth, without crowds.
    """

    pairs: np.ndarray
    ious: np.ndarray
    false_positives: np.ndarray
    ignored: np.ndarray
    false_negatives: np.ndarray


def match_segments(truth: Segments, found: Segments) -> Match:
    """Match segments as Kirillov et al. define (Panoptic Segmentation, CVPR 2019, section 4.1 to 4.3).

    Segments of one class match if their IoU is above 0.5; the void pixels of the truth do not count. Crowds do not
    match. An unmatched predicted segment is ignored if more than half of its pixels are void or crowd of its class.
    """
    rows, columns = len(truth.labels) + 1, len(found.labels) + 1  # the first of each is void
    joint = np.bincount(((truth.places + 1) * columns + found.places + 1).ravel(), minlength=rows * columns)
    joint = joint.reshape(rows, columns)
    same = truth.labels[:, None] == found.labels
    both, void, area = joint[1:, 1:], joint[0, 1:], joint[:, 1:].sum(axis=0)
    union = joint[1:].sum(axis=1)[:, None] + area - void - both
    iou = np.where(same & ~truth.crowd[:, None], both / np.maximum(union, 1), 0)
    pairs = np.argwhere(iou > MIN_IOU)
    unmatched = np.setdiff1d(np.arange(columns - 1), pairs[:, 1])
    lost = void + (both * (same & truth.crowd[:, None])).sum(axis=0)
    ignored = lost[unmatched] > MIN_IOU * area[unmatched]
    missed = np.setdiff1d(np.flatnonzero(~truth.crowd), pairs[:, 0])
    return Match(pairs, iou[tuple(pairs.T)], unmatched[~ignored], unmatched[ignored], missed)


def count_matches(truth: Segments, found: Segments, classes: int) -> np.ndarray:
    """Count an image's matches: the sum of IoUs, and :data:`COUNTS`, of each class; shape (classes, 4)."""
    match = match_segments(truth, found)
    labels = truth.labels[match.pairs[:, 0]]
    parts = (labels, match.ious), (labels, None), (found.labels[match.false_positives], None)
    parts += ((truth.labels[match.false_negatives], None),)
    return np.stack([np.bincount(of, weights, classes) for of, weights in parts], axis=1)


def measure_quality(counts: np.ndarray) -> np.ndarray:
    """Compute PQ, SQ and RQ of each class from :func:`count_matches` of all images; NaN for a class without segments.

    Args:
        counts: shape (..., 4).

    Returns:
        Shape (..., 3), from 0 to 1.
    """
    iou, hits, wrong, missed = np.moveaxis(np.asarray(counts, float), -1, 0)
    size = hits + (wrong + missed) / 2
    segmentation = iou / np.maximum(hits, 1)
    recognition = np.divide(hits, size, out=np.full_like(size, np.nan), where=size > 0)
    segmentation = np.where(size > 0, segmentation, np.nan)
    return np.stack([segmentation * recognition, segmentation, recognition], axis=-1)


def average(quality: np.ndarray) -> np.ndarray:
    """Return the mean of PQ, SQ and RQ over the classes with segments, NaN without any; shape (3,)."""
    known = quality[~np.isnan(quality[:, 0])]
    return known.mean(axis=0) if len(known) else np.full(3, np.nan)


@METRICS.register_module()
class PanopticQuality(PatientMetric, CocoPanopticMetric):
    """PQ, SQ and RQ of all classes, of things and of stuff, in percent; replaces MMDetection's CocoPanopticMetric.

    That class needs panopticapi, which no package index has under a licence. Arguments and names are the same.

    Args:
        ann_file: an annotation file in COCO's panoptic format.
        seg_prefix: the folder of its PNGs.
        classwise: whether to log the metrics of each class.
        format_only: whether to only write the predictions.
        outfile_prefix: if given, PNGs of the predictions are written to PREFIX.panoptic, and PREFIX.panoptic.json.

    Attributes:
        counts: after an evaluation, :func:`count_matches` of each image by its id.
        entries: the images' predictions in COCO's panoptic format, if they were written.

    Raises:
        InputError: if an argument is missing.
    """

    tmp_dir = None  # MMDetection's class looks for it when it is deleted

    def __init__(
        self, ann_file: str | None = None, seg_prefix: str | None = None, classwise: bool = False,
        format_only: bool = False, outfile_prefix: str | None = None, nproc: int = 0, backend_args: dict | None = None,
        collect_device: str = 'cpu', prefix: str | None = None,
    ) -> None:  # fmt: skip
        BaseMetric.__init__(self, collect_device=collect_device, prefix=prefix)
        if not ann_file or not (seg_prefix or format_only) or format_only and not outfile_prefix:
            raise InputError('PanopticQuality needs ann_file and seg_prefix, or with format_only outfile_prefix. Set '
                             'them in the evaluator')  # fmt: skip
        self.file = PanopticFile(ann_file)
        self.truth = {a['image_id']: a for a in self.file.dataset.get('annotations', ())}
        self.seg_prefix, self.classwise, self.format_only = seg_prefix, classwise, format_only
        self.outfile_prefix = outfile_prefix
        self.counts: dict[object, np.ndarray] = {}
        self.entries: dict[object, dict | None] = {}

    @property
    def categories(self) -> list[dict]:
        """The categories of the labels, in their order."""
        names = self.dataset_meta['classes']
        return [category for category in self.file.dataset['categories'] if category['name'] in names]

    @property
    def label_of(self) -> dict[int, int]:
        """The labels by category id."""
        return {category['id']: label for label, category in enumerate(self.categories)}

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Match the segments of images, and write their predictions if wanted."""
        categories, label_of = self.categories, self.label_of
        for sample in data_samples:
            if 'pred_panoptic_seg' not in sample:
                raise InputError('PanopticQuality: the model predicts no panoptic segmentation. Use another evaluator')
            panoptic = sample['pred_panoptic_seg']['sem_seg'][0].cpu().numpy()
            found, image, entry = Segments.from_prediction(panoptic, len(categories)), sample['img_id'], None
            if self.outfile_prefix:
                stem = Path(self.file.imgs[image]['file_name']).with_suffix('')
                entry = write_prediction(found, image, Path(f'{self.outfile_prefix}.{PNGS}'), stem)
                for segment in entry['segments_info']:
                    segment['category_id'] = categories[segment['category_id'] - 1]['id']
            counts = None
            if not self.format_only:
                annotation = self.truth[image]
                ids = read_ids(os.path.join(self.seg_prefix, annotation['file_name']))
                if ids.shape != panoptic.shape:
                    raise InputError(f'{self.seg_prefix}: the size of {annotation["file_name"]} is not that of its '
                                     'image. Run "spec-mmdet prepare" to list all faults')  # fmt: skip
                truth = Segments.from_ids(ids, annotation['segments_info'], label_of)
                counts = count_matches(truth, found, len(categories))
            self.results.append((image, counts, entry))

    def compute_metrics(self, results: list[tuple]) -> dict[str, float]:
        """Compute the metrics of the images that :meth:`process` has matched; -1 without any segment."""
        if self.outfile_prefix:
            path = f'{self.outfile_prefix}.{PNGS}.json'
            write(Path(path), json.dumps(dict(annotations=[entry for _, _, entry in results])).encode())
            print_log(f'wrote {path}', 'current')
        if self.format_only:
            return {}
        self.counts = {image: counts for image, counts, _ in results}
        self.entries = {image: entry for image, _, entry in results}
        quality = measure_quality(sum(self.counts.values()))
        groups = group_classes(self.categories, quality)
        rows, metrics = [['', 'PQ', 'SQ', 'RQ', 'classes']], {}
        for (name, of_group), suffix in zip(groups.items(), ('', '_th', '_st')):
            values = np.nan_to_num(100 * average(of_group), nan=-1).tolist()
            metrics |= {f'{kind}{suffix}': value for kind, value in zip(('PQ', 'SQ', 'RQ'), values)}
            rows.append([name, *(f'{value:.3f}' for value in values), len(of_group)])
        if self.classwise:
            names = [category['name'] for category in self.categories]
            rows += [[n, *(f'{value:.3f}' for value in 100 * row), ''] for n, row in zip(names, quality)]
        print_log('\n' + AsciiTable(rows).table, 'current')
        return metrics


Metric = PanopticQuality


def group_classes(categories: Sequence[dict], quality: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows of :func:`measure_quality` for all classes, for things and for stuff."""
    things = np.array([bool(category['isthing']) for category in categories])
    return dict(all=quality, things=quality[things], stuff=quality[~things])


def write_prediction(found: Segments, image_id: object, folder: Path, stem: Path) -> dict:
    """Write the PNG of an image's predicted segments, and return the image's entry in COCO's panoptic format.

    Args:
        found: the segments.
        image_id: the image's id.
        folder: the folder of the PNGs.
        stem: the PNG's path in it, without a suffix.

    Returns:
        The entry. Category ids are labels + 1; segment ids are from 1 on.
    """
    path = folder / stem.parent / f'{stem.name}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode('.png', encode_ids(found.places + 1)[..., ::-1])[1])
    segments = []
    for place, label in enumerate(found.labels.tolist()):
        x, y, width, height = cv2.boundingRect((found.places == place).astype(np.uint8))
        area = int((found.places == place).sum())
        segments.append(dict(id=place + 1, category_id=label + 1, iscrowd=0, area=area, bbox=[x, y, width, height]))
    return dict(image_id=image_id, file_name=path.relative_to(folder).as_posix(), segments_info=segments)


def mark_truth(sample: DetDataSample, classes: Sequence[str]) -> list[Mark]:
    """Return the marks of an image's stuff, in the map of classes, and of its things."""
    if 'gt_sem_seg' not in sample:
        return []
    labels = np.asarray(sample.gt_sem_seg.sem_seg.cpu())[0]
    things = convert_to_marks(sample.gt_instances, classes)
    for mark in things:
        mark.framed = False
    drawn = np.unique(np.asarray(sample.gt_instances.labels.cpu()))
    return convert_map_to_marks(np.where(np.isin(labels, drawn), len(classes), labels), classes) + things


def mark_predictions(sample: DetDataSample, classes: Sequence[str], score: float) -> list[Mark]:
    """Return the marks of an image's predicted segments, which have no score."""
    return convert_map_to_marks(np.asarray(sample.pred_panoptic_seg.sem_seg.cpu())[0], classes)


def list_categories(cfg: Config, classes: Sequence[str]) -> list[dict]:
    """List the categories of the results; ids are labels + 1."""
    things = next(node['num_things_classes'] for _, node in walk(cfg.model) if 'num_things_classes' in node)
    return [dict(id=i, name=name, isthing=int(i <= things)) for i, name in enumerate(classes, start=1)]


def list_results(
    sample: DetDataSample, classes: Sequence[str], score: float, image_id: int, folder: Path, stem: Path
) -> Iterator[dict]:
    """Write an image's PNG to folder/panoptic, and yield its entry in COCO's panoptic format; see :mod:`detection`."""
    panoptic = np.asarray(sample.pred_panoptic_seg.sem_seg.cpu())[0]
    yield write_prediction(Segments.from_prediction(panoptic, len(classes)), image_id, folder / PNGS, stem)


def find_evaluator(cfg: Config) -> dict:
    """Return the config of the test evaluator that a report shows.

    Raises:
        InputError: if there is none.
    """
    found = [e for e in list_metrics(cfg, 'test') if is_kind_of(e, METRICS, PanopticQuality)]
    if not found or found[0].get('format_only'):
        raise InputError('--report: needs a PanopticQuality without format_only in test_evaluator. Add one')
    return found[0]


def prepare_report(folder: Path, cfg: Config) -> None:
    """Make a config's evaluation write its predictions to a report's folder; changes ``cfg``.

    Raises:
        InputError: if the config has no evaluation of PQ.
    """
    evaluator = find_evaluator(cfg)
    evaluator.outfile_prefix = evaluator.get('outfile_prefix') or str(folder / PARTIAL / 'predictions')


def describe_report(
    folder: Path, cfg: Config, metric: PanopticQuality, weights: dict[str, object]
) -> dict[str, object]:
    """Return the values of the template panoptic.html, and write the worst images; see :mod:`detection`."""
    evaluator, dataset = find_evaluator(cfg), next(list_datasets(cfg, 'test'))
    record_data(folder, Path(evaluator.ann_file), list_configured_classes(dataset), weights)
    categories = metric.categories
    counts = sum(metric.counts.values())
    quality = measure_quality(counts)
    groups = group_classes(categories, quality)
    images = os.path.join(dataset.get('data_root') or '', dataset.data_prefix.img)
    of_image = {image: measure_quality(own.sum(axis=0))[0] for image, own in metric.counts.items()}
    ranked = sorted((image for image, value in of_image.items() if not np.isnan(value)), key=of_image.get)
    chosen = {'lowest PQ': ranked[:WORST], 'highest PQ': ranked[WORST:][::-1][:SHOWN]}
    (folder / IMAGES).mkdir()
    names = [category['name'] for category in categories]
    with use_font_for(names):
        examples = [
            (kind, [draw_example(folder, metric, image, images, names, of_image[image]) for image in found])
            for kind, found in chosen.items()
            if found
        ]
    segments = counts[:, 1] + counts[:, 3]
    return dict(
        images=len(metric.counts),
        segments=int(segments.sum()),
        stats=[(name, *format_quality(average(of_group)), len(of_group)) for name, of_group in groups.items()],
        classes=[
            (c['name'], 'thing' if c['isthing'] else 'stuff', *format_quality(q), int(n), *map(int, own[1:]))
            for c, q, n, own in zip(categories, quality, segments, counts)
        ],
        counts=COUNTS,
        colours=COLOURS,
        examples=examples,
        data=display_path(evaluator.ann_file),
        folder=display_path(images),
    )


def format_quality(values: np.ndarray) -> list[str]:
    """Return metrics in percent as text, a dash for NaN."""
    return ['–' if np.isnan(value) else f'{100 * value:.1f}' for value in values]


def draw_example(
    folder: Path, metric: PanopticQuality, image_id: object, images: str, names: Sequence[str], quality: float
) -> dict:
    """Draw the truth and the prediction of an image, for the page and in full size into the report's folder."""
    name = metric.file.imgs[image_id]['file_name']
    sides = [
        Segments.from_ids(read_ids(os.path.join(place, entry['file_name'])), entry['segments_info'], metric.label_of)
        for place, entry in (
            (metric.seg_prefix, metric.truth[image_id]),
            (f'{metric.outfile_prefix}.{PNGS}', metric.entries[image_id]),
        )
    ]
    match, crowds = match_segments(*sides), np.flatnonzero(sides[0].crowd)
    outcomes = (
        dict(
            true_positives=match.pairs[:, 0],
            false_negatives=match.false_negatives,
            crowd=crowds,
        ),
        dict(true_positives=match.pairs[:, 1], false_positives=match.false_positives, crowd=match.ignored),
    )
    image = decode(get(os.path.join(images, name)))[..., ::-1]
    grey = 0.3 * image + 0.7 * image.mean(axis=2, keepdims=True)  # makes the colours of the marks stand out

    def draw_both(longer: int, name: str = '') -> list[np.ndarray]:
        titles = (f'truth, orange: false negatives: {name}', f'predictions, red: false positives: {name}')
        pictures = []
        for segments, outcome, title in zip(sides, outcomes, titles):
            marks = [
                Mark(None, names[segments.labels[i]], to_rgb_bytes(COLOURS[kind]), segments.places == i, framed=False)
                for kind, places in outcome.items()
                for i in places
            ]
            marks = [mark for mark in marks if mark.mask is not None]
            pictures.append(draw(grey, marks, longer / max(image.shape[:2]), title if name else ''))
        return pictures

    numbers = len(match.pairs), len(match.false_positives), len(match.false_negatives)
    text = ', '.join(f'{number} {kind}' for number, kind in zip(numbers, COUNTS))
    path = folder / IMAGES / f'{image_id}_{Path(name).stem}.jpg'
    return write_example(path, name, f'PQ {100 * quality:.1f}, {text}', image.shape, draw_both)
