"""The loader, the checks and the classifiers decode images once and completely."""

import io
import struct
import threading
import time
import warnings
import zlib
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from spec_mmdet import InputError
from spec_mmdet.data import images
from spec_mmdet.data.findings import Findings
from spec_mmdet.data.formats.export import read_size
from spec_mmdet.data.images import CheckedLoadImageFromFile, allow_large_images, check_image


@pytest.fixture
def folder(tmp_path):
    """Write one picture as JPEG, PNG, WebP, BMP, 16-bit PNG and TIFF, and rotated by its EXIF orientation."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).resize((120, 80))
    for suffix in ('jpg', 'png', 'webp', 'bmp'):
        picture.save(tmp_path / f'plain.{suffix}')
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / 'turned.jpg', exif=exif)
    for suffix in ('png', 'tif'):
        cv2.imwrite(str(tmp_path / f'deep.{suffix}'), np.asarray(picture).astype(np.uint16) * 256)
    return tmp_path


@pytest.mark.parametrize(
    'settings', [{}, dict(to_float32=True), dict(color_type='grayscale'), dict(imdecode_backend='pillow')], ids=str
)
def test_the_loader_returns_what_mmcv_returns(folder, settings):
    for path in folder.iterdir():
        ours, theirs = (
            kind(**settings).transform(dict(img_path=str(path)))
            for kind in (CheckedLoadImageFromFile, LoadImageFromFile)
        )
        assert list(ours) == list(theirs) and ours['img'].dtype == theirs['img'].dtype
        assert ours['img_shape'] == theirs['img_shape'] and ours['ori_shape'] == theirs['ori_shape']
        assert np.array_equal(ours['img'], theirs['img'])


def test_files_are_read_and_decoded_once(folder, monkeypatch):
    counts = dict(read=0, decoded=0)
    read, decode = images.fileio.get, mmcv.imfrombytes

    def count(name, function):
        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(images.fileio, 'get', count('read', read))
    monkeypatch.setattr(mmcv, 'imfrombytes', count('decoded', decode))
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda image: pytest.fail('decoded by Pillow'))
    CheckedLoadImageFromFile().transform(dict(img_path=str(folder / 'plain.jpg')))
    assert counts == dict(read=1, decoded=1)
    assert check_image(folder / 'plain.jpg', 80, 120)[:2] == ('', [])
    assert check_image(folder / 'plain.png', 80, 120)[:2] == ('', [])
    assert counts['decoded'] == 3


def test_sizes_are_those_of_the_header(folder, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda image: pytest.fail('decoded'))
    for path in folder.iterdir():
        assert read_size(path) == ((80, 120) if path.stem == 'turned' else (120, 80))


def test_a_damaged_png_is_found_even_if_opencv_reads_it(folder, monkeypatch):
    path = folder / 'plain.png'
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert check_image(path, 80, 120)[0] == images.DAMAGED
    monkeypatch.setattr(mmcv, 'imfrombytes', lambda content, **kwargs: np.full((80, 120, 3), 128, np.uint8))
    assert check_image(path, 80, 120)[0] == images.DAMAGED


def test_an_image_beyond_opencvs_limit_is_named(folder):
    """The header of a PNG claims 40,000 x 40,000 pixels."""
    content = (folder / 'plain.png').read_bytes()
    header = b'IHDR' + struct.pack('>II', 40000, 40000) + content[24:29]
    (folder / 'plain.png').write_bytes(content[:12] + header + struct.pack('>I', zlib.crc32(header)) + content[33:])
    assert check_image(folder / 'plain.png', 40000, 40000)[0] == images.TOO_LARGE


def test_an_interrupt_does_not_wait_for_all_images(folder, monkeypatch):
    """Few of a thousand images are decoded after the one that raises KeyboardInterrupt."""
    checked = []

    def interrupt(path, height, width):
        checked.append(path)
        if len(checked) == 5:
            raise KeyboardInterrupt
        time.sleep(0.001)
        return '', [], b''

    monkeypatch.setattr(images, 'check_image', interrupt)
    entries = enumerate([dict(file_name='plain.jpg', height=80, width=120)] * 1000)
    with pytest.raises(KeyboardInterrupt):
        images.check_images(entries, folder, 'plain.json', Findings())
    assert len(checked) < 500


@pytest.mark.parametrize('name', ['plain.jpg', 'plain.png', 'plain.webp'])
def test_truncated_and_missing_images(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for size in (path.stat().st_size, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(InputError, match=f'{name}: corrupt or truncated'):
            CheckedLoadImageFromFile().transform(dict(img_path=str(path)))
        assert check_image(path, 80, 120)[0]
    path.unlink()
    with pytest.raises(InputError, match=f'{name}: cannot be read'):
        CheckedLoadImageFromFile().transform(dict(img_path=str(path)))
    assert CheckedLoadImageFromFile(ignore_empty=True).transform(dict(img_path=str(path))) is None


def test_checks_of_size_orientation_and_depth(folder):
    assert ' size ' in check_image(folder / 'plain.png', 80, 121)[0]
    assert 'EXIF' in check_image(folder / 'turned.jpg', 120, 80)[1][0]
    assert 'ignore the EXIF' in check_image(folder / 'turned.jpg', 80, 120)[0]
    for name in ('deep.png', 'deep.tif'):
        assert check_image(folder / name, 80, 120)[1] == [images.DEEP]


def write_tiff(path: Path, bands: int) -> None:
    """Write an uncompressed TIFF of 4 x 3 pixels, which Pillow cannot write for this number of bands."""
    directory = ImageFileDirectory_v2()
    directory.update({256: 4, 257: 3, 258: (8,) * bands, 259: 1, 262: 2, 273: 0, 277: bands, 278: 3, 279: 12 * bands})
    path.write_bytes(b'II*\0\x08\0\0\0' + directory.tobytes(8) + bytes(range(12)) * bands)


def test_bands_that_are_not_used(tmp_path):
    write_tiff(tmp_path / 'four.tif', 4)
    write_tiff(tmp_path / 'eight.tif', 8)
    for opacity in (255, 9):
        Image.new('RGBA', (4, 3), (1, 2, 3, opacity)).save(tmp_path / f'{opacity}.png')
    assert check_image(tmp_path / 'four.tif', 3, 4)[:2] == ('', [images.MANY_BANDS])
    assert check_image(tmp_path / '9.png', 3, 4)[:2] == ('', [images.MANY_BANDS])
    assert check_image(tmp_path / '255.png', 3, 4)[:2] == ('', [])
    assert check_image(tmp_path / 'eight.tif', 3, 4)[0] == images.TOO_MANY_BANDS
    with pytest.raises(InputError, match=r'eight.tif: has more than four bands'):
        CheckedLoadImageFromFile().transform(dict(img_path=str(tmp_path / 'eight.tif')))


def test_pillows_limit_is_lifted_only_while_decoding(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50)
    buffer = io.BytesIO()
    Image.new('RGB', (30, 30)).save(buffer, 'webp')
    inside, leave = threading.Event(), threading.Event()

    def work():
        with allow_large_images():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(10)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        images.require_complete(buffer.getvalue())
    assert Image.MAX_IMAGE_PIXELS is None  # the other thread is still decoding
    leave.set()
    thread.join()
    assert Image.MAX_IMAGE_PIXELS == 50
    with pytest.raises(Image.DecompressionBombError):
        Image.open(buffer)


def test_timms_operations_are_its_own():
    timm = pytest.importorskip('timm.data')
    from spec_mmdet.data.classification import ClassFolder, build_transform  # noqa: F401, registers as a config does

    operations = timm.auto_augment.NAME_TO_OP
    assert operations['PosterizeIncreasing'] is timm.auto_augment.posterize
    arguments = dict(input_size=32, is_training=True, auto_augment='rand-m10-inc1')
    transform = build_transform(**arguments)
    (augmentation,) = (step for step in transform.transforms if hasattr(step, 'ops'))
    (operation,) = (op for op in augmentation.ops if op.name == 'PosterizeIncreasing')
    operation.prob = 1
    picture = Image.fromarray(np.full((32, 32, 3), 200, np.uint8))
    assert np.unique(operation(picture)).tolist() == [128]  # 1 bit; timm asks for no conversion
