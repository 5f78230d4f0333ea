"""An evaluation that people can look at: one HTML page with COCO's figures, curves, confusions and the worst images."""

from __future__ import annotations

import base64
import io
import json
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import jinja2
import mmcv
import mmdet
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.fileio import get_local_path
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.fitting import coco_datasets, configured_classes, evaluators
from ..data.reading import AnnotationFile
from ..errors import InputError
from ..files import ASIDE, is_empty
from .drawing import names_drawn
from .metrics import Evaluation

WORST = 8  # how many images are drawn
MIN_SCORE = 0.3  # a detection below this counts in the curves and AP alone
MIN_IOU = 0.5
STATS = (
    'AP',
    'AP50',
    'AP75',
    'APs',
    'APm',
    'APl',
    'AR1',
    'AR10',
    'AR100',
    'ARs',
    'ARm',
    'ARl',
)  # as pycocotools has them
COLOURS = dict(found='#2563eb', missed='#f59e0b', false='#dc2626', crowd='#6b7280')
PAGE = 'index.html'
MARK = '<meta name="generator" content="spec_mmdet report">'
DPI = 150  # of the pictures, whose inches are a hundred of the page's pixels


@dataclass
class Outcome:
    """What became of an image's objects and of its detections with a score of MIN_SCORE or more, by their ids."""

    found: list[tuple[int, int]] = field(default_factory=list)  # detection and object
    false: list[int] = field(default_factory=list)
    crowd: list[int] = field(default_factory=list)  # detections in a crowd region, which do not count
    missed: list[int] = field(default_factory=list)  # objects


def prepare(folder: Path, cfg: Config) -> None:
    """Check that a report can be written and have the evaluation leave its detections beside it; changes ``cfg``.

    Args:
        folder: where the report is to be: new, empty, or an earlier report's, which stays until the new one is whole.
        cfg: the whole config, command line options merged.

    Raises:
        InputError: if the folder holds anything else, or the config has no COCO evaluation to report on.
    """
    if folder.exists():
        page = folder / PAGE
        if not is_empty(folder) and not (page.is_file() and MARK in page.read_text('utf-8')):
            raise InputError(f'--report {folder}: holds something other than a report; name a new folder')
    evaluator = coco_evaluator(cfg)
    if not evaluator.get('ann_file') or evaluator.get('format_only') or 'bbox' not in evaluator.get('metric', 'bbox'):
        raise InputError("--report: needs a test_evaluator that has an ann_file, the metric 'bbox' and no format_only")
    if not any(coco_datasets(cfg.test_dataloader)):
        raise InputError('--report: needs a CocoDataset in test_dataloader')
    evaluator.outfile_prefix = evaluator.get('outfile_prefix') or str(folder / ASIDE / 'detections')


def coco_evaluator(cfg: Config) -> dict:
    """The test evaluator whose metric is COCO's; an InputError where there is none."""
    for evaluator in evaluators(cfg, 'test'):
        if evaluator.type in ('CocoMetric', 'FastCocoMetric'):
            return evaluator
    raise InputError('--report: needs a CocoMetric in test_evaluator')


def evaluate(coco: COCO, detections: Path, kind: str, categories: list[int | str]) -> COCOeval:
    """Evaluate detections by pycocotools' own rules; the ids in the result are numbers (see :class:`Evaluation`).

    Args:
        coco: the truth.
        detections: a JSON file in COCO's format for results.
        kind: 'bbox' or 'segm'.
        categories: ids of those to evaluate.
    """
    results = json.loads(detections.read_bytes())
    if kind == 'segm':
        for result in results:
            del result['bbox']  # or its area would be taken for the mask's
    if results:
        found = coco.loadRes(results)
    else:  # loadRes cannot tell of what kind no results are
        found = COCO()
        found.dataset = dict(coco.dataset, annotations=[])
        found.createIndex()
    evaluation = Evaluation(coco, found, kind)
    evaluation.params.catIds = categories
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def average_precision(evaluation: COCOeval, category: int, iou: slice = slice(None)) -> float:
    """A category's AP, by its place among the evaluated; -1 where it has no objects."""
    precision = evaluation.eval['precision'][iou, :, category, 0, -1]
    precision = precision[precision > -1]
    return float(precision.mean()) if precision.size else -1.0


