"""Time and peak memory of XCiT backbones and of whole detectors: ours against timm's, mmpretrain's and the plain form.

    spec-mmdet benchmark [--arch small_12] [--patch-size 16] [--sizes 640x640 ...] [--batch 1] [--amp bf16|fp16]
    spec-mmdet benchmark --detector [...]

All have the same weights (but for mmpretrain's, which has its own) and see the same images. They take turns, so that a
busy machine slows all of them alike; a ratio is the median, over the rounds, of the first model's time over theirs in
the same round: above 1 is faster than the first. Backbones are timed up to their last block, before any feature
pyramid; detectors on random objects.
Written are a table, a JSON file and, for several sizes, a plot.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ..checkpoints.layouts import to_layout
from ..configs import find_config
from ..files import folder_written_aside
from ..models.xcit import ARCHS, SpecXCiT
from .common import parser

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

AMP = {None: None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


class OurTaps(nn.Module):
    """A SpecXCiT up to its last block: images to the tokens after it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.taps(images)[-1]


class TheirTaps(nn.Module):
    """The same of timm's XCiT or mmpretrain's, which differ in what they call their blocks."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.model, self.blocks = model, blocks

    def forward(self, images: Tensor) -> Tensor:
        x, (h, w) = self.model.patch_embed(images)
        x = x + self.model.pos_embed(len(x), h, w).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, h, w)
        return x


def plain_form(model: nn.Module) -> nn.Module:
    """Have a model's attention take the plain form, whatever the number of tokens."""
    for module in model.modules():
        if hasattr(module, 'gram_from'):
            module.gram_from = math.inf
    return model


def build_backbone(name: str, arch: str, patch_size: int) -> nn.Module:
    """One of the backbones to compare, with the weights that all of them have."""
    torch.manual_seed(0)
    ours = SpecXCiT(arch, patch_size)
    dims = ARCHS[arch]
    if name == 'timm':
        from timm.models.xcit import Xcit

        shape = dict(embed_dim=dims['dim'], depth=dims['depth'], num_heads=dims['num_heads'])
        model = Xcit(patch_size=patch_size, eta=dims['eta'], tokens_norm=True, num_classes=0, **shape)
        model.load_state_dict(to_layout(ours.state_dict(), 'timm'), strict=False)
        return TheirTaps(model, model.blocks)
    if name == 'mmpretrain':
        from mmpretrain.models.backbones import XCiT

        shape = dict(embed_dims=dims['dim'], depth=dims['depth'], num_heads=dims['num_heads'], qkv_bias=True)
        model = XCiT(patch_size=patch_size, layer_scale_init_value=dims['eta'], **shape)
        return TheirTaps(model, model.xca_layers)
    if name == 'plain form':
        return OurTaps(plain_form(ours))
    if name in ('identity', 'svd'):
        conditioned = SpecXCiT(arch, patch_size, dict(type=name))
        conditioned.load_state_dict(conditioned.state_dict() | ours.state_dict())
        return OurTaps(conditioned)
    return OurTaps(ours)


def build_detector(name: str, arch: str, patch_size: int) -> nn.Module:
    """The plain Mask R-CNN config's detector, with this backbone."""
    register_all_modules()
    cfg = Config.fromfile(find_config('xcit_maskrcnn')).model
    cfg.backbone.update(arch=arch, patch_size=patch_size, norm_cfg=dict(type='BN'))
    cfg.neck.in_channels = [ARCHS[arch]['dim']] * 4
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    return plain_form(model) if name == 'plain form' else model


def objects(height: int, width: int, count: int = 8) -> DetDataSample:
    """An image's worth of random rectangles."""
    low = torch.rand(count, 2) * torch.tensor([width, height]) * 0.6
    boxes = torch.cat([low, low + 16 + torch.rand(count, 2) * torch.tensor([width, height]) * 0.3], dim=1)
    masks = torch.zeros(count, height, width, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        mask[y0:y1, x0:x1] = 1
    shapes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), (height, width))
    sample = DetDataSample(metainfo=dict(shapes, scale_factor=(1.0, 1.0)))
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.randint(80, (count,)))
    sample.gt_instances.masks = BitmapMasks(masks.numpy(), height, width)
    return sample


def jobs(name: str, args: argparse.Namespace, size: tuple[int, int]) -> dict[str, Callable[[], None]]:
    """What is timed of a model: inference, and forward and backward."""
    images = torch.randn(args.batch, 3, *size, generator=torch.Generator().manual_seed(1)).to(args.device)
    amp = dict(device_type=torch.device(args.device).type, dtype=AMP[args.amp], enabled=args.amp is not None)
    model = (build_detector if args.detector else build_backbone)(name, args.arch, args.patch_size).to(args.device)
    samples = [objects(*size).to(args.device) for _ in range(args.batch)] if args.detector else None

    def infer() -> None:
        model.eval()
        with torch.no_grad(), torch.autocast(**amp):
            model(images, samples, mode='predict') if args.detector else model(images)

    def train() -> None:
        model.train()
        model.zero_grad()
        with torch.autocast(**amp):
            if args.detector:
                loss = model.parse_losses(model(images, samples, mode='loss'))[0]
            else:
                loss = model(images).float().square().mean()
        loss.backward()

    return dict(inference=infer, training=train)


