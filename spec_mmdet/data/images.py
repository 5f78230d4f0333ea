"""Decode images, and reject truncated ones, whose missing part OpenCV may fill with grey."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Lock

import cv2
import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmdet.registry import TRANSFORMS
from mmengine import fileio
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import SAMPLESPERPIXEL, ImageFileDirectory_v2
from tqdm import tqdm

from ..errors import InputError
from .findings import Findings, Place
from .rules import MAX_PIXELS

EXIF_ORIENTATION = 0x0112
IMAGE_SUFFIXES = frozenset(  # OpenCV decodes these
    '.jpg .jpeg .jpe .jfif .png .bmp .dib .webp .tif .tiff .ppm .pgm .pbm .pnm .jp2'.split()  # noqa: SIM905
)
JPEG, PNG, BMP, RIFF = b'\xff\xd8', b'\x89PNG', b'BM', b'RIFF'  # first bytes; RIFF of WebP
SCAN = b'\xff\xda'  # where the pixels of a JPEG begin
ENDS = {JPEG: b'\xff\xd9', PNG: b'IEND\xaeB`\x82'}  # last bytes of an intact file
ANNOUNCED = 1000  # number of images from which decoding takes seconds and is announced
DAMAGED = 'corrupt or truncated images'
DEEP = 'images with more than 8 bits per channel (only the upper 8 are used)'
MANY_BANDS = 'images with more than three bands (only the first three are used)'
TOO_LARGE = 'images of more than 2^30 pixels, which OpenCV does not decode: cut them into tiles'
TOO_MANY_BANDS = 'images with more than four bands, which cannot be decoded: save them with three'


class _PillowLimit:
    lock, users, value = Lock(), 0, None


@contextmanager
def allow_large_images() -> Iterator[None]:
    """Disable Pillow's limit of the number of pixels while any thread is in this context."""
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
    """Return whether a file is a JPEG or PNG that ends as such."""
    return any(content.startswith(start) and content.endswith(end) for start, end in ENDS.items())


def decode(content: bytes, flag: str = 'color', backend: str | None = None) -> np.ndarray:
    """Decode an image as for training: shape (H, W, 3), BGR, 8 bits, rotated by its EXIF orientation.

    OpenCV decodes the image. If the file is not a JPEG or PNG that ends as such, Pillow checks that it is complete.

    Args:
        content: the file's content.
        flag, backend: see ``mmcv.imfrombytes``.

    Raises:
        InputError: with the kind of fault.
    """
    if not content:
        raise InputError('empty image files')
    if not has_end(content):
        require_complete(content)
    try:
        image = mmcv.imfrombytes(content, flag=flag, backend=backend)
    except Exception:  # decoders raise errors of any type for corrupt files
        image = None
    if image is None:
        height, width = read_orientation(content)[1]
        is_large = height * width > MAX_PIXELS
        raise InputError(TOO_LARGE if is_large else TOO_MANY_BANDS if count_bands(content) > 4 else DAMAGED)
    return image


def read(path: Path, doubts: dict[str, list[Path]] | None = None) -> np.ndarray:
    """Read an image file as :func:`decode` does.

    Args:
        path: the file.
        doubts: receives the file by the kinds of data that are not used (:func:`find_losses`).

    Raises:
        InputError: with the kind of fault.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError('images that are folders' if path.is_dir() else 'images that cannot be read') from error
    image = decode(content)
    for kind in find_losses(content) if doubts is not None else ():
        doubts.setdefault(kind, []).append(path)
    return image


def require_complete(content: bytes) -> None:
    """Check with Pillow that an image is complete.

    Raises:
        InputError: if it is truncated.
    """
    if content.startswith(JPEG) and ENDS[JPEG] not in content[content.rfind(SCAN) :]:
        raise InputError(DAMAGED)  # Pillow would decode following data as the rest of the image
    try:
        with allow_large_images(), Image.open(io.BytesIO(content)) as image:
            image.load()
    except UnidentifiedImageError:  # a format that OpenCV may support
        return
    except Exception as error:
        raise InputError(DAMAGED) from error


def read_orientation(content: bytes) -> tuple[bool, tuple[int, int]]:
    """Return whether an image has an EXIF orientation, and its height and width before that is applied."""
    try:
        with allow_large_images(), Image.open(io.BytesIO(content)) as image:
            # Pillow decodes a PNG to look for EXIF data behind its pixels.
            has_exif = not content.startswith(PNG) or b'eXIf' in content or b'Raw profile type' in content
            return has_exif and image.getexif().get(EXIF_ORIENTATION, 1) not in (0, 1), image.size[::-1]
    except Exception:  # a format that Pillow does not support
        return False, (0, 0)


def count_bands(content: bytes) -> int:
    """Return the number of bands of an image, and 3 if it is unknown."""
    try:
        if content.startswith((b'II*\0', b'MM\0*')):  # TIFF; Pillow opens only those with few bands
            directory, file = ImageFileDirectory_v2(content[:8]), io.BytesIO(content)
            file.seek(directory.next)
            directory.load(file)
            return int(directory.get(SAMPLESPERPIXEL, 1))
        with allow_large_images(), Image.open(io.BytesIO(content)) as image:
            return len(image.getbands())
    except Exception:  # a format that Pillow does not support
        return 3


def find_losses(content: bytes) -> list[str]:
    """List the kinds of data in an image that :func:`decode` drops: lower bits, and bands other than opaque alpha."""
    if content.startswith(JPEG):
        return []
    is_wide = count_bands(content) > 3
    deep = content[24:25] == b'\x10'  # bit depth in the header of a PNG
    if is_wide or not content.startswith((PNG, BMP, RIFF)):
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        if image is None:
            return []
        deep = image.dtype != np.uint8
        is_wide = image.ndim == 3 and image.shape[2] > 3 and bool((image[..., 3] != np.iinfo(image.dtype).max).any())
    return [DEEP] * deep + [MANY_BANDS] * is_wide


def check_image(path: Path, height: float, width: float) -> tuple[str, list[str], bytes]:
    """Decode an image as for training, a JPEG or PNG once; of a PNG, verify the checksums, too.

    MMDetection and labelling tools apply the EXIF orientation, so the annotation file should contain the size of the
    rotated image.

    Returns:
        The error, the warnings, and a digest of the file's content.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError):
        return 'images that are folders' if os.path.isdir(path) else 'missing images', [], b''
    try:
        size = decode(content).shape[:2]
    except InputError as error:
        return str(error), [], b''
    try:
        if content.startswith(PNG):  # OpenCV 4.10 returns grey pixels for damaged ones
            with allow_large_images(), Image.open(io.BytesIO(content)) as image:
                image.verify()
    except Exception:  # Pillow raises errors of several types
        return DAMAGED, [], b''
    digest = hashlib.blake2b(content, digest_size=16).digest()
    doubts = find_losses(content)
    turned, before = read_orientation(content)
    if size == (height, width):
        doubt = 'images with an EXIF orientation, which training applies: check that the labels fit the rotated image'
        return '', doubts + [doubt] * turned, digest
    if turned and before == (height, width):
        return 'labels that ignore the EXIF orientation: rotate these images, and save them without it', doubts, digest
    return 'images whose size differs from the annotation file', doubts, digest