def outcomes(evaluation: COCOeval) -> dict[int, Outcome]:
    """What became of each image's objects and detections, by pycocotools' matching at MIN_IOU; keys are image ids.

    Its matching is greedy from the highest score down, so that detections below MIN_SCORE have no part in it.
    """
    result = {image_id: Outcome() for image_id in evaluation.params.imgIds}
    whole = evaluation.params.areaRng[0]
    (threshold,) = np.flatnonzero(evaluation.params.iouThrs == MIN_IOU)
    for entry in evaluation.evalImgs:
        if entry is None or entry['aRng'] != whole:
            continue
        outcome = result[entry['image_id']]
        matched = set()
        for detection, score, match, ignored in zip(
            entry['dtIds'], entry['dtScores'], entry['dtMatches'][threshold], entry['dtIgnore'][threshold]
        ):
            if score < MIN_SCORE:
                continue
            if ignored:
                outcome.crowd.append(detection)
            elif match:
                outcome.found.append((detection, int(match)))
                matched.add(int(match))
            else:
                outcome.false.append(detection)
        pairs = zip(entry['gtIds'], entry['gtIgnore'])
        outcome.missed += [truth for truth, ignored in pairs if not ignored and truth not in matched]
    return result


def confusion_matrix(evaluation: COCOeval, outcome_of: dict[int, Outcome]) -> np.ndarray:
    """Count which category was taken for which.

    An object that was found counts on the diagonal. A false positive that lies on a missed object (IoU of boxes of
    MIN_IOU or more) counts as taken for it, each at most once; all other missed objects and false positives count as
    confused with the background, the last row and column.

    Returns:
        Counts, rows truth and columns predictions: a row sums up to the objects, a column to the detections.
    """
    place = {category: i for i, category in enumerate(evaluation.params.catIds)}
    truth, found = evaluation.cocoGt.anns, evaluation.cocoDt.anns
    matrix = np.zeros((len(place) + 1, len(place) + 1), int)
    for outcome in outcome_of.values():
        for _, object_id in outcome.found:
            matrix[(place[truth[object_id]['category_id']],) * 2] += 1
        missed = list(outcome.missed)
        for detection in sorted(outcome.false, key=lambda d: -found[d]['score']):
            row = -1
            if missed:
                boxes = [truth[object_id]['bbox'] for object_id in missed]
                overlap = mask_utils.iou([found[detection]['bbox']], boxes, [0] * len(missed))[0]
                if overlap.max() >= MIN_IOU:
                    row = place[truth[missed.pop(int(overlap.argmax()))]['category_id']]
            matrix[row, place[found[detection]['category_id']]] += 1
        for object_id in missed:
            matrix[place[truth[object_id]['category_id']], -1] += 1
    return matrix


