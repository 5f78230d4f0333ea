"""Time and peak memory of backbones and of whole detectors: ours against timm's, the plain form and MMDetection's own.

    spec-mmdet benchmark [--arch small_12] [--patch-size 16] [--sizes 640x640 ...] [--batch 1] [--amp bf16|fp16]
    spec-mmdet benchmark --detector [...]
    spec-mmdet benchmark --data FOLDER

--models takes some of: timm, mmpretrain, timm-compiled (compiled, channels_last), plain-form, ours, ours-compiled,
identity, svd (conditioned), levels (ours with the four feature maps of a detector), resnet-50 and swin-t
(MMDetection's, with theirs, ResNet-50 with one stage frozen as it is trained). With --detector: ours, ours-compiled,
plain-form, identity, svd, resnet-50 and swin-t.

XCiTs have the same weights (but for mmpretrain's, which has its own) and all see the same images. They take turns, so
that a busy machine slows all of them alike; a ratio is the median, over the rounds, of the first model's time over
theirs in the same round: above 1 is faster than the first. But for the last three, backbones are timed up to their
last block, before any feature pyramid; detectors on random objects.
In each round the device's own rate is measured too, by the matrix products of the MLP and of the attention's output in
the same precision; "share" is a model's multiply-adds in its time over that rate.
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
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from mmdet.registry import DATASETS, MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..checkpoints.layouts import to_layout
from ..configs import find_config
from ..data.folders import use_folder
from ..files import write_folder_atomically
from ..models.products import linear
from ..models.xcit import ARCHS, SpecXCiT
from .common import adapt_to_data, parser

PEERS = {
    'resnet-50': 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'swin-t': 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
}
OWN = ('ours', 'ours-compiled', 'plain-form', 'identity', 'svd')
MODELS_COMPARED = (*OWN, 'levels', 'timm', 'timm-compiled', 'mmpretrain', *PEERS)
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
    """One of the backbones to compare, with the weights that all XCiTs have."""
    if name in PEERS:
        return build_peer(name).backbone
    torch.manual_seed(0)
    ours = SpecXCiT(arch, patch_size, compile=dict(dynamic=True) if name == 'ours-compiled' else None)
    dims = ARCHS[arch]
    if name in ('timm', 'timm-compiled'):
        from timm.models.xcit import Xcit

        shape = dict(embed_dim=dims['dim'], depth=dims['depth'], num_heads=dims['num_heads'])
        model = Xcit(patch_size=patch_size, eta=dims['eta'], tokens_norm=True, num_classes=0, **shape)
        model.load_state_dict(to_layout(ours.state_dict(), 'timm'), strict=False)
        model = TheirTaps(model, model.blocks)
        return torch.compile(model.to(memory_format=torch.channels_last)) if name == 'timm-compiled' else model
    if name == 'mmpretrain':
        from mmpretrain.models.backbones import XCiT

        shape = dict(embed_dims=dims['dim'], depth=dims['depth'], num_heads=dims['num_heads'], qkv_bias=True)
        model = XCiT(patch_size=patch_size, layer_scale_init_value=dims['eta'], **shape)
        return TheirTaps(model, model.xca_layers)
    if name in ('identity', 'svd'):
        conditioned = SpecXCiT(arch, patch_size, dict(type=name))
        conditioned.load_state_dict(conditioned.state_dict() | ours.state_dict())
        return OurTaps(conditioned)
    if name == 'levels':
        return ours
    return OurTaps(plain_form(ours) if name == 'plain-form' else ours)


def build_peer(name: str) -> nn.Module:
    """MMDetection's own Mask R-CNN with another backbone, its weights random."""
    register_all_modules()
    cfg = get_config(PEERS[name]).model
    cfg.backbone.init_cfg = None
    torch.manual_seed(0)
    return MODELS.build(cfg)


def build_detector(name: str, arch: str, patch_size: int) -> nn.Module:
    """The plain Mask R-CNN config's detector, with this backbone, or a peer's."""
    if name in PEERS:
        return build_peer(name)
    register_all_modules()
    cfg = Config.fromfile(find_config('xcit_maskrcnn')).model
    cfg.backbone.update(arch=arch, patch_size=patch_size, norm_cfg=dict(type='BN'))
    if name == 'ours-compiled':
        cfg.backbone.compile = dict(dynamic=True)
    if name in ('identity', 'svd'):
        cfg.backbone.conditioning = dict(type=name)
    cfg.neck.in_channels = [ARCHS[arch]['dim']] * 4
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    return plain_form(model) if name == 'plain-form' else model


