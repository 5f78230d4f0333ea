"""Recognise and read the exports of labelling tools as COCO dicts.

Every file of an export is either used, or reported as unused.

We use no library: labelformat 0.1.17 skips images without labels and unreadable lines with only a log message, and
ignores the EXIF orientation; globox 2.9 only reads boxes; datumaro 1.13 installs different versions of OpenCV and
Pillow.
"""

from __future__ import annotations

import os
import re
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path

from ...errors import InputError
from ...status import show_status
from ..checks import check_categories
from ..findings import Findings
from ..folders import find_split, list_pairs
from ..reading import read_coco
from ..splits import WHOLE, Split
from .coco import join_files, load_coco, read_any_coco
from .export import LABELS, NEUTRAL, SPLITS, Export, is_junk, parse_split
from .label_studio import read_label_studio
from .labelme import read_labelme
from .xml import read_cvat, read_voc
from .yolo import read_yolo

READERS: dict[str, Callable[[Export], list[Split] | None]] = {
    'COCO (also of Roboflow, CVAT, Label Studio and FiftyOne)': read_any_coco,
    'CVAT for images 1.1': read_cvat,
    'Label Studio (JSON, JSON-MIN)': read_label_studio,
    'YOLO (Ultralytics, Darknet, labelImg)': read_yolo,
    'Pascal VOC': read_voc,
    'LabelMe': read_labelme,
}
DATUM = (
    'python -m venv dm && dm/bin/pip install "datumaro[cli]" && '
    'dm/bin/datum convert -i {folder} -if {format} -f coco_instances -o OUT -- --save-media '
    '--segmentation-mode polygons'  # by default, masks become crowds
)
# Formats that we do not read: the tool, the suffix and words (all) that identify a file, and datumaro 1.13's name of
# the format if it can read it. The first row that fits is named.
FOREIGN = (
    ('VIA (VGG Image Annotator)', '.json', ('"regions"', '"shape_attributes"'), ''),
    ('VIA (VGG Image Annotator)', '.csv', ('region_shape_attributes',), ''),
    ('Supervisely', '.json', ('"classTitle"',), ''),
    ('Darwin (V7)', '.json', ('"item"', '"slots"'), ''),
    ('Darwin (V7)', '.json', ('"annotations"', '"bounding_box"', '"dataset"'), ''),
    ('Datumaro', '.json', ('"items"', '"categories"'), 'datumaro'),
    ('Labelbox', '.json', ('"data_row"',), ''),
    ('Labelbox', '.ndjson', ('"data_row"',), ''),
    ('Labelbox', '.json', ('"Labeled Data"',), ''),
    ('FiftyOne (use COCODetectionDataset)', '.json', ('"classes"', '"labels"', '"bounding_box"'), ''),
    ('FiftyOne (use COCODetectionDataset)', '.json', ('"samples"', '"_cls"'), ''),
    ('CreateML', '.json', ('"annotations"', '"coordinates"'), ''),
    ('CVAT backup', '.json', ('"shapes"', '"tracks"', '"version"'), ''),
    ('ISAT', '.json', ('"ISAT"', '"objects"'), ''),
    ('VoTT', '.json', ('"regions"', '"asset'), ''),
    ('SuperAnnotate', '.json', ('"instances"', '"className"'), ''),
    ('detections instead of annotations', '.json', ('"image_id"', '"category_id"', '"score"'), ''),
    ('Ultralytics HUB', '.ndjson', ('"type"', '"dataset"'), ''),
    ('Hugging Face (metadata.jsonl)', '.jsonl', ('"file_name"',), ''),
    ('Amazon SageMaker', '.manifest', ('source-ref',), ''),
    ('CSV of TensorFlow', '.csv', ('filename,width,height,class,xmin',), ''),
    ('masks of segments', '.txt', ('# label:color_rgb:parts:actions',), 'voc_segmentation'),
    ('Open Images', '.csv', ('ImageID', 'LabelName', 'XMin'), 'open_images'),
    ('CSV', '.csv', (), ''),
    ('TFRecord', '.tfrecord', (), ''),
    ('Parquet', '.parquet', (), ''),
    ('Roboflow, not as COCO', '.txt', ('roboflow',), ''),
)


MAPS = ('labels', 'classes.txt')


@show_status('reading the data set')
def find_splits(folder: Path, found: Findings, scratch: Path, zero_based: bool = False) -> list[Split]:
    """Read a data set in COCO's layout or in one of the formats above.

    Args:
        folder: the data set's folder, one around it, or a .zip of it.
        found: receives what is unreadable, unused, or filled in.
        scratch: a temporary folder, for archives and for images that exist only inside label files.
        zero_based: whether Pascal VOC's coordinates count from 0.

    Returns:
        Its splits 'train', 'val' and 'test', or 'all' for data without splits.

    Raises:
        InputError: if the format is unknown, or files contradict each other.
    """
    given, folder = folder, unpack(folder, scratch)
    splits = read_ready(folder, found)
    export = Export(folder, found, scratch, zero_based)
    for split in splits:
        export.used.add(export.folder / split.ann_file.relative_to(folder))
        images = export.folder / split.images.relative_to(folder)
        export.used.update(images / image['file_name'] for image in split.coco['images'])
        split.is_foreign = folder != given
    if splits:  # the same images may have labels of semantic and panoptic segmentation
        parts = {path: path.relative_to(export.folder).parts for path in export.files}
        export.used |= {path for path, of in parts.items() if of[0] in MAPS or of[1:] and of[1].startswith('panoptic_')}
    for name, read in READERS.items():
        if splits or (splits := read(export)) is None:
            continue
        print(f'{given}: format {name}')
        if not splits:
            raise InputError(f'{given}: contains labels but not their images. Copy the images there')
    if not splits:
        raise InputError(describe_unknown(export))
    if {WHOLE, 'val'} <= {split.name for split in splits}:
        for split in splits:
            split.name = 'train' if split.name == WHOLE else split.name
        print('labels outside of the split val are used for training')
    export.report_unused()
    return splits


