"""Fuzz the readers of checkpoints, their layouts and annotation files; an InputError is a correct answer.

python tests/fuzzing.py reader --seconds 600 --out FOLDER     # guided by coverage, with atheris
"""

import argparse
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from mmengine.logging import HistoryBuffer  # noqa: E402

try:
    import atheris
except ImportError:  # without atheris, inputs are changed at random
    atheris = None

PARTS = ['spec_mmdet', 'json']
with atheris.instrument_imports(include=PARTS) if atheris and __name__ == '__main__' else nullcontext():
    from spec_mmdet.checkpoints.layouts import WRAPPERS, recognise, to_layout
    from spec_mmdet.checkpoints.reading import get_classes, get_state_dict, load, require_training_state
    from spec_mmdet.data.checks import check_annotations, check_contents, remove_faults
    from spec_mmdet.data.findings import Findings
    from spec_mmdet.data.reading import read_coco
    from spec_mmdet.errors import InputError
    from spec_mmdet.models.xcit import SpecXCiT

LIMIT = 10  # processor seconds that an input may take


def only_input_errors(action: Callable, *args) -> object:
    """Run an action; a one-line InputError is an answer, anything else is a fault."""
    try:
        return action(*args)
    except InputError as error:
        if '\n' in str(error) or len(str(error)) > 2000:
            raise AssertionError('more than a line') from error
        return None


def good_checkpoint() -> dict:
    """Make a small checkpoint with the contents of one of MMEngine's."""
    hub = dict(log_scalars={'train/loss': HistoryBuffer([1.0], [1])}, runtime_info=dict(iter=3), resumed_keys={})
    meta = dict(epoch=1, iter=3, cfg='a = 1', dataset_meta=dict(classes=('a', 'b')), x=np.float64(1))
    weights = torch.nn.Linear(2, 2).state_dict()
    return dict(meta=meta, message_hub=hub, state_dict=weights, optimizer={}, param_schedulers=[])


# A complete file, or the pickle of a torch.save file, whose checksums a change would break.
WHOLE, PICKLE = b'w', b'p'


def reader_seeds() -> Iterator[bytes]:
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save(good_checkpoint(), file, _use_new_zipfile_serialization=zipped)
        yield WHOLE + file.getvalue()
        if zipped:
            with zipfile.ZipFile(file) as archive:
                yield PICKLE + archive.read('archive/data.pkl')


def fuzz_reader(data: bytes, folder: Path) -> None:
    path = folder / 'input.pth'
    content = data[1:]
    if data[:1] == PICKLE:
        file = io.BytesIO()
        with zipfile.ZipFile(file, 'w') as archive:
            archive.writestr('archive/data.pkl', content)
            archive.writestr('archive/version', '3\n')
            for number in range(4):
                archive.writestr(f'archive/data/{number}', bytes(16))
        content = file.getvalue()
    path.write_bytes(content)
    for mmap in (False, True):
        found = only_input_errors(lambda mmap=mmap: load(path, mmap=mmap))
        for use in (get_state_dict, require_training_state, recognise):
            only_input_errors(use, found, 'it')
        get_classes(found)


def xcits() -> list[dict]:
    """Return small XCiTs in their layouts."""
    plain = SpecXCiT(dict(dim=8, depth=4, num_heads=2), 16).state_dict()
    own = SpecXCiT(dict(dim=8, depth=4, num_heads=2), 8, conditioning=dict(type='identity', lam=1.0)).state_dict()
    timm = to_layout(plain, 'timm')
    detector = {f'backbone.{name}': value for name, value in own.items()} | {'neck.a.weight': torch.zeros(1)}
    return [dict(model=plain), timm, dict(state_dict=detector, meta={}), to_layout(own, 'timm')]


def layout_seeds() -> Iterator[bytes]:
    for which in range(4):
        yield bytes([which])
        yield bytes([which, 0, 3, 1, 2, 9, 4, 4, 20, 7])


XCITS: list[dict] = []


def fuzz_layouts(data: bytes, folder: Path) -> None:
    """Change a checkpoint: the first byte chooses it, and each three more define a change: kind, place and value."""
    XCITS.extend([] if XCITS else xcits())
    content = XCITS[data[0] % len(XCITS) if data else 0]
    wrapper = next((name for name in WRAPPERS if name in content), '')
    weights = dict(content.get(wrapper, content))
    for kind, where, how in zip(data[1::3], data[2::3], data[3::3]):
        names = list(weights)
        if not names:
            break
        name = names[where * 7 % len(names)]
        value = weights.get(name)
        numeric = isinstance(value, torch.Tensor)
        match kind % 10:
            case 0:
                del weights[name]
            case 1:
                weights[name.replace('.', chr(how), 1)] = weights.pop(name)
            case 2:
                weights[name[: how % (len(name) + 1)] + str(how) + name[how % (len(name) + 1) :]] = value
            case 3 if numeric:
                weights[name] = value.flatten()[: how % 8]
            case 4 if numeric:
                weights[name] = value.to([torch.int64, torch.bool, torch.float64, torch.bfloat16][how % 4])
            case 5 if numeric:
                weights[name] = value.new_zeros([how % 5] * (how % 4))
            case 6:
                weights[name] = [None, 'text', {}, how, [value]][how % 5]
            case 7:
                prefix = ['module.', 'backbone.', '_orig_mod.', 'blocks.', 'head.', 'xca_layers.'][how % 6]
                weights = {prefix + key: kept for key, kept in weights.items()}
            case 8 if numeric and value.is_floating_point():
                weights[name] = value * [torch.nan, torch.inf, 0, -1, 1e30][how % 5]
            case 9:
                key = (*WRAPPERS, 'meta', '')[how % (len(WRAPPERS) + 2)]
                weights = {key: weights, 'n_averaged': torch.zeros(())} if how & 128 else {key: weights}
    only_input_errors(recognise, {wrapper: weights} if wrapper else weights, 'it')
    only_input_errors(recognise, weights, 'it', 'model')


