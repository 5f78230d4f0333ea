"""What the conditioning costs: training steps of the backbone without it, with its identity form and its exact form.

    python tools/benchmark.py [--arch small_12] [--patch-size 16] [--size 640 640] [--batch 1] [--rounds 9]

A step is a forward pass, a backward pass and AdamW's update. The forms take turns, so that a busy machine slows all of
them alike; a ratio is the median of those to the plain backbone's step in the same round. Set-up is making the
corrections, once.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from spec_mmdet import SpecXCiT
from spec_mmdet.conditioning import Correction

FORMS = {'plain': None, 'identity': dict(type='identity'), 'svd': dict(type='svd')}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--arch', default='small_12')
    parser.add_argument('--patch-size', type=int, default=16)
    parser.add_argument('--size', type=int, nargs=2, default=(640, 640), metavar=('HEIGHT', 'WIDTH'))
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()

    device = torch.device(args.device)
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    images = torch.randn(args.batch, 3, *args.size, device=device)
    steps, setup, times = {}, {}, {name: [] for name in FORMS}
    for name, conditioning in FORMS.items():
        model = SpecXCiT(args.arch, args.patch_size, conditioning)
        start = time.perf_counter()
        for block in model.blocks if conditioning else ():
            Correction(block.attn.qkv.weight, **conditioning)
        setup[name] = time.perf_counter() - start
        model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step(model=model, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            sum(feature.square().mean() for feature in model(images)).backward()
            optimizer.step()

        steps[name] = step
    for round_ in range(args.rounds + 1):
        order = list(steps)[round_ % len(steps) :] + list(steps)[: round_ % len(steps)]
        for name in order:
            wait()
            start = time.perf_counter()
            steps[name]()
            wait()
            if round_:  # the first warms up
                times[name].append(time.perf_counter() - start)
    where = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    print(f'{args.arch} p{args.patch_size}, {args.batch} x {args.size[0]} x {args.size[1]}, {where}')
    print(f'{"":10}{"s a step":>10}{"ratio":>8}{"set-up, s":>11}')
    for name in FORMS:
        ratio = statistics.median(time / plain for time, plain in zip(times[name], times['plain']))
        print(f'{name:10}{statistics.median(times[name]):>10.3f}{ratio:>8.3f}{setup[name]:>11.3f}')


if __name__ == '__main__':
    main()
