"""Measure time, memory and operations of backbones and detectors, in inference and training."""

from __future__ import annotations

import math
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.model import revert_sync_batchnorm
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..checkpoints.layouts import to_layout
from ..configs import find_config, read_config
from ..errors import InputError
from ..models.connecting import connect_backbone
from ..models.products import linear
from ..models.xcit import ARCHS, SpecXCiT

PEERS = {
    'resnet-50': 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'swin-t': 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
}
DETECTORS = ('ours', 'ours-compiled', 'plain-form', 'identity', 'svd', *PEERS)
BACKBONES = (*DETECTORS, 'levels', 'timm', 'timm-compiled')
AMP = {None: None, 'bf16': torch.bfloat16, 'fp16': torch.float16}
COMPILED = '-compiled'


@dataclass(frozen=True)
class Setting:
    """Settings of a measurement."""

    arch: str = 'small_12'
    patch_size: int = 16
    batch: int = 1  # images per forward pass
    size: tuple[int, int] = (640, 640)  # height and width of the images
    amp: str | None = None  # of :data:`AMP`
    device: str = 'cpu'
    detector: bool = False  # Mask R-CNNs instead of backbones
    rounds: int = 7
    memory: bool = True  # also measure peak memory, in a separate process for each model

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == 'cuda'


class LastTokens(nn.Module):
    """A backbone, ours or timm's, up to the tokens after its last block."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(self.model, SpecXCiT):
            return self.model.compute_tokens(images)[-1]
        x, (h, w) = self.model.patch_embed(images)
        x = x + self.model.pos_embed(len(x), h, w).flatten(2).transpose(1, 2)
        for block in self.model.blocks:
            x = block(x, h, w)
        return x


def use_plain_form(model: nn.Module) -> nn.Module:
    """Make a model's attention use the plain form for any number of tokens, and return the model."""
    for module in model.modules():
        if hasattr(module, 'gram_from'):
            module.gram_from = math.inf
    return model


def build_backbone(name: str, arch: str, patch_size: int) -> nn.Module:
    """Build one of :data:`BACKBONES`; all XCiTs have the same weights."""
    if name in PEERS:
        return build_detector(name, arch, patch_size).backbone
    torch.manual_seed(0)
    ours = SpecXCiT(arch, patch_size, compile=dict(dynamic=True) if name == 'ours-compiled' else None)
    if name.startswith('timm'):
        from timm.models.xcit import Xcit

        dims = ARCHS[arch]
        shape = dict(embed_dim=dims['dim'], depth=dims['depth'], num_heads=dims['num_heads'], eta=dims['eta'])
        model = Xcit(patch_size=patch_size, tokens_norm=True, num_classes=0, **shape)
        model.load_state_dict(to_layout(ours.state_dict(), 'timm'), strict=False)
        model = LastTokens(model)
        return torch.compile(model.to(memory_format=torch.channels_last)) if name.endswith(COMPILED) else model
    if name in ('identity', 'svd'):
        conditioned = SpecXCiT(arch, patch_size, dict(type=name))
        conditioned.load_state_dict(conditioned.state_dict() | ours.state_dict())
        return LastTokens(conditioned)
    if name == 'levels':
        return ours
    return LastTokens(use_plain_form(ours) if name == 'plain-form' else ours)


def build_detector(name: str, arch: str, patch_size: int) -> nn.Module:
    """Build one of :data:`DETECTORS`: the config xcit_maskrcnn with this backbone, or MMDetection's Mask R-CNN."""
    register_all_modules()
    if name in PEERS:
        cfg = get_config(PEERS[name]).model
        cfg.backbone.init_cfg = None
    else:
        cfg = read_config(find_config('xcit_maskrcnn')).model
        cfg.backbone.update(arch=arch, patch_size=patch_size, norm_cfg=dict(type='BN'))
        if name == 'ours-compiled':
            cfg.backbone.compile = dict(dynamic=True)
        if name in ('identity', 'svd'):
            cfg.backbone.conditioning = dict(type=name)
        connect_backbone(cfg)
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    return use_plain_form(model) if name == 'plain-form' else model


def describe_processor(device: str) -> str:
    """Return a device's name, and for a CPU its generation and the number of threads."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(':') for line in lines)}
    name = facts.get('model name') or platform.machine()
    if {'cpu family', 'model'} <= facts.keys():
        name += f' (family {facts["cpu family"]}, model {facts["model"]})'
    return f'{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads'


def count_convolution_gradients(by_y: torch.Size, x: torch.Size, W: torch.Size, *args, **kwargs) -> int:
    """Count the operations of convolution_backward; PyTorch's count is too high for grouped convolutions."""
    transposed, wanted = args[4], args[7]
    places = (x if transposed else by_y)[2:].numel() * x[0]
    return 2 * places * W.numel() * sum(wanted[:2])


def count_operations(run: Callable[[], None]) -> int:
    """Count the additions and multiplications in a run's matrix products and convolutions."""
    mapping = {torch.ops.aten.convolution_backward: count_convolution_gradients}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return counter.get_total_flops()


@torch.no_grad()
def count_multiply_adds(cfg: Config) -> tuple[int, int, int]:
    """Count the parameters of a config's detector and backbone, and the backbone's multiply-adds at 800 x 1216."""
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    detector, backbone = (sum(p.numel() for p in part.parameters()) for part in (model, model.backbone))
    return detector, backbone, count_operations(lambda: model.backbone(torch.randn(1, 3, 800, 1216))) // 2


