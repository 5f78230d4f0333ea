"""COCO's JSON in any layout: of CVAT, Label Studio, FiftyOne, Roboflow and others."""

from __future__ import annotations

import json
from pathlib import Path

from ...errors import InputError
from ..findings import Place
from ..reading import read_coco
from ..splits import WHOLE, Split
from .export import SPLITS, Export, locate_images, split_named


def read_any_coco(export: Export) -> list[Split] | None:
    """Read an export of COCO files, None where there is none.

    A file is of the split that its name or its folder names; files of several subsets that are none are one. Its images
    are found by the path that it states, of a server's path by the file name.
    """
    paths = [path for path in export.list_files('.json') if is_coco(path)]
    paths = [path for path in paths if path.stem.startswith('instances_')] or paths  # beside keypoints and captions
    if not paths:
        return None
    splits = {path: split_named(path.stem.removeprefix('instances_')) or export.split_of(path) for path in paths}
    if 'train' in splits.values():
        for path in [path for path, split in splits.items() if split is None]:
            export.warn('annotation files of subsets that are neither train, val nor test, not used', path)
            export.used.add(path)
            del splits[path]
    contents = {path: read_coco(path, found=export.found) for path in splits}
    export.used.update(contents)
    names = dict.fromkeys(category['name'] for coco in contents.values() for category in coco['categories'])
    first = next(iter(contents.values()))['categories']
    if any(coco['categories'] != first for coco in contents.values()):
        first = [dict(id=index, name=name, supercategory='') for index, name in enumerate(names, start=1)]
        for coco in contents.values():
            renumber_categories(coco, {category['name']: category['id'] for category in first})
    result = []
    for split in (*SPLITS, None):
        files = {path: coco for path, coco in contents.items() if splits[path] == split}
        if files:
            result.append(join_files(export, split or WHOLE, files))
    return result


def is_coco(path: Path) -> bool:
    """Test whether a JSON file is in COCO's format: it has lists of images, annotations and categories."""
    content = path.read_bytes()
    if not all(key in content for key in (b'"images"', b'"annotations"', b'"categories"')):
        return False
    try:
        coco = json.loads(content)
    except (ValueError, RecursionError):
        return True  # which reading it will name
    return isinstance(coco, dict) and all(isinstance(coco.get(key), list) for key in ('images', 'categories'))


def renumber_categories(coco: dict, ids: dict[str, int]) -> None:
    """Give the categories the ids of their names, in ``coco`` itself."""
    new = {category['id']: ids[category['name']] for category in coco['categories']}
    coco['categories'] = [dict(id=index, name=name, supercategory='') for name, index in ids.items()]
    for annotation in coco['annotations']:
        old = annotation['category_id']
        annotation['category_id'] = new.get(old, f'unknown {old}')


def join_files(export: Export, split: str, files: dict[Path, dict]) -> Split:
    """The split that these files are together; ids are renumbered where there are several."""
    title = '/'.join(next(iter(files)).parts[-2:]) if len(files) == 1 else f'{export.folder.name}, COCO, {split}'
    images, annotations, paths = [], [], {}
    for path, coco in files.items():
        near = (path.stem.removeprefix('instances_'), path.parent.name)
        near = next((name for name in near if name.lower() in export.folders), '')
        ids = {}
        for image in coco['images']:
            found = export.find_image(image['file_name'], path, near, loosely=True, split=split)
            if found is None or found in paths:
                kind = 'images that several entries name' if found else 'images that are not there'
                export.found.errors[kind].append(Place(export.name_of(path), image['file_name']))
                ids.setdefault(image['id'], None)
                continue
            ids[image['id']] = image['id'] if len(files) == 1 else len(images) + 1
            paths[found] = None
            images.append({**image, 'id': ids[image['id']]})
        for annotation in coco['annotations']:
            index = ids.get(annotation['image_id'], f'{annotation["image_id"]} of {path.name}')
            if index is not None:
                number = annotation['id'] if len(files) == 1 else len(annotations) + 1
                annotations.append({**annotation, 'id': number, 'image_id': index})
    if not paths:
        raise InputError(
            f'{export.folder}: lacks the images of {title}, first {next(iter(files.values()))["images"][:1]!r:.100}; '
            'copy them there, or use "spec-mmdet prepare IMAGES --annotations FILE"'
        )
    root, names = locate_images(export, split, list(paths))
    for image, name in zip(images, names, strict=True):
        image['file_name'] = name
    export.used.update(paths)
    coco = {**next(iter(files.values())), 'images': images, 'annotations': annotations}
    return Split(split, coco, title, root, is_foreign=True)
