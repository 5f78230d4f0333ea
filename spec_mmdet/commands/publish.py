"""Make a folder of a trained detector that others can use: weights alone, config, model card and checksums.

    spec-mmdet publish work_dirs/mine/epoch_36.pth --licence CC-BY-4.0 [--out DIR]

DIR (default: `published`, beside the checkpoint) gets `model.pth` and `model.safetensors`, the weights (averages, where
the training kept them) without optimiser and history; `config.py`, whole, with the classes; `README.md`, the model
card: data, AP, conditioning, licence, command and commit, each as far as it is known; and `SHA256SUMS`, which
`sha256sum --check SHA256SUMS` reads. AP is that of the training's own validation (`results.csv`) at the checkpoint's
epoch. Before anything is written, all of the weights have gone into the config's model.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import MMLogger
from safetensors.torch import save
from torch import nn

from ..checkpoints.reading import get_classes, get_run_info, get_state_dict, load
from ..conditioning import describe_conditioning
from ..configs import find_run_config
from ..data.fitting import configured_classes, set_classes
from ..errors import InputError, list_briefly
from ..files import write
from ..training.results import TABLE
from ..training.saving import serialize
from .common import parser
from .predict import load_inferencer

UNKNOWN = 'not known'


def measured(checkpoint: Path, epoch: object) -> dict[str, float]:
    """What the validation of an epoch has given, from the table in the checkpoint's directory."""
    table = checkpoint.parent / TABLE
    if not table.is_file():
        return {}
    with table.open(newline='') as file:
        rows = [row for row in csv.DictReader(file) if row.get('epoch') == str(epoch)]
    return {key: float(value) for key, value in rows[-1].items() if '/' in key and value} if rows else {}


def paths_of(dataloader: dict | None) -> str:
    """The annotation files of a config's data sets."""
    found: list[str] = []

    def look(entry: object) -> None:
        if isinstance(entry, dict):
            if isinstance(entry.get('ann_file'), str):
                found.append(entry['ann_file'])
            for value in entry.values():
                look(value)
        elif isinstance(entry, list | tuple):
            for value in entry:
                look(value)

    look(dataloader)
    return list_briefly(found) if found else UNKNOWN


def card(
    name: str, cfg: Config, model: nn.Module, classes: Sequence[str], content: dict, ap: dict, licence: str | None
) -> str:
    """The model card, in Markdown."""
    run = get_run_info(content)
    meta = content.get('meta', {}) if isinstance(content, dict) else {}
    backbone = getattr(model, 'backbone', None)
    facts = {
        'detector': f'{type(model).__name__} on {type(backbone).__name__}, '
        f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters',
        'conditioning': describe_conditioning(backbone.state_dict()) if backbone else UNKNOWN,
        'classes': f'{len(classes)}: {", ".join(classes)}',
        'trained on': paths_of(cfg.get('train_dataloader')),
        'validated on': paths_of(cfg.get('val_dataloader')),
        'epochs': meta.get('epoch', UNKNOWN),
        'seed': run.get('seed', UNKNOWN),
        'command': f'`{run["command"]}`' if run.get('command') else UNKNOWN,
        'commit of spec_mmdet': run.get('commit') or UNKNOWN,
        'versions': ', '.join(f'{key} {value}' for key, value in run.get('versions', {}).items()) or UNKNOWN,
        'licence': licence or 'not stated',
    }
    measure = '\n'.join(f'| {key.removeprefix("coco/")} | {value:.3f} |' for key, value in ap.items())
    figures = (
        f'| measure | value |\n|---|---|\n{measure}' if ap else 'Not known: no table of the training was beside it.'
    )
    rows = '\n'.join(f'| {key} | {" ".join(str(value).split())} |' for key, value in facts.items())
    return f"""# {name}

| | |
|---|---|
{rows}

## AP on the validation images

{figures}

## Using it

In this folder, with spec_mmdet installed:

```shell
sha256sum --check SHA256SUMS
spec-mmdet predict config.py model.pth IMAGES
spec-mmdet test config.py model.pth --data FOLDER
```

`model.safetensors` holds the same weights, and may be named in the place of `model.pth`.
"""


def main(argv: Sequence[str] | None = None) -> None:
    options = parser('publish', __doc__)
    options.add_argument('checkpoint', type=Path, help='a checkpoint of the detector')
    options.add_argument('--config', type=Path, help='its config (default: the one beside it)')
    options.add_argument('--out', type=Path, help='a folder that is empty or not there (default: published, beside it)')
    options.add_argument('--name', help="of the model (default: the config's)")
    options.add_argument('--licence', help='under which others may use it, for instance CC-BY-4.0')
    args = options.parse_args(argv)

    content = load(args.checkpoint)
    weights = get_state_dict(content, f'checkpoint {args.checkpoint}')
    config = args.config or find_run_config(args.checkpoint.parent)
    if not config.is_file():
        raise InputError(f'--config {config}: no such file')
    out = args.out or args.checkpoint.parent / 'published'
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f'--out {out}: is there already and not an empty folder')
    MMLogger.get_current_instance().setLevel('ERROR')  # it lists every tensor that it loads
    cfg = Config.fromfile(config)
    model = load_inferencer(copy.deepcopy(cfg), str(args.checkpoint), 'cpu').model
    classes = get_classes(content) or configured_classes(cfg.test_dataloader.dataset)
    set_classes(cfg, classes)
    for key in ('work_dir', 'load_from', 'resume'):  # of the machine that it was trained on
        cfg.pop(key, None)
    ap = measured(args.checkpoint, content.get('meta', {}).get('epoch'))

    meta = dict(dataset_meta=dict(classes=tuple(classes)))
    files = {
        'model.pth': serialize(dict(meta=meta, state_dict=weights)),
        'model.safetensors': save({key: value.contiguous() for key, value in weights.items()},
                                  dict(classes=json.dumps(classes))),
        'config.py': cfg.pretty_text.encode(),
        'README.md': card(args.name or config.stem, cfg, model, classes, content, ap, args.licence).encode(),
    }  # fmt: skip
    sums = ''.join(f'{hashlib.sha256(data).hexdigest()}  {name}\n' for name, data in files.items())
    for name, data in {**files, 'SHA256SUMS': sums.encode()}.items():
        write(out / name, data)
    print(sums, end='')
    if not args.licence:
        print('no --licence: the card says that it is not stated')
    if not ap:
        print(f'no AP of this epoch in {args.checkpoint.parent / TABLE}: the card says that it is not known')
    print(f'wrote {out}')
