"""Write a folder of a trained detector for other users: weights, config, model card and checksums."""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from safetensors.torch import save
from torch import nn

from ..checkpoints.reading import describe_state, get_classes, get_run_info, get_state_dict, load
from ..checkpoints.writing import serialize
from ..compat import get_content
from ..conditioning import describe_conditioning
from ..configs import find_run_config, is_segmentor, walk
from ..data.fitting import drop_pretrained, list_configured_classes
from ..data.tasks import set_classes
from ..errors import InputError
from ..files import write
from ..substitution import add_import
from ..training.results import TABLE, is_of_training
from .inferencer import load_inferencer

UNKNOWN = 'unknown'


def read_metrics(folder: Path, state: dict, run: dict) -> dict[str, float]:
    """Read the metrics of a checkpoint's validation from the table in its folder.

    Args:
        folder: the checkpoint's folder.
        state: state of its weights; see ``describe_state``.
        run: metadata of its training.

    Returns:
        The metrics; {} without a table, within an epoch, or if the folder is that of another training.
    """
    table = folder / TABLE
    if not table.is_file() or state['epoch'] is None or not is_of_training(run, folder):
        return {}
    with table.open(newline='') as file:
        rows = [row for row in csv.DictReader(file) if row.get('epoch') == str(state['epoch'])]
    return {key: float(value) for key, value in rows[-1].items() if '/' in key and value} if rows else {}


def describe_annotation_files(dataloader: dict | None, digests: dict[str, str] | None) -> str:
    """Return the annotation files of a training with their digests as text, or those of a config's data sets."""
    found = [f'{Path(path).name} (SHA-256 {digest})' for path, digest in (digests or {}).items()]
    found = found or [node['ann_file'] for _, node in walk(dataloader) if isinstance(node.get('ann_file'), str)]
    return ', '.join(found) or UNKNOWN


def write_card(
    name: str, cfg: Config, model: nn.Module, classes: Sequence[str], run: dict, state: dict, ap: dict,
    licence: str | None,
) -> str:  # fmt: skip
    """Return the model card in Markdown."""
    data = run.get('data') or {}
    backbone = getattr(model, 'backbone', None)
    facts = {
        'detector': f'{type(model).__name__} on {type(backbone).__name__}, '
        f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters',
        'conditioning': describe_conditioning(backbone.state_dict()) if backbone else UNKNOWN,
        'classes': f'{len(classes)}: {", ".join(classes)}',
        'trained on': describe_annotation_files(cfg.get('train_dataloader'), data.get('train')),
        'validated on': describe_annotation_files(cfg.get('val_dataloader'), data.get('val')),
        'weights': f'{state["position"]}; SHA-256 of the tensors {state["sha256"]}',
        'seed': run.get('seed', UNKNOWN),
        'command': f'`{run["command"]}`' if run.get('command') else UNKNOWN,
        'commit of spec_mmdet': run.get('commit') or UNKNOWN,
        'versions': ', '.join(f'{key} {value}' for key, value in run.get('versions', {}).items()) or UNKNOWN,
        'licence': licence or 'not specified',
    }
    table = ''.join(f'\n| {key.removeprefix("coco/")} | {value:.3f} |' for key, value in ap.items())
    metrics = (
        f'| metric | value |\n|---|---|{table}'
        if ap
        else f'Unknown, because {TABLE} next to the checkpoint has no validation of these weights.'
    )
    rows = '\n'.join(f'| {key} | {" ".join(str(value).split())} |' for key, value in facts.items())
    return f"""# {name}

| | |
|---|---|
{rows}

## Results on the validation images

{metrics}

## Usage

Run in this folder, with spec_mmdet installed:

```shell
sha256sum --check SHA256SUMS
spec-mmdet predict config.py model.pth IMAGES
spec-mmdet test config.py model.pth --data FOLDER
```

`model.safetensors` contains the same weights and can be used instead of `model.pth`.
"""


def remove_local_settings(cfg: Config) -> None:
    """Remove local settings from a config; changes ``cfg``.

    These are pretrained weights, the work directory and paths: data folders become ``data``, and other files keep only
    their names.
    """
    for key in ('work_dir', 'load_from', 'resume'):
        cfg.pop(key, None)
    drop_pretrained(cfg.get('model'))
    nodes = [node for _, node in walk(get_content(cfg))]
    roots = {node['data_root'].rstrip('/') for node in nodes if isinstance(node.get('data_root'), str)} - {''}

    def change(value: object) -> object:
        if isinstance(value, (list, tuple)):
            return type(value)(map(change, value))
        if not isinstance(value, str):
            return value
        for root in sorted(roots, key=len, reverse=True):
            if value.rstrip('/') == root or value.startswith(f'{root}/'):
                return f'data{value[len(root) :]}'
        return Path(value).name if value.startswith(('..', '~')) or os.path.isabs(value) else value

    for node in nodes:
        node.update({key: change(value) for key, value in node.items() if key not in ('type', 'classes')})


def publish(
    checkpoint: Path, config: Path | None, out: Path, name: str | None, licence: str | None
) -> tuple[str, dict[str, float]]:
    """Write the folder of a detector; return the checksums and the metrics in the model card.

    Args:
        checkpoint: a checkpoint of a training.
        config: its config; by default the one next to the checkpoint.
        out: a new or empty folder.
        name: name of the model; by default the config's.
        licence: licence for other users.

    Raises:
        InputError: if an input is invalid, or the weights do not fit the config's model.
    """
    content = load(checkpoint)
    weights = get_state_dict(content, f'checkpoint {checkpoint}')
    config = config or find_run_config(checkpoint.parent)
    if not config.is_file():
        raise InputError(f'--config {config}: no such file. Check the path')
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f'--out {out}: exists and is not empty. Pass a new folder')
    cfg = Config.fromfile(config)
    model = load_inferencer(copy.deepcopy(cfg), str(checkpoint), 'cpu').model
    own = model.state_dict()
    weights = {key: value.clone(memory_format=torch.contiguous_format) for key, value in weights.items() if key in own}
    classes = get_classes(content) or list_configured_classes(cfg.test_dataloader.dataset)
    set_classes(cfg, classes)
    remove_local_settings(cfg)
    add_import(cfg)
    if is_segmentor(cfg):
        cfg.visualizer = dict(type='SegLocalVisualizer')  # MMSegInferencer requires it
    run, state = get_run_info(content), describe_state(content)
    ap = read_metrics(checkpoint.parent, state, run)
    meta = dict(dataset_meta=dict(classes=tuple(classes)))
    files = {
        'model.pth': serialize(dict(meta=meta, state_dict=weights)),
        'model.safetensors': save(weights, dict(classes=json.dumps(classes))),
        'config.py': cfg.pretty_text.encode(),
        'README.md': write_card(name or config.stem, cfg, model, classes, run, state, ap, licence).encode(),
    }  # fmt: skip
    sums = ''.join(f'{hashlib.sha256(data).hexdigest()}  {name}\n' for name, data in files.items())
    for file, data in {**files, 'SHA256SUMS': sums.encode()}.items():
        write(out / file, data)
    return sums, ap
