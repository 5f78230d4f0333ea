"""Decode images completely or not at all: OpenCV may fill the missing part of a truncated one with grey."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import cv2
import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmdet.registry import TRANSFORMS
from mmengine import fileio
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ..errors import InputError
from .findings import Findings, Place

EXIF_ORIENTATION = 0x0112
IMAGE_SUFFIXES = frozenset(  # as OpenCV decodes them
    '.jpg .jpeg .jpe .jfif .png .bmp .dib .webp .tif .tiff .ppm .pgm .pbm .pnm .jp2'.split()  # noqa: SIM905
)
JPEG, PNG = b'\xff\xd8', b'\x89PNG'  # first bytes
SCAN = b'\xff\xda'  # where the pixels of a JPEG begin
ENDS = {JPEG: b'\xff\xd9', PNG: b'IEND\xaeB`\x82'}  # last bytes of an intact file
DAMAGED = 'images that cannot be decoded to their end'
DEEP = 'images of more than 8 bits a channel, of which only the upper 8 are seen'


class _PillowLimit:
    lock, users, value = Lock(), 0, None


@contextmanager
def allow_large_images() -> Iterator[None]:
    """Lift Pillow's limit of an image's pixels while any thread is inside; large images are expected here."""
    with _PillowLimit.lock:
        if not _PillowLimit.users:
            _PillowLimit.value, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _PillowLimit.users += 1
    try:
        yield
    finally:
        with _PillowLimit.lock:
            _PillowLimit.users -= 1
            if not _PillowLimit.users:
                Image.MAX_IMAGE_PIXELS = _PillowLimit.value


def has_end(content: bytes) -> bool:
    """Tell whether a file is a JPEG or PNG with the last bytes of one."""
    return any(content.startswith(start) and content.endswith(end) for start, end in ENDS.items())


def decode(content: bytes, flag: str = 'color', backend: str | None = None) -> np.ndarray:
    """Decode an image as training sees it: (H, W, 3), BGR, 8 bits, turned as its EXIF orientation says.

    A JPEG or PNG with its last bytes is decoded by OpenCV alone. Others are decoded by Pillow as well, which notices a
    missing end.

    Args:
        content: a file's.
        flag, backend: of ``mmcv.imfrombytes``.

    Raises:
        InputError: naming the kind of faulty images that it belongs to.
    """
    if not content:
        raise InputError('images of no bytes')
    if not has_end(content):
        require_whole(content)
    try:
        image = mmcv.imfrombytes(content, flag=flag, backend=backend)
    except Exception:  # a damaged file can make the decoders raise anything
        image = None
    if image is None:
        raise InputError(DAMAGED)
    return image


def read(path: Path) -> np.ndarray:
    """Read an image file as :func:`decode` does; warn if it has more than 8 bits.

    Raises:
        InputError: naming the kind of faulty images that it belongs to.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError('images that are folders' if path.is_dir() else 'images that cannot be read') from error
    image = decode(content)
    if is_deep(content):
        print(f'warning: {path}: {DEEP}')
    return image


def require_whole(content: bytes) -> None:
    """Decode an image by Pillow.

    Raises:
        InputError: if it is truncated.
    """
    if content.startswith(JPEG) and ENDS[JPEG] not in content[content.rfind(SCAN) :]:
        raise InputError(DAMAGED)  # Pillow takes what follows for the rest of the picture
    try:
        with allow_large_images(), Image.open(io.BytesIO(content)) as image:
            image.load()
    except UnidentifiedImageError:  # of a kind that Pillow does not know; OpenCV may
        return
    except Exception as error:
        raise InputError(DAMAGED) from error


def read_orientation(content: bytes) -> tuple[bool, tuple[int, int]]:
    """Return whether an image has an EXIF orientation, and its height and width before that is applied."""
    try:
        with allow_large_images(), Image.open(io.BytesIO(content)) as image:
            return image.getexif().get(EXIF_ORIENTATION, 1) not in (0, 1), image.size[::-1]
    except Exception:  # of a kind that Pillow does not know
        return False, (0, 0)


def is_deep(content: bytes) -> bool:
    """Tell whether OpenCV drops the lower bits of an image to return 8 bits per channel."""
    if content.startswith(JPEG):
        return False
    if content.startswith(PNG):
        return content[24:25] == b'\x10'  # the depth in its header
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    return image is not None and image.dtype != np.uint8


def check_image(path: Path, height: float, width: float) -> tuple[str, list[str], bytes]:
    """Decode an image as training does; one that is no JPEG is decoded by Pillow as well.

    MMDetection turns images as their EXIF orientation says, and so do the tools that people label with; then the size
    in the annotation file is that of the turned image.

    Returns:
        The error, warnings, and a digest of the file's content.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError):
        return 'images that are folders' if os.path.isdir(path) else 'images that are not there', [], b''
    try:
        if has_end(content) and not content.startswith(JPEG):  # of others, decode requires it
            require_whole(content)
        size = decode(content).shape[:2]
    except InputError as error:
        return str(error), [], b''
    digest = hashlib.blake2b(content, digest_size=16).digest()
    doubts = [DEEP] * is_deep(content)
    turned, before = read_orientation(content)
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
        """Load the image of ``results['img_path']``; its file is read and decoded once.

        Returns:
            ``results`` with the image, or None for a faulty image if ``ignore_empty`` is set.

        Raises:
            InputError: one line that names the file.
        """
        path = results['img_path']
        try:
            client = self.file_client_args and fileio.FileClient.infer_client(self.file_client_args, path)
            content = client.get(path) if client else fileio.get(path, backend_args=self.backend_args)
            image = decode(content, self.color_type, self.imdecode_backend)
        except Exception as error:  # storage backends raise anything
            if self.ignore_empty:
                return None
            lines = str(error).strip().splitlines() or [type(error).__name__]
            why = 'decoded to its end' if isinstance(error, InputError) else f'read ({lines[-1]})'
            raise InputError(f'image {path}: cannot be {why}') from error
        labelled = results.get('height'), results.get('width')
        size = image.shape[:2]
        if None not in labelled and size != labelled:
            raise InputError(
                f'image {path}: is {size[1]} x {size[0]} pixels, where the annotation file says '
                f'{labelled[1]} x {labelled[0]}'
            )
        results.update(img=image.astype(np.float32) if self.to_float32 else image, img_shape=size, ori_shape=size)
        return results
