"""Kill trainings, break writes, forge and garble checkpoints: a table of what was tried, what survived, what was lost.

    make torture        # or python tests/torture.py [--kills 50] [--seconds 600]

What is trained is tests/training/toy.py, the smallest training with this project's loop and hooks; each is a fork.
"""

import argparse
import contextlib
import io
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(ROOT / 'tests' / 'training')]

import torch  # noqa: E402
import toy  # noqa: E402
from forged import write_forged  # noqa: E402
from mmengine.logging import HistoryBuffer  # noqa: E402

from spec_mmdet import InputError, files  # noqa: E402
from spec_mmdet.checkpoints.layouts import recognise  # noqa: E402
from spec_mmdet.checkpoints.reading import load  # noqa: E402
from spec_mmdet.training.resume import locked, newest_whole  # noqa: E402


@dataclass
class Row:
    """What was tried of a kind, and what of it was lost."""

    name: str
    tried: int = 0
    lost: int = 0


def train(work: Path) -> None:
    """Go on with the training in a directory, as the command does."""
    newest = newest_whole(work)
    with locked(work):
        runner = toy.runner(work, resume_from=newest)
        epoch = load(newest)['meta']['epoch'] if newest else 0
        record = work / 'last_evaluation'
        # The score follows the epoch; an evaluation that was killed is made up for.
        toy.Score.epoch = epoch - (epoch > 0 and (not record.exists() or record.read_text() != str(epoch)))
        runner.train()


def child(action: Callable[[], None]) -> int:
    """Run something in a fork, in silence; returns its number."""
    process = os.fork()
    if process == 0:
        with contextlib.suppress(BaseException), Path(os.devnull).open('w') as silence:
            os.dup2(silence.fileno(), 1)
            os.dup2(silence.fileno(), 2)
            action()
            os._exit(0)
        os._exit(1)
    return process


def finish(work: Path, truth: dict) -> bool:
    """Whether the training in a directory can be finished, with the weights of one that was never stopped."""
    _, status = os.waitpid(child(lambda: train(work)), 0)
    if status:
        return False
    again = load(work / 'epoch_4.pth')['state_dict']
    return all(torch.equal(value, again[name]) for name, value in truth.items())


def lost_ground(work: Path, reached: int) -> tuple[int, bool]:
    """The iteration of the newest whole checkpoint, and whether that is before one that was there already."""
    with contextlib.redirect_stdout(io.StringIO()):
        newest = newest_whole(work)
    iteration = load(newest)['meta']['iter'] if newest else 0
    return iteration, iteration < reached


def kills(folder: Path, truth: dict, count: int, rng: random.Random) -> tuple[Row, Row]:
    """SIGKILL at random moments, writes made slow so that many are within one; then the training is finished."""
    anywhere, inside = Row('SIGKILL between writes'), Row('SIGKILL within a write')
    real = os.fsync

    def slow(number: int) -> None:
        time.sleep(0.03)
        real(number)

    run = 0
    while anywhere.tried + inside.tried < count:
        run += 1
        work, reached = folder / f'killed_{run}', 0
        work.mkdir()
        rows: list[Row] = []
        for _ in range(4):

            def action(work: Path = work) -> None:
                files.os.fsync = slow
                train(work)

            process = child(action)
            time.sleep(rng.uniform(0.1, 1.5))
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            if os.WIFSIGNALED(status):
                row = inside if list(work.glob('.*.partial')) else anywhere
                row.tried += 1
                rows.append(row)
                reached, lost = lost_ground(work, reached)
                row.lost += lost
        if rows and not finish(work, truth):
            rows[-1].lost += 1
    return anywhere, inside


def signals(folder: Path, truth: dict, count: int, rng: random.Random) -> Row:
    """SIGTERM and SIGINT at random moments: status 143 or 130, and nothing lost."""
    from spec_mmdet.training.saving import listening

    row = Row('SIGTERM, SIGINT')
    for i in range(count):
        work = folder / f'signal_{i}'
        work.mkdir()

        def action(work: Path = work) -> None:
            try:
                with listening():
                    (work / 'ready').touch()
                    train(work)
            except SystemExit as ended:
                os._exit(ended.code)

        process = child(action)
        while not (work / 'ready').exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        number = rng.choice([signal.SIGTERM, signal.SIGINT])
        os.kill(process, number)
        _, status = os.waitpid(process, 0)
        row.tried += 1
        # A training that had ended by then has nothing to save.
        row.lost += os.waitstatus_to_exitcode(status) not in (0, 128 + number) or not finish(work, truth)
    return row