def check_images(images: Iterable[tuple[int, dict]], folder: Path, name: str, found: Findings) -> dict[Path, bytes]:
    """Decode images of an annotation file.

    Args:
        images: positions and entries in the annotation file.
        folder: the folder of the images.
        name: name of the annotation file.
        found: receives the faults.

    Returns:
        A digest of each intact image.
    """
    images, digests, names = list(images), {}, {}
    if len(images) > ANNOUNCED:
        print(f'decoding {len(images)} images of {name}', flush=True)

    def check(entry: tuple[int, dict]) -> tuple[str, list[str], bytes]:
        return check_image(folder / entry[1]['file_name'], entry[1]['height'], entry[1]['width'])

    # Threads suffice: a 640 x 480 JPEG holds Python's lock for 0.1 of 2.6 ms. An interrupt cancels what has not begun.
    with ThreadPoolExecutor() as pool, closing(pool.map(check, images)) as results:
        progress = tqdm(results, f'images of {name}', len(images), leave=False, disable=None)
        for (error, doubts, digest), (position, image) in zip(progress, images):
            place = Place(str(folder), image['file_name'])
            if error:
                found.errors[error].append(place)
                found.faulty_images[name].add(position)
            for doubt in doubts:
                found.warnings[doubt].append(place)
            if digest in names:
                twin = Place(str(folder), image['file_name'], detail=f'same as {names[digest]}')
                found.warnings['duplicate images'].append(twin)
            if digest:
                names[digest] = image['file_name']
                digests[folder / image['file_name']] = digest
    return digests


@TRANSFORMS.register_module()
class CheckedLoadImageFromFile(LoadImageFromFile):
    """MMCV's LoadImageFromFile that rejects truncated images, and sizes that differ from the annotation file.

    MMCV would train on the grey pixels that OpenCV fills in for the missing part.
    """

    def transform(self, results: dict) -> dict | None:
        """Load the image of ``results['img_path']``.

        Returns:
            ``results`` with the image, or None for a faulty image if ``ignore_empty`` is set.

        Raises:
            InputError: naming the file.
        """
        path = results['img_path']
        try:
            client = self.file_client_args and fileio.FileClient.infer_client(self.file_client_args, path)
            content = client.get(path) if client else fileio.get(path, backend_args=self.backend_args)
            image = decode(content, self.color_type, self.imdecode_backend)
        except Exception as error:  # storage backends raise errors of any type
            if self.ignore_empty:
                return None
            lines = str(error).strip().splitlines() or [type(error).__name__]
            why = f'cannot be read ({lines[-1]})'
            if isinstance(error, InputError):
                why = 'has more than four bands' if str(error) == TOO_MANY_BANDS else 'corrupt or truncated'
            raise InputError(f'image {path}: {why}. Replace the file, or remove the image from the data') from error
        labelled = results.get('height'), results.get('width')
        size = image.shape[:2]
        if None not in labelled and size != labelled:
            raise InputError(
                f'image {path}: is {size[1]} x {size[0]} pixels, but {labelled[1]} x {labelled[0]} in the annotation '
                'file. Run "spec-mmdet prepare" to list all faults'
            )
        results.update(img=image.astype(np.float32) if self.to_float32 else image, img_shape=size, ori_shape=size)
        return results
