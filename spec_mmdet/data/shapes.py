"""Generate a small data set of shapes in COCO's format, for the demo and the tests; a laptop's CPU can learn it.

    write_shapes('data/shapes')

Circles, squares, triangles and stars of random colour, size and rotation overlap on cluttered backgrounds; polygons
follow the visible parts. Some images contain a crowd region: many tiny shapes with one annotation of iscrowd=1, as in
COCO. The same objects are in label PNGs for semantic segmentation, and in COCO's panoptic layout. The same seed writes
the same files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as mask_utils
from shapely import affinity
from shapely.geometry import MultiPolygon, Point, Polygon, box
from shapely.geometry.base import BaseGeometry

from ..files import write_folder_atomically
from .rules import encode_ids, rasterise

CATEGORIES = ('circle', 'square', 'triangle', 'star')
STUFF = ('dark background', 'light background')
MIN_STUFF = 64  # pixels of a segment of stuff
MIN_VISIBLE = 0.7  # minimum visible fraction of an object


@cache
def make_outline(category: str) -> Polygon:
    """Return the outline of a category around the origin, within a radius of 1."""
    if category == 'circle':
        return Point(0, 0).buffer(1, quad_segs=12)
    points = {'square': 4, 'triangle': 3, 'star': 10}[category]
    angles = np.arange(points) * 2 * np.pi / points
    radii = np.where(np.arange(points) % 2, 0.45, 1.0) if category == 'star' else np.ones(points)
    return Polygon(np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1))


def place(rng: np.random.Generator, category: str, x: float, y: float, radius: float) -> Polygon:
    """Scale, rotate and move the outline of a category; return it in pixels."""
    shape = affinity.scale(make_outline(category), radius, radius * rng.uniform(0.85, 1), origin=(0, 0))
    return affinity.translate(affinity.rotate(shape, rng.uniform(0, 360), origin=(0, 0)), x, y)


def cut_into_polygons(geometry: BaseGeometry, min_area: float = 4) -> list[Polygon]:
    """Cut a geometry into polygons of some area without holes, which COCO's polygons cannot express."""
    if isinstance(geometry, Polygon):
        if not geometry.interiors:
            return [geometry] if geometry.area >= min_area else []
        x0, y0, x1, y1 = geometry.bounds
        cut = geometry.interiors[0].centroid.x
        halves = geometry.intersection(box(x0, y0, cut, y1)), geometry.intersection(box(cut, y0, x1, y1))
        return [part for half in halves for part in cut_into_polygons(half, min_area)]
    return [part for child in getattr(geometry, 'geoms', ()) for part in cut_into_polygons(child, min_area)]


def draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw patches, lines and specks that belong to no category, as an image of size x size pixels, BGR."""
    patches = np.clip(rng.integers(30, 226, 3) + rng.integers(-60, 61, (4, 4, 3)), 0, 255).astype(np.uint8)
    image = cv2.resize(patches, (size, size), interpolation=cv2.INTER_CUBIC)
    for _ in range(rng.integers(3, 7)):
        p, q = (tuple(int(v) for v in rng.integers(0, size, 2)) for _ in range(2))
        cv2.line(image, p, q, rng.integers(0, 256, 3).tolist(), int(rng.integers(1, 3)), cv2.LINE_AA)
    for _ in range(rng.integers(5, 30)):
        centre = tuple(int(v) for v in rng.integers(0, size, 2))
        cv2.circle(image, centre, 1, rng.integers(0, 256, 3).tolist(), -1)
    return image


def paint(image: np.ndarray, shape: Polygon, rng: np.random.Generator) -> None:
    """Fill a shape with a colour that contrasts with the background, and outline it."""
    fixed_point = np.round(np.asarray(shape.exterior.coords) * 256).astype(np.int32)
    covered = np.zeros(image.shape[:2], np.uint8)
    cv2.fillPoly(covered, [fixed_point], 1, shift=8)
    under = image[covered > 0].mean(axis=0) if covered.any() else np.full(3, 127.0)
    colour = max(rng.integers(0, 256, (4, 3)), key=lambda c: np.abs(c - under).sum()).tolist()
    cv2.fillPoly(image, [fixed_point], colour, cv2.LINE_AA, shift=8)
    cv2.polylines(image, [fixed_point], True, [c // 2 for c in colour], 1, cv2.LINE_AA, shift=8)


def describe_mask(rle: dict) -> dict:
    """Return the fields of a COCO annotation that follow from an RLE mask of pycocotools."""
    return dict(
        area=float(mask_utils.area(rle)),
        bbox=mask_utils.toBbox(rle).tolist(),
        segmentation=dict(size=rle['size'], counts=rle['counts'].decode()),
    )


def describe_polygons(polygons: Sequence[Polygon]) -> dict:
    """Return the fields of a COCO annotation that follow from polygons without holes."""
    x0, y0, x1, y1 = MultiPolygon(polygons).bounds
    return dict(
        area=sum(p.area for p in polygons),
        bbox=[x0, y0, x1 - x0, y1 - y0],
        segmentation=[np.asarray(p.exterior.coords[:-1]).round(2).ravel().tolist() for p in polygons],
    )


def add_noise(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Add Gaussian noise to an image."""
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an image; unlike OpenCV's imwrite, raise an error on a full disk."""
    path.write_bytes(cv2.imencode('.png', image)[1])


