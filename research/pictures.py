"""Redraw the pictures of the README and of docs/.

    python -m research.pictures [NAME ...]

NAME is the name of a picture without suffix (default: all). The commands that a picture needs are run if their results
are not in work_dirs, which takes about 45 minutes on two idle CPU cores. Screenshots of pages need Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from shapely.geometry import Polygon, box
from shapely.ops import unary_union

from spec_mmdet.commands import command_line
from spec_mmdet.commands.common import make_parser, run_command
from spec_mmdet.data.shapes import CATEGORIES, cut_into_polygons, describe_polygons, place, write_split
from spec_mmdet.errors import InputError
from spec_mmdet.evaluation.drawing import tile_pictures

from .scenes import Figures, make_crop, make_scene

DOCS, WORK = Path(__file__).parents[1] / 'docs', Path('work_dirs')
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
# Colours of a scene, RGB: the background's top and bottom, and the objects.
PALETTES = [
    ('#fdf2e3', '#f6c89f', '#2a6f77', '#d9573f', '#f2a33a', '#5b4a72'),
    ('#e8f1f8', '#a9c8e4', '#e4572e', '#17475f', '#f3c13a', '#7a9e3b'),
    ('#f0ebf8', '#c6b6e2', '#3d2c6b', '#e0527c', '#2f9c95', '#f4b942'),
    ('#eaf4ea', '#b3d6b4', '#234f3b', '#ee7b30', '#c8334d', '#356fa8'),
]


def parse_colour(text: str) -> np.ndarray:
    """Return a colour, #rrggbb, as BGR."""
    return np.array([int(text[i : i + 2], 16) for i in (5, 3, 1)], float)


def make_still_life(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[dict]]:
    """Draw the demo's shapes, apart from each other, with shadows on a plain background; see ``make_image``."""
    top, bottom, *colours = map(parse_colour, PALETTES[rng.integers(len(PALETTES))])
    ramp = np.linspace(0, 1, size)[:, None, None]
    image = np.broadcast_to((1 - ramp) * top + ramp * bottom, (size, size, 3)).copy()
    taken, annotations = Polygon(), []
    for _ in range(60):
        category, radius = int(rng.integers(len(CATEGORIES))), size * rng.uniform(0.1, 0.2)
        outline = place(rng, CATEGORIES[category], *rng.uniform(0.12 * size, 0.88 * size, 2), radius)
        if len(annotations) == 7 or not box(0, 0, size, size).contains(outline) or outline.intersects(taken):
            continue
        taken = unary_union([taken, outline.buffer(size * 0.025)])
        opacity = np.zeros((2, size, size), np.float32)  # of the shadow and of the object
        for layer, offset in zip(opacity, (size * 0.02, 0)):
            points = np.round((np.asarray(outline.exterior.coords) + offset) * 256).astype(np.int32)
            cv2.fillPoly(layer, [points], 1, cv2.LINE_AA, shift=8)
        shadow = 0.3 * cv2.GaussianBlur(opacity[0], (0, 0), size * 0.015)[..., None]
        colour = colours[rng.integers(len(colours))] * (1.1 - 0.25 * ramp)
        image = image * (1 - shadow) * (1 - opacity[1][..., None]) + colour * opacity[1][..., None]
        polygons = cut_into_polygons(outline)
        annotations.append(dict(category_id=category + 1, iscrowd=0, **describe_polygons(polygons)))
    return image.clip(0, 255).astype(np.uint8), annotations


