"""Predict on images, folders of images, globs and videos: pictures with masks, boxes, classes and scores, and JSON.

    spec-mmdet predict CONFIG CHECKPOINT INPUT... [--score 0.3] [--out DIR]

An INPUT is an image, a folder (the images in it, not those in its folders), a quoted glob ('images/**/*.jpg') or a
video. In DIR, each is drawn under its name below the folder that all of them share, so that no two are the same.

`predictions.json` is a list in COCO's results format, masks as RLE; `images.json` has the images, whose ids are 1, 2,
3, ... in the order of the inputs, with their file names, and the categories, whose ids are 1, 2, 3, ... in the order of
the classes. An image of a video has a `frame_id` from 0, too. `COCO('images.json').loadRes('predictions.json')` reads
both. (To have pycocotools tell masks by their own size, delete the `bbox` of each result first.)

From Python, with the config that training has written beside the checkpoint (a config of other classes would have
MMDetection leave out what does not fit; this tool takes the classes from the checkpoint):

    import spec_mmdet
    from mmdet.apis import DetInferencer
    results = DetInferencer('work_dirs/demo/xcit_spec_shapes.py', 'work_dirs/demo/epoch_3.pth', device='cpu')('image.png', out_dir='out')
"""  # noqa: E501

from __future__ import annotations

import glob
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from mmdet.apis import DetInferencer
from mmengine.config import Config
from mmengine.logging import MMLogger
from rich.progress import track

from ..checkpoints.reading import describe_mismatches, fetch, get_classes, get_state_dict, load
from ..data import images
from ..data.fitting import configured_classes, set_classes
from ..errors import InputError, list_briefly
from ..evaluation.drawing import use_font_for
from ..files import is_empty, write_folder_atomically
from ..substitution import protect
from .common import add_config, add_keep_types, load_config, parser

VIDEOS = {'.mp4': 'mp4v', '.avi': 'mp4v', '.mov': 'mp4v', '.mkv': 'mp4v', '.webm': 'VP80'}  # and codecs to write them


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def find_inputs(names: list[str]) -> list[Path]:
    """The images and videos that inputs name, each once, as absolute paths; hidden files of folders are passed over.

    Raises:
        InputError: where one is absent, holds nothing, or cannot be read. Of an image only the header is looked at, and
            nothing of what a folder or a glob holds.
    """
    paths: dict[Path, None] = {}
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in images.IMAGE_SUFFIXES)
            hidden = [entry.name for entry in found if entry.name.startswith('.')]
            found = [entry for entry in found if entry.name not in hidden]
            if hidden:
                print(f'{name}: passed over hidden files: {list_briefly(hidden)}')
            if not found:
                raise InputError(f'{name}: no images ({", ".join(sorted(images.IMAGE_SUFFIXES))}) in this folder')
        elif path.exists():
            found = [path]
            require_readable(path, name)
        elif glob.has_magic(name):
            found = map(Path, sorted(glob.glob(str(path), recursive=True)))
            found = [entry for entry in found if entry.suffix.lower() in (*images.IMAGE_SUFFIXES, *VIDEOS)]
            if not found:
                raise InputError(f'{name}: matches no images and no videos')
        else:
            raise InputError(f'{name}: no such file or folder')
        paths.update(dict.fromkeys(Path(os.path.abspath(entry)) for entry in found))
    return list(paths)


def require_readable(path: Path, name: str) -> None:
    """Refuse a file that is no image and no video by its name or by how it begins."""
    if not (path.suffix.lower() in images.IMAGE_SUFFIXES or is_video(path)):
        raise InputError(
            f'{name}: neither an image ({", ".join(sorted(images.IMAGE_SUFFIXES))}) nor a video ({", ".join(VIDEOS)})'
        )
    readable = cv2.VideoCapture(str(path)).isOpened() if is_video(path) else cv2.haveImageReader(str(path))
    if not readable:
        raise InputError(f'{name}: not {"a video" if is_video(path) else "an image"} that OpenCV can read')


def count_frames(path: Path) -> int:
    """How many pictures a file holds; of a video, as many as it says."""
    return int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)) if is_video(path) else 1


def decode(path: Path) -> Iterator[tuple[int | None, np.ndarray]]:
    """The frames of a video with their numbers, from 0, or the one image of a file, as (H, W, 3), BGR.

    Raises:
        InputError: saying what kind of files it is one of; that a video breaks off is not told.
    """
    if not is_video(path):
        yield None, images.read(path)
        return
    video, frame_id = cv2.VideoCapture(str(path)), 0
    while (frame := video.read()[1]) is not None:
        yield frame_id, frame
        frame_id += 1
    if not frame_id:
        raise InputError('videos without a picture that can be decoded')


