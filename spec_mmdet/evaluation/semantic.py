"""The evaluation of semantic segmentation: metric, drawings, results and the report (see :mod:`tasks`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from zlib import crc32

import mmdet.registry
import numpy as np
from mmdet.registry import METRICS
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.fileio import get
from mmengine.logging import MMLogger, print_log
from mmengine.structures import BaseDataElement
from PIL import Image

from ..configs import is_kind_of
from ..data.fitting import list_evaluators
from ..data.images import decode
from ..data.tasks import list_datasets
from ..errors import InputError
from ..files import PARTIAL, display_path, format_csv
from .detection import list_categories  # noqa: F401, a part of the task
from .drawing import Mark, convert_map_to_marks, draw, use_font_for
from .plots import list_confusions, write_example

LABELS = {f'semantic/{name}': name for name in ('mIoU', 'mAcc', 'aAcc')}
ENVELOPE = '[', ']'  # around the results of predict
IMAGES, MAPS, CONFUSIONS = 'images', 'labels', 'confusion.csv'
WORST, BEST = 8, 3  # images in the report
MISTAKEN = 10  # pairs of classes in the report
LISTED = 10  # best and worst classes in the terminal


def measure(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return IoU and accuracy of each class in percent, NaN for a class without pixels.

    Args:
        matrix: pixels by true and predicted class, shape (classes, classes).
    """
    hits, truth, found = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    with np.errstate(invalid='ignore'):
        return 100 * hits / (truth + found - hits), 100 * hits / truth


def average(values: np.ndarray) -> float:
    """Return the mean of the values that are not NaN; NaN if there is none."""
    return float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else float('nan')


def measure_accuracy(matrix: np.ndarray) -> float:
    """Return the percentage of pixels whose class is predicted (aAcc)."""
    return 100 * float(np.trace(matrix)) / matrix.sum() if matrix.any() else float('nan')