def embedded(figure: Figure, kind: str = 'png') -> dict:
    """A figure as a picture inside the page, and its width there in pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=DPI)
    code = base64.b64encode(buffer.getvalue()).decode()
    return dict(address=f'data:image/{kind};base64,{code}', width=round(figure.get_figwidth() * 100))


def draw_curves(evaluations: dict[str, COCOeval]) -> Figure:
    """Precision over recall, the mean of all classes that have objects."""
    figure = Figure(figsize=(5.5 * len(evaluations), 3.6), layout='constrained')
    for axis, (name, evaluation) in zip(figure.subplots(1, len(evaluations), squeeze=False)[0], evaluations.items()):
        precision = evaluation.eval['precision'][:, :, :, 0, -1]
        precision = precision[:, :, precision[0, 0] > -1]
        for label, iou in (('IoU 0.50', slice(0, 1)), ('IoU 0.75', slice(5, 6)), ('IoU 0.50 to 0.95', slice(None))):
            if precision.size:
                curve = precision[iou].mean(axis=(0, 2))
                axis.plot(evaluation.params.recThrs, curve, label=f'{label}: AP {curve.mean():.3f}')
        axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel='recall', ylabel='precision', title=name)
        axis.grid(alpha=0.3)
        if precision.size:
            axis.legend(loc='lower left')
    return figure


def draw_confusion(matrix: np.ndarray, names: list[str]) -> Figure:
    """The confusion matrix: colours are shares of a row, numbers (where they find room) are counts."""
    few = len(names) <= 20
    size = max(4.5, 2 + 0.45 * len(names)) if few else 11
    figure = Figure(figsize=(size, size), layout='constrained')
    axis = figure.subplots()
    share = matrix / matrix.sum(axis=1, keepdims=True).clip(1)
    axis.imshow(share, cmap='Blues', vmin=0, vmax=1)
    font = 9 if few else max(3, 540 / len(names))
    labels = [*names, 'background']
    axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=font)
    axis.set_yticks(range(len(labels)), labels, fontsize=font)
    axis.set(xlabel='predicted', ylabel='truth')
    for edge in np.arange(len(labels) + 1) - 0.5:
        axis.axhline(edge, color='#e5e7eb', linewidth=0.4)
        axis.axvline(edge, color='#e5e7eb', linewidth=0.4)
    for i, j in np.argwhere(matrix) if few else ():
        axis.text(
            j, i, matrix[i, j], ha='center', va='center', fontsize=9, color='white' if share[i, j] > 0.5 else 'black'
        )
    return figure


def draw_image(image: np.ndarray, evaluation: COCOeval, outcome: Outcome) -> Figure:
    """The truth beside the predictions, coloured by what became of them.

    Args:
        image: height x width x 3, RGB, 0 to 255.
        evaluation: by masks where there are any, or by boxes.
        outcome: of this image.
    """
    truth, found = evaluation.cocoGt.anns, evaluation.cocoDt.anns
    ids = {object_id for _, object_id in outcome.found} | set(outcome.missed)
    image_id = truth[next(iter(ids))]['image_id'] if ids else found[outcome.false[0]]['image_id']
    crowds = [a['id'] for a in evaluation.cocoGt.imgToAnns[image_id] if a['iscrowd']]
    left = [(truth[o], kind) for kind, own in (('crowd', crowds), ('found', [o for _, o in outcome.found]),
            ('missed', outcome.missed)) for o in own]  # fmt: skip
    right = [(found[d], kind) for kind, own in (('crowd', outcome.crowd), ('found', [d for d, _ in outcome.found]),
             ('false', outcome.false)) for d in own]  # fmt: skip

    height, width = image.shape[:2]
    scale = min(5.4 / width, 4.8 / height)  # inches a pixel
    figure = Figure(figsize=(2 * scale * width + 0.2, scale * height + 0.3), facecolor='white')
    whole_width, whole_height = figure.get_size_inches()
    for x, title, things in (
        (0, 'truth', left),
        (scale * width + 0.2, f'predictions, score at least {MIN_SCORE}', right),
    ):
        axis = figure.add_axes(
            (x / whole_width, 0, scale * width / whole_width, scale * height / whole_height), frameon=False
        )
        axis.set_title(title, fontsize=9, loc='left', pad=4)
        # Nearly grey, so that the colours stand out.
        grey = 0.3 * image + 0.7 * image.mean(axis=2, keepdims=True)
        painted = grey.copy()
        for thing, kind in things:
            colour = COLOURS[kind]
            if 'segmentation' in thing and evaluation.params.iouType == 'segm':
                mask = evaluation.cocoGt.annToMask(thing).astype(bool)
                painted[mask] = 0.6 * grey[mask] + 0.4 * np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
            left_edge, top, box_width, box_height = thing['bbox']
            line = dict(edgecolor=colour, linewidth=1.8, linestyle='--' if kind == 'missed' else '-', fill=False)
            axis.add_patch(Rectangle((left_edge, top), box_width, box_height, **line))
            label = 'crowd' if kind == 'crowd' else evaluation.cocoGt.cats[thing['category_id']]['name']
            if 'score' in thing:
                label += f' {thing["score"]:.2f}'
            box = dict(facecolor=colour, edgecolor='none', pad=1)
            axis.text(
                max(left_edge, 0),
                max(top, 0),
                label,
                color='white',
                fontsize=6.5,
                va='top',
                bbox=box,
                clip_on=True,
            )
        axis.imshow(painted.astype(np.uint8), aspect='auto', extent=(0, width, height, 0))
        axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    return figure


def draw_worst(dataset: dict, evaluations: dict[str, COCOeval], outcome_of: dict[int, Outcome]) -> list[dict]:
    """The images with the most mistakes, as they go into the page.

    Args:
        dataset: the config of the data set, which says where they are.
        evaluations: by boxes first.
        outcome_of: their outcomes by boxes.
    """
    errors = {image_id: len(o.missed) + len(o.false) for image_id, o in outcome_of.items()}
    worst = sorted((i for i in errors if errors[i]), key=lambda i: -errors[i])[:WORST]
    pictures = []
    for image_id in worst:
        name = evaluations['Boxes'].cocoGt.imgs[image_id]['file_name']
        image = mmcv.imread(
            str(Path(dataset.get('data_root') or '', dataset.data_prefix.img, name)), channel_order='rgb'
        )
        outcome = outcome_of[image_id]
        figure = draw_image(image, list(evaluations.values())[-1], outcome)
        counts = f'{len(outcome.missed)} missed, {len(outcome.false)} false, {len(outcome.found)} found'
        pictures.append(dict(embedded(figure, 'jpeg'), name=name, counts=counts))
    return pictures


def shown(value: float) -> str:
    """A figure as it is printed; a dash for pycocotools' -1, which says that there is nothing to measure."""
    return f'{value:.3f}' if value > -1 else '–'