def measure_seconds(run: Callable[[], None], on_gpu: bool) -> float:
    """Measure the seconds of a run."""
    if not on_gpu:
        clock = time.perf_counter()
        run()
        return time.perf_counter() - clock
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


@torch.no_grad()
def make_rate_meter(setting: Setting) -> Callable[[], float]:
    """Return a function that measures the device's operations per second.

    It runs the products of fc1, fc2 and the attention's output with the faster of PyTorch's and our linear layers.
    """
    dim, kind = ARCHS[setting.arch]['dim'], dict(device=setting.device, dtype=AMP[setting.amp] or torch.float32)
    tokens = math.prod(setting.size) // setting.patch_size**2
    shapes = ((dim, 4 * dim), (4 * dim, dim), (dim, dim))
    products = [(torch.randn(setting.batch, tokens, i, **kind), torch.randn(o, i, **kind)) for i, o in shapes]
    times = 5

    @torch.no_grad()
    def run(product: Callable[[Tensor, Tensor], Tensor]) -> None:
        for _ in range(times):
            for x, W in products:
                product(x, W)

    def measure() -> float:
        seconds = min(measure_seconds(partial(run, product), setting.on_gpu) for product in (F.linear, linear))
        return times * sum(2 * x.numel() * len(W) for x, W in products) / seconds

    return measure


def make_objects(height: int, width: int, count: int = 8) -> DetDataSample:
    """Make an image's annotation: random rectangles with masks."""
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


def make_jobs(name: str, setting: Setting) -> dict[str, Callable[[], None]]:
    """Return a model's jobs to time: 'inference', and 'training' (a forward and backward pass)."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(setting.batch, 3, *setting.size, generator=generator).to(setting.device)
    amp = dict(device_type=torch.device(setting.device).type, dtype=AMP[setting.amp], enabled=setting.amp is not None)
    build = build_detector if setting.detector else build_backbone
    model = build(name, setting.arch, setting.patch_size).to(setting.device)
    samples = [make_objects(*setting.size).to(setting.device) for _ in images] if setting.detector else None

    def infer() -> None:
        model.eval()
        with torch.no_grad(), torch.autocast(**amp):
            model(images, samples, mode='predict') if setting.detector else model(images)

    def train() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        with torch.autocast(**amp):
            if setting.detector:
                loss = model.parse_losses(model(images, samples, mode='loss'))[0]
            else:
                out = model(images)
                loss = sum(each.float().mean() for each in (out if isinstance(out, tuple | list) else [out]))
        loss.backward()

    return dict(inference=infer, training=train)


def read_memory(setting: Setting, peak: bool) -> int:
    """Return the memory of this process in bytes, current or peak."""
    if setting.on_gpu:
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    key = 'VmHWM:' if peak else 'VmRSS:'
    status = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(key)) * 1024


def measure_growth(train: Callable[[], None], setting: Setting) -> int:
    """Return by how many bytes a training step increases the memory of this process at most."""
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = read_memory(setting, peak=False)
    train()
    return read_memory(setting, peak=True) - before


def measure_peak_memory(name: str, setting: Setting) -> int:
    """Return the memory of a training step on the CPU, without model and images; call it in a new process."""
    return measure_growth(make_jobs(name, setting)['training'], setting)


def measure_models(names: Sequence[str], setting: Setting) -> Iterator[dict]:
    """Time models in turns, so that a busy machine slows all of them alike, and measure their peak memory.

    Yields:
        A dict for each name in :data:`BACKBONES` or :data:`DETECTORS`: seconds, ratio of the first model's seconds to
        its own, multiply-adds, their rate as a share of the device's matrix products (all medians over the rounds), and
        bytes.

    Raises:
        InputError: for an unknown name.
    """
    known = DETECTORS if setting.detector else BACKBONES
    if unknown := sorted({*names} - {*known}):
        raise InputError(f'--models {" ".join(unknown)}: choose from {", ".join(known)}')
    jobs = {(name, job): run for name in names for job, run in make_jobs(name, setting).items()}
    # Operations cannot be counted in compiled models; they are those of the others.
    operations = {key: count_operations(run) for key, run in jobs.items() if not key[0].endswith(COMPILED)}
    measure_rate = make_rate_meter(setting)
    seconds, rates = {key: [] for key in jobs}, []
    for i in range(setting.rounds + 1):
        rate = measure_rate()
        order = sorted(jobs, key=lambda key: (names.index(key[0]) - i) % len(names))
        times = {key: measure_seconds(jobs[key], setting.on_gpu) for key in order}
        if i:  # the first round is a warm-up
            rates.append(rate)
            for key, value in times.items():
                seconds[key].append(value)
    measured = names if setting.memory and setting.on_gpu else ()
    memory = {name: measure_growth(jobs[name, 'training'], setting) for name in measured}
    jobs.clear()
    for name in names:
        row = dict(model=name, height=setting.size[0], width=setting.size[1], matrix_rate=statistics.median(rates))
        for job in ('inference', 'training'):
            times, first = seconds[name, job], seconds[names[0], job]
            row[f'{job}_s'] = statistics.median(times)
            row[f'{job}_ratio'] = statistics.median(a / b for a, b in zip(first, times))
            if count := operations.get((name.removesuffix(COMPILED), job)):
                row[f'{job}_multiply_adds'] = count // 2
                row[f'{job}_share'] = statistics.median(count / s / rate for s, rate in zip(times, rates))
        if name in memory:
            row['training_peak_bytes'] = memory[name]
        elif setting.memory:
            with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as process:
                row['training_peak_bytes'] = process.submit(measure_peak_memory, name, setting).result()
        yield row
