"""Kill trainings, break writes, forge checkpoints, fuzz readers: print a table of faults tested and losses.

    make torture        # or python tests/torture.py [--kills 50] [--seconds 600] [--only fuzzing]

The training is tests/training/toy.py, the smallest one with this project's loop and hooks; each runs in a fork. Forged
checkpoints go through the commands themselves; tests/fuzzing.py contains the fuzzers.
"""

import argparse
import contextlib
import faulthandler
import functools
import http.server
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(ROOT / 'tests' / 'training')]

import fuzzing  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import toy  # noqa: E402
from forged import is_harmless, write_forged  # noqa: E402

from spec_mmdet import files  # noqa: E402
from spec_mmdet.checkpoints.reading import load  # noqa: E402
from spec_mmdet.data.shapes import write_split  # noqa: E402
from spec_mmdet.training.resume import find_newest_checkpoint, lock_folder  # noqa: E402

SECONDS, MEGABYTES = (
    60,
    1500,
)  # limits of processor time and memory of an entry point for a forged file, its own work included


@dataclass
class Row:
    """The count of one kind of fault: how often it was tested, and a line for each loss."""

    name: str
    tried: int = 0
    losses: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return len(self.losses)

    def note(self, **faults: object) -> None:
        """Count a loss if one of the faults is true."""
        if any(faults.values()):
            self.losses.append(f'number {self.tried}: {", ".join(name for name, there in faults.items() if there)}')


def train(work: Path) -> None:
    """Resume the training in a directory, as the command does."""
    newest = find_newest_checkpoint(work)
    with lock_folder(work):
        runner = toy.runner(work, resume_from=newest)
        epoch = load(newest)['meta']['epoch'] if newest else 0
        record = work / 'last_evaluation'
        # The score follows the epoch; an interrupted evaluation is run again.
        toy.Score.epoch = epoch - (epoch > 0 and (not record.exists() or record.read_text() != str(epoch)))
        runner.train()


def child(action: Callable[[], None]) -> int:
    """Run a function in a fork without output; return its process id."""
    process = os.fork()
    if process == 0:
        faulthandler.disable()  # pytest enables it with a copy of stderr
        with contextlib.suppress(BaseException), Path(os.devnull).open('w') as silence:
            sys.stdout = sys.stderr = silence  # pytest replaces them by files
            os.dup2(silence.fileno(), 1)
            os.dup2(silence.fileno(), 2)
            action()
            os._exit(0)
        os._exit(1)
    return process


def finish(work: Path, truth: dict) -> bool:
    """Return whether the training in a directory can be finished with the weights of one that was never stopped."""
    _, status = os.waitpid(child(lambda: train(work)), 0)
    if status:
        return False
    again = load(work / 'epoch_4.pth')['state_dict']
    return all(torch.equal(value, again[name]) for name, value in truth.items())


def lost_ground(work: Path, reached: int) -> tuple[int, bool]:
    """Return the iteration of the newest intact checkpoint, and whether it is older than one that existed before."""
    with contextlib.redirect_stdout(io.StringIO()):
        newest = find_newest_checkpoint(work)
    iteration = load(newest)['meta']['iter'] if newest else 0
    return iteration, iteration < reached


def kills(folder: Path, truth: dict, count: int, rng: random.Random) -> tuple[Row, Row]:
    """Send SIGKILL at random moments, with writes slowed so that many are hit; then finish the training."""
    anywhere, inside = Row('SIGKILL between writes'), Row('SIGKILL within a write')
    real = os.fsync

    def slow(number: int) -> None:
        time.sleep(0.03)
        real(number)

    run = 0
    while anywhere.tried + inside.tried < count or inside.tried < count * 3 // 10:
        run += 1
        work, reached = folder / f'killed_{run}', 0
        work.mkdir()
        row = None
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
                reached, lost = lost_ground(work, reached)
                row.note(ground=lost)
        if row:
            row.note(unfinished=not finish(work, truth))
    return anywhere, inside