def full_disks(folder: Path, truth: dict, count: int, rng: random.Random) -> Row:
    """Files that may not grow beyond some size: nothing half-written is left, and the training goes on afterwards."""
    row = Row('a file that cannot be written to its end')
    for i in range(count):
        work = folder / f'full_{i}'
        work.mkdir()
        process = child(lambda work=work: train(work))
        time.sleep(rng.uniform(0.1, 0.6))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        reached, _ = lost_ground(work, 0)
        limit = rng.randrange(1, 6000)

        def action(work: Path = work, limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            train(work)

        os.waitpid(child(action), 0)
        row.tried += 1
        row.lost += bool(list(work.glob('.*.partial'))) or lost_ground(work, reached)[1] or not finish(work, truth)
    return row


def read_anyhow(path: Path) -> None:
    """What a command makes of a checkpoint; anything but the documented error is raised."""
    try:
        recognise(load(path), str(path))
    except InputError as error:
        if '\n' in str(error):
            raise AssertionError('more than a line') from error


def forged(folder: Path, good: dict) -> Row:
    """Forged files through the reader and the recogniser of layouts."""
    row, trace = Row('forged checkpoints'), folder / 'trace'
    for path in write_forged(folder, good, trace).values():
        _, status = os.waitpid(child(lambda path=path: read_anyhow(path)), 0)
        row.tried += 1
        row.lost += status != 0 or trace.exists()
    return row


def garbled(folder: Path, good: dict, seconds: float, rng: random.Random) -> Row:
    """Bytes changed, cut and moved at random in good checkpoints of both formats, for so many seconds."""
    row = Row('garbled checkpoints')
    sources = []
    for new in (True, False):
        buffer = io.BytesIO()
        torch.save(good, buffer, _use_new_zipfile_serialization=new)
        sources.append(buffer.getvalue())
    path, until = folder / 'garbled.pth', time.time() + seconds

    def many() -> None:
        end = time.time() + min(5, seconds)
        tried = 0
        while time.time() < end:
            content = bytearray(rng.choice(sources))
            for _ in range(rng.choice([1, 1, 2, 8, 64])):
                where = rng.randrange(len(content))
                kind = rng.random()
                if kind < 0.6:
                    content[where] = rng.randrange(256)
                elif kind < 0.8:
                    del content[where : where + rng.randrange(1, 64)]
                else:
                    content[where:where] = content[: rng.randrange(64)]
            path.write_bytes(content)
            read_anyhow(path)
            tried += 1
        (folder / 'tried').write_text(str(tried))

    while time.time() < until:
        rng.random()
        (folder / 'tried').write_text('1')
        _, status = os.waitpid(child(many), 0)
        row.tried += int((folder / 'tried').read_text())
        if status:
            row.lost += 1
            path.rename(folder / f'lost_{row.lost}.pth')
    return row


def torture(kill_count: int, seconds: float, seed: int, folder: Path) -> list[Row]:
    """All of it, in a folder."""
    rng = random.Random(seed)
    whole = folder / 'whole'
    os.waitpid(child(lambda: toy.runner(whole).train()), 0)
    truth = load(whole / 'epoch_4.pth')['state_dict']
    hub = dict(log_scalars={'train/loss': HistoryBuffer([1.0], [1])}, runtime_info=dict(iter=3), resumed_keys={})
    weights = torch.nn.Linear(2, 2).state_dict()
    good = dict(meta=dict(epoch=1, iter=3, cfg='a = 1'), message_hub=hub, state_dict=weights)
    (folder / 'forged').mkdir()
    return [
        *kills(folder, truth, kill_count, rng),
        signals(folder, truth, max(4, kill_count // 5), rng),
        full_disks(folder, truth, max(4, kill_count * 2 // 5), rng),
        forged(folder / 'forged', good),
        garbled(folder, good, seconds, rng),
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument('--kills', type=int, default=50)
    options.add_argument('--seconds', type=float, default=600, help='of garbled checkpoints')
    options.add_argument('--seed', type=int, default=0)
    args = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = torture(args.kills, args.seconds, args.seed, Path(folder))
    print(f'{"":44}{"tried":>9}{"survived":>10}{"lost":>6}')
    for row in rows:
        print(f'{row.name:44}{row.tried:9}{row.tried - row.lost:10}{row.lost:6}')
    sys.exit(any(row.lost for row in rows))


if __name__ == '__main__':
    main()