def write(folder: Path, cfg: Config, checkpoint: str, command: str) -> None:
    """Write the report of an evaluation for which :func:`prepare` prepared the config.

    Args:
        folder: where to.
        cfg: the whole config.
        checkpoint: the name of the evaluated one.
        command: the command line.
    """
    evaluator = coco_evaluator(cfg)
    dataset = next(coco_datasets(cfg.test_dataloader))
    metrics = evaluator.get('metric', 'bbox')
    kinds = {'Boxes': 'bbox', 'Masks': 'segm'} if 'segm' in metrics else {'Boxes': 'bbox'}
    with redirect_stdout(io.StringIO()):
        with get_local_path(evaluator.ann_file, backend_args=evaluator.get('backend_args')) as path:
            coco = AnnotationFile(str(path))
        categories = coco.getCatIds(catNms=configured_classes(dataset))
        evaluations = {
            name: evaluate(coco, Path(f'{evaluator.outfile_prefix}.{kind}.json'), kind, categories)
            for name, kind in kinds.items()
        }
    boxes = evaluations['Boxes']
    outcome_of = outcomes(boxes)
    coco = boxes.cocoGt
    names = [coco.cats[category]['name'] for category in boxes.params.catIds]
    matrix = confusion_matrix(boxes, outcome_of)
    found, missed, false = (sum(len(getattr(o, k)) for o in outcome_of.values()) for k in ('found', 'missed', 'false'))

    with names_drawn(names):
        pictures = draw_worst(dataset, evaluations, outcome_of)
        curves, confusion = embedded(draw_curves(evaluations)), embedded(draw_confusion(matrix, names))
    mistaken = [(matrix[i, j], names[i], names[j]) for i, j in np.argwhere(matrix[:-1, :-1]) if i != j]
    device = torch.cuda.get_device_name() if get_device() == 'cuda' else get_device()
    page = jinja2.Template(Path(__file__).with_name('report.html').read_text('utf-8'), autoescape=True).render(
        mark=MARK,
        title=Path(cfg.filename).stem,
        checkpoint=checkpoint,
        images=len(coco.imgs),
        objects=found + missed,
        date=time.strftime('%Y-%m-%d %H:%M'),
        stat_names=STATS,
        stats={name: [shown(value) for value in evaluation.stats] for name, evaluation in evaluations.items()},
        found=found,
        missed=missed,
        false_positives=false,
        min_score=MIN_SCORE,
        min_iou=MIN_IOU,
        curves=curves,
        confusion=confusion,
        mistaken=sorted(mistaken, key=lambda m: -m[0])[:10],
        classes=[
            (
                name,
                *(shown(average_precision(evaluation, i)) for evaluation in evaluations.values()),
                shown(average_precision(boxes, i, slice(0, 1))),
                matrix[i].sum(),
            )
            for i, name in enumerate(names)
        ],
        colours=COLOURS,
        pictures=pictures,
        command=command,
        versions=f'torch {torch.__version__}, mmdet {mmdet.__version__}, spec_mmdet {version("spec_mmdet")}',
        device=device,
        config=cfg.filename,
        config_text=cfg.pretty_text,
    )
    (folder / PAGE).write_text(page, 'utf-8')
