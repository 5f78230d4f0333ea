"""At every moment of a training an intact checkpoint exists, and weights that are not finite are not saved."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
import toy
from mmdet.registry import HOOKS
from mmengine.config import Config
from mmengine.hooks import Hook

from spec_mmdet import InputError, files
from spec_mmdet.checkpoints.reading import load
from spec_mmdet.training.resume import find_checkpoints, find_newest_checkpoint, lock_folder, require_no_checkpoints


class Killed(BaseException):
    """Stand in for the end of a process, as far as its files are concerned."""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob('*.pth')}


def test_files_of_a_finished_training(tmp_path):
    toy.runner(tmp_path).train()
    best = 'best_score_epoch_4'
    assert names(tmp_path) == {'epoch_4.pth', f'{best}.pth', f'{best}_weights.pth'}
    assert (tmp_path / 'last_checkpoint').read_text() == 'epoch_4.pth'
    assert not list(tmp_path.glob('.*.partial'))
    weights = load(tmp_path / f'{best}_weights.pth')
    assert set(weights) == {'meta', 'state_dict'} and weights['meta']['epoch'] == 4
    for name, value in load(tmp_path / f'{best}.pth')['state_dict'].items():
        assert torch.equal(value, weights['state_dict'][name])


def die(*args) -> None:
    raise Killed


def fill(*args) -> None:
    raise OSError(errno.ENOSPC, 'No space left on device')


@pytest.mark.parametrize('fault', [die, fill])
@pytest.mark.parametrize('operation', ['replace', 'fsync'])
def test_a_fault_at_any_write_loses_nothing(monkeypatch, tmp_path, fault, operation):
    done = tmp_path / 'done'
    calls = 0
    real = getattr(os, operation)

    def counted(*args):
        nonlocal calls
        calls += 1
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(files.os, operation, counted)
        toy.runner(done).train()
    truth = load(done / 'epoch_4.pth')
    assert calls >= 20
    for nth in range(1, calls + 1, 2 if operation == 'replace' else 5):
        work, calls_left = tmp_path / str(nth), nth

        def failing(*args):
            nonlocal calls_left
            calls_left -= 1
            return fault(*args) if calls_left == 0 else real(*args)

        with monkeypatch.context() as patched:
            patched.setattr(files.os, operation, failing)
            with pytest.raises((Killed, InputError)):
                toy.runner(work).train()
        if fault is fill:
            assert not list(work.glob('.*.partial')), nth
        newest = find_newest_checkpoint(work)
        trained = load(newest)['meta']['epoch'] if newest else 0
        before = [load(path)['meta']['epoch'] for path in work.glob('best_*.pth')]
        assert trained >= max(before, default=0) - 1, nth  # at most an epoch is lost
        moved = tmp_path / f'{nth}_moved'
        shutil.move(work, moved)
        resumed = toy.runner(moved, resume_from=newest and moved / newest.name)
        if newest is not None:
            toy.Score.epoch = trained - (not (moved / 'last_evaluation').exists() or
                                         (moved / 'last_evaluation').read_text() != str(trained))  # fmt: skip
        with lock_folder(moved):
            resumed.train()
        again = load(moved / 'epoch_4.pth')
        for name, value in truth['state_dict'].items():
            assert torch.equal(value, again['state_dict'][name]), (nth, name)
        assert {name for name in names(moved) if name.startswith('best')} >= {'best_score_epoch_4.pth'}
        assert not list(moved.glob('.*.partial'))


def test_the_newest_intact_checkpoint_is_resumed(tmp_path, capsys):
    assert find_newest_checkpoint(tmp_path) is None
    toy.runner(tmp_path, default_hooks=dict(checkpoint=dict(type='AtomicCheckpointHook', interval=1))).train()
    assert find_newest_checkpoint(tmp_path).name == 'epoch_4.pth'
    whole = (tmp_path / 'epoch_4.pth').read_bytes()
    (tmp_path / 'epoch_4.pth').write_bytes(whole[: len(whole) // 2])
    spoilt = bytearray((tmp_path / 'epoch_3.pth').read_bytes())
    where = spoilt.index(load(tmp_path / 'epoch_3.pth')['state_dict']['layer.weight'].numpy().tobytes())
    spoilt[where] ^= 1  # unnoticed by reading
    (tmp_path / 'epoch_3.pth').write_bytes(spoilt)
    capsys.readouterr()
    assert find_newest_checkpoint(tmp_path).name == 'epoch_2.pth'
    says = capsys.readouterr().out
    assert 'epoch_3.pth: corrupt in' in says and 'epoch_4.pth: not a checkpoint' in says
    assert 'resuming from' in says and 'saved after iteration 8' in says
    for number in (1, 2):
        (tmp_path / f'epoch_{number}.pth').write_bytes(b'')
    with pytest.raises(InputError, match='4 checkpoints'):
        find_newest_checkpoint(tmp_path)
    assert len(find_checkpoints(tmp_path)) == 4
    with pytest.raises(InputError, match='contains a training already .epoch_1.pth'):
        require_no_checkpoints(tmp_path)


@pytest.mark.parametrize('out_dir', [None, 'elsewhere', 'the work directory'])
@pytest.mark.parametrize('template', [None, 'line_{:03d}.pth', '{}.pth'])
def test_checkpoints_are_found_where_the_hook_writes_them(tmp_path, monkeypatch, out_dir, template):
    monkeypatch.chdir(tmp_path)
    work = tmp_path / 'run'
    hook = dict(type='AtomicCheckpointHook', interval=1, save_best='score', rule='greater')
    hook.update(out_dir=str(work) if out_dir == 'the work directory' else out_dir, filename_tmpl=template)
    cfg = Config(dict(default_hooks=dict(checkpoint=hook)))
    assert find_newest_checkpoint(Path('run'), cfg) is None
    toy.runner(work, default_hooks=dict(checkpoint=hook)).train()
    files = [path for path in tmp_path.rglob('*.pth') if not path.name.startswith('best_')]
    assert len(files) == 4
    assert {path.resolve() for path in find_checkpoints(Path('run'), cfg)} == set(files)
    assert find_newest_checkpoint(Path('run'), cfg).resolve() == max(files)
    with pytest.raises(InputError, match='contains a training already'):
        require_no_checkpoints(Path('run'), cfg)


def test_two_trainings_do_not_share_a_directory(tmp_path):
    child = os.fork()  # locks act between processes
    ready, go = tmp_path / 'ready', tmp_path / 'go'
    if child == 0:
        with lock_folder(tmp_path / 'work'):
            ready.touch()
            while not go.exists():
                pass
        os._exit(0)
    while not ready.exists():
        pass
    with (
        pytest.raises(InputError, match=f'another training is writing there .process {child} on'),
        lock_folder(tmp_path / 'work'),
    ):
        pass
    go.touch()
    os.waitpid(child, 0)
    with lock_folder(tmp_path / 'work'):
        pass


@HOOKS.register_module()
class Spoil(Hook):
    """Make a weight or a batch infinite."""

    def __init__(self, what: str, iteration: int) -> None:
        self.what, self.iteration = what, iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter + 1 == self.iteration and self.what == 'batch':
            data_batch['inputs'][0][0] = torch.inf

    def after_train_epoch(self, runner) -> None:
        if runner.iter == self.iteration and self.what == 'weight':
            runner.model.layer.weight.data[0, 0] = torch.nan


def test_weights_that_are_not_finite_stop_training_and_are_not_saved(tmp_path):
    for what, iteration, says in (
        ('batch', 6, r'iteration 6: not finite: loss .*the last good checkpoint is .*epoch_1.pth.*The batch is in'),
        ('weight', 8, r'weights contain NaN or inf \(layer.weight\) and were not saved; the last good .*epoch_1.pth'),
    ):
        work = tmp_path / what
        hooks = [dict(type='FiniteGuard'), dict(type='Spoil', what=what, iteration=iteration)]
        training = toy.runner(work, custom_hooks=hooks)
        with pytest.raises(InputError, match=says):
            training.train()
        assert all(value.isfinite().all() for value in load(work / 'epoch_1.pth')['state_dict'].values())
        assert not (work / 'epoch_2.pth').exists()
    dump = load(tmp_path / 'batch' / 'not_finite_6_0.pth')
    assert dump['iter'] == 6 and not dump['inputs'][0].isfinite().all()


@HOOKS.register_module()
class DieInEvaluation(Hook):
    def before_val_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.epoch == 2:
            raise Killed


def test_a_killed_evaluation_is_run_again(tmp_path):
    with pytest.raises(Killed):
        toy.runner(tmp_path, custom_hooks=[dict(type='DieInEvaluation')]).train()
    assert (tmp_path / 'last_evaluation').read_text() == '1'
    resumed = toy.runner(tmp_path, resume_from=tmp_path / 'epoch_2.pth')
    toy.Score.epoch = 1
    resumed.train()
    assert toy.Score.epoch == 4
    # Nothing is evaluated twice.
    resumed = toy.runner(tmp_path, resume_from=tmp_path / 'epoch_4.pth')
    toy.Score.epoch = 4
    resumed.train()
    assert toy.Score.epoch == 4


def test_checkpoints_by_iteration_and_other_epochs(tmp_path):
    by_iteration = dict(checkpoint=dict(type='AtomicCheckpointHook', by_epoch=False, interval=3))
    toy.runner(tmp_path, default_hooks=by_iteration).train()
    truth = load(tmp_path / 'iter_16.pth')['state_dict']
    for number in (3, 6, 9, 12, 15):
        work = tmp_path / str(number)
        from_here = tmp_path / f'iter_{number}.pth'
        toy.runner(work, resume_from=from_here, default_hooks=by_iteration).train()
        again = load(work / 'iter_16.pth')
        assert again['meta']['iter'] == 16
        assert all(torch.equal(value, truth[name]) for name, value in again['state_dict'].items()), number
    for settings, says in (
        (
            dict(train_dataloader=toy.loader(batch_size=1)),
            'with 2 images an iteration instead of 1',
        ),
        (dict(train_dataloader=toy.loader(images=6)), 'with 8 images instead of 6'),
        (dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01))), '3 iterations a step instead of 1'),
    ):
        with pytest.raises(InputError, match=says):
            toy.runner(tmp_path / 'other', resume_from=tmp_path / 'iter_3.pth', **settings).train()


@pytest.mark.parametrize('sampler', ['InfiniteSampler', 'DefaultSampler'])
def test_trainings_by_iterations(tmp_path, sampler):
    settings = dict(
        train_cfg=dict(type='ExactIterTrainLoop', max_iters=16, val_interval=4),
        train_dataloader=toy.loader(sampler=dict(type=sampler), num_workers=1),
        default_hooks=dict(checkpoint=dict(type='AtomicCheckpointHook', by_epoch=False, interval=1)),
    )
    toy.runner(tmp_path, **settings).train()
    truth = load(tmp_path / 'iter_16.pth')['state_dict']
    for number in (5, 12):  # the last one's evaluation is run again
        work = tmp_path / str(number)
        toy.runner(work, resume_from=tmp_path / f'iter_{number}.pth', **settings).train()
        again = load(work / 'iter_16.pth')
        assert again['meta']['iter'] == 16 and toy.Score.epoch == dict([(5, 3), (12, 2)])[number]
        assert all(torch.equal(value, truth[name]) for name, value in again['state_dict'].items()), number
    assert (tmp_path / 'last_evaluation').read_text() == '16'


def test_a_resumed_training_that_chooses_differently_starts_without_a_best_checkpoint(monkeypatch, tmp_path):
    """3 is the greatest score so far; 4 is not the least of all, but the least since the choice was changed."""
    monkeypatch.setattr(toy, 'SCORES', [3.0, 1.0, 4.0, 5.0])
    toy.runner(tmp_path, 2).train()
    hook = dict(type='AtomicCheckpointHook', interval=1, save_best='score', rule='less')
    resumed = toy.runner(tmp_path, resume_from=tmp_path / 'epoch_2.pth', default_hooks=dict(checkpoint=hook))
    toy.Score.epoch = 2
    resumed.train()
    assert names(tmp_path) >= {'best_score_epoch_1.pth', 'best_score_epoch_3.pth'}