def stream(paths: list[Path], damaged: dict[str, list[Path]]) -> Iterator[tuple[Path, int | None, np.ndarray]]:
    """What :func:`decode` yields of each file, with its path; others go to ``damaged``, by what they are."""
    for path in paths:
        try:
            for frame_id, image in decode(path):
                yield path, frame_id, image
        except InputError as error:
            damaged.setdefault(str(error), []).append(path)


def in_batches(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(islice(items, size)):
        yield batch


@contextmanager
def json_list(path: Path, before: str = '[', after: str = ']') -> Iterator[Callable[[dict], None]]:
    """Write a JSON file that ends in a list entry by entry, of which none stays in memory."""
    with path.open('w') as file:
        file.write(before)
        separator = '\n'

        def add(entry: dict) -> None:
            nonlocal separator
            file.write(separator + json.dumps(entry))
            separator = ',\n'

        yield add
        file.write(f'\n{after}\n')


class Pictures:
    """Writes drawn pictures, (H, W, 3), BGR: those of images as files, those of a video, in order, as a video."""

    def __init__(self) -> None:
        self.video: cv2.VideoWriter | None = None

    def write(self, picture: np.ndarray, source: Path, frame_id: int | None, out_file: Path) -> None:
        out_file.parent.mkdir(parents=True, exist_ok=True)
        if frame_id is None:
            out_file.write_bytes(cv2.imencode(out_file.suffix, picture)[1])  # imwrite may not notice a full disk
            return
        if frame_id == 0:
            self.close()
            rate = cv2.VideoCapture(str(source)).get(cv2.CAP_PROP_FPS) or 25
            codec = cv2.VideoWriter_fourcc(*VIDEOS[out_file.suffix.lower()])
            self.video = cv2.VideoWriter(str(out_file), codec, rate, picture.shape[1::-1])
            self.video_file = out_file
            if not self.video.isOpened():
                raise OSError(f'{out_file.name} could not be opened; this OpenCV may have no encoder for it')
        self.video.write(picture)
        self.frames = frame_id + 1

    def close(self) -> None:
        """Finish the video that is being written.

        Raises:
            OSError: where it is not all there, as on a disk that is full, which OpenCV does not tell.
        """
        if self.video is None:
            return
        self.video.release()
        self.video, written = None, cv2.VideoCapture(str(self.video_file))
        written.set(cv2.CAP_PROP_POS_FRAMES, self.frames - 1)
        if not written.read()[0]:
            raise OSError(f'{self.video_file.name} is cut off: the disk may be full')


def load_inferencer(cfg: Config, checkpoint: str, device: str | None, score: float = 0.0) -> DetInferencer:
    """MMDetection's inferencer with all of a checkpoint's weights and with its classes; changes ``cfg``.

    Args:
        cfg: the whole config; of an exported detector, its test pipeline is used.
        checkpoint: a file, or an address; or a detector that was exported, .onnx.
        device: for instance 'cpu' or 'cuda:1'; by default a GPU where there is one.
        score: least score of what an exported detector finds.

    Raises:
        InputError: where the checkpoint cannot be read or does not fit the model.
    """
    if checkpoint.endswith('.onnx'):
        cfg.model = dict(type='OnnxDetector', path=checkpoint, score=score, device=device)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # that there are no weights, and so no known classes
            inferencer = DetInferencer(cfg, None, 'cpu', show_progress=False)
        return know_classes(inferencer, inferencer.model.classes)
    name = f'checkpoint {checkpoint}'
    content = load(checkpoint, mmap=True)
    weights = get_state_dict(content, name)
    classes = get_classes(content) or configured_classes(cfg.test_dataloader.dataset)  # a backbone's has none
    set_classes(cfg, classes)
    inferencer = DetInferencer(cfg, fetch(checkpoint), device, show_progress=False)
    faults = describe_mismatches(inferencer.model, weights)
    if faults:
        raise InputError(f'{name} does not fit the configured model: {faults}')
    return know_classes(inferencer, classes)


def know_classes(inferencer: DetInferencer, classes: Sequence[str]) -> DetInferencer:
    """An inferencer that knows the classes' names."""
    inferencer.model.dataset_meta['classes'] = tuple(classes)  # the visualizer's, too
    return inferencer


def coco_results(prediction: dict, image_id: int) -> Iterator[dict]:
    """The instances of one image in COCO's results format, from what DetInferencer makes of them."""
    for i, (label, score, (x0, y0, x1, y1)) in enumerate(
        zip(prediction['labels'], prediction['scores'], prediction['bboxes'])
    ):
        result = dict(image_id=image_id, category_id=label + 1, bbox=[x0, y0, x1 - x0, y1 - y0], score=score)
        yield result | (dict(segmentation=prediction['masks'][i]) if 'masks' in prediction else {})


def main(argv: Sequence[str] | None = None) -> None:
    options = parser('predict', __doc__)
    add_config(options)
    add_keep_types(options)
    options.add_argument('checkpoint', help='a file, or an http(s) address; or a detector that was exported, .onnx')
    options.add_argument('inputs', nargs='+', metavar='INPUT', help='an image, a folder, a quoted glob or a video')
    options.add_argument('--out', type=Path, help='a folder that is empty or not there (default: a new one in '
                        'work_dirs/predictions)')  # fmt: skip
    options.add_argument('--score', type=float, default=0.3, help='least score of what is drawn and written '
                        '(default: 0.3)')  # fmt: skip
    options.add_argument('--batch-size', type=int, default=1, help='pictures at a time (default: 1; with more, those '
                        'of different sizes are padded, which changes them a little)')  # fmt: skip
    options.add_argument('--device', help='for instance cpu or cuda:1 (default: a GPU where there is one)')
    options.add_argument('--no-pictures', action='store_true', help='write the JSON files alone')
    args = options.parse_args(argv)

    cfg = load_config(args)
    protect(cfg, args.keep_types, running=False)
    if not {'model', 'test_dataloader'} <= cfg.keys():
        raise InputError(f'config {args.config}: has no model and test_dataloader')
    if not 0 <= args.score <= 1 or args.batch_size < 1:
        raise InputError('--score must be from 0 to 1, and --batch-size at least 1')
    out = args.out or Path('work_dirs/predictions') / datetime.now().strftime('%Y%m%d_%H%M%S')
    if out.exists() and not is_empty(out):
        raise InputError(f'--out {out}: is there already and not an empty folder')
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f'--device {args.device}: {str(error).splitlines()[0]}') from error
    paths = find_inputs(args.inputs)
    MMLogger.get_current_instance().setLevel('ERROR')  # it lists what does not fit, which an error is to do
    # Of classes that are in the config alone, of a visualizer without a folder, and of shapes that reach over the edge.
    warnings.filterwarnings('ignore', message='dataset_meta or class names')
    warnings.filterwarnings('ignore', module='mmengine.visualization')
    inferencer = load_inferencer(cfg, args.checkpoint, args.device, args.score)

    root = Path(os.path.commonpath([path.parent for path in paths]))
    about = dict(
        info=dict(folder=str(root), config=str(args.config), checkpoint=args.checkpoint, score=args.score),
        categories=[dict(id=i, name=name) for i, name in enumerate(inferencer.model.dataset_meta['classes'], start=1)],
    )
    damaged: dict[str, list[Path]] = {}
    total = -(-sum(map(count_frames, paths)) // args.batch_size)
    batches = track(in_batches(stream(paths, damaged), args.batch_size), 'predicting', total)
    pictures, image_id = Pictures(), 0
    with (
        write_folder_atomically(out) as aside,
        json_list(aside / 'predictions.json') as add_result,
        use_font_for(() if args.no_pictures else inferencer.model.dataset_meta['classes']),
        json_list(aside / 'images.json', json.dumps(about)[:-1] + ', "images": [', ']}') as add_image,
    ):
        for batch in batches:
            inputs = [image for _, _, image in batch]
            found = inferencer(inputs, len(batch), return_datasamples=True, no_save_vis=True)['predictions']
            for (path, frame_id, image), sample in zip(batch, found):
                image_id += 1
                name = path.relative_to(root)
                height, width = image.shape[:2]
                entry = dict(id=image_id, file_name=name.as_posix(), width=width, height=height)
                add_image(entry if frame_id is None else dict(entry, frame_id=frame_id))
                sample.pred_instances = sample.pred_instances[sample.pred_instances.scores >= args.score]
                for result in coco_results(inferencer.pred2dict(sample), image_id):
                    add_result(result)
                if not args.no_pictures:
                    visualizer = inferencer.visualizer
                    visualizer.add_datasample(str(name), image[..., ::-1], sample, draw_gt=False, pred_score_thr=0)
                    pictures.write(visualizer.get_image()[..., ::-1], path, frame_id, aside / name)
        pictures.close()
    print(f'{image_id} pictures; wrote {out}')
    for kind, files in damaged.items():
        print(f'passed over {len(files)} {kind}:', *files, sep='\n  ')
    if damaged:
        count, first = sum(map(len, damaged.values())), next(iter(damaged.values()))[0]
        raise InputError(f'{count} of {len(paths)} inputs could not be decoded, first {first}; the results of the '
                         'others are written')  # fmt: skip
