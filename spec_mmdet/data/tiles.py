"""Cut the images of a data set into tiles, and their objects with them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import shapely
from pycocotools import mask as mask_utils
from tqdm import tqdm

from ..errors import InputError
from .images import read
from .rules import compute_extent, rasterise
from .shapes import cut_into_polygons, describe_mask, describe_polygons
from .splits import Split

MIN_SHARE = 0.25  # of an object's area; a smaller part becomes a crowd region, which training and AP ignore
LEFT_OUT = ('keypoints', 'num_keypoints')  # fields of annotations that the parts do not have
JPEG = ('.jpg', '.jpeg', '.jpe', '.jfif')

Tile = tuple[int, int, int, int]  # corners x0, y0, x1, y1 in pixels


def place_tiles(width: int, height: int, size: int, overlap: int) -> list[Tile]:
    """Place tiles that cover an image, row by row; the last of a row or column ends at the image's border.

    Args:
        width, height: the image's size in pixels.
        size: side of a tile; a side of the image that is not longer is not cut.
        overlap: minimum number of pixels that neighbours share, below ``size``.
    """

    def list_starts(side: int) -> list[int]:
        last = max(side - size, 0)
        return [*range(0, last, size - overlap), last]

    return [
        (x, y, min(x + size, width), min(y + size, height)) for y in list_starts(height) for x in list_starts(width)
    ]


def make_cutter(annotation: dict, width: int, height: int) -> Callable[[Tile], dict]:
    """Return a function that cuts an object with a tile: its area, box and mask there, in the image's pixels.

    A polygon or box is intersected with the tile; of an RLE mask, the pixels are cut out. The area is 0 outside.
    """
    mask = annotation.get('segmentation')
    if isinstance(mask, dict):
        pixels = mask_utils.decode(rasterise(mask, width, height))

        def cut(tile: Tile) -> dict:
            x0, y0, x1, y1 = tile
            part = describe_mask(mask_utils.encode(np.asfortranarray(pixels[y0:y1, x0:x1])))
            part['bbox'] = [part['bbox'][0] + x0, part['bbox'][1] + y0, *part['bbox'][2:]]
            return part

        return cut
    x, y, w, h = annotation['bbox']
    shape = shapely.box(x, y, x + w, y + h)
    if mask:  # pycocotools fills a polygon by the even-odd rule, and merges the polygons of an object
        outlines = [shapely.Polygon(np.reshape(polygon, (-1, 2))) for polygon in mask]
        shape = shapely.union_all([shapely.make_valid(outline) for outline in outlines])

    def cut(tile: Tile) -> dict:
        polygons = cut_into_polygons(shape.intersection(shapely.box(*tile)), 0)
        part = describe_polygons(polygons) if polygons else dict(area=0.0)
        return part if mask else {key: value for key, value in part.items() if key != 'segmentation'}

    return cut


def move(annotation: dict, x: int, y: int) -> dict:
    """Move an object by (-x, -y); an RLE mask is that of the tile already, and stays."""
    left, top, *sides = annotation['bbox']
    moved = {**annotation, 'bbox': [round(left - x, 3), round(top - y, 3), *sides]}
    if isinstance(mask := annotation.get('segmentation'), list):
        moved['segmentation'] = [(np.reshape(part, (-1, 2)) - (x, y)).round(3).ravel().tolist() for part in mask]
    return moved


def cut_object(annotation: dict, tiles: Sequence[Tile], width: int, height: int) -> Iterator[tuple[int, dict, float]]:
    """Cut a valid object into its parts in the tiles of an image.

    Args:
        annotation: the object in COCO's format.
        tiles: tiles of the image.
        width, height: the image's size in pixels.

    Yields:
        The position of a tile, the part in the tile's pixels, and the part's share of the object's area. The box of
        a part encloses its mask. A polygon or box within a tile is only moved.
    """
    annotation = {key: value for key, value in annotation.items() if key not in LEFT_OUT}
    mask, (x, y, w, h) = annotation.get('segmentation'), annotation['bbox']
    is_rle = isinstance(mask, dict)
    if is_rle:
        x, y, w, h = mask_utils.toBbox(rasterise(mask, width, height)).tolist()
    x0, y0, x1, y1 = (x, y, x + w, y + h)
    if mask and not is_rle:
        edges = compute_extent(mask)
        x0, y0, x1, y1 = min(x0, edges[0]), min(y0, edges[1]), max(x1, edges[2]), max(y1, edges[3])
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    cut = total = None
    for i, tile in enumerate(tiles):
        if x1 <= tile[0] or x0 >= tile[2] or y1 <= tile[1] or y0 >= tile[3]:
            continue
        within = tile[0] <= x0 and tile[1] <= y0 and x1 <= tile[2] and y1 <= tile[3]
        if within and not is_rle:
            yield i, move(annotation, *tile[:2]), 1.0
            continue
        if cut is None:
            cut = make_cutter(annotation, width, height)
            total = cut((0, 0, width, height))['area']
        part = cut(tile)
        if part['area']:
            yield i, move({**annotation, **part}, *tile[:2]), part['area'] / total


def name_tile(file_name: str, x: int, y: int) -> str:
    """Return the file name of a tile: photo_X_Y.jpg of photo.jpg; of other formats than JPEG, a PNG."""
    path = PurePosixPath(file_name)
    suffix = path.suffix if path.suffix.lower() in (*JPEG, '.png') else f'{path.suffix}.png'
    return str(path.with_name(f'{path.stem}_{x}_{y}{suffix}'))


def write_tiles(out: Path, name: str, split: Split, size: int, overlap: int) -> None:
    """Cut a split into tiles, and write them in COCO's layout as the split ``name``; one image is in memory at a time.

    A part of an object with less than :data:`MIN_SHARE` of the object's area becomes a crowd region; parts below
    a pixel in width or height are left out. For training, tiles without objects are left out, as training would; for
    evaluation they stay, because false positives count there.

    Args:
        out: folder of the data set.
        name: name of the split's folder and annotation file.
        split: a split without faults.
        size: side of a tile in pixels.
        overlap: minimum overlap of neighbours in pixels.

    Raises:
        InputError: if two images yield tiles of the same name.
    """
    of_image = defaultdict(list)
    for annotation in split.coco['annotations']:
        of_image[annotation['image_id']].append(annotation)
    images, annotations, counts = [], [], Counter()
    for image in tqdm(split.coco['images'], f'tiles of {name}', leave=False, disable=None):
        width, height = image['width'], image['height']
        tiles, pixels = place_tiles(width, height, size, overlap), read(split.images / image['file_name'])
        parts = defaultdict(list)
        for annotation in of_image[image['id']]:
            for i, part, share in cut_object(annotation, tiles, width, height):
                if min(part['bbox'][2:]) < 1 > share:
                    counts['below a pixel'] += 1
                    continue
                if share < MIN_SHARE and not part.get('iscrowd'):
                    counts['small'] += 1
                    part['iscrowd'] = 1
                counts['objects'] += not part.get('iscrowd')
                parts[i].append(part)
        for i, (x0, y0, x1, y1) in enumerate(tiles):
            empty = all(part.get('iscrowd') for part in parts[i])
            counts['empty'] += empty
            if empty and split.name == 'train':
                continue
            file_name = name_tile(image['file_name'], x0, y0)
            target = out / name / file_name
            if target.exists():
                raise InputError(f'{split.title}: two images yield the tile {file_name}. Rename {image["file_name"]}')
            target.parent.mkdir(parents=True, exist_ok=True)
            quality = [cv2.IMWRITE_JPEG_QUALITY, 95] if target.suffix.lower() in JPEG else []
            target.write_bytes(cv2.imencode(target.suffix, pixels[y0:y1, x0:x1], quality)[1])
            images.append({**image, 'id': len(images) + 1, 'file_name': file_name, 'width': x1 - x0, 'height': y1 - y0})
            for part in parts[i]:
                annotations.append({**part, 'id': len(annotations) + 1, 'image_id': len(images)})
    (out / 'annotations').mkdir(parents=True, exist_ok=True)
    coco = {**split.coco, 'images': images, 'annotations': annotations}
    (out / 'annotations' / f'instances_{name}.json').write_text(json.dumps(coco))
    print(
        f'{name}: {len(split.coco["images"])} images cut into {len(images)} tiles with {counts["objects"]} objects; '
        f'{counts["small"]} parts below {MIN_SHARE:g} of their object became crowd regions, {counts["below a pixel"]} '
        f'parts below a pixel were left out; {counts["empty"]} tiles without objects '
        f'{"were left out" if split.name == "train" else "stay"}'
    )