def annotation_seeds() -> Iterator[bytes]:
    images = [dict(id=1, file_name='a.png', width=8, height=8), dict(id='b', file_name='b.png', width=8, height=8)]
    box = dict(image_id=1, category_id=1, bbox=[1, 1, 4, 4], iscrowd=0, area=16)
    shapes = [
        [[1, 1, 5, 1, 5, 5, 1, 5]],
        dict(size=[8, 8], counts=[9, 4, 51]),
        dict(size=[8, 8], counts='94c1'),
        None,
    ]
    categories = [dict(id=1, name='a'), dict(id=2, name='b')]
    for i, shape in enumerate(shapes):
        annotations = [dict(box, id=i, segmentation=shape), dict(box, id=f'{i}', image_id='b', iscrowd=i % 2)]
        yield json.dumps(dict(images=images, annotations=annotations, categories=categories)).encode()
    yield json.dumps(dict(images=images, annotations=[], categories=categories)).encode('utf-16')


def fuzz_annotations(data: bytes, folder: Path) -> None:
    path = folder / 'input.json'
    path.write_bytes(data)
    found = Findings()
    coco = only_input_errors(read_coco, path, True, found)
    only_input_errors(read_coco, path)
    if coco is not None:
        check_annotations(coco, 'it', found)
        for training in (True, False):
            check_contents(remove_faults(coco, 'it', found), 'it', found, training)
        only_input_errors(found.require_none, '')


ENTRIES = {
    'reader': (fuzz_reader, reader_seeds),
    'layouts': (fuzz_layouts, layout_seeds),
    'annotations': (fuzz_annotations, annotation_seeds),
}


class Clock:
    """Return the seconds that a process has run, without those while it was stopped; writes the number of inputs."""

    def __init__(self, seconds: float, counter: Path) -> None:
        self.left, self.last, self.counter, self.tried = seconds, time.monotonic(), counter, 0

    def tick(self) -> bool:
        """Count an input; return whether time is left."""
        now = time.monotonic()
        self.left -= min(now - self.last, LIMIT)
        self.last = now
        self.tried += 1
        if self.tried % 64 == 0 or self.left <= 0:
            self.counter.write_text(f'{self.tried} {self.left}')
        # An input that takes longer ends the process.
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        return self.left > 0


def changed(seeds: list[bytes], rng: random.Random) -> bytes:
    """Change a seed: some bytes, a cut, or a part of itself or of another seed."""
    content, other = bytearray(rng.choice(seeds)), rng.choice(seeds)
    for _ in range(rng.choice([1, 1, 2, 3, 8, 64])):
        where = rng.randrange(len(content) + 1)
        match rng.randrange(4):
            case 0 | 1:
                content[where : where + 1] = bytes([rng.randrange(256)])
            case 2:
                del content[where : where + rng.randrange(1, 64)]
            case 3:
                start = rng.randrange(len(other))
                content[where:where] = other[start : start + rng.randrange(64)]
    return bytes(content)


def fuzz(entry: str, seconds: float, out: Path, seed: int, guided: bool) -> None:
    """Feed an entry point for some seconds. An input that ends the process is kept in ``out/last_ENTRY``."""
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    function, seeds = ENTRIES[entry]
    clock = Clock(seconds, out / f'tried_{entry}')
    with tempfile.TemporaryDirectory(dir='/dev/shm' if Path('/dev/shm').is_dir() else None) as folder:

        def one(data: bytes) -> None:
            if not clock.tick():
                os._exit(0)
            last.seek(0)
            last.write(data)
            last.truncate()
            function(data, Path(folder))

        with (out / f'last_{entry}').open('wb', buffering=0) as last:
            if guided:
                corpus = out / f'corpus_{entry}'
                corpus.mkdir(exist_ok=True)
                for number, content in enumerate(seeds()):
                    (corpus / str(number)).write_bytes(content)
                limits = ['-timeout=1000000', '-rss_limit_mb=3000', '-max_len=8192', f'-artifact_prefix={out}/']
                atheris.Setup([sys.argv[0], f'-seed={seed + 1}', *limits, str(corpus)], one)
                atheris.instrument_func(torch._weights_only_unpickler.Unpickler.load)
                atheris.Fuzz()
            else:
                rng, known = random.Random(seed), list(seeds())
                while True:
                    one(changed(known, rng))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument('entry', choices=ENTRIES)
    options.add_argument('--seconds', type=float, default=600)
    options.add_argument('--out', type=Path, required=True, help='a folder')
    options.add_argument('--seed', type=int, default=0)
    args = options.parse_args()
    fuzz(args.entry, args.seconds, args.out, args.seed, guided=atheris is not None)


if __name__ == '__main__':
    main()
