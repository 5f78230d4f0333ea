"""Draw the report's plots and pictures: curves, confusion matrix, and the images with the most errors."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pycocotools.cocoeval import COCOeval

from .drawing import Mark, draw, format_label, tile_pictures, to_rgb_bytes
from .outcomes import ERRORS, MIN_IOU, Outcome, Scores

COLOURS = dict(true_positives='#2563eb', false_negatives='#f59e0b', false_positives='#dc2626', crowd='#6b7280')
CLASSES = 30  # maximum of classes in the plot of the confusion matrix
SHOWN = 3  # images drawn for each type of error, and without errors
DPI = 150  # of the plots; an inch is 100 pixels of the page
SIDE = 420  # longer side of an image in the page, in pixels


def embed_picture(content: bytes, kind: str, width: int) -> dict:
    """Return a picture for a page: its data URL and its width in pixels."""
    return dict(address=f'data:image/{kind};base64,{base64.b64encode(content).decode()}', width=width)


def embed_figure(figure: Figure) -> dict:
    """Return a figure as a picture for a page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    return embed_picture(buffer.getvalue(), 'png', round(figure.get_figwidth() * 100))


def encode_jpeg(image: np.ndarray) -> bytes:
    """Encode an image, RGB, as JPEG."""
    return cv2.imencode('.jpg', image[..., ::-1])[1].tobytes()


def add_legend(axis: Axes) -> None:
    """Add a legend below a plot, where it covers no curve."""
    axis.legend(loc='upper center', bbox_to_anchor=(0.5, -0.17), ncols=3, frameon=False, fontsize=8, columnspacing=1.2)


def start_plot(title: str, **settings: object) -> tuple[Figure, Axes]:
    """Return an empty plot in the pages' style."""
    figure = Figure(figsize=(5.2, 3.9), layout='constrained')
    axis = figure.subplots()
    axis.set(title=title, **settings)
    axis.grid(alpha=0.3)
    return figure, axis


def draw_precision(evaluation: COCOeval, name: str) -> Figure:
    """Plot precision against recall, as the mean over the classes with objects, up to the largest recall."""
    figure, axis = start_plot(name, xlim=(0, 1), ylim=(0, 1.02), xlabel='recall', ylabel='precision')
    precision = evaluation.eval['precision'][:, :, :, 0, -1]
    precision = precision[:, :, precision[0, 0] > -1]
    for label, iou in (('IoU 0.50', slice(0, 1)), ('0.75', slice(5, 6)), ('0.50 to 0.95', slice(None))):
        if precision.size:
            curve = precision[iou].mean(axis=(0, 2))
            drawn = np.where(curve > 0, curve, np.nan)  # no class reaches the recall
            axis.plot(evaluation.params.recThrs, drawn, label=f'{label}: AP {curve.mean():.3f}')
    if precision.size:
        add_legend(axis)
    return figure


def draw_scores(scores: Scores, name: str) -> Figure:
    """Plot precision, recall and F1 against the score threshold; precision only where detections remain."""
    best = scores.thresholds[scores.best], scores.f1[scores.best]
    title = f'{name}, IoU at least {MIN_IOU:.2f}: best F1 {best[1]:.2f} at {best[0]:.2f}'
    figure, axis = start_plot(title, xlim=(0, 1), ylim=(0, 1.02), xlabel='score threshold')
    for key, line in (('precision', '--'), ('recall', ':'), ('f1', '-')):
        axis.plot(scores.thresholds, getattr(scores, key), line, label='F1' if key == 'f1' else key)
    axis.plot(*best, 'ko', markersize=5, clip_on=False)
    add_legend(axis)
    return figure


def draw_training(curves: dict[str, tuple[list, list]], metrics: Iterable[str]) -> dict[str, Figure]:
    """Plot the loss and metrics of a training; return the plots by their title.

    Args:
        curves: iterations and values by name.
        metrics: names of curves.
    """
    figures = {}
    for title, names in (('loss', ['loss']), ('metrics on the validation images', metrics)):
        drawn = [name for name in names if name in curves]
        figure, axis = start_plot(title, xlabel='iteration', **(dict(yscale='log') if title == 'loss' else {}))
        for name in drawn:
            axis.plot(*curves[name], marker='o' if len(curves[name][0]) < 20 else None, markersize=4, label=name)
        if drawn:
            add_legend(axis)
            figures[title] = figure
    return figures


