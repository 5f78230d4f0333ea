"""Run every command of the README, docs/ and research/ as written, in a fresh clone of HEAD with a fresh environment.

    python tests/docs.py [--list] [--only TEXT ...] [--folder DIR]

Run by `make docs-test`; needs no packages. The pages are the README and those of docs/ and research/ that it links to,
in the order of the links. Commands are the lines of ```shell blocks, the ```python blocks, and inline code that
begins like a command. A ```python block that begins with `_base_` is a config: it is saved as my_detector.py, and its
model is built. Notebooks are pages, too: cells are blocks; lines that begin with an exclamation mark are commands.
Commands run in the pages' order, each by itself from the root of the clone, without a GPU and with the COCO data of
COCO_MINI (default: ../shared/coco_mini). A repeated command runs once, and two processes run instead of eight. The
tables below define the values of placeholders, what precedes or follows a command, and which commands are skipped; an
entry that matches no command is an error. Logs go to work_dirs/docs_test.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / 'work_dirs' / 'docs_test'
COCO = Path(os.environ.get('COCO_MINI', ROOT.parent / 'shared' / 'coco_mini'))
TIMEOUT = 20 * 60  # time limit of a command in seconds
CONFIG = 'my_detector.py'  # where a page's config is saved

# Start of inline code that is a command, not an option or the name of a file or command.
INLINE = re.compile(
    r'(python tools/|python -m (spec_mmdet|research|benchmarks)\b|tools/dist_(train|test)\.sh |torchrun |make |pip )'
    r'|mkdir |spec-mmdet (--|\S+ \S)'
)

# Keys of the next three tables are commands, or their beginnings up to the end of a word, written with spec-mmdet and
# names of configs, even if the page uses files of tools/ and configs/.
SKIPPED = {
    'docker': 'builds and runs a container; the Dockerfile has the commands of the page about installing',
    'pip install jupyterlab': 'waits for a browser; the cells of the notebook are run',
    'make demo TORCH=': 'downloads another PyTorch; make demo runs the same rule',
    'make demo TORCH_INDEX=': 'the same',
    'make docs-test': 'this command',
    'make test': 'CI runs it',
    'make test-onedl': 'CI runs it',
    'pip wheel --wheel-dir wheels': 'downloads the packages of the preceding commands again',
    'pip install --no-index': 'the same',
    'make clean': 'would remove the environment that the other commands need',
    'make torture': 'takes half an hour; a short form of it is in the suite',
    'make pictures': 'takes an hour; the pages it shows are tested',
    'python -m research.pictures': 'likewise',
    'make paper-figures': 'takes 11 minutes; it runs the training of make demo twice',
    'python -m research.paper_figures': 'likewise',
    'python -m benchmarks.gpu': 'needs a GPU; the suite runs it on the CPU',
    'spec-mmdet test work_dirs/plain_0/xcit_spec_shapes.py': 'needs trainings that take an hour; the suite runs it',
    'spec-mmdet compare': 'needs trainings that take an hour; the suite runs it',
    'spec-mmdet train xcit_panopticfpn': "needs COCO's panoptic labels; the suite runs it on generated ones",
    'spec-mmdet test xcit_panopticfpn': 'likewise',
    'spec-mmdet predict work_dirs/xcit_panopticfpn/xcit_panopticfpn.py': 'likewise',
    'spec-mmdet convert FILE': "needs a file of XCiT's authors; the suite converts a generated one",
    'torchrun --nproc_per_node 2': 'takes three minutes and needs data/shapes; the suite runs it on fewer images',
    'make experiment': 'takes hours; the commands of the page about pretraining run the same code',
    'python -m research.experiment': 'likewise',
    'make followup': 'likewise',
    'python -m research.followup': 'likewise',
    'python -m research.systems --published': 'likewise',
}

# Options that make COCO's configs small for a CPU: images of 160 pixels, two for training and two for evaluation.
EVALUATE = ' '.join(
    f'{loop}_dataloader.{setting}'
    for loop in ('val', 'test')
    for setting in (
        'num_workers=0',
        'persistent_workers=False',
        'dataset.indices=2',
        'dataset.pipeline.1.scale="(160, 160)"',
    )
)
TRAIN = (
    '--cfg-options train_cfg.max_epochs=1 train_dataloader.batch_size=1 '
    'train_dataloader.num_workers=0 train_dataloader.persistent_workers=False default_hooks.conditioning=None '
    + ' '.join(
        f'train_dataloader.dataset.pipeline.3.transforms.{resize}.scales="[(160, 160)]"'
        for resize in ('0.0', '1.0', '1.2')
    )
    + f' {EVALUATE} train_dataloader.dataset.indices='
)
OF_IMAGENET = (
    '--image-size 32 --epochs 1 --batch-size 8 --cfg-options train_dataloader.num_workers=0 '
    'val_dataloader.num_workers=0'
)
AS_400 = '(cd work_dirs/pretrain_xcit_small_12_p16 && cp epoch_1.pth epoch_400.pth)'
LAST_EPOCH = 'for f in work_dirs/*/last_checkpoint; do (cd ${f%/*} && cp $(cat last_checkpoint) epoch_36.pth); done'

# A training does not start in a directory that contains the checkpoints of another.
ANEW = 'rm -rf work_dirs/xcit_maskrcnn &&'
MAKE_IMAGENET = (
    'rm -rf work_dirs/pretrain_xcit_small_12_p16 made/imagenet && '
    'python -m research.scenes made/imagenet --train 1 --val 1 --crops 128 &&'
)
PREPENDED = {
    'spec-mmdet train xcit_maskrcnn --data data/coco': ANEW,
    'spec-mmdet train xcit_maskrcnn --data data/mine --preset': ANEW,
    'tools/dist_train.sh xcit_maskrcnn': ANEW,
    'torchrun --nproc_per_node 8 -m spec_mmdet train xcit_maskrcnn': ANEW,
    'spec-mmdet pretrain pretrain_xcit_small_12_p16': MAKE_IMAGENET,
    'torchrun --nproc_per_node 8 -m spec_mmdet pretrain': MAKE_IMAGENET,
}

# The longest matching key counts.
APPENDED = {
    'pip uninstall': '--yes',
    'pip install --force-reinstall': "&& python -c 'import spec_mmdet, mmdet.apis'",
    "pip install 'dist": '&& cd made && spec-mmdet flops xcit_spec_maskrcnn',
    'spec-mmdet train': f'{TRAIN}2 && {LAST_EPOCH}',
    'tools/dist_train.sh': f'{TRAIN}8 && {LAST_EPOCH}',
    'torchrun': f'{TRAIN}8 && {LAST_EPOCH}',
    'spec-mmdet test': f'--cfg-options {EVALUATE}',
    # The notebook is small already.
    'spec-mmdet train xcit_spec_shapes': '',
    'spec-mmdet test own-data': '',
    'python -m research.scenes': '--train 16 --val 8 --crops 128',
    'spec-mmdet pretrain pretrain_xcit_small_12_p16': f'{OF_IMAGENET} && {AS_400}',
    'torchrun --nproc_per_node 8 -m spec_mmdet pretrain': f'{OF_IMAGENET} && {AS_400}',
    'spec-mmdet train research/configs/experiment_maskrcnn.py': '',
    'spec-mmdet test work_dirs/experiment_maskrcnn': '',
    'tools/dist_test.sh': f'--cfg-options {EVALUATE}',
    'spec-mmdet analyze': '--max-images 1',
    'spec-mmdet benchmark': '--rounds 1 --sizes 64x64',
    'python -m benchmarks.detectors': 'retinanet',
    'python -m benchmarks.evaluator': '--images 200',
    'python -m benchmarks.half_precision': '--archs nano_12',
    'python -m benchmarks.coco_scale': '--fraction 0.002 --parts train',
    'backbone = dict(': '\nimport spec_mmdet\nfrom mmdet.registry import MODELS\nMODELS.build(backbone).init_weights()',
}

# Commands that create an environment, in the order of the pages; True: begin with a new one.
OWN = {
    "pip install -e '.[mmdet]'": True,
    "pip install -e '.[onedl]'": True,
    'pip install -e .': False,
    'pip uninstall opencv-python': False,
    'pip install --force-reinstall': False,
    "pip install 'dist": True,
}

# Values of placeholders that are words of their own, the more specific first; relative paths start at the clone's
# root.
PLACEHOLDERS = {
    '/where/coco/is': shlex.quote(str(COCO.resolve())),
    '../shared/coco_mini': shlex.quote(str(COCO.resolve())),
    'IMAGES --annotations FILE': shlex.join(
        [f'{COCO.resolve()}/val2017', '--annotations', f'{COCO.resolve()}/annotations/instances_val2017.json']
    ),
    'init_cfg.checkpoint=FILE': 'init_cfg.checkpoint=made/timm.pth',
    # An alternative of the preceding command, whose folder the following ones use.
    'EXPORT --val 0.2 --out data/mine': 'made/export --val 0.2 --out data/export',
    'EXPORT': 'made/export',
    'DATA': 'data/mine',
    'benchmarks.masks FOLDER': f'benchmarks.masks {shlex.quote(str(COCO.resolve()))}',
    'prepare FOLDER': 'prepare data/shapes',
    'NEW.pth': 'made/new.pth',
    'NEW': 'made/boxes',
    'IMAGENET': 'made/imagenet/pretraining',
    'SOURCE': 'made/timm.pth',
    'DESTINATION.pth': 'made/converted.pth',
    '[CHECKPOINT] [--images DIR]': 'work_dirs/xcit_maskrcnn/epoch_36.pth --images data/coco/val2017',
}

# Creates the other inputs of the commands in the clone: a Python program, run in the environment.
MADE = """
import pathlib, cv2, numpy, timm, torch
export = pathlib.Path('made/export')
for folder in ('images', 'labels'):
    (export / folder).mkdir(parents=True, exist_ok=True)
