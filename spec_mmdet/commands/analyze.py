"""Condition numbers of a backbone's projections and of its attention's Jacobians: a table, CSV files and a plot.

    spec-mmdet analyze xcit_spec_maskrcnn [CHECKPOINT] [--images DIR]

Without a checkpoint the weights are those that training would start from. The Jacobians depend on the tokens, so they
are computed on images, by XCA layers alone; each figure of a layer is the median over the images.
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from mmdet.registry import MODELS
from mmdet.utils import get_test_pipeline_cfg, register_all_modules
from mmengine.dataset import Compose
from mmengine.logging import MMLogger

from ..checkpoints.pretrained import load_backbone
from ..conditioning import Report, measure
from ..data.images import IMAGE_SUFFIXES
from ..errors import InputError
from ..files import write_folder_atomically
from ..models.jacobians import JacobianSpectrum, jacobian_spectra
from ..models.xcit import SpecXCiT
from .common import add_config, load_config, parser


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def draw(report: Report, jacobians: dict[str, list[JacobianSpectrum]], path: Path) -> None:
    """Over the layers: kappa of the projections, their singular values, and kappa of the Jacobians."""
    layers = list(dict.fromkeys(row.name for row in report))
    panels = 3 if jacobians else 2
    figure = Figure(figsize=(5.5 * panels, 4), layout='constrained')
    axes = figure.subplots(1, panels)
    for color, role in enumerate(dict.fromkeys(row.role for row in report)):
        rows = [row for row in report if row.role == role]
        x = [layers.index(row.name) for row in rows]
        axes[0].plot(x, [row.kappa for row in rows], f'C{color}--', label=f'$W_{{{role}}}$')
        axes[1].plot(x, [row.sigma_min for row in rows], f'C{color}--', label=f'$W_{{{role}}}$')
        axes[1].plot(x, [row.sigma_max for row in rows], f'C{color}--')
        if rows[0].conditioned_kappa is not None:
            label = f'$W_{{{role}}} + C_{{{role}}}$'
            axes[0].plot(x, [row.conditioned_kappa for row in rows], f'C{color}', label=label)
            axes[1].plot(x, [row.conditioned_sigma_min for row in rows], f'C{color}', label=label)
            axes[1].plot(x, [row.conditioned_sigma_max for row in rows], f'C{color}')
    axes[0].set(yscale='log', xlabel='layer', title=r'$\kappa$ of the projections')
    axes[1].set(yscale='log', xlabel='layer', title='their smallest and largest singular values')
    axes[0].legend()
    axes[1].legend()
    if jacobians:
        axes[2].plot([statistics.median(row.kappa for row in rows) for rows in jacobians.values()], 'k', marker='o')
        axes[2].set(yscale='log', xlabel='layer', title=r"$\kappa$ of the attention's Jacobian")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser('analyze', __doc__)
    add_config(options)
    options.add_argument('checkpoint', nargs='?', help='in any layout of XCiT; a file, or an http(s) address')
    options.add_argument('--images', type=Path, help='a folder of images, for the Jacobians')
    options.add_argument('--max-images', type=int, default=4, help='how many of them to use (default: 4)')
    options.add_argument('--heads', type=int, help='heads per layer whose Jacobian is computed (default: all, or one'
                        ' where they are wider than 32 channels and take about a second each)')  # fmt: skip
    options.add_argument('--out', type=Path, default=Path('work_dirs/conditioning'), help='folder of the files written')
    args = options.parse_args(argv)

    if min(args.max_images, args.heads or 1) < 1:
        raise InputError('--max-images and --heads must be at least 1')
    images = []
    if args.images:
        found = (path for path in args.images.glob('*') if path.suffix.lower() in IMAGE_SUFFIXES)
        images = sorted(found)[: args.max_images]
        if not images:
            raise InputError(
                f'--images {args.images}: no folder with images ({", ".join(sorted(IMAGE_SUFFIXES))}) in it'
            )
    MMLogger.get_current_instance().setLevel('ERROR')  # it lists every weight that it initialises
    register_all_modules()
    cfg = load_config(args)
    if 'backbone' not in cfg.get('model', {}):
        raise InputError(f'config {args.config}: no model with a backbone in it')
    backbone = MODELS.build(cfg.model.backbone)
    if args.checkpoint and not isinstance(backbone, SpecXCiT):
        raise InputError(f'{args.checkpoint}: checkpoints are read for SpecXCiT alone, not {cfg.model.backbone.type}')
    if args.checkpoint:
        load_backbone(backbone, args.checkpoint)
    else:
        backbone.init_weights()
    report = measure(backbone)
    if not report:
        raise InputError(f'config {args.config}: no attention was found in its backbone, a {cfg.model.backbone.type}')

    print(report)
    if report.describe_worsened():
        print(f'\nwarning: {report.describe_worsened()}')
    projections = [
        {**dataclasses.asdict(r), 'kappa': r.kappa, 'conditioned_kappa': r.conditioned_kappa} for r in report
    ]

    jacobians: dict[str, list[JacobianSpectrum]] = {}
    rows = []
    if images:
        preprocess = MODELS.build(cfg.model.data_preprocessor)
        steps = [step for step in get_test_pipeline_cfg(cfg) if step['type'] != 'LoadAnnotations']
        pipeline = Compose(steps)
        for i, path in enumerate(images):
            batch = preprocess(dict(inputs=[pipeline(dict(img_path=str(path), img_id=i))['inputs']], data_samples=None))
            for row in jacobian_spectra(backbone, batch['inputs'], args.heads):
                jacobians.setdefault(row.name, []).append(row)
                rows.append({'image': path.name, **dataclasses.asdict(row), 'kappa': row.kappa})
    if jacobians:
        width = max(map(len, jacobians))
        print(f'\n{"Jacobian of":{width}}{"sigma_min":>10}{"sigma_max":>10}{"kappa":>10}  heads')
        for name, spectra in jacobians.items():
            figures = zip(*((row.sigma_min, row.sigma_max, row.kappa) for row in spectra))
            columns = ''.join(f'{statistics.median(figure):>10.3g}' for figure in figures)
            chosen, count = spectra[0].heads, spectra[0].num_heads
            heads = 'all' if len(chosen) == count else f'{", ".join(map(str, chosen))} of {count} (a sample)'
            print(f'{name:{width}}{columns}  {heads}')
        print(f'on {len(images)} images: {", ".join(path.name for path in images)}')
    elif images:
        print('\nno Jacobians: they are known for XCA layers alone')
    with write_folder_atomically(args.out) as aside:
        write_csv(aside / 'projections.csv', projections)
        if jacobians:
            write_csv(aside / 'jacobians.csv', rows)
        draw(report, jacobians, aside / 'conditioning.png')
    written = ['projections.csv', *(['jacobians.csv'] if jacobians else []), 'conditioning.png']
    print(f'\nwrote {", ".join(str(args.out / name) for name in written)}')
