"""The smallest training with all parts: a line fitted to noise by MMEngine's Runner, with this project's hooks."""

import gc
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import Dataset

from spec_mmdet.errors import InputError
from spec_mmdet.training.running import one_line_errors
from spec_mmdet.training.saving import stop_on_signals

SCORES = [1.0, 3.0, 2.0, 4.0]  # by epoch


class Noise(Dataset):
    metainfo = dict(classes=('a', 'b'))

    def __init__(self, length: int = 8) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        return dict(inputs=torch.randn(3) + index, data_samples=torch.randn(1))


class Line(BaseModel):
    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.dropout = dropout

    def forward(self, inputs, data_samples=None, mode='tensor'):
        if mode != 'loss':
            return [0.0]
        error = self.layer(torch.dropout(torch.stack(inputs), self.dropout, True)) - torch.stack(data_samples)
        return dict(loss=error.square().mean())


class Score(BaseMetric):
    """Return one score after the other, in the order of the epochs."""

    epoch = 0

    def process(self, data_batch, data_samples) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list) -> dict:
        Score.epoch += 1
        return dict(score=SCORES[(Score.epoch - 1) % len(SCORES)])


def loader(images: int = 8, **settings) -> dict:
    """Return the config of a loader with batches of two in random order."""
    collate, sampler = dict(type='pseudo_collate'), dict(type='DefaultSampler', shuffle=True)
    return dict(batch_size=2, num_workers=0, dataset=Noise(images), sampler=sampler, collate_fn=collate) | settings


def runner(work: Path, epochs: int = 4, resume_from: Path | None = None, **settings) -> Runner:
    """Return a runner of four iterations per epoch; the arguments override its settings."""
    Score.epoch = 0
    checkpoint = dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=1, save_best='score', rule='greater')
    hooks = dict(checkpoint=checkpoint, logger=dict(type='LoggerHook', interval=100))
    arguments = dict(
        model=dict(type=Line),
        work_dir=str(work),
        train_dataloader=loader(),
        train_cfg=dict(type='ExactEpochTrainLoop', max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01), accumulative_counts=3),
        val_dataloader=loader(sampler=dict(type='DefaultSampler', shuffle=False)),
        val_cfg=dict(type='ValLoop'),
        val_evaluator=dict(type=Score),
        custom_hooks=[dict(type='FiniteGuard')],
        default_hooks=hooks,
        default_scope='mmdet',
        randomness=dict(seed=0),
        log_level='ERROR',
        experiment_name=f'{work.name}{id(hooks)}',
        resume=resume_from is not None,
        load_from=None if resume_from is None else str(resume_from),
    )
    return Runner(**(arguments | settings))


def fork(action: Callable[[], None], says: Path) -> int:
    """Run a function in a process of its own, which ends as a command does and writes its one line to a file."""
    process = os.fork()
    if process == 0:
        gc.freeze()  # objects of earlier tests may, when collected, wait for threads that a fork does not have
        with (Path(f'{says}.log')).open('w') as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        status = 2
        try:
            with one_line_errors(), stop_on_signals():
                action()
            status = 0
        except InputError as error:
            says.write_text(str(error))
            status = 1
        except SystemExit as ended:
            status = ended.code
        except BaseException:
            says.write_text(traceback.format_exc())
        finally:
            os._exit(status)
    return process


def status_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