(export / 'classes.txt').write_text('bolt')
for i in range(5):
    cv2.imwrite(f'{export}/images/{i}.png', numpy.full((64, 64, 3), 40 * i, numpy.uint8))
    (export / 'labels' / f'{i}.txt').write_text('0 0.5 0.5 0.4 0.4')
torch.save(timm.create_model('xcit_small_12_p16_224').state_dict(), 'made/timm.pth')
"""

# For --only: a part of a command (as it is run), and the command that has to run before it.
NEEDS = {
    'xcit_spec_maskrcnn': "pip install -e '.[mmdet]' && mkdir",
    'data/coco': "pip install -e '.[mmdet]' && mkdir",
    'work_dirs/xcit_maskrcnn/': 'spec-mmdet train xcit_maskrcnn --data data/coco',
    'work_dirs/demo/': 'make demo',
    'data/shapes': 'make demo',
    'data/scenes': 'python -m research.scenes',
    'work_dirs/experiment_pretraining/': 'spec-mmdet pretrain research/configs/experiment_pretraining.py',
    'work_dirs/backbone.pth': 'spec-mmdet convert work_dirs/experiment_pretraining',
    'work_dirs/experiment_maskrcnn/': 'spec-mmdet train research/configs/experiment_maskrcnn.py',
    'work_dirs/pretrain_xcit_small_12_p16/': 'spec-mmdet pretrain pretrain_xcit_small_12_p16',
    'checkpoint=backbone.pth': 'spec-mmdet convert work_dirs/pretrain_xcit_small_12_p16',
    'data/mine': 'spec-mmdet prepare IMAGES',
    'work_dirs/mine/': 'spec-mmdet train xcit_maskrcnn --data data/mine',
    'train my_detector.py': "_base_ = 'spec_mmdet::xcit/xcit_spec_maskrcnn.py'",
    'own-data/drawn': 'from spec_mmdet.data.shapes',
    'own-data/prepared': 'spec-mmdet prepare own-data/drawn',
    'own-data/findings': 'spec-mmdet prepare own-data/drawn',
    'own-data/run': 'spec-mmdet train xcit_spec_shapes',
    'own-data/predictions': 'spec-mmdet predict own-data/run',
    'dist/spec_mmdet': 'pip wheel',
    'pip install -e .': "pip install -e '.[onedl]'",
    'opencv-python': "pip install -e '.[onedl]'",
}

# The command that each file of tools/ runs.
TOOLS = {tool.name: re.search(r"run\('(.+)'\)", tool.read_text())[1] for tool in (ROOT / 'tools').glob('*.py')}


def as_command(text: str) -> str:
    """Rewrite text to use spec-mmdet and the names of configs."""
    text = re.sub(r'python tools/(\w+\.py)', lambda match: f'spec-mmdet {TOOLS[match[1]]}', text)
    return re.sub(r'(?<![\w/])configs/(\w+)\.py', r'\1', text)


def begins(text: str, key: str) -> bool:
    return re.match(re.escape(key) + r'(?![\w-])', as_command(text)) is not None


@dataclass(frozen=True)
class Command:
    """A command as written on a page, without its comment, and the line of the page where it begins."""

    page: str
    line: int
    text: str
    python: bool = False

    @property
    def config(self) -> bool:
        return self.python and self.text.startswith('_base_')

    @property
    def where(self) -> str:
        return f'{self.page}:{self.line}'

    @property
    def title(self) -> str:
        return f'python: {self.text.splitlines()[0]}' if self.python else self.text

    @property
    def log(self) -> Path:
        name = f'{Path(self.page).stem}_{self.line:03}_{self.title}'
        return LOGS / f'{re.sub("[^a-zA-Z0-9]+", "_", name)[:80].strip("_")}.log'

    @property
    def skipped(self) -> str:
        """Return why the command is skipped, or ''."""
        return next((reason for key, reason in SKIPPED.items() if begins(self.text, key)), '')

    @property
    def own(self) -> bool:
        return any(begins(self.text, key) for key in OWN)

    @property
    def run_as(self) -> str:
        """Fill in the placeholders and add what precedes and follows the command."""
        text = ' '.join([*(value for key, value in PREPENDED.items() if begins(self.text, key)), self.text])
        for name, value in PLACEHOLDERS.items():
            text = re.sub(placeholder(name), lambda match, value=value: value, text)
        text = re.sub(r'(--nproc_per_node|^.*tools/dist_\S+ .+?) 8(?= |$)', r'\1 2', text)
        if fitting := [key for key in APPENDED if begins(self.text, key)]:
            value = APPENDED[max(fitting, key=len)]
            text = f'{text} {value.removeprefix("--cfg-options ") if "--cfg-options" in text else value}'
        return text


def placeholder(name: str) -> str:
    return rf'(?<![\w/]){re.escape(name)}(?!\w)'


def read_page(page: Path) -> str:
    """Read a page's text; a notebook becomes Markdown with its code as blocks."""
    if page.suffix == '.md':
        return page.read_text()
    texts = []
    for cell in json.loads(page.read_text())['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'code':
            language = 'shell' if text.startswith('!') else 'python'
            text = f'```{language}\n{re.sub("^!", "", text, flags=re.MULTILINE)}\n```'
        texts.append(text)
    return '\n\n'.join(texts) + '\n'


def read_pages() -> dict[str, str]:
    """Return the README and the pages of docs/ and research/ by name, in the order of the README's links."""
    readme = read_page(ROOT / 'README.md')
    linked = list(dict.fromkeys(re.findall(r'\]\(((?:docs|research)/[\w/-]+\.(?:md|ipynb))', readme)))
    there = [*(ROOT / 'docs').rglob('*.md'), *(ROOT / 'docs').rglob('*.ipynb'), *(ROOT / 'research').rglob('README.md')]
    forgotten = {str(page.relative_to(ROOT)) for page in there} - {*linked}
    if forgotten:
        sys.exit(f'error: the README does not link to {", ".join(sorted(forgotten))}')
    return {'README.md': readme, **{page: read_page(ROOT / page) for page in linked}}


def read_commands(pages: dict[str, str]) -> list[Command]:
    """Return the commands of pages in their order, each once."""
    commands: dict[str, Command] = {}

    def add(page: str, offset: int, text: str, python: bool = False) -> None:
        commands.setdefault(text, Command(page, pages[page].count('\n', 0, offset) + 1, text, python))

    for page, content in pages.items():
        for match in re.finditer(r'^```(\w*)\n(.*?)^```$|`([^`]+)`', content, re.MULTILINE | re.DOTALL):
            language, block, inline = match.groups()
            if inline:
                text = ' '.join(inline.replace('\\|', '|').split())
                if INLINE.match(text):
                    add(page, match.start(), text)
            elif language == 'python':
                add(page, match.start(2), block.rstrip(), python=True)
            elif language == 'shell':
                for line in re.finditer(r'(?:.*\\\n)*.+', block):
                    text = re.sub(r'(^|\s+)#\s.*', '', line.group().replace('\\\n', '')).strip()
                    if text:
                        add(page, match.start(2) + line.start(), text)
            elif language not in ('text', 'bibtex'):
                sys.exit(f'error: {page} has a block of {language!r}; use shell, python or, for what is not run, text')
    return list(commands.values())


def idle_entries(commands: list[Command]) -> list[str]:
    """Return the entries of the tables that match no command."""
    run = [command for command in commands if not command.skipped]
    idle = [f'SKIPPED[{key!r}]' for key in SKIPPED if not any(begins(c.text, key) for c in commands)]
    for name, table in dict(PREPENDED=PREPENDED, APPENDED=APPENDED, OWN=OWN).items():
        idle += [f'{name}[{key!r}]' for key in table if not any(begins(c.text, key) for c in run)]
    idle += [
        f'PLACEHOLDERS[{key!r}]' for key in PLACEHOLDERS if not any(re.search(placeholder(key), c.text) for c in run)
    ]
    for key, needed in NEEDS.items():
        if not any(key in as_command(c.run_as) for c in run) or not any(begins(c.text, needed) for c in run):
            idle.append(f'NEEDS[{key!r}]')
    return idle


def choose(commands: list[Command], texts: list[str]) -> list[Command]:
    """Return the commands that contain one of some texts, or whose place does, with those that they need."""
    chosen = [command for command in commands if any(text in f'{command.where} {command.text}' for text in texts)]
    for command in chosen:  # grows in the loop
        needed = [value for key, value in NEEDS.items() if key in as_command(command.run_as) and not command.skipped]
        makers = [c for c in commands if not c.skipped and any(begins(c.text, value) for value in needed)]
        chosen += [c for c in makers if c not in chosen]
    return [command for command in commands if command in chosen]


class Clone:
    """A fresh clone of HEAD, and its environments; one that exists in the folder is made fresh but for these."""

    def __init__(self, folder: Path) -> None:
        head = git('rev-parse', 'HEAD').strip()
        self.root = folder / 'spec_mmdet'
        if self.root.is_dir():
            subprocess.run(['git', '-C', self.root, 'fetch', '--quiet', ROOT, head], check=True)
            subprocess.run(
                ['git', '-C', self.root, 'clean', '-ffdxq', '-e', '.venv', '-e', '.venv-own', '-e', '*.egg-info'],
                check=True,
            )
        else:
            subprocess.run(['git', 'clone', '--quiet', '--no-checkout', ROOT, self.root], check=True)
        subprocess.run(['git', '-C', self.root, 'checkout', '--quiet', '--force', head], check=True)
        (self.root / 'made').mkdir()
        # Nothing of the calling environment and make.
        aside = ('VIRTUAL_ENV', 'PYTHONPATH', 'PYTHONHOME', 'MAKEFLAGS', 'MAKELEVEL', 'MFLAGS', 'VENV')
        self.env = {key: value for key, value in os.environ.items() if key not in aside}
        self.env['CUDA_VISIBLE_DEVICES'] = ''

    def run(self, arguments: list[str], log: Path, environment: str = '.venv') -> bool:
        """Run a command from the root in an environment, with its output in a log; return whether it succeeded."""
        env = dict(self.env, PATH=f'{self.root / environment / "bin"}:{self.env["PATH"]}')
        with log.open('ab') as file:
            streams = dict(stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
            process = subprocess.Popen(arguments, cwd=self.root, env=env, start_new_session=True, **streams)
            try:
                return process.wait(TIMEOUT) == 0
            except subprocess.TimeoutExpired:
                file.write(f'\nnot done after {TIMEOUT} s\n'.encode())
                return False
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)  # torchrun passes it on to its processes
                    process.wait()

    def set_up(self, log: Path) -> bool:
        """Create the environment of `make demo`, and the files that the pages' commands need."""
        return self.run(['make', '.venv/mmdet'], log) and self.run(['python', '-c', MADE], log)

    def execute(self, command: Command, log: Path) -> bool:
        """Run a command of a page."""
        if any(new and begins(command.text, key) for key, new in OWN.items()):
            shutil.rmtree(self.root / '.venv-own', ignore_errors=True)
            if not self.run([sys.executable, '-m', 'venv', '.venv-own'], log):
                return False
        if command.config:
            (self.root / CONFIG).write_text(command.text + '\n')
            return self.run(['spec-mmdet', 'flops', CONFIG], log)
        arguments = ['python', '-c'] if command.python else ['bash', '-euo', 'pipefail', '-c']
        return self.run([*arguments, command.run_as], log, '.venv-own' if command.own else '.venv')


def git(*arguments: str) -> str:
    return subprocess.run(['git', '-C', ROOT, *arguments], check=True, capture_output=True, text=True).stdout


def report(where: str, title: str, work: Callable[[Path], bool], log: Path) -> bool:
    """Run an action and print a line about it; on failure, also the end of its log."""
    print(f'{where:28}{title} ... ', end='', flush=True)
    start = time.time()
    good = work(log)
    print(f'{"ok" if good else "FAILED"}, {time.time() - start:.0f} s', flush=True)
    if not good:
        print(f'  {log}:', *log.read_text(errors='replace').splitlines()[-20:], sep='\n    ', flush=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--list', action='store_true', help='show the commands as they would be run')
    parser.add_argument('--only', nargs='+', default=[''], metavar='TEXT',
                        help='those that contain one of these, or whose page does, and what they need')  # fmt: skip
    parser.add_argument('--folder', type=Path, metavar='DIR',
                        help='folder for the clone; its environments are used again')  # fmt: skip
    args = parser.parse_args()

    every = read_commands(read_pages())
    idle = idle_entries(every)
    if idle:
        sys.exit(f'error: in tests/docs.py, nothing in the pages is as in {", ".join(idle)}')
    commands = choose(every, args.only)
    if not commands:
        sys.exit(f'error: no command of the pages contains {" or ".join(args.only)}')
    if args.list:
        for command in commands:
            print(f'{command.where:28}', command.title if command.python else command.run_as,
                  f'(skipped: {command.skipped})' if command.skipped else '')  # fmt: skip
        return
    if not (COCO / 'annotations').is_dir():
        sys.exit(f'error: no COCO data at {COCO}; set COCO_MINI to a folder in the layout of COCO 2017')
    if git('status', '--porcelain', '--untracked-files=no'):
        print('note: the commands are those of the pages as they are here, and run on what is committed')

    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    start, failed, run = time.time(), [], 0
    with tempfile.TemporaryDirectory(prefix='spec_mmdet_docs_') as folder:
        clone = Clone(args.folder.resolve() if args.folder else Path(folder))
        if not report('', 'the environment', clone.set_up, LOGS / '000_environment.log'):
            sys.exit(1)
        for command in commands:
            if command.skipped:
                print(f'{command.where:28}{command.title} ... skipped ({command.skipped})')
                continue
            run += 1
            if not report(command.where, command.title, partial(clone.execute, command), command.log):
                failed.append(command)
    skipped = len(commands) - run
    print(f'{run - len(failed)} ok, {len(failed)} failed, {skipped} skipped, in {(time.time() - start) / 60:.0f} min')
    sys.exit(bool(failed))


if __name__ == '__main__':
    main()
