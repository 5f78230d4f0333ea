"""Tabulate and plot the condition numbers of a backbone and of its attention's Jacobians on images."""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from mmdet.registry import MODELS
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config
from mmengine.dataset import Compose
from torch import nn

from ..checkpoints.pretrained import load_backbone
from ..conditioning import Report
from ..errors import InputError
from ..files import write_folder_atomically
from ..models.jacobians import JacobianSpectrum, compute_jacobian_spectra
from ..models.xcit import SpecXCiT

Spectra = dict[str, list[JacobianSpectrum]]  # by layer, one for each image


def build_backbone(cfg: Config, checkpoint: str | None) -> nn.Module:
    """Build a config's backbone with the weights of a checkpoint, or with the config's initial weights.

    Raises:
        InputError: if the config has no backbone, or the checkpoint does not fit it.
    """
    if 'backbone' not in cfg.get('model', {}):
        raise InputError(f'config {cfg.filename}: has no model with a backbone. Use the config of a detector')
    backbone = MODELS.build(cfg.model.backbone)
    if not checkpoint:
        backbone.init_weights()
    elif isinstance(backbone, SpecXCiT):
        load_backbone(backbone, checkpoint)
    else:
        raise InputError(
            f'{checkpoint}: checkpoints of {cfg.model.backbone.type} are not supported. Leave out the checkpoint'
        )
    return backbone


def measure_jacobians(cfg: Config, backbone: nn.Module, images: Sequence[Path], heads: int | None) -> Spectra:
    """Compute the spectra of the backbone's Jacobians on images, preprocessed by the config's test pipeline."""
    spectra: Spectra = {}
    if images:
        preprocess = MODELS.build(cfg.model.data_preprocessor)
        pipeline = Compose([step for step in get_test_pipeline_cfg(cfg) if step['type'] != 'LoadAnnotations'])
    for i, path in enumerate(images):
        batch = preprocess(dict(inputs=[pipeline(dict(img_path=str(path), img_id=i))['inputs']], data_samples=None))
        for row in compute_jacobian_spectra(backbone, batch['inputs'], heads):
            spectra.setdefault(row.name, []).append(row)
    return spectra


def format_jacobians(spectra: Spectra) -> str:
    """Format a table of the layers with medians over the images."""
    width = max(map(len, spectra))
    lines = [f'{"Jacobian of":{width}}{"sigma_min":>10}{"sigma_max":>10}{"kappa":>10}  heads']
    for name, rows in spectra.items():
        values = zip(*((row.sigma_min, row.sigma_max, row.kappa) for row in rows))
        columns = ''.join(f'{statistics.median(column):>10.3g}' for column in values)
        chosen, count = rows[0].heads, rows[0].num_heads
        heads = 'all' if len(chosen) == count else f'{", ".join(map(str, chosen))} of {count} (a sample)'
        lines.append(f'{name:{width}}{columns}  {heads}')
    return '\n'.join(lines)


def write_analysis(out: Path, report: Report, spectra: Spectra, images: Sequence[Path]) -> list[Path]:
    """Write projections.csv, jacobians.csv if there are any, and conditioning.png; return their paths."""
    projections = [
        {**dataclasses.asdict(r), 'kappa': r.kappa, 'conditioned_kappa': r.conditioned_kappa} for r in report
    ]
    jacobians = [
        {'image': path.name, **dataclasses.asdict(rows[i]), 'kappa': rows[i].kappa}
        for i, path in enumerate(images)
        for rows in spectra.values()
    ]
    tables = {'projections.csv': projections, 'jacobians.csv': jacobians}
    tables = {name: rows for name, rows in tables.items() if rows}
    with write_folder_atomically(out) as temporary:
        for name, rows in tables.items():
            text = io.StringIO()
            writer = csv.DictWriter(text, rows[0], lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
            (temporary / name).write_text(text.getvalue())
        draw(report, spectra, temporary / 'conditioning.png')
    return [out / name for name in (*tables, 'conditioning.png')]


def draw(report: Report, jacobians: Spectra, path: Path) -> None:
    """Plot kappa and singular values of the projections, and kappa of the Jacobians, against the layer."""
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