def make_image(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[dict]]:
    """Draw an image of size x size pixels, BGR; return it and its COCO annotations without ids."""
    image = draw_background(rng, size)
    frame = box(0, 0, size, size)
    annotations = []
    taken = Polygon()
    if rng.random() < 0.1:
        category = int(rng.integers(len(CATEGORIES)))
        x, y = rng.uniform(0.25 * size, 0.75 * size, 2)
        members = [
            place(rng, CATEGORIES[category], x + dx, y + dy, size * rng.uniform(0.025, 0.045))
            for dx, dy in rng.normal(0, 0.09 * size, (20, 2))
        ]
        for member in members:
            paint(image, member, rng)
        taken = MultiPolygon(members).buffer(0).convex_hull.intersection(frame)
        rle = mask_utils.frPyObjects([np.asarray(taken.exterior.coords).ravel().tolist()], size, size)[0]
        annotations.append(dict(category_id=category + 1, iscrowd=1, **describe_mask(rle)))

    placed: list[tuple[int, Polygon, Polygon]] = []  # category, outline, visible part
    for _ in range(rng.integers(3, 7)):
        category = int(rng.integers(len(CATEGORIES)))
        radius = size * rng.uniform(0.12, 0.24)
        outline = place(rng, CATEGORIES[category], *rng.uniform(0.08 * size, 0.92 * size, 2), radius)
        visible = outline.intersection(frame)
        below = [(c, o, v.difference(outline)) for c, o, v in placed]
        candidate = [*below, (category, outline, visible)]
        if visible.intersects(taken) or any(v.area < MIN_VISIBLE * o.area for _, o, v in candidate):
            continue
        paint(image, outline, rng)
        placed = candidate

    for category, _, visible in placed:
        annotations.append(dict(category_id=category + 1, iscrowd=0, **describe_polygons(cut_into_polygons(visible))))
    return add_noise(rng, image), annotations