def peak_memory(name: str, args: argparse.Namespace, size: tuple[int, int], pipe) -> None:
    """In a process of its own: send how many bytes more than model and images a forward and backward pass takes."""
    train = jobs(name, args, size)['training']
    if torch.device(args.device).type == 'cuda':
        train()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train()
        pipe.send(torch.cuda.max_memory_allocated() - before)
        return

    def status(key: str) -> int:
        (line,) = (line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    before = status('VmRSS')
    train()
    pipe.send(status('VmHWM') - before)


def measure(names: list[str], args: argparse.Namespace, size: tuple[int, int]) -> list[dict]:
    """Time the models in turn, and then take each one's peak memory."""
    cuda = torch.device(args.device).type == 'cuda'
    todo = {name: jobs(name, args, size) for name in names}
    times = {(name, job): [] for name in names for job in todo[name]}
    for round_ in range(args.rounds + 1):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            for job, run in todo[name].items():
                if cuda:
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    run()
                    end.record()
                    torch.cuda.synchronize()
                    seconds = start.elapsed_time(end) / 1000
                else:
                    clock = time.perf_counter()
                    run()
                    seconds = time.perf_counter() - clock
                if round_:  # the first warms up
                    times[name, job].append(seconds)
    todo.clear()
    rows = []
    for name in names:
        row = dict(model=name, height=size[0], width=size[1])
        for job in ('inference', 'training'):
            row[f'{job}_s'] = statistics.median(times[name, job])
            pairs = zip(times[names[0], job], times[name, job])
            row[f'{job}_ratio'] = statistics.median(first / own for first, own in pairs)
        if not args.no_memory:
            receive, send = multiprocessing.get_context('spawn').Pipe(duplex=False)
            worker = multiprocessing.get_context('spawn').Process(target=peak_memory, args=(name, args, size, send))
            worker.start()
            row['training_peak_bytes'] = receive.recv()
            worker.join()
        rows.append(row)
    return rows


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Seconds over pixels, both axes logarithmic: linear cost is a line of slope one."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout='constrained')
    for axis, job in zip(axes, ('inference', 'training')):
        for name in dict.fromkeys(row['model'] for row in rows):
            own = [row for row in rows if row['model'] == name]
            axis.loglog([r['height'] * r['width'] for r in own], [r[f'{job}_s'] for r in own], marker='o', label=name)
        axis.set(xlabel='pixels', ylabel='seconds', title=job)
        axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=80)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser('benchmark', __doc__)
    options.add_argument('--arch', default='small_12', choices=list(ARCHS))
    options.add_argument('--patch-size', type=int, default=16, choices=[8, 16])
    options.add_argument('--sizes', nargs='+', default=['640x640'], metavar='HEIGHTxWIDTH')
    options.add_argument('--batch', type=int, default=1)
    options.add_argument('--rounds', type=int, default=7)
    options.add_argument('--amp', choices=['bf16', 'fp16'])
    options.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    options.add_argument('--models', nargs='+', help='by default all of timm, mmpretrain (where they are installed), '
                        'plain form, ours, identity, svd')  # fmt: skip
    options.add_argument('--detector', action='store_true', help='time whole Mask R-CNNs: plain form and ours')
    options.add_argument('--no-memory', action='store_true', help='do not measure peak memory')
    options.add_argument('--out', type=Path, default=Path('work_dirs/benchmark'))
    args = options.parse_args(argv)

    others = [name for name in ('timm', 'mmpretrain') if find_spec(name)]
    names = args.models or (
        ['plain form', 'ours'] if args.detector else [*others, 'plain form', 'ours', 'identity', 'svd']
    )
    cuda = torch.device(args.device).type == 'cuda'
    where = torch.cuda.get_device_name() if cuda else f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    what = 'Mask R-CNN' if args.detector else 'backbone'
    title = f'{args.arch} p{args.patch_size}, batch {args.batch}, {args.amp or "float32"}'
    print(f'{what}, {title}; {where}, torch {torch.__version__}; ratios to {names[0]}')
    print(
        f'{"size":12}{"model":12}{"inference":>12}{"ratio":>8}{"training":>12}{"ratio":>8}{"peak MiB":>10}{"ratio":>8}'
    )
    rows = []
    for size in args.sizes:
        measured = measure(names, args, tuple(map(int, size.split('x'))))
        for row in measured:
            line = f'{size:12}{row["model"]:12}{row["inference_s"]:>10.3f} s{row["inference_ratio"]:>8.3f}'
            line += f'{row["training_s"]:>10.3f} s{row["training_ratio"]:>8.3f}'
            if 'training_peak_bytes' in row:
                peak = row['training_peak_bytes']
                line += f'{peak / 2**20:>10.0f}{peak / measured[0]["training_peak_bytes"]:>8.3f}'
            print(line, flush=True)
        rows += measured
    settings = {k: str(v) for k, v in vars(args).items()} | dict(device_name=where, torch=torch.__version__)
    with folder_written_aside(args.out) as aside:
        (aside / 'benchmark.json').write_text(json.dumps(dict(settings=settings, rows=rows), indent=1))
        if len(args.sizes) > 1:
            draw(rows, aside / 'benchmark.png', f'{title}, {where}')
    print(f'wrote {args.out}')
