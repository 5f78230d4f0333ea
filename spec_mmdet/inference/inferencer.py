"""Build MMDetection's inferencer from a config and a matching checkpoint, and write its results as JSON."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from mmcv.transforms import Pad
from mmdet.apis import DetInferencer
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from rich.progress import track

from ..checkpoints.reading import describe_mismatches, fetch, get_classes, get_state_dict, load
from ..configs import is_kind_of, is_segmentor, walk
from ..data.fitting import drop_pretrained, has_masks, list_configured_classes
from ..data.tasks import set_classes
from ..errors import InputError
from ..evaluation.drawing import draw, use_font_for
from ..evaluation.tasks import find_task
from ..files import write_folder_atomically
from .media import PictureWriter, count_frames, decode_files


def load_inferencer(cfg: Config, checkpoint: str, device: str | None, score: float = 0.0) -> DetInferencer:
    """Build MMDetection's inferencer with all of a checkpoint's weights and its classes; changes ``cfg``.

    Silences MMEngine's log below errors, because it lists every loaded tensor.

    Args:
        cfg: the complete config; an exported detector only uses its test pipeline.
        checkpoint: file or URL of a checkpoint, or an exported detector (.onnx).
        device: for instance 'cpu' or 'cuda:1'; by default a GPU if there is one.
        score: score threshold, below which detectors with masks build none; detections below it may remain.

    Raises:
        InputError: if the checkpoint cannot be read or does not fit the model.
    """
    MMLogger.get_current_instance().setLevel('ERROR')
    # Warnings about classes that only the config defines, a visualiser without folder, and shapes beyond the edge.
    warnings.filterwarnings('ignore', message='dataset_meta or class names')
    warnings.filterwarnings('ignore', module='mmengine.visualization')
    if checkpoint.endswith('.onnx'):
        use_exported(cfg, checkpoint, device, score)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about missing weights and unknown classes
            inferencer = build_inferencer(cfg, None, {}, 'cpu')
        return set_names(inferencer, inferencer.model.classes)
    name = f'checkpoint {checkpoint}'
    content = load(checkpoint, mmap=True)
    weights = get_state_dict(content, name)
    classes = get_classes(content) or list_configured_classes(cfg.test_dataloader.dataset)  # absent for a backbone
    set_classes(cfg, classes)
    raise_score_threshold(cfg.model, score)
    inferencer = build_inferencer(cfg, fetch(checkpoint), weights, device)
    if faults := describe_mismatches(inferencer.model, weights):
        raise InputError(f'{name} does not fit the configured model: {faults}. Pass the config of its training')
    return set_names(inferencer, classes)


def build_inferencer(
    cfg: Config, checkpoint: str | None, weights: dict[str, torch.Tensor], device: str | None
) -> DetInferencer | SegInferencer:
    """Build the inferencer of a config's library, with the weights of a file, if any; MMDetection's reads it itself."""
    if is_segmentor(cfg):
        return SegInferencer(cfg, weights, device)
    return DetInferencer(cfg, checkpoint, device, show_progress=False)


class SegInferencer:
    """Inferencer of MMSegmentation's models, with the part of DetInferencer's interface that this package uses.

    Args:
        cfg: the complete config.
        weights: the model's state dict; the caller checks that it fits.
        device: for instance 'cpu'; by default a GPU if there is one.
    """

    def __init__(self, cfg: Config, weights: dict[str, torch.Tensor], device: str | None) -> None:
        init_default_scope('mmseg')
        drop_pretrained(cfg.model)
        self.cfg, self.model = cfg, MODELS.build(cfg.model).to(device or get_device()).eval()
        self.model.load_state_dict(weights, strict=False)
        self.model.dataset_meta, self.model.cfg = {}, cfg
        pipeline = cfg.test_dataloader.dataset.pipeline[1:]
        kept = [step for step in pipeline if str(step['type']).rpartition('.')[2] != 'LoadAnnotations']
        self.pipeline = Compose([dict(type='LoadImageFromNDArray'), *kept])

    def prepare(self, images: list[np.ndarray]) -> dict:
        """Return the model's input for images, shape (H, W, 3), BGR."""
        return pseudo_collate([self.pipeline(dict(img=image)) for image in images])

    def __call__(self, images: list[np.ndarray], *_: object, **__: object) -> dict[str, list]:
        """Return a sample with ``pred_sem_seg`` for each image, shape (H, W, 3), BGR, under 'predictions'."""
        with torch.no_grad():
            return dict(predictions=self.model.test_step(self.prepare(images)))


def raise_score_threshold(model: dict, score: float) -> None:
    """Raise the ``score_thr`` of a detector with masks, so that it builds no masks of detections below a score.

    A mask takes a byte per pixel of the image. The other detections do not change: in NMS, lower scores do not suppress
    higher ones.

    Args:
        model: the detector's config, which is changed. Detectors without ``score_thr`` (Mask2Former, QueryInst) build
            the masks of all their detections.
        score: the score threshold.
    """
    for name, node in walk(model) if has_masks(model) else ():
        path = name.split('.')
        if 'score_thr' in node and 'test_cfg' in path and not {'rpn', 'panoptic'} & {*path}:
            below = float(np.nextafter(np.float32(score), np.float32(-1)))  # MMDetection keeps only higher scores
            node['score_thr'] = max(node['score_thr'], below)