def signals(folder: Path, truth: dict, count: int, rng: random.Random) -> Row:
    """Send SIGTERM and SIGINT at random moments: the status is 143 or 130, and nothing is lost."""
    from spec_mmdet.training.saving import stop_on_signals

    row = Row('SIGTERM, SIGINT')
    for i in range(count):
        work = folder / f'signal_{i}'
        work.mkdir()

        def action(work: Path = work) -> None:
            try:
                with stop_on_signals():
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
        # A training that had already ended has nothing to save.
        code = os.waitstatus_to_exitcode(status)
        row.note(**{f'status {code}': code not in (0, 128 + number)}, unfinished=not finish(work, truth))
    return row


def full_disks(folder: Path, truth: dict, count: int, rng: random.Random) -> Row:
    """Limit the size of files: nothing is truncated, and the training continues afterwards."""
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
        half = list(work.glob('.*.partial'))
        row.note(half=half, ground=lost_ground(work, reached)[1], unfinished=not finish(work, truth))
    return row


def forged_through(name: str, enter: Callable[[Path], None], forged: dict[str, Path], trace: Path, log: Path) -> Row:
    """Pass forged files to an entry point: each gives one line within seconds and limited memory, in few forks."""
    from entries import try_entry

    row, left = Row(f'forged: {name}'), list(forged)
    tried = trace.with_name('tried')

    def many() -> None:
        for what in list(left):
            with tried.open('a') as record:
                print(what, file=record)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                says = try_entry(enter, forged[what])
            except BaseException:
                log.write_text(traceback.format_exc())
                os._exit(3)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
            if trace.exists() or grown > MEGABYTES or not says and not is_harmless(what):
                log.write_text(f'code run: {trace.exists()}, MB: {grown}, said: {says!r}')
                os._exit(4)

    while left:
        tried.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
        _, status = os.waitpid(child(many), 0)
        done = tried.read_text().splitlines()
        row.tried += len(done)
        left = left[len(done) :]
        if status:
            says = log.read_text().strip() if log.exists() else f'status {os.waitstatus_to_exitcode(status)}'
            row.losses.append(f'{done[-1]}: {says}')
            trace.unlink(missing_ok=True)
    return row


def forged_through_all(folder: Path, count: int, rng: random.Random) -> list[Row]:
    """Pass forged files of a detector to each entry point, some of them chosen at random."""
    from conftest import CONFIG, options, run_tool
    from entries import OF_WEIGHTS, entries

    patch = pytest.MonkeyPatch()
    patch.setenv('TORCH_HOME', str(folder / 'hub'))
    for split in ('train', 'val'):
        write_split(folder, split, 4, 128, np.random.default_rng(len(split)))
    few = ['val_cfg=None', 'val_dataloader=None', 'val_evaluator=None']
    command = [CONFIG, '--work-dir', folder / 'work', *options(folder), *few]
    os.waitpid(child(lambda: run_tool(patch, 'train', *command)), 0)
    trace = folder / 'trace'
    (folder / 'forged').mkdir()
    forged = write_forged(folder / 'forged', load(folder / 'work' / 'epoch_1.pth'), trace)
    ways, rows = entries(patch, folder, folder), []
    handler = functools.partial(QuietHandler, directory=folder / 'forged')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address, direct = f'http://127.0.0.1:{server.server_port}', ways['convert']
        ways['an address'] = lambda path: direct(f'{address}/{path.name}')
        for name, enter in ways.items():
            # An entry point that reads only the weights ignores other forged parts and would continue.
            whats = [what for what in forged if not (name in (*OF_WEIGHTS, 'an address') and is_harmless(what))]
            some = {what: forged[what] for what in rng.sample(whats, min(count, len(whats)))}
            rows.append(forged_through(name, enter, some, trace, folder / 'log'))
        server.shutdown()
    return rows


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        """Suppress all output."""