def unpack(folder: Path, scratch: Path) -> Path:
    """Return the folder in an archive, or in folders that contain nothing else.

    Raises:
        InputError: if an archive cannot be read.
    """
    if folder.is_file():
        target = scratch / 'archive' / folder.stem
        try:
            with zipfile.ZipFile(folder) as archive:
                for entry in archive.infolist():
                    entry.filename = entry.filename.replace('\\', '/')  # written on Windows
                    archive.extract(entry, target)
        except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise InputError(f'{folder}: not a readable .zip ({error}). Unpack it, and pass the folder') from error
        folder = target
    inside = [path for path in folder.iterdir() if not is_junk(path.name)]
    if len(inside) != 1 or parse_split(inside[0].name) or inside[0].name.lower() in NEUTRAL:
        return folder
    return unpack(inside[0], scratch) if inside[0].is_dir() or inside[0].suffix.lower() == '.zip' else folder


def read_ready(folder: Path, found: Findings) -> list[Split]:
    """Return the splits of a folder that training can read unchanged; [] for other folders."""
    pairs = {name: list(list_pairs(folder, name)) for name in SPLITS}
    if not pairs['train'] + pairs['val']:
        return []
    if not all(any(map(Path.is_dir, places)) for entries in pairs.values() for _, places in entries):
        return []
    splits: list[Split] = []
    for name in SPLITS:
        if pairs[name]:
            ann_file, images = find_split(folder, name)
            coco, incomplete = load_coco(ann_file, found) or (read_coco(ann_file, found=found), set())
            if coco['images'] and not any((images / image['file_name']).is_file() for image in coco['images']):
                return []  # the file states other paths
            splits.append(Split(name, coco, '/'.join(ann_file.parts[-2:]), images, ann_file, incomplete=incomplete))
            names = [[category['name'] for category in split.coco['categories']] for split in (splits[-1], splits[0])]
            check_categories(ann_file, *names)
    return splits


def describe_unknown(export: Export) -> str:
    """Return the error message for a folder in an unknown format."""
    supported = f'Supported formats: {", ".join(READERS)}'
    for tool, suffix, words, datumaro in FOREIGN:
        for path in export.list_files(suffix)[:20]:
            text = path.read_bytes().decode('utf-8', 'replace') if words else ''
            if all(word in text for word in words):
                how = 'Export the data as COCO from its tool; datumaro cannot convert this, either'
                if datumaro:
                    how = f'Convert it: {DATUM.format(folder=shlex.quote(str(export.folder)), format=datumaro)}'
                return f'{export.folder}: unsupported format {tool} ({export.format_path(path)}). {how}. {supported}'
    hint = f' {export.found.describe_first_error()}.' * bool(export.found.errors)
    stems = {path.stem for path in export.images}
    labels = [path for path in export.list_files('.txt') if path.stem in stems]
    if labels and not re.search(rb'[^-+.eE\d\s]', labels[0].read_bytes()):
        hint += f' {export.format_path(labels[0])} may be labels of YOLO: add classes.txt with one class name per line.'
    if archives := export.list_files('.tar', '.gz', '.tgz', '.rar', '.7z', '.zip'):
        hint += f' Unpack {export.format_path(archives[0])}.'
    if not export.images:
        hint += ' It contains no images.'
    elif not export.list_files(*LABELS):
        hint += ' It contains no label files; folders that are classes are for "spec-mmdet pretrain".'
    unknown = f'{export.folder}: contains neither annotations/instances_train*.json nor labels in a known format'
    try:
        for name in SPLITS:
            find_split(export.folder, name)
    except InputError as error:  # a part of COCO's layout is missing
        unknown = str(error)
    return f'{unknown}.{hint} {supported}'


def read_annotations(images: Path, ann_file: Path, found: Findings, scratch: Path) -> Split:
    """Read an annotation file in COCO's format whose images are in a folder.

    Raises:
        InputError: if it cannot be read, or all images are missing.
    """
    export = Export(images, found, scratch)
    ann_file = Path(os.path.abspath(ann_file))
    content = load_coco(ann_file, found) if ann_file.is_file() else None
    split = join_files(export, WHOLE, {ann_file: content or (read_coco(ann_file, found=found), set())})
    export.used.add(ann_file)
    export.report_unused()
    return split