@METRICS.register_module()
class SemanticMetric(BaseMetric):
    """mIoU, mAcc and aAcc in percent, as MMSegmentation's IoUMetric, with the confusion matrix of each image.

    Args:
        ignore_index: label of pixels that do not count.
        output_dir: folder for PNGs of the predicted labels; None writes none.
        collect_device, prefix: MMEngine's.
    """

    default_prefix = 'semantic'

    def __init__(
        self,
        ignore_index: int = 255,
        output_dir: str | None = None,
        collect_device: str = 'cpu',
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.ignore_index, self.output_dir = ignore_index, output_dir
        self.images: dict[str, np.ndarray] = {}  # the confusion matrix of each image's path, as pairs and counts

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Count the pixels of each pair of a true and a predicted class.

        Raises:
            InputError: if the labels have been resized with the image.
        """
        number = len(self.dataset_meta['classes'])
        for sample in data_samples:
            truth, found = (
                np.asarray(sample[key]['data'].cpu())[0].astype(np.int64) for key in ('gt_sem_seg', 'pred_sem_seg')
            )
            if truth.shape != found.shape:
                raise InputError(
                    f'{sample["img_path"]}: the labels have shape {truth.shape}, the prediction {found.shape}. Put '
                    'LoadAnnotations behind Resize in the test pipeline'
                )
            counted = (truth != self.ignore_index) & (truth < number)
            pairs = np.unique(truth[counted] * number + found[counted], return_counts=True)
            self.results.append((sample['img_path'], np.stack(pairs)))
            if self.output_dir:
                path = Path(self.output_dir, name_map(sample['img_path']))
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(found.astype(np.uint8)).save(path)

    def expand(self, pairs: np.ndarray) -> np.ndarray:
        """Return the confusion matrix of pairs of classes and their counts, shape (2, number of pairs)."""
        number = len(self.dataset_meta['classes'])
        matrix = np.zeros(number**2, np.int64)
        matrix[pairs[0]] = pairs[1]
        return matrix.reshape(number, number)

    def compute_metrics(self, results: list[tuple[str, np.ndarray]]) -> dict[str, float]:
        """Return mIoU, mAcc and aAcc; log IoU and accuracy of each class, in the terminal of the best and worst."""
        self.images = dict(results)
        self.matrix = sum(map(self.expand, self.images.values()))
        iou, accuracy = measure(self.matrix)
        names = self.dataset_meta['classes']
        width = max(map(len, names))
        title = f'{"class":{width}}    IoU    Acc'
        rows = [f'{name:{width}} {a:6.2f} {b:6.2f}' for name, a, b in zip(names, iou, accuracy)]
        if len(rows) > 2 * LISTED:
            print_log('\n'.join([title, *rows]), 'current')  # not shown in the terminal
            order = [i for i in np.argsort(-iou) if not np.isnan(iou[i])]
            best, worst = ([rows[i] for i in part] for part in (order[:LISTED], order[LISTED:][-LISTED:]))
            rows = [*best, f'... (the log file lists all {len(names)} classes)', *worst]
        MMLogger.get_current_instance().info('\n'.join([title, *rows]))
        return dict(mIoU=average(iou), mAcc=average(accuracy), aAcc=measure_accuracy(self.matrix))


Metric = SemanticMetric


def name_map(path: str) -> str:
    """Return the file name of an image's PNG of labels, unique for its path."""
    return f'{Path(path).stem}_{crc32(path.encode()):08x}.png'


def mark_truth(sample: BaseDataElement, classes: Sequence[str]) -> list[Mark]:
    """Return a mark for each class in the labels of an image."""
    return convert_map_to_marks(np.asarray(sample.gt_sem_seg.data.cpu())[0], classes) if 'gt_sem_seg' in sample else []


def mark_predictions(sample: BaseDataElement, classes: Sequence[str], score: float) -> list[Mark]:
    """Return a mark for each predicted class; the score threshold has no effect."""
    return convert_map_to_marks(np.asarray(sample.pred_sem_seg.data.cpu())[0], classes)


def list_results(
    sample: BaseDataElement, classes: Sequence[str], score: float, image_id: int, folder: Path, stem: Path
) -> Iterator[dict]:
    """Write an image's labels to folder/labels, and yield the number of pixels of each predicted class."""
    labels = np.asarray(sample.pred_sem_seg.data.cpu())[0].astype(np.uint8)
    path = folder / MAPS / f'{stem}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)
    present, counts = np.unique(labels, return_counts=True)
    segments = [dict(category_id=int(label) + 1, area=int(count)) for label, count in zip(present, counts)]
    yield dict(image_id=image_id, file_name=path.relative_to(folder).as_posix(), segments=segments)


def prepare_report(folder: Path, cfg: Config) -> None:
    """Make a config's evaluation write the predicted labels to a report's folder; changes ``cfg``.

    Raises:
        InputError: if the config has no SemanticMetric.
    """
    found = [e for e in list_evaluators(cfg, 'test') if is_kind_of(e, METRICS, SemanticMetric)]
    if not found:
        raise InputError('--report: needs a SemanticMetric in test_evaluator. Add one')
    found[0].output_dir = found[0].get('output_dir') or str(folder / PARTIAL / MAPS)


def describe_report(folder: Path, cfg: Config, metric: SemanticMetric, weights: dict[str, object]) -> dict[str, object]:
    """Return the values of the template semantic.html, and write the worst images; see :mod:`detection`."""
    names, matrix = list(metric.dataset_meta['classes']), metric.matrix
    iou, accuracy = measure(matrix)
    pixels, wrong = matrix.sum(axis=1), matrix - np.diag(np.diag(matrix))
    (config,) = list_datasets(cfg, 'test')
    loading = next(s for s in config['pipeline'] if str(s['type']).rpartition('.')[2] == 'LoadAnnotations')
    dataset = mmdet.registry.DATASETS.build(dict(config, pipeline=[loading]))
    index = {dataset.get_data_info(i)['img_path']: i for i in range(len(dataset))}
    of_image = {path: average(measure(metric.expand(pairs))[0]) for path, pairs in metric.images.items()}
    ranked = sorted((path for path, value in of_image.items() if not np.isnan(value)), key=of_image.get)
    chosen = {'lowest mIoU': ranked[:WORST], 'highest mIoU': ranked[WORST:][::-1][:BEST]}
    (folder / IMAGES).mkdir()
    (folder / CONFUSIONS).write_text(format_csv(list_confusions(matrix, names)), 'utf-8')
    with use_font_for(names):
        examples = [
            (
                kind,
                [
                    draw_example(folder, metric, path, dataset[index[path]]['gt_seg_map'], f'mIoU {of_image[path]:.1f}')
                    for path in paths
                ],
            )
            for kind, paths in chosen.items()
            if paths
        ]
    pairs = sorted(np.argwhere(wrong).tolist(), key=lambda pair: -wrong[tuple(pair)])[:MISTAKEN]
    return dict(
        images=len(metric.images),
        pixels=int(matrix.sum()),
        stats=dict(
            mIoU=format_percent(average(iou)),
            mAcc=format_percent(average(accuracy)),
            aAcc=format_percent(measure_accuracy(matrix)),
        ),
        classes=[
            (
                name,
                format_percent(iou[i]),
                format_percent(accuracy[i]),
                format_percent(100 * pixels[i] / matrix.sum()),
                names[wrong[i].argmax()] if wrong[i].any() else '–',
            )
            for i, name in enumerate(names)
        ],
        mistaken=[(names[i], names[j], format_percent(100 * wrong[i, j] / pixels[i])) for i, j in pairs],
        confusions=CONFUSIONS,
        colours={},
        examples=examples,
        data=display_path(config.get('data_root') or ''),
        folder=display_path(Path(config.get('data_root') or '', config['data_prefix']['img_path'])),
    )


def format_percent(value: float) -> str:
    """Return a percentage as text, a dash for NaN."""
    return '–' if np.isnan(value) else f'{value:.1f}'


def draw_example(folder: Path, metric: SemanticMetric, path: str, truth: np.ndarray, text: str) -> dict:
    """Draw the truth and the prediction of an image, for the page and in full size into the report's folder."""
    names, image = metric.dataset_meta['classes'], decode(get(path))[..., ::-1]
    with Image.open(Path(metric.output_dir, name_map(path))) as file:
        found = np.asarray(file)
    sides = [convert_map_to_marks(labels, names) for labels in (truth, found)]

    def draw_both(longer: int, name: str = '') -> list[np.ndarray]:
        titles = (f'truth: {name}', 'predictions') if name else ('', '')
        return [draw(image, marks, longer / max(image.shape[:2]), title) for marks, title in zip(sides, titles)]

    counted = truth < len(names)
    share = (found[counted] == truth[counted]).mean() if counted.any() else float('nan')
    text = f'{text}, {format_percent(100 * share)} % of the pixels correct'
    whole = folder / IMAGES / f'{Path(name_map(path)).stem}.jpg'
    return write_example(whole, Path(path).name, text, image.shape, draw_both)