class Fuzzing:
    """Run the fuzzers of all entry points in processes of their own, restarted if an input ends them."""

    def __init__(self, folder: Path, seconds: float, guided: bool) -> None:
        self.folder, self.guided = folder, guided
        self.rows = {entry: Row(f'fuzzed: {entry}') for entry in fuzzing.ENTRIES}
        self.left = dict.fromkeys(fuzzing.ENTRIES, seconds)
        self.running = {entry: self.begin(entry) for entry in fuzzing.ENTRIES}

    def begin(self, entry: str) -> int:
        seed, seconds = self.rows[entry].lost, self.left[entry]
        (self.folder / f'tried_{entry}').write_text(f'0 {seconds}')
        if not self.guided:
            return child(lambda: fuzzing.fuzz(entry, seconds, self.folder, seed, False))
        command = [sys.executable, fuzzing.__file__, entry, '--out', self.folder, '--seconds', seconds, '--seed', seed]
        with (self.folder / f'log_{entry}').open('w') as log:
            return subprocess.Popen(['nice', '-n', '19', *map(str, command)], stdout=log, stderr=log).pid

    def wait(self) -> list[Row]:
        """Return the rows after the time of all fuzzers."""
        for entry, row in self.rows.items():
            while True:
                _, status = os.waitpid(self.running[entry], 0)
                tried, left = (self.folder / f'tried_{entry}').read_text().split()
                row.tried += int(tried)
                if not status:
                    break
                kept = (self.folder / f'last_{entry}').rename(self.folder / f'lost_{entry}_{row.lost}')
                row.losses.append(f'{kept} (status {os.waitstatus_to_exitcode(status)})')
                self.left[entry] = float(left)
                if row.lost == 20:
                    break
                self.running[entry] = self.begin(entry)
        return list(self.rows.values())


PARTS = ('kills', 'signals', 'faults', 'forged', 'fuzzing')


def torture(
    kill_count: int, seconds: float, forged_count: int, seed: int, folder: Path, only: Sequence[str], guided: bool
) -> list[Row]:
    """Run all parts, or some, in a folder."""
    rng = random.Random(seed)
    # In the background, from the start.
    fuzzers = Fuzzing(folder, seconds, guided) if 'fuzzing' in only else None
    whole = folder / 'whole'
    os.waitpid(child(lambda: toy.runner(whole).train()), 0)
    truth = load(whole / 'epoch_4.pth')['state_dict']
    rows: list[Row] = []
    if 'kills' in only:
        rows += kills(folder, truth, kill_count, rng)
    if 'signals' in only:
        rows.append(signals(folder, truth, max(4, kill_count // 5), rng))
    if 'faults' in only:
        rows.append(full_disks(folder, truth, max(4, kill_count * 2 // 5), rng))
    if 'forged' in only:
        rows += forged_through_all(folder, forged_count, rng)
    return rows + (fuzzers.wait() if fuzzers else [])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument('--kills', type=int, default=50, help='and of signals and faults in proportion')
    options.add_argument('--seconds', type=float, default=600, help='of fuzzing, each entry')
    options.add_argument('--forged', type=int, default=16, help='files, through each entry, of those in forged.py')
    options.add_argument('--seed', type=int, default=0)
    options.add_argument('--only', nargs='+', choices=PARTS, default=PARTS)
    args = options.parse_args()
    torch.set_num_threads(1)
    guided = fuzzing.atheris is not None
    folder = Path(tempfile.mkdtemp(prefix='torture-'))
    rows = torture(args.kills, args.seconds, args.forged, args.seed, folder, args.only, guided)
    if 'fuzzing' in args.only:
        print(
            'fuzzing was guided by coverage (atheris)' if guided else 'without atheris, inputs were changed at random'
        )
    print(f'{"":44}{"tried":>9}{"survived":>10}{"lost":>6}')
    for row in rows:
        print(f'{row.name:44}{row.tried:9}{row.tried - row.lost:10}{row.lost:6}')
    for row in rows:
        print(*(f'lost, {row.name}: {loss}' for loss in row.losses), sep='\n', end='\n' * bool(row.losses))
    if any(row.lost for row in rows):
        sys.exit(f'lost; what there was is in {folder}')
    shutil.rmtree(folder)


if __name__ == '__main__':
    main()