def processor(device: str) -> str:
    """What a device calls itself, and of a CPU what tells its generation."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(':') for line in lines)}
    name = told.get('model name') or platform.machine()
    if {'cpu family', 'model'} <= told.keys():
        name += f' (family {told["cpu family"]}, model {told["model"]})'
    return f'{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads'


def convolution_gradients(by_y: torch.Size, x: torch.Size, W: torch.Size, *args, **kwargs) -> int:
    """Operations of aten's convolution_backward, of whose grouped ones PyTorch counts too many."""
    transposed, wanted = args[4], args[7]
    places = (x if transposed else by_y)[2:].numel() * x[0]
    return 2 * places * W.numel() * sum(wanted[:2])


def count_operations(run: Callable[[], None]) -> int:
    """The additions and multiplications of a run's products and convolutions."""
    counted = {torch.ops.aten.convolution_backward: convolution_gradients}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        run()
    return counter.get_total_flops()


class MatrixRate:
    """The device's own rate at the products of a model: of fc1, of fc2 and of the attention's output.

    Args:
        args: the command line.
        size: height and width of the images.
    """

    def __init__(self, args: argparse.Namespace, size: tuple[int, int]) -> None:
        dim, dtype = ARCHS[args.arch]['dim'], AMP[args.amp] or torch.float32
        tokens = math.prod(size) // args.patch_size**2
        kind = dict(device=args.device, dtype=dtype)
        self.products = [
            (torch.randn(args.batch, tokens, c_in, **kind), torch.randn(c_out, c_in, **kind))
            for c_in, c_out in ((dim, 4 * dim), (4 * dim, dim), (dim, dim))
        ]
        self.operations = sum(2 * x.numel() * len(W) for x, W in self.products)

    @torch.no_grad()
    def run(self, product: Callable[[Tensor, Tensor], Tensor], times: int = 5) -> None:
        for _ in range(times):
            for x, W in self.products:
                product(x, W)

    def measure(self) -> float:
        """Operations a second, by PyTorch's linear layers or by ours, whichever is faster."""
        seconds = min(clocked(partial(self.run, product), self.products[0][0].device.type == 'cuda')
                      for product in (F.linear, linear))  # fmt: skip
        return 5 * self.operations / seconds


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
        model.zero_grad(set_to_none=True)
        with torch.autocast(**amp):
            if args.detector:
                loss = model.parse_losses(model(images, samples, mode='loss'))[0]
            else:
                out = model(images)
                loss = sum(each.float().mean() for each in (out if isinstance(out, tuple | list) else [out]))
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


def clocked(run: Callable[[], None], cuda: bool) -> float:
    """The seconds that a run takes."""
    if not cuda:
        clock = time.perf_counter()
        run()
        return time.perf_counter() - clock
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def measure(names: list[str], args: argparse.Namespace, size: tuple[int, int]) -> list[dict]:
    """Time the models in turn, and then take each one's peak memory."""
    cuda = torch.device(args.device).type == 'cuda'
    todo = {name: jobs(name, args, size) for name in names}
    operations = {}
    for name, runs in todo.items():
        if not name.endswith('-compiled'):  # which has the operations of the other, and hides them
            operations |= {(name, job): count_operations(run) for job, run in runs.items()}
    matrices = MatrixRate(args, size)
    times, rates = {(name, job): [] for name in names for job in todo[name]}, []
    for round_ in range(args.rounds + 1):
        first = round_ % len(names)
        rate = matrices.measure()
        if round_:  # the first warms up
            rates.append(rate)
        for name in names[first:] + names[:first]:
            for job, run in todo[name].items():
                seconds = clocked(run, cuda)
                if round_:
                    times[name, job].append(seconds)
    todo.clear()
    rows = []
    for name in names:
        row = dict(model=name, height=size[0], width=size[1], matrix_rate=statistics.median(rates))
        for job in ('inference', 'training'):
            own = times[name, job]
            row[f'{job}_s'] = statistics.median(own)
            row[f'{job}_ratio'] = statistics.median(first / s for first, s in zip(times[names[0], job], own))
            done = operations.get((name.removesuffix('-compiled'), job))
            if done:
                row[f'{job}_multiply_adds'] = done // 2
                row[f'{job}_share'] = statistics.median(done / s / rate for s, rate in zip(own, rates))
        if not args.no_memory:
            receive, send = multiprocessing.get_context('spawn').Pipe(duplex=False)
            worker = multiprocessing.get_context('spawn').Process(target=peak_memory, args=(name, args, size, send))
            worker.start()
            row['training_peak_bytes'] = receive.recv()
            worker.join()
        rows.append(row)
    return rows


