"""Training that goes on exactly where it was, whenever it was stopped.

Every random number is a function of the seed and of the place in the training: of the sample's in its epoch, for what
its pipeline draws, and of the iteration's, for what the model draws. Nothing depends on what was drawn before, and no
generator's state has to be kept.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from pathlib import Path

import numpy as np
import torch
from mmdet.registry import LOOPS
from mmengine.dist import broadcast, get_rank
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from ..errors import InputError
from .saving import EVALUATED

# The two kinds of places, so that their numbers differ.
SAMPLE, ITERATION = range(2)


def seed_all(*place: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch by numbers that say where the training is."""
    words = np.random.SeedSequence(place).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


class SeededDataset:
    """A dataset, asked for (index, place): the sample of the index, with the random numbers of the place."""

    def __init__(self, dataset: Sized) -> None:
        vars(self)['dataset'] = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, tuple[int, ...]]) -> object:
        index, place = key
        seed_all(SAMPLE, *place)
        return self.dataset[index]

    def __getattr__(self, name: str) -> object:
        if name == 'dataset':  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.dataset, name, value)  # as hooks do that change the pipeline


class SeededBatches:
    """A batch sampler whose indices come with their places, from batch ``start`` of an epoch on.

    Args:
        batches: the batch sampler that gives the indices.
        seed: the run's.
    """

    def __init__(self, batches: object, seed: int) -> None:
        self.batches, self.seed = batches, seed
        self.epoch = self.start = 0

    @property
    def sampler(self) -> object:
        """Where MMEngine tells the epoch."""
        return self.batches.sampler

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        for number, batch in enumerate(self.batches):
            if number >= self.start:
                yield [(index, (self.seed, get_rank(), self.epoch, number, i)) for i, index in enumerate(batch)]


def seeded(loader: DataLoader, seed: int) -> DataLoader:
    """A loader like another one, its samples drawn by their places."""
    return DataLoader(
        SeededDataset(loader.dataset),
        batch_sampler=SeededBatches(loader.batch_sampler, seed),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


@LOOPS.register_module()
class ExactTrainLoop(EpochBasedTrainLoop):
    """MMEngine's loop over epochs, which goes on within an epoch, too, and makes up for an evaluation that was killed.

    Resumed on the same number of processes, with the same data and batch size, a run ends with the weights of one that
    was never stopped, bit for bit where the arithmetic is deterministic, as on a CPU. Only gradients that are half
    accumulated when a checkpoint is saved are kept for one process alone.

    Attributes:
        began: the iteration at which the epoch began.
        resumed_from: the meta of the checkpoint that the run goes on from.
    """

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, *args, **kwargs) -> None:
        super().__init__(runner, dataloader, *args, **kwargs)
        self.dataloader = seeded(self.dataloader, runner.seed)
        self.began = 0
        self.resumed_from: dict = {}

    def run(self) -> torch.nn.Module:
        """Train from where a checkpoint says that it was saved, or from the start.

        Raises:
            InputError: where that is within an epoch of another number of iterations.
        """
        self._find_place()
        self.runner.call_hook('before_train')
        if self._epoch and self._iter == self.began and not self._is_evaluated():
            self._evaluate_if_due()
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._decide_current_val_interval()
            self._evaluate_if_due()
        self.runner.call_hook('after_train')
        return self.runner.model

    def _find_place(self) -> None:
        within, length = (self.resumed_from.get(key, 0) for key in ('iter_in_epoch', 'iters_per_epoch'))
        if within and length != len(self.dataloader):
            raise InputError(
                f'the checkpoint is from within an epoch of {length} iterations, and this one would have '
                f'{len(self.dataloader)}: resume with the same data, batch size and number of processes, or from a '
                'checkpoint of the end of an epoch'
            )
        self.began = self._iter - within
        batches = self.dataloader.batch_sampler
        batches.seed = self.runner.seed  # a resumed run has the first one's
        if hasattr(batches.sampler, 'seed'):
            batches.sampler.seed = self.runner.seed

    def _is_evaluated(self) -> bool:
        record = Path(self.runner.work_dir, EVALUATED)
        known = torch.tensor(int(record.is_file() and record.read_text() == str(self._epoch)))
        broadcast(known)  # as the first process sees it
        return bool(known)

    def _evaluate_if_due(self) -> None:
        due = self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs
        if self.runner.val_loop is not None and self._epoch >= self.val_begin and due:
            self.runner.val_loop.run()

    def run_epoch(self) -> None:
        """Train for an epoch, or for what is left of it."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        batches = self.dataloader.batch_sampler
        batches.epoch, batches.start = self._epoch, self._iter - self.began
        for idx, data_batch in enumerate(self.dataloader, batches.start):
            self.run_iter(idx, data_batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1
        self.began = self._iter

    def run_iter(self, idx: int, data_batch: dict) -> None:
        """Train for an iteration, with its own random numbers."""
        seed_all(ITERATION, self.runner.seed, get_rank(), self._iter)
        super().run_iter(idx, data_batch)