def select_confused(matrix: np.ndarray, count: int) -> np.ndarray:
    """Return the indices, sorted, of the most confused classes; ties go to those confused most with the background.

    Args:
        matrix: confusion matrix, shape (classes + 1, classes + 1); the last row and column are the background.
        count: number of classes to select.
    """
    wrong = matrix - np.diag(np.diag(matrix))
    among, beside = wrong[:-1, :-1], wrong[:-1, -1] + wrong[-1, :-1]
    return np.sort(np.lexsort((-beside, -among.sum(axis=0) - among.sum(axis=1)))[:count])


def draw_confusion(matrix: np.ndarray, names: list[str]) -> Figure:
    """Plot the confusion matrix: colours are shares of a row, numbers are counts.

    With more than :data:`CLASSES` classes, only the most confused ones are shown; the others are merged.
    """
    labels = [*names, 'background']
    if len(names) > CLASSES:
        drawn = select_confused(matrix, CLASSES)
        group = np.full(len(labels), CLASSES)
        group[drawn], group[-1] = range(CLASSES), CLASSES + 1
        member = np.eye(CLASSES + 2, dtype=matrix.dtype)[group]
        matrix = member.T @ matrix @ member
        labels = [*(names[i] for i in drawn), f'{len(names) - CLASSES} others', 'background']
    size = max(4.5, 2.45 + 0.45 * len(names)) if len(labels) <= 20 else 11.5
    figure = Figure(figsize=(size, size), layout='constrained')
    axis = figure.subplots()
    share = matrix / matrix.sum(axis=1, keepdims=True).clip(1)
    axis.imshow(share, cmap='Blues', vmin=0, vmax=1)
    font = 9 if len(labels) <= 20 else 8
    axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=font)
    axis.set_yticks(range(len(labels)), labels, fontsize=font)
    axis.set(xlabel='predicted', ylabel='truth')
    for edge in np.arange(len(labels) + 1) - 0.5:
        axis.axhline(edge, color='#e5e7eb', linewidth=0.4)
        axis.axvline(edge, color='#e5e7eb', linewidth=0.4)
    for i, j in np.argwhere(matrix):
        count, colour = matrix[i, j], 'white' if share[i, j] > 0.5 else 'black'
        text = f'{count / 1000:.0f}k' if count >= 10_000 else str(count)
        axis.text(j, i, text, ha='center', va='center', fontsize=font if count < 1000 else font - 2, color=colour)
    return figure


def list_confusions(matrix: np.ndarray, names: list[str]) -> list[dict]:
    """List the non-zero counts of a confusion matrix, the largest first: truth, predicted, count."""
    labels = [*names, 'background']
    pairs = sorted(np.argwhere(matrix).tolist(), key=lambda pair: -matrix[tuple(pair)])
    return [dict(truth=labels[i], predicted=labels[j], count=int(matrix[i, j])) for i, j in pairs]