def measure_loading(folder: Path, count: int = 64) -> list[dict]:
    """Processor time of the steps of xcit_maskrcnn's training pipeline on one thread, the longest first.

    Args:
        folder: a data set in COCO's layout.
        count: images to load.

    Returns:
        A row a step, with the milliseconds an image takes in it.
    """
    register_all_modules()
    cfg = Config.fromfile(find_config('xcit_maskrcnn'))
    use_folder(cfg, folder, ['train'])
    adapt_to_data(cfg, ['train'], None, thorough=False)
    cv2.setNumThreads(0)  # as in MMEngine's workers
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    dataset.full_init()
    seconds = dict.fromkeys(dataset.pipeline.transforms, 0.0)
    np.random.seed(0)
    for i in range(count):
        sample = dataset.get_data_info(i % len(dataset))
        for step in seconds:
            begun = time.process_time()
            sample = step(sample)
            seconds[step] += time.process_time() - begun
    rows = [dict(step=type(step).__name__, ms=1000 * spent / count) for step, spent in seconds.items()]
    return sorted(rows, key=lambda row: -row['ms'])


def print_table(rows: list[dict], size: str) -> None:
    """The rows of one size, as a Markdown table."""
    rate = rows[0]['matrix_rate'] / 1e9
    print(f'\n{size}: matrix products at {rate:.0f} GFLOP/s\n')
    print(
        '| model | inference, s | ratio | share | training, s | ratio | share | peak, MiB |', '|---' * 8 + '|', sep='\n'
    )
    for row in rows:
        cells = [row['model']]
        for job in ('inference', 'training'):
            share = row.get(f'{job}_share')
            cells += [f'{row[f"{job}_s"]:.3f}', f'{row[f"{job}_ratio"]:.2f}', f'{share:.0%}' if share else '']
        cells.append(f'{row["training_peak_bytes"] / 2**20:.0f}' if 'training_peak_bytes' in row else '')
        print(f'| {" | ".join(cells)} |', flush=True)


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Seconds over pixels, both axes logarithmic: linear cost is a line of slope one."""
    figure = Figure(figsize=(11, 4.5), layout='constrained')
    axes = figure.subplots(1, 2)
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
    options.add_argument('--models', nargs='+', choices=MODELS_COMPARED, help='by default timm (where it is '
                        'installed), plain-form, ours, identity, svd')  # fmt: skip
    options.add_argument('--detector', action='store_true', help='time whole Mask R-CNNs: by default plain-form, ours')
    options.add_argument('--no-memory', action='store_true', help='do not measure peak memory')
    options.add_argument('--out', type=Path, default=Path('work_dirs/benchmark'))
    options.add_argument('--data', type=Path, metavar='FOLDER', help='time the loading of the training images of this '
                        "folder in COCO's layout instead of a model")  # fmt: skip
    args = options.parse_args(argv)

    if args.data:
        steps = measure_loading(args.data)
        total = sum(row['ms'] for row in steps)
        print(f'{1000 / total:.1f} images a second on one thread; {processor("cpu")}\n')
        print('| step | ms an image |\n|---|---|')
        for row in steps:
            print(f'| {row["step"]} | {row["ms"]:.1f} |')
        return
    names = args.models
    if names is None:
        names = ['plain-form', 'ours']
        if not args.detector:
            names = [*(['timm'] if find_spec('timm') else []), *names, 'identity', 'svd']
    where = processor(args.device)
    what = 'Mask R-CNN' if args.detector else 'backbone'
    title = f'{args.arch} p{args.patch_size}, batch {args.batch}, {args.amp or "float32"}'
    print(f'{what}, {title}; {where}, torch {torch.__version__}; ratios to {names[0]}')
    rows = []
    for size in args.sizes:
        rows += measure(names, args, tuple(map(int, size.split('x'))))
        print_table([row for row in rows if f'{row["height"]}x{row["width"]}' == size], size)
    settings = {k: str(v) for k, v in vars(args).items()} | dict(device_name=where, torch=torch.__version__)
    with write_folder_atomically(args.out) as aside:
        (aside / 'benchmark.json').write_text(json.dumps(dict(settings=settings, rows=rows), indent=1))
        if len(args.sizes) > 1:
            draw(rows, aside / 'benchmark.png', f'{title}, {where}')
    print(f'wrote {args.out}')
