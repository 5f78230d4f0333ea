"""Training that goes on exactly where it was, whenever it was stopped.

Every random number is a function of the seed and of the place in the training: of the sample's in its epoch, for what
its pipeline draws, and of the iteration's, for what the model draws. Nothing depends on what was drawn before, and no
generator's state has to be kept. Places are counted over all processes, so that two of them draw in an iteration what
one draws in two.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from itertools import count
from pathlib import Path

import numpy as np
import torch
from mmdet.registry import LOOPS
from mmengine.dist import broadcast, get_rank, get_world_size
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from ..compat import count_accumulated_batches, count_epoch, update_val_interval
from ..errors import InputError
from .saving import EVALUATED, count_progress

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
    """A batch sampler whose indices come with their places, from batch ``start`` on.

    Args:
        batches: the batch sampler that gives the indices.
        seed: the run's.
        endless: whether to begin anew at the end of an epoch.
    """

    def __init__(self, batches: object, seed: int, endless: bool = False) -> None:
        self.batches, self.seed, self.endless = batches, seed, endless
        self.epoch = self.start = 0

    @property
    def sampler(self) -> object:
        """Where MMEngine tells the epoch."""
        return self.batches.sampler

    @property
    def batch_size(self) -> int:
        """As PyTorch's batch samplers have it."""
        return self.batches.batch_size

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        number, rank, processes = 0, get_rank(), get_world_size()
        for epoch in count(self.epoch):
            if hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(epoch)
            drawn = 0
            for batch in self.batches:
                if number >= self.start:
                    places = ((drawn + i) * processes + rank for i in range(len(batch)))
                    yield [(index, (self.seed, epoch, place)) for index, place in zip(batch, places)]
                number += 1
                drawn += len(batch)
            if not self.endless:
                return


def seed_loader(loader: DataLoader, seed: int, endless: bool = False) -> DataLoader:
    """A loader like another one, its samples drawn by their places."""
    return DataLoader(
        SeededDataset(loader.dataset),
        batch_sampler=SeededBatches(loader.batch_sampler, seed, endless),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


class ExactLoop:
    """What the loops below add to MMEngine's.

    Resumed with the same data and steps, a run ends with the weights of one that was never stopped: bit for bit on the
    same number of processes, where the arithmetic is deterministic, as on a CPU. An evaluation that was killed is made
    up for.

    Attributes:
        resumed_from: the meta of the checkpoint that the run goes on from.
    """

    resumed_from: dict = {}

    @property
    def step_settings(self) -> dict[str, int]:
        """What makes a step of the optimiser the same one whatever the processes are."""
        batch = self.dataloader.batch_sampler.batches.batch_size
        return {
            'images': len(self.dataloader.dataset),
            'images an iteration': batch * get_world_size(),
            'iterations a step': count_accumulated_batches(self.runner.optim_wrapper),
        }

    def _restore_run(self, may_differ: tuple[str, ...] = ()) -> None:
        """Go on with the seed of the run that is resumed, and with its steps, which an InputError says are others."""
        theirs, ours = self.resumed_from.get('steps', {}), self.step_settings
        if not isinstance(theirs, dict) or any(type(number) is not int for number in theirs.values()):
            raise InputError('the checkpoint: what it says of its steps are no numbers')
        for what in ours.keys() & theirs.keys() - set(may_differ):
            if ours[what] != theirs[what]:
                raise InputError(
                    f'the checkpoint is from a training of {theirs[what]} {what}, and this one would have '
                    f'{ours[what]}: resume with the same data, train_dataloader.batch_size times the number of '
                    'processes, and optim_wrapper.accumulative_counts; or start a new training from its weights: '
                    '--cfg-options load_from=FILE'
                )
        batches = self.dataloader.batch_sampler
        batches.seed = self.runner.seed
        if hasattr(batches.sampler, 'seed'):
            batches.sampler.seed = self.runner.seed

    def _is_evaluated(self) -> bool:
        record = Path(self.runner.work_dir, EVALUATED)
        known = torch.tensor(int(record.is_file() and record.read_text() == str(count_progress(self.runner))))
        broadcast(known)  # as the first process sees it
        return bool(known)

    def _evaluate_if_due(self) -> None:
        done, last = (self.epoch, self.max_epochs) if self.epoch else (self.iter, self.max_iters)
        due = done >= self.val_begin and (done % self.val_interval == 0 or done == last)
        if self.runner.val_loop is not None and due:
            self.runner.val_loop.run()

    def run_iter(self, *args) -> None:
        """Train for an iteration, with its own random numbers."""
        seed_all(ITERATION, self.runner.seed, self.iter * get_world_size() + get_rank())
        super().run_iter(*args)


@LOOPS.register_module()
class ExactEpochTrainLoop(ExactLoop, EpochBasedTrainLoop):
    """MMEngine's loop over epochs, which also resumes within an epoch.

    Attributes:
        epoch_start: the iteration at which the epoch began.
    """

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, *args, **kwargs) -> None:
        super().__init__(runner, dataloader, *args, **kwargs)
        self.dataloader = seed_loader(self.dataloader, runner.seed)
        self.epoch_start = 0

    def run(self) -> torch.nn.Module:
        """Train from where a checkpoint says that it was saved, or from the start.

        Raises:
            InputError: where its steps were others.
        """
        within = self.resumed_from.get('iter_in_epoch', 0)
        self._restore_run(may_differ=() if within else ('images',))
        self.epoch_start = self.iter - within
        self.runner.call_hook('before_train')
        if self.epoch and not within and not self._is_evaluated():
            self._evaluate_if_due()
        while self.epoch < self.max_epochs and not self.stop_training:
            self.run_epoch()
            update_val_interval(self)
            self._evaluate_if_due()
        self.runner.call_hook('after_train')
        return self.runner.model

    def run_epoch(self) -> None:
        """Train for an epoch, or for what is left of it."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        batches = self.dataloader.batch_sampler
        batches.epoch, batches.start = self.epoch, self.iter - self.epoch_start
        for idx, data_batch in enumerate(self.dataloader, batches.start):
            self.run_iter(idx, data_batch)
        self.runner.call_hook('after_train_epoch')
        count_epoch(self)
        self.epoch_start = self.iter


@LOOPS.register_module()
class ExactIterTrainLoop(ExactLoop, IterBasedTrainLoop):
    """MMEngine's loop over iterations, which skips the samples that were trained on without reading them."""

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, *args, **kwargs) -> None:
        if isinstance(dataloader, dict):
            dataloader = runner.build_dataloader(dataloader, runner.seed)
        # MMEngine's starts the workers here, before it is known where to go on.
        super().__init__(runner, DataLoader(dataloader.dataset), *args, **kwargs)
        self.dataloader = seed_loader(dataloader, runner.seed, endless=True)

    def run(self) -> torch.nn.Module:
        """Train from where a checkpoint was saved, or from the start.

        Raises:
            InputError: where its steps were others.
        """
        self._restore_run()
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        if self.iter and not self._is_evaluated():
            self._evaluate_if_due()
        self.dataloader.batch_sampler.start = self.iter
        batches = iter(self.dataloader)
        while self.iter < self.max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(batches))
            update_val_interval(self)
            self._evaluate_if_due()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model
