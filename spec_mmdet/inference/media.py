"""Images and videos: find them, decode them, and write pictures."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from ..data.images import IMAGE_SUFFIXES, read
from ..errors import InputError, list_briefly

VIDEOS = {'.mp4': 'mp4v', '.avi': 'mp4v', '.mov': 'mp4v', '.mkv': 'mp4v', '.webm': 'VP80'}  # suffixes, and codecs


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def find_inputs(names: list[str]) -> list[Path]:
    """Find the images and videos of inputs (files, folders and globs); hidden files in folders are skipped.

    Returns:
        Absolute paths without duplicates.

    Raises:
        InputError: if an input does not exist or contains nothing, or the header of a file cannot be read.
    """
    paths: dict[Path, None] = {}
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            images = sorted(entry for entry in path.iterdir() if is_image(entry))
            found = [entry for entry in images if not entry.name.startswith('.')]
            if hidden := [entry.name for entry in images if entry.name.startswith('.')]:
                print(f'{name}: skipped hidden files: {list_briefly(hidden)}')
            if not found:
                raise InputError(f'{name}: the folder contains no images ({", ".join(sorted(IMAGE_SUFFIXES))}). Pass '
                                 'another folder, or a quoted glob')  # fmt: skip
        elif path.exists():
            found = [path]
            require_readable(path, name)
        elif glob.has_magic(name):
            matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
            if not (found := [entry for entry in matches if is_image(entry) or is_video(entry)]):
                raise InputError(f'{name}: the glob matches no images or videos. Check the path, and quote the glob')
        else:
            raise InputError(f'{name}: no such file or folder. Check the path')
        paths.update(dict.fromkeys(Path(os.path.abspath(entry)) for entry in found))
    return list(paths)


def require_readable(path: Path, name: str) -> None:
    """Check that a file is an image or a video by its suffix and its header."""
    if not (is_image(path) or is_video(path)):
        suffixes = ', '.join(sorted(IMAGE_SUFFIXES)), ', '.join(VIDEOS)
        raise InputError('{}: neither an image ({}) nor a video ({}). Convert it'.format(name, *suffixes))
    readable = cv2.VideoCapture(str(path)).isOpened() if is_video(path) else cv2.haveImageReader(str(path))
    if not readable:
        raise InputError(f'{name}: OpenCV cannot read this {"video" if is_video(path) else "image"}. Convert it')


def count_frames(path: Path) -> int:
    """Return 1 for an image, and for a video the number of frames in its header."""
    return int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)) if is_video(path) else 1


def decode_file(path: Path, doubts: dict[str, list[Path]] | None = None) -> Iterator[tuple[int | None, np.ndarray]]:
    """Yield (number from 0, frame) for a video, or (None, image); shape (H, W, 3), BGR; see ``read`` for ``doubts``.

    A truncated video ends without an error.

    Raises:
        InputError: with the kind of fault.
    """
    if not is_video(path):
        yield None, read(path, doubts)
        return
    video, frame_id = cv2.VideoCapture(str(path)), 0
    while (frame := video.read()[1]) is not None:
        yield frame_id, frame
        frame_id += 1
    if not frame_id:
        raise InputError('corrupt videos')


def decode_files(
    paths: list[Path], damaged: dict[str, list[Path]], doubts: dict[str, list[Path]]
) -> Iterator[tuple[Path, int | None, np.ndarray]]:
    """Yield the path, number and image of all files; add corrupt files to ``damaged``, by kind of fault."""
    for path in paths:
        try:
            for frame_id, image in decode_file(path, doubts):
                yield path, frame_id, image
        except InputError as error:
            damaged.setdefault(str(error), []).append(path)


class PictureWriter:
    """Writer of pictures, shape (H, W, 3), BGR, as image files or as frames of a video, in order."""

    def __init__(self) -> None:
        self.video: cv2.VideoWriter | None = None

    def write(self, picture: np.ndarray, source: Path, frame_id: int | None, out_file: Path) -> None:
        """Write a picture of an image (``frame_id`` None) or of a frame of the video ``source``."""
        out_file.parent.mkdir(parents=True, exist_ok=True)
        if frame_id is None:
            out_file.write_bytes(cv2.imencode(out_file.suffix, picture)[1])  # imwrite may not report a full disk
            return
        if frame_id == 0:
            self.close()
            rate = cv2.VideoCapture(str(source)).get(cv2.CAP_PROP_FPS) or 25
            codec = cv2.VideoWriter_fourcc(*VIDEOS[out_file.suffix.lower()])
            self.video = cv2.VideoWriter(str(out_file), codec, rate, picture.shape[1::-1])
            self.video_file = out_file
            if not self.video.isOpened():
                raise OSError(f'{out_file.name} could not be opened; OpenCV may lack its encoder. Use --no-pictures')
        self.video.write(picture)
        self.frames = frame_id + 1

    def close(self) -> None:
        """Finish the current video.

        Raises:
            OSError: if it is truncated; OpenCV does not report a full disk.
        """
        if self.video is None:
            return
        self.video.release()
        self.video, video = None, cv2.VideoCapture(str(self.video_file))
        video.set(cv2.CAP_PROP_POS_FRAMES, self.frames - 1)
        if not video.read()[0]:
            raise OSError(f'{self.video_file.name} is truncated: the disk may be full')
