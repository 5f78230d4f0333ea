"""Read COCO's JSON in the layouts of CVAT, Label Studio, FiftyOne, Roboflow and others."""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError
from ..findings import Findings, Place
from ..reading import check_layout, read_json
from ..splits import WHOLE, Split
from .export import MISSING, SPLITS, Export, find_split_words, is_set, locate_images, parse_split

# Fields of objects and images that are used, or contain nothing about the image's content.
USED = dict(
    annotations={'id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd', 'ignore', 'segmentation'},
    images={'id', 'file_name', 'width', 'height', 'license', 'coco_url', 'flickr_url', 'date_captured'},
)


def read_any_coco(export: Export) -> list[Split] | None:
    """Read an export of COCO files; None if there are none.

    The name of a file or of its folder defines the split; files without split are merged. Images are found by their
    stated path, or for paths of a server by their file name.
    """
    contents = {path: found for path in export.list_files('.json') if (found := load_coco(path, export.found))}
    instances = [path for path in contents if path.stem.startswith('instances_')]  # not keypoints and captions
    if not contents:
        return None
    contents = {path: contents[path] for path in instances or contents}
    splits = {path: parse_split(path.stem) or export.infer_split(path) for path in contents}
    if not any(splits.values()):  # names with other words, like lvis_v1_train.json, if all files have them
        words = {path: find_split_words(path.stem) for path in contents}
        if all(len(found) == 1 for found in words.values()) and len(set(map(min, words.values()))) > 1:
            splits = {path: min(found) for path, found in words.items()}
    if 'train' in splits.values():
        for path in [path for path, split in splits.items() if split is None]:
            export.add_warning('annotation files of subsets other than train, val and test, not used', path)
            export.used.add(path)
            del splits[path], contents[path]
    export.used.update(contents)
    categories = [coco['categories'] for coco, _ in contents.values()]
    if any(other != categories[0] for other in categories):
        names = dict.fromkeys(category['name'] for some in categories for category in some)
        for coco, _ in contents.values():
            renumber_categories(coco, {name: index for index, name in enumerate(names, start=1)})
    result = []
    for split in (*SPLITS, None):
        files = {path: coco for path, coco in contents.items() if splits[path] == split}
        if files:
            result.append(join_files(export, split or WHOLE, files))
    return result


def load_coco(path: Path, found: Findings) -> tuple[dict, set] | None:
    """Read a JSON file in COCO's format.

    Returns:
        Its content, and the ids of images with unreadable annotations; None for a file in a different format.

    Raises:
        InputError: if it is corrupt.
    """
    content = path.read_bytes()
    if not all(key in content for key in (b'"images"', b'"annotations"', b'"categories"')):
        return None
    raw = read_json(path)
    if not isinstance(raw, dict) or not all(isinstance(raw.get(key), list) for key in ('images', 'categories')):
        return None
    for image in raw['images']:
        if isinstance(image, dict) and isinstance(url := image.get('coco_url'), str):  # LVIS has no file_name
            image.setdefault('file_name', '/'.join(url.split('/')[-2:]))
    coco = check_layout(raw, path, True, found)
    for key, things in (('images', 'images'), ('annotations', 'objects')):
        for entry in coco[key]:
            for name in [name for name, value in entry.items() if name not in USED[key] and is_set(value)]:
                place = Place(path.name, entry.get('file_name', ''), entry['id'] if key == 'annotations' else '')
                found.notes[f'{things} with "{name}", which is not used'].append(place)
    read = set(map(id, coco['annotations']))
    incomplete = {str(entry.get('image_id')) for entry in raw['annotations'] if id(entry) not in read}
    return coco, {image['id'] for image in coco['images'] if str(image['id']) in incomplete}


def renumber_categories(coco: dict, ids: dict[str, int]) -> None:
    """Replace the ids of categories by those of their names; changes ``coco``."""
    new = {category['id']: ids[category['name']] for category in coco['categories']}
    coco['categories'] = [dict(id=index, name=name, supercategory='') for name, index in ids.items()]
    for annotation in coco['annotations']:
        old = annotation['category_id']
        annotation['category_id'] = new.get(old, f'unknown {old}')


def join_files(export: Export, split: str, files: dict[Path, tuple[dict, set]]) -> Split:
    """Merge files into one split; ids are renumbered if there are several files."""
    first, _ = next(iter(files.values()))
    title = '/'.join(next(iter(files)).parts[-2:]) if len(files) == 1 else f'{export.folder.name}, COCO, {split}'
    images, annotations, paths, incomplete = [], [], {}, set()
    for path, (coco, faulty) in files.items():
        near = (path.stem.removeprefix('instances_'), path.parent.name)
        near = next((name for name in near if name.lower() in export.folders), '')
        ids = {}
        for image in coco['images']:
            found = export.find_image(image['file_name'], path, near, loosely=True, split=split)
            if found is None or found in paths:
                export.add_error('images with several entries' if found else MISSING, path, image['file_name'])
                ids.setdefault(image['id'], None)
                incomplete |= {paths[found]} if found else set()
                continue
            ids[image['id']] = image['id'] if len(files) == 1 else len(images) + 1
            paths[found] = ids[image['id']]
            incomplete |= {ids[image['id']]} if image['id'] in faulty else set()
            images.append({**image, 'id': ids[image['id']]})
        for annotation in coco['annotations']:
            index = ids.get(annotation['image_id'], f'{annotation["image_id"]} of {path.name}')
            if index is not None:
                number = annotation['id'] if len(files) == 1 else len(annotations) + 1
                annotations.append({**annotation, 'id': number, 'image_id': index})
    if not paths and first['images']:
        raise InputError(
            f'{export.folder}: lacks the images of {title}, first {first["images"][0]["file_name"]}. Copy them there, '
            'or run "spec-mmdet prepare IMAGES --annotations FILE"'
        )
    root, names = locate_images(export, split, list(paths))
    for image, name in zip(images, names, strict=True):
        image['file_name'] = name
    export.used.update(paths)
    coco = {**first, 'images': images, 'annotations': annotations}
    return Split(split, coco, title, root, is_foreign=True, incomplete=incomplete)