def take_screenshot(page: Path, out: Path, width: int, height: int) -> None:
    """Write the top of a page as PNG.

    Raises:
        InputError: if there is no browser.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise InputError(f'{out.name}: needs a browser, one of {", ".join(BROWSERS)}. Run: apt-get install chromium')
    options = ['--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', f'--window-size={width},{height}']
    with TemporaryDirectory() as profile:
        options += [f'--user-data-dir={profile}', f'--screenshot={out}']
        subprocess.run([browser, *options, page.resolve().as_uri()], check=True, capture_output=True)


def run_demo() -> Path:
    """Run the demo if it has not been run, and return its folder."""
    if not (WORK / 'demo' / 'report' / 'index.html').is_file():
        run_command('demo')
    return WORK / 'demo'


def draw_predictions(out: Path) -> None:
    demo = run_demo()
    with TemporaryDirectory() as folder:
        write_split(Path(folder), 'val', 6, 360, np.random.default_rng(4), make_still_life)
        checkpoint = demo / (demo / 'last_checkpoint').read_text()
        drawn = Path(folder) / 'drawn'
        run_command(
            'predict', demo / 'xcit_spec_shapes.py', checkpoint, f'{folder}/val', '--score', 0.5, '--out', drawn
        )
        cv2.imwrite(str(out), tile_pictures([cv2.imread(str(path)) for path in sorted(drawn.glob('*.png'))], 3))


def draw_report(out: Path) -> None:
    take_screenshot(run_demo() / 'report' / 'index.html', out, 1240, 1000)


def draw_comparison(out: Path) -> None:
    """Train the demo's detector on images of 64 pixels, plain and conditioned, with two seeds each; compare them."""
    page = WORK / 'comparison' / 'index.html'
    if not page.is_file():
        runs = []
        for name, options in (('plain', ['model.backbone.conditioning=None']), ('conditioned', [])):
            for seed in range(2):
                folder = WORK / f'{name}_{seed}'
                runs.append(f'{name}={folder}')
                if (folder / 'report').is_dir():
                    continue
                args = ['--epochs', 1, '--image-size', 64, '--cfg-options', *options, f'randomness.seed={seed}']
                run_command('train', 'xcit_spec_shapes', '--work-dir', folder, *args)
                checkpoint = folder / (folder / 'last_checkpoint').read_text()
                run_command('test', folder / 'xcit_spec_shapes.py', checkpoint, '--report', folder / 'report')
        run_command('compare', *runs)
    take_screenshot(page, out, 878, 638)


def draw_paper_figures(out: Path) -> None:
    drawn = WORK / 'paper_figures' / 'conditioning.png'
    if not drawn.is_file():
        subprocess.run([sys.executable, '-m', 'research.paper_figures'], check=True)
    shutil.copy(drawn, out)


def draw_benchmark(out: Path) -> None:
    results = WORK / 'benchmark' / 'benchmark.json'
    if not results.is_file():
        sizes = ['--sizes', '320x320', '640x640', '800x1216']
        run_command('benchmark', '--models', 'timm', 'ours', *sizes, '--out', results.parent)
    subprocess.run([sys.executable, '-m', 'benchmarks.speed_plot', results, out], check=True)


def draw_scenes(out: Path) -> None:
    """Draw scenes to detect objects in, and single objects to pretrain on."""
    figures, rng = Figures(), np.random.default_rng(1)
    scenes = [make_scene(rng, 192, figures, 'val')[0] for _ in range(8)]
    crops = [make_crop(rng, 92, figures, name, 'val') for name in figures.pretraining]
    sheets = tile_pictures(scenes, 4), tile_pictures(crops, 4)
    height = max(sheet.shape[0] for sheet in sheets)
    padded = [np.pad(s, ((0, height - s.shape[0]), (0, 0), (0, 0)), constant_values=255) for s in sheets]
    cv2.imwrite(str(out), np.hstack(padded))


PICTURES = {
    'predictions.png': draw_predictions,
    'report.png': draw_report,
    'comparison.png': draw_comparison,
    'paper_figures.png': draw_paper_figures,
    'benchmark.png': draw_benchmark,
    'scenes.jpg': draw_scenes,
}


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('research.pictures', __doc__, 'python -m')
    names = [Path(name).stem for name in PICTURES]
    options.add_argument('names', nargs='*', metavar='NAME', help=f'some of {", ".join(names)}')
    args = options.parse_args(argv)
    if unknown := set(args.names) - set(names):
        raise InputError(f'there is no picture {", ".join(sorted(unknown))}. Pass some of {", ".join(names)}')
    for name, draw in PICTURES.items():
        if not args.names or Path(name).stem in args.names:
            draw(DOCS / name)
            print(f'wrote {DOCS / name}')


if __name__ == '__main__':
    with command_line():
        main()