def mark_stuff(image: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the background is dark and where it is light, bool, shape (H, W); smoothed, so without its clutter.

    Args:
        image: BGR, shape (H, W, 3).
        free: the pixels without objects, bool, shape (H, W).
    """
    above = (cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(np.float32) - 128) * free
    light = cv2.GaussianBlur(above, (0, 0), len(image) / 16) > 0
    return free & ~light, free & light


def make_labels(
    image: np.ndarray, annotations: Sequence[dict], count: int
) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Make an image's labels for semantic and panoptic segmentation from the annotations of its objects.

    Args:
        image: BGR, shape (H, W, 3).
        annotations: COCO annotations of its objects.
        count: number of categories of objects. The categories of :data:`STUFF` follow them.

    Returns:
        The labels, uint8, shape (H, W): 0 is the background, the categories follow, and crowds are ignored (255).
        The ids of segments, int32, shape (H, W): objects, and the dark and the light background; small parts of the
        background are void (0).
        The segments' descriptions in COCO's panoptic format.
    """
    size = image.shape[:2]
    labels, ids, segments = np.zeros(size, np.uint8), np.zeros(size, np.int32), []
    parts = [(a['category_id'], a['iscrowd'], mask_utils.decode(rasterise(a['segmentation'], *size[::-1])) > 0)
             for a in annotations]  # fmt: skip
    for category, crowd, mask in parts:
        labels[mask] = 255 if crowd else category
    covered = sum((mask for _, _, mask in parts), np.zeros(size, bool))
    parts += [(count + 1 + i, 0, mask) for i, mask in enumerate(mark_stuff(image, ~covered))]
    for category, crowd, mask in parts:
        mask &= ids == 0
        area = int(mask.sum())
        if area < (MIN_STUFF if category > count else 1):
            continue
        ids[mask] = len(segments) + 1
        bbox = list(cv2.boundingRect(mask.astype(np.uint8)))
        segments.append(dict(id=len(segments) + 1, category_id=category, iscrowd=crowd, area=area, bbox=bbox))
    return labels, ids, segments


def write_split(
    root: Path,
    split: str,
    images: int,
    size: int,
    rng: np.random.Generator,
    make: Callable[[np.random.Generator, int], tuple[np.ndarray, list[dict]]] = make_image,
    categories: Sequence[str] = CATEGORIES,
    labelled: bool = False,
) -> None:
    """Write ``images`` images to root/split and their annotations to root/annotations/instances_{split}.json.

    Args:
        root: folder to write to.
        split: 'train' or 'val'.
        images: number of images.
        size: height and width in pixels.
        rng: random number generator.
        make: function that makes an image; see :func:`make_image`.
        categories: names of the categories.
        labelled: also write the labels of :func:`make_labels`. Those for semantic segmentation are the PNGs
            root/labels/{split} and the names root/classes.txt, those for panoptic segmentation
            root/annotations/panoptic_{split}.json and the PNGs root/annotations/panoptic_{split}.
    """
    semantic, panoptic = root / 'labels' / split, root / 'annotations' / f'panoptic_{split}'
    for folder in (root / split, root / 'annotations', *([semantic, panoptic] if labelled else [])):
        folder.mkdir(parents=True, exist_ok=True)
    things = [dict(id=i + 1, name=name) for i, name in enumerate(categories)]
    coco: dict = dict(
        info=dict(description='Generated by spec_mmdet'), licenses=[], images=[], annotations=[], categories=things
    )

    def finish(name: str, image: np.ndarray, annotations: list[dict]) -> list[dict] | None:
        write_png(root / split / name, image)
        if not labelled:
            return None
        labels, ids, segments = make_labels(image, annotations, len(categories))
        write_png(semantic / name, labels)
        write_png(panoptic / name, encode_ids(ids)[..., ::-1])
        return segments

    with ThreadPoolExecutor(1) as thread:  # finishes an image while the next ones are drawn
        finished = []
        for image_id in range(1, images + 1):
            image, annotations = make(rng, size)
            name = f'{image_id:06}.png'
            finished.append(thread.submit(finish, name, image, annotations))
            coco['images'].append(dict(id=image_id, file_name=name, width=size, height=size))
            for annotation in annotations:
                coco['annotations'].append(dict(annotation, id=len(coco['annotations']) + 1, image_id=image_id))
    segments = [each.result() for each in finished]
    (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))
    if labelled:
        (root / 'classes.txt').write_text('\n'.join(['background', *categories]) + '\n')
        stuff = [dict(id=len(things) + 1 + i, name=name, isthing=0) for i, name in enumerate(STUFF)]
        coco['categories'] = [dict(thing, isthing=1) for thing in things] + stuff
        coco['annotations'] = [
            dict(image_id=image['id'], file_name=image['file_name'], segments_info=of_image)
            for image, of_image in zip(coco['images'], segments, strict=True)
        ]
        panoptic.with_suffix('.json').write_text(json.dumps(coco))


def write_shapes(root: str | Path, train: int = 1800, val: int = 150, size: int = 256, seed: int = 0) -> None:
    """Write the data set and print a line about it; an error leaves no partial folder.

    Args:
        root: folder to write.
        train: number of training images.
        val: number of validation images.
        size: height and width of the images in pixels.
        seed: the same seed writes the same files.

    Raises:
        InputError: if the folder cannot be written.
    """
    with write_folder_atomically(Path(root)) as folder:
        for i, (split, images) in enumerate(dict(train=train, val=val).items()):
            write_split(folder, split, images, size, np.random.default_rng([seed, i]), labelled=True)
    print(f'{root}: {train} training and {val} validation images of {size} pixels', flush=True)
