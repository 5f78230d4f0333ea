"""What is written on pictures: names of classes as they are, in a font that has their letters."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import matplotlib
from matplotlib.font_manager import findSystemFonts, fontManager, get_font
from mmdet.engine.hooks import DetVisualizationHook
from mmdet.registry import HOOKS
from mmengine.runner import Runner

ADVICE = (
    'install a font that has them (for instance fonts-noto-cjk of Debian and Ubuntu), or one for Python alone: '
    'pip install mplfonts'
)


@cache
def letters_of(path: str) -> frozenset[int]:
    """The code points that a font file has a picture of."""
    try:
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError):  # not a font that matplotlib can read
        return frozenset()


def font_for(letters: set[int]) -> tuple[str, set[int]]:
    """The name of the font that has the most of these code points, and which it lacks.

    It is matplotlib's own where that is enough, or else one of the system or of the package mplfonts.
    """
    own = 'DejaVu Sans'
    paths = {entry.fname: entry.name for entry in fontManager.ttflist if entry.name == own and entry.style == 'normal'}
    lacking = letters - letters_of(next(iter(paths)))
    if not lacking:
        return own, lacking
    package = find_spec('mplfonts')
    others = list(map(str, Path(package.origin).parent.glob('fonts/*'))) if package else []
    best = max([*findSystemFonts(), *others], key=lambda path: len(lacking & letters_of(path)), default='')
    if not lacking & letters_of(best):
        return own, lacking
    fontManager.addfont(best)  # the list of them may be older than it is
    return fontManager.ttflist[-1].name, letters - letters_of(best)


@contextmanager
def names_drawn(names: Iterable[str]) -> Iterator[None]:
    """What pictures are drawn in: nothing in a name is read as mathematics, and a font that has its letters is found.

    Letters that no font has are squares, and are told.
    """
    letters = {ord(letter) for name in names for letter in name if not letter.isspace()}
    font, lacking = font_for(letters)
    if lacking:
        some = ' '.join(sorted(map(chr, lacking))[:20])
        print(f'warning: {len(lacking)} letters of the names of classes are squares on pictures ({some}): {ADVICE}')
    families = [font, *matplotlib.rcParams['font.sans-serif']]
    with matplotlib.rc_context({'text.parse_math': False, 'font.sans-serif': families}):
        yield


@HOOKS.register_module()
class PictureHook(DetVisualizationHook):
    """MMDetection's DetVisualizationHook, which draws images of the same name in two folders into two folders."""

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: list) -> None:
        """Draw the predictions, each in the place that its image has below the data set's image folder."""
        top = self.test_out_dir
        if top is None:
            super().after_test_iter(runner, batch_idx, data_batch, outputs)
            return
        root = (getattr(runner.test_dataloader.dataset, 'data_prefix', None) or {}).get('img', '')
        for sample in outputs:
            place = os.path.relpath(os.path.dirname(sample.img_path), root) if root else '.'
            self.test_out_dir = os.path.normpath(os.path.join(top, '.' if place.startswith('..') else place))
            super().after_test_iter(runner, batch_idx, data_batch, [sample])
        self.test_out_dir = top