def use_exported(cfg: Config, path: str, device: str | None = None, score: float = 0.0) -> None:
    """Replace a config's model by an exported one; changes ``cfg``.

    Args:
        cfg: the complete config.
        path: the .onnx file.
        device: for instance 'cpu'; by default a GPU if there is one.
        score: score threshold of a detector.
    """
    kind = 'OnnxSegmentor' if is_segmentor(cfg) else 'OnnxDetector'
    cfg.model = dict(type=f'mmdet.{kind}', path=path, device=device)
    if not is_segmentor(cfg):
        cfg.model.score = score
    cfg.pop('data_preprocessor', None)  # MMEngine's runner would pass it to the model
    remove_padding(cfg)


def remove_padding(cfg: Config) -> None:
    """Remove padding from the test pipeline, because an exported detector scales boxes by the image's size."""
    for name, node in walk(cfg.test_dataloader, 'test_dataloader'):
        kept = [step for step in node.get('pipeline') or () if not is_kind_of(step, TRANSFORMS, Pad)]
        if len(kept) < len(node.get('pipeline') or ()):
            print(f'{name}.pipeline: padding removed, because exported detectors need none')
            node['pipeline'] = kept


def set_names(inferencer: DetInferencer, classes: Sequence[str]) -> DetInferencer:
    """Set the names of the classes in an inferencer and its visualiser, and return it."""
    inferencer.model.dataset_meta['classes'] = tuple(classes)
    return inferencer


def require_device(device: str | None) -> None:
    """Check that a device exists."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f'--device {device}: not available ({str(error).splitlines()[0]}). Pass --device cpu'
        ) from error


@contextmanager
def write_json_list(path: Path, before: str, after: str) -> Iterator[Callable[[dict], None]]:
    """Write a JSON file that ends in a list, one entry at a time."""
    with path.open('w') as file:
        file.write(before)
        separator = '\n'

        def add(entry: dict) -> None:
            nonlocal separator
            file.write(separator + json.dumps(entry))
            separator = ',\n'

        yield add
        file.write(f'\n{after}\n')


def detect(inferencer: DetInferencer, images: list[np.ndarray]) -> list[DetDataSample | str]:
    """Detect objects in images, shape (H, W, 3), BGR; return a sample for each, or the reason why it was rejected.

    If a batch is rejected, its images are tried one by one.
    """
    try:
        return inferencer(images, len(images), return_datasamples=True, no_save_vis=True)['predictions']
    except Exception as error:  # of any type: a size that the model rejects, or too little memory
        if len(images) == 1:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            if isinstance(error, MemoryError) or 'allocate' in why:
                why = 'too little memory. Pass a higher --score, which saves masks, or cut it into tiles'
            return [f'images of {images[0].shape[1]} x {images[0].shape[0]} pixels that the detector rejects: {why}']
    torch.cuda.empty_cache()
    return [found for image in images for found in detect(inferencer, [image])]


def predict_files(
    inferencer: DetInferencer,
    paths: list[Path],
    out: Path,
    info: dict,
    score: float = 0.3,
    batch_size: int = 1,
    pictures: bool = True,
) -> tuple[int, dict[str, list[Path]], dict[str, list[Path]]]:
    """Predict on images and videos; write predictions.json, images.json and, if wanted, pictures to a folder.

    Args:
        inferencer: from :func:`load_inferencer`.
        paths: absolute paths of images and videos.
        out: the folder to write; pictures are named after the inputs, relative to their common folder.
        info: metadata for images.json.
        score: score threshold.
        batch_size: images per forward pass.
        pictures: whether to draw pictures.

    Returns:
        The number of images, the files that could not be decoded or were rejected, and those of which data was not
        used, by kind.
    """
    root = Path(os.path.commonpath([path.parent for path in paths]))
    task, classes = find_task(inferencer.cfg), inferencer.model.dataset_meta['classes']
    categories = task.list_categories(inferencer.cfg, classes)
    head = json.dumps(dict(info=dict(folder=str(root), **info), categories=categories))[:-1] + ', "images": ['
    damaged: dict[str, list[Path]] = {}
    doubts: dict[str, list[Path]] = {}
    frames = decode_files(paths, damaged, doubts)
    batches = iter(lambda: list(islice(frames, batch_size)), [])
    writer, image_id = PictureWriter(), 0
    with (
        write_folder_atomically(out) as temporary,
        write_json_list(temporary / 'predictions.json', *task.ENVELOPE) as add_result,
        use_font_for(classes if pictures else ()),
        write_json_list(temporary / 'images.json', head, ']}') as add_image,
    ):
        for batch in track(batches, 'predicting', -(-sum(map(count_frames, paths)) // batch_size)):
            for (path, frame_id, image), found in zip(batch, detect(inferencer, [image for _, _, image in batch])):
                name = path.relative_to(root)
                if isinstance(found, str):
                    if path not in damaged.setdefault(found, []):
                        damaged[found].append(path)
                    if pictures and frame_id is not None:  # the written video keeps all frames
                        writer.write(image, path, frame_id, temporary / name)
                    continue
                image_id += 1
                stem = name.with_suffix('') if frame_id is None else name.with_suffix('') / f'{frame_id:06}'
                height, width = image.shape[:2]
                entry = dict(id=image_id, file_name=name.as_posix(), width=width, height=height)
                add_image(entry if frame_id is None else dict(entry, frame_id=frame_id))
                for result in task.list_results(found, classes, score, image_id, temporary, stem):
                    add_result(result)
                if pictures:
                    picture = draw(image[..., ::-1], task.mark_predictions(found, classes, score))
                    writer.write(picture[..., ::-1], path, frame_id, temporary / name)
        writer.close()
    return image_id, damaged, doubts
