"""Images: read whole or not at all, where OpenCV may return what there is of a damaged one, and grey for the rest."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmdet.registry import TRANSFORMS
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ..errors import InputError
from .findings import Findings, Place

EXIF_ORIENTATION = 0x0112
IMAGE_SUFFIXES = frozenset(  # as OpenCV decodes them
    '.jpg .jpeg .jpe .jfif .png .bmp .dib .webp .tif .tiff .ppm .pgm .pbm .pnm .jp2'.split()  # noqa: SIM905
)
JPEG, SCAN = b'\xff\xd8', b'\xff\xda'  # how one begins, and its picture in it
ENDS = {JPEG: b'\xff\xd9', b'\x89PNG': b'IEND\xaeB`\x82'}  # of a whole JPEG and PNG, by how they begin
DAMAGED = 'images that cannot be decoded to their end'
DEEP = 'images of more than 8 bits a channel, of which only the upper 8 are seen'
Image.MAX_IMAGE_PIXELS = None  # large images are expected here


def decode(content: bytes) -> np.ndarray:
    """An image, whole, as training sees it: (H, W, 3), BGR, 8 bits, turned as its EXIF orientation says.

    A JPEG or PNG that ends as such is decoded by OpenCV alone. All else goes to Pillow, too, which minds a missing end.

    Raises:
        InputError: saying what kind of images it is one of.
    """
    if not content:
        raise InputError('images of no bytes')
    if not any(content.startswith(start) and content.endswith(end) for start, end in ENDS.items()):
        require_whole(content)
    try:
        image = mmcv.imfrombytes(content)
    except Exception:  # a damaged file can make the decoders raise anything
        image = None
    if image is None:
        raise InputError(DAMAGED)
    return image


def read(path: Path) -> np.ndarray:
    """An image file, as :func:`decode` has it, which says so where it shows the upper 8 bits alone.

    Raises:
        InputError: saying what kind of images it is one of.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError('images that are folders' if path.is_dir() else 'images that cannot be read') from error
    image = decode(content)
    if is_deep(content):
        print(f'warning: {path}: {DEEP}')
    return image


def require_whole(content: bytes) -> tuple[bool, tuple[int, int]]:
    """Decode an image by Pillow.

    Returns:
        Whether its EXIF orientation turns it, and its height and width before.

    Raises:
        InputError: if it does not reach to its end.
    """
    if content.startswith(JPEG) and ENDS[JPEG] not in content[content.rfind(SCAN) :]:
        raise InputError(DAMAGED)  # Pillow takes what follows for the rest of the picture
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return image.getexif().get(EXIF_ORIENTATION, 1) not in (0, 1), image.size[::-1]
    except UnidentifiedImageError:  # of a kind that Pillow does not know; OpenCV may
        return False, (0, 0)
    except Exception as error:
        raise InputError(DAMAGED) from error


def is_deep(content: bytes) -> bool:
    """Whether OpenCV drops the lower bits of an image to show it in 8 bits a channel."""
    if content.startswith(JPEG):  # all of 8 bits
        return False
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    return image is not None and image.dtype != np.uint8


def check_image(path: Path, height: float, width: float) -> tuple[str, list[str], bytes]:
    """Decode an image as the training will, and by Pillow.

    MMDetection turns images as their EXIF orientation says, and so do the tools that people label with; then the size
    in the annotation file is that of the turned image.

    Returns:
        What is wrong, what may be, and a digest of the file's content.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError):
        return 'images that are folders' if os.path.isdir(path) else 'images that are not there', [], b''
    try:
        turned, before = require_whole(content)
        size = decode(content).shape[:2]
    except InputError as error:
        return str(error), [], b''
    digest = hashlib.blake2b(content, digest_size=16).digest()
    doubts = [DEEP] * is_deep(content)
    if size == (height, width):
        doubt = 'images with an EXIF orientation, which training follows: were they labelled as turned by it?'
        return '', doubts + [doubt] * turned, digest
    if turned and before == (height, width):
        return 'images that their EXIF orientation turns, but their labels do not: save them turned', doubts, digest
    return 'images of another size than the annotation file says', doubts, digest


def check_images(images: Iterable[tuple[int, dict]], folder: Path, name: str, found: Findings) -> dict[Path, bytes]:
    """Decode images of an annotation file.

    Args:
        images: entries of the annotation file, and their positions in it.
        folder: where the images are.
        name: what the annotation file is called.
        found: what is wrong is added here.

    Returns:
        A digest of each image that is whole.
    """
    images, digests, names = list(images), {}, {}
    with ThreadPoolExecutor() as pool:  # decoding lets go of Python's lock
        results = pool.map(
            lambda entry: check_image(folder / entry[1]['file_name'], entry[1]['height'], entry[1]['width']), images
        )
        results = tqdm(results, f'images of {name}', len(images), leave=False, disable=None)
        for (error, doubts, digest), (position, image) in zip(results, images):
            place = Place(str(folder), image['file_name'])
            if error:
                found.errors[error].append(place)
                found.faulty_images[name].add(position)
            for doubt in doubts:
                found.warnings[doubt].append(place)
            if digest in names:
                twin = Place(str(folder), image['file_name'], detail=f'which is {names[digest]}')
                found.warnings['images that are there twice'].append(twin)
            if digest:
                names[digest] = image['file_name']
                digests[folder / image['file_name']] = digest
    return digests


@TRANSFORMS.register_module()
class CheckedLoadImageFromFile(LoadImageFromFile):
    """MMCV's LoadImageFromFile that rejects a truncated image, or one whose size is not that of its annotations.

    MMCV trains on the grey pixels that OpenCV fills in for the missing part.
    """

    def transform(self, results: dict) -> dict | None:
        """Load the image of ``results['img_path']``.

        Raises:
            InputError: one line that names the file.
        """
        path = results['img_path']
        try:
            loaded = super().transform(results)
        except (OSError, ValueError, AssertionError, AttributeError, cv2.error) as error:
            raise InputError(f'image {path}: cannot be read ({str(error).strip().splitlines()[-1:]})') from error
        if loaded is None:  # as ignore_empty has it
            return None
        if os.path.isfile(path):
            require_end(path)
        labelled = results.get('height'), results.get('width')
        if None not in labelled and loaded['img_shape'] != labelled:
            height, width = loaded['img_shape']
            raise InputError(
                f'image {path}: is {width} x {height} pixels, where the annotation file says '
                f'{labelled[1]} x {labelled[0]}'
            )
        return loaded


def require_end(path: str) -> None:
    """Look at how a file begins and ends, and decode it by Pillow if it does not end as it should.

    Raises:
        InputError: if it breaks off; names the file.
    """
    with open(path, 'rb') as file:
        start = file.read(8)
        file.seek(-min(8, os.path.getsize(path)), os.SEEK_END)
        end = file.read()
        if any(start.startswith(first) and end.endswith(last) for first, last in ENDS.items()):
            return
        file.seek(0)
        try:
            require_whole(file.read())
        except InputError as error:
            raise InputError(f'image {path}: cannot be decoded to its end') from error