def draw_sides(
    image: np.ndarray,
    evaluation: COCOeval,
    image_id: int,
    outcome: Outcome,
    masks: Sequence[dict] | None,
    longer: int,
    name: str = '',
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the objects and the detections of an image, coloured by their outcome.

    Args:
        image: shape (H, W, 3), RGB, 0 to 255.
        evaluation: the evaluation of boxes.
        image_id: id of this image.
        outcome: outcome of this image.
        masks: RLE masks of all detections; None if the detector has none.
        longer: length of the pictures' longer side, in pixels.
        name: name of the image, for titles; '' draws none.
    """
    truth, found = evaluation.cocoGt.anns, evaluation.cocoDt.anns
    crowds = [a['id'] for a in evaluation.cocoGt.imgToAnns[image_id] if a['iscrowd']]
    hits = [[pair[i] for pair in outcome.true_positives] for i in (1, 0)]
    kinds = dict(crowd=crowds, true_positives=hits[0], false_negatives=outcome.false_negatives)
    left = [(truth[index], kind) for kind, ids in kinds.items() for index in ids]
    kinds = dict(crowd=outcome.crowd, true_positives=hits[1], false_positives=outcome.false_positives)
    right = [(found[index], kind) for kind, ids in kinds.items() for index in ids]

    def mark(thing: dict, kind: str) -> Mark:
        x, y, width, height = thing['bbox']
        mask = None
        if masks is not None:
            rle = masks[thing['id'] - 1] if 'score' in thing else thing['segmentation']
            mask = evaluation.cocoGt.annToMask(dict(image_id=image_id, segmentation=rle)).astype(bool)
        name = 'crowd' if kind == 'crowd' else evaluation.cocoGt.cats[thing['category_id']]['name']
        label = format_label(name, thing.get('score'))
        return Mark(
            (x, y, x + width, y + height), label, to_rgb_bytes(COLOURS[kind]), mask, dashed=kind == 'false_negatives'
        )

    grey = 0.3 * image + 0.7 * image.mean(axis=2, keepdims=True)  # makes the colours of the marks stand out
    scale = longer / max(image.shape[:2])
    sides = 'truth, dashed: false negatives', 'predictions, red: false positives'
    titles = [f'{side}: {name}' if name else '' for side in sides]
    return tuple(draw(grey, [mark(*thing) for thing in side], scale, t) for side, t in zip((left, right), titles))


def rank_images(outcome_of: dict[int, Outcome]) -> Iterator[tuple[str, list[int]]]:
    """Yield the ids of the images to draw, each once: those without errors, then those with the most of each type."""
    errors = {image_id: sum(map(len, outcome.errors.values())) for image_id, outcome in outcome_of.items()}
    hits = {image_id: len(outcome.true_positives) for image_id, outcome in outcome_of.items()}
    good = sorted((i for i in hits if hits[i] and not errors[i]), key=lambda i: -hits[i])[:SHOWN]
    drawn = set(good)
    if good:
        yield 'no error', good
    for kind in sorted(ERRORS, key=lambda kind: -sum(len(o.errors[kind]) for o in outcome_of.values())):
        count = {image_id: len(outcome.errors[kind]) for image_id, outcome in outcome_of.items()}
        worst = sorted((i for i in count if count[i] and i not in drawn), key=lambda i: -count[i])[:SHOWN]
        drawn.update(worst)
        if worst:
            yield kind, worst


def draw_examples(
    folder: Path,
    read: Callable[[str], np.ndarray],
    boxes: COCOeval,
    outcome_of: dict[int, Outcome],
    masks: Sequence[dict] | None,
) -> list[tuple[str, list[dict]]]:
    """Draw the images of :func:`rank_images`, for the page and in full size into a folder.

    Args:
        folder: an existing folder.
        read: function that reads an image, RGB, by its file name.
        boxes: the evaluation of boxes.
        outcome_of: the outcomes by image id.
        masks: see :func:`draw_sides`.

    Returns:
        The pictures of each kind.
    """
    examples = []
    for kind, image_ids in rank_images(outcome_of):
        pictures = []
        for image_id in image_ids:
            name, outcome = boxes.cocoGt.imgs[image_id]['file_name'], outcome_of[image_id]
            image = read(name)
            draw_both = partial(draw_sides, image, boxes, image_id, outcome, masks)
            path = folder / f'{image_id}_{Path(name).stem}.jpg'
            pictures.append(write_example(path, name, describe_outcome(outcome), image.shape, draw_both))
        examples.append((kind, pictures))
    return examples


def write_example(
    path: Path, name: str, counts: str, shape: Sequence[int], draw_both: Callable[..., Sequence[np.ndarray]]
) -> dict:
    """Write the truth and the prediction of an image in full size, and return both with its texts for the page.

    Args:
        path: the JPEG to write, in a folder beside the page.
        name: the image's name, also for titles in the file.
        counts: text about the image.
        shape: shape of the image, (H, W, ...).
        draw_both: function that draws both sides, given the length of their longer side in pixels, and the name if
            they have titles.
    """
    path.write_bytes(encode_jpeg(tile_pictures(draw_both(max(800, *shape[:2]), name), 2)))
    width = round(SIDE * shape[1] / max(shape[:2]))
    sides = [embed_picture(encode_jpeg(side), 'jpeg', width) for side in draw_both(2 * SIDE)]
    return dict(name=name, counts=counts, whole=f'{path.parent.name}/{path.name}', sides=sides)


def describe_outcome(outcome: Outcome) -> str:
    """Return an image's numbers of true positives and of errors as text."""
    errors = [f'{len(ids)} {kind}' for kind, ids in outcome.errors.items() if ids]
    return ', '.join([f'{len(outcome.true_positives)} true positives', *errors])
