"""Training loops that resume exactly where they were stopped.

All random numbers are functions of the seed and of a position: of the sample in its epoch for the data pipeline, of the
iteration for the model. They do not depend on earlier ones, so no generator state has to be saved. Positions are
counted over all processes: two processes draw in one iteration what a single one draws in two.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from itertools import count
from pathlib import Path

import numpy as np
import torch
from mmdet.registry import LOOPS
from mmengine.dist import broadcast, get_rank, get_world_size, is_main_process
from mmengine.hooks import EarlyStoppingHook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from ..compat import count_accumulated_batches, count_epoch, update_val_interval
from ..errors import InputError
from ..models.products import CHOSEN, choose_kernels, describe_setting, restore_kernels
from ..processes import decide_on_main
from .saving import EVALUATED, count_progress, unwrap_model

SAMPLE, ITERATION = range(2)  # the two kinds of positions, so that their seeds differ


def seed_all(*place: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch with the numbers of a position in the training."""
    words = np.random.SeedSequence(place).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    # For generators of CUDA that are not there yet, torch.manual_seed formats the calling stack, 0.2 ms and more.
    seed = torch.manual_seed if torch.cuda.is_initialized() else torch.default_generator.manual_seed
    seed(int(words[2]) << 32 | int(words[3]))


class SeededDataset:
    """Data set wrapper: the key (index, place) returns the sample ``index`` with the random numbers of ``place``."""

    def __init__(self, dataset: Sized) -> None:
        vars(self)['dataset'] = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, tuple[int, ...]]) -> object:
        index, place = key
        seed_all(SAMPLE, *place)
        return self.dataset[index]

    def __getattr__(self, name: str) -> object:
        if name == 'dataset':  # during unpickling
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.dataset, name, value)  # some hooks change the pipeline


def keeps_state(dataset: SeededDataset) -> bool:
    """Return whether an image depends on those before it, although all random numbers are the same.

    Examples are CachedMosaic and CachedMixUp, which keep images, and Albu, which has its own random numbers.
    """
    keys = [(index, (0, 0, index)) for index in range(min(3, len(dataset)))]
    before, after = ([get_image(dataset[key]) for key in keys] for _ in range(2))
    return any(a is not None and not torch.equal(a, b) for a, b in zip(before, after))


def get_image(sample: object) -> torch.Tensor | None:
    """Return the image of a sample; None if it is not a single tensor."""
    image = sample.get('inputs') if isinstance(sample, dict) else None
    return image if isinstance(image, torch.Tensor) else None


class SeededBatches:
    """Batch sampler that adds a position to each index, and starts at batch ``start``.

    Args:
        batches: the batch sampler of the indices.
        seed: the run's seed.
        endless: whether to start again at the end of an epoch.
    """

    def __init__(self, batches: object, seed: int, endless: bool = False) -> None:
        self.batches, self.seed, self.endless = batches, seed, endless
        self.epoch = self.start = 0

    @property
    def sampler(self) -> object:
        """The sampler, on which MMEngine sets the epoch."""
        return self.batches.sampler

    @property
    def batch_size(self) -> int:
        """The batch size."""
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
    """Return a copy of a loader whose random numbers depend on positions.

    Raises:
        InputError: if it has no batch.
    """
    if not len(loader):
        raise InputError(
            f'train_dataloader: {len(loader.dataset)} images are fewer than a batch of '
            f'{loader.batch_sampler.batch_size} per process, and drop_last=True leaves them out. Use a smaller '
            '--batch-size, or --cfg-options train_dataloader.drop_last=False'
        )
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
    """Mixin that makes MMEngine's loops resume exactly.

    A run that is resumed with the same data and total batch size ends with the weights of an uninterrupted run. They
    are bit-identical if the number of processes is the same and the arithmetic is deterministic, as on a CPU. An
    interrupted evaluation is run again.

    Attributes:
        resumed_from: the meta of the checkpoint that is resumed.
    """

    resumed_from: dict = {}

    @property
    def step_settings(self) -> dict[str, int]:
        """The settings that define an optimiser step, independent of the number of processes."""
        batch = self.dataloader.batch_sampler.batches.batch_size
        return {
            'images': len(self.dataloader.dataset),
            'images an iteration': batch * get_world_size(),  # these names are stored in checkpoints
            'iterations a step': count_accumulated_batches(self.runner.optim_wrapper),
        }

    def _restore_run(self, may_differ: tuple[str, ...] = ()) -> None:
        """Restore seed, kernels and early stopping of the resumed run; raise InputError if ``step_settings`` differ."""
        if is_main_process() and keeps_state(self.dataloader.dataset):
            self.runner.logger.warning(
                'the training data depends on the images before (CachedMosaic, CachedMixUp and Albu do this), so a '
                'resumed training will not be bit-identical to one that was never stopped'
            )
        for hook in self._list_early_stopping() if self.resumed_from else ():
            history = self.runner.message_hub.log_scalars.get(f'val/{hook.monitor}')
            for score in history.data[0] if history else ():
                hook.after_val_epoch(self.runner, {hook.monitor: float(score)})
        theirs, ours = self.resumed_from.get('steps', {}), self.step_settings
        if not isinstance(theirs, dict) or any(type(number) is not int for number in theirs.values()):
            raise InputError('the checkpoint: its "steps" are not numbers. Use a checkpoint that train wrote')
        for what in ours.keys() & theirs.keys() - set(may_differ):
            if ours[what] != theirs[what]:
                raise InputError(
                    f'the checkpoint is from a training with {theirs[what]} {what} instead of {ours[what]}. Resume '
                    'with the same data, optim_wrapper.accumulative_counts and total batch size '
                    '(train_dataloader.batch_size times processes), or start a new training from its weights with '
                    '--cfg-options load_from=FILE'
                )
        restore_kernels(self.resumed_from.get('products', {}))
        if next(unwrap_model(self.runner).parameters()).device.type == 'cpu':
            # Now, so that all processes use the same kernels, and the first checkpoint contains them.
            CHOSEN[describe_setting(torch.float32)] = decide_on_main(lambda: choose_kernels(torch.float32))
        stated = (self.runner.cfg.get('randomness') or {}).get('seed')
        if stated not in (None, self.runner.seed):
            self.runner.logger.warning(f'randomness.seed {stated} is not used: a resumed training keeps its seed')
        done, all_of_it = (self.epoch, self.max_epochs) if self.epoch else (self.iter, self.max_iters)
        if self.resumed_from and done >= all_of_it:
            self.runner.logger.warning(f'nothing is left to train: the checkpoint has done {done} of {all_of_it}')
        batches = self.dataloader.batch_sampler
        batches.seed = self.runner.seed
        if hasattr(batches.sampler, 'seed'):
            batches.sampler.seed = self.runner.seed

    def _list_early_stopping(self) -> list[EarlyStoppingHook]:
        return [hook for hook in self.runner.hooks if isinstance(hook, EarlyStoppingHook)]

    def _is_evaluated(self) -> bool:
        record, done = Path(self.runner.work_dir, EVALUATED), count_progress(self.runner)
        known = record.is_file() and record.read_text() == str(done)
        if self._list_early_stopping():  # needs the result, which checkpoints contain if they were saved afterwards
            known = self.runner.message_hub.runtime_info.get(EVALUATED) == done
        known = torch.tensor(int(known))
        broadcast(known)  # the first process decides
        return bool(known)

    def _evaluate_if_due(self) -> None:
        done, last = (self.epoch, self.max_epochs) if self.epoch else (self.iter, self.max_iters)
        due = done >= self.val_begin and (done % self.val_interval == 0 or done == last)
        if self.runner.val_loop is not None and due:
            self.runner.val_loop.run()

    def run_iter(self, *args) -> None:
        """Train for one iteration with its own random numbers."""
        seed_all(ITERATION, self.runner.seed, self.iter * get_world_size() + get_rank())
        super().run_iter(*args)


@LOOPS.register_module()
class ExactEpochTrainLoop(ExactLoop, EpochBasedTrainLoop):
    """MMEngine's loop over epochs that can also resume within an epoch.

    Attributes:
        epoch_start: the first iteration of the epoch.
    """

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, *args, **kwargs) -> None:
        super().__init__(runner, dataloader, *args, **kwargs)
        self.dataloader = seed_loader(self.dataloader, runner.seed)
        self.epoch_start = 0

    def run(self) -> torch.nn.Module:
        """Train from the position of the resumed checkpoint, or from the start.

        Raises:
            InputError: if the checkpoint's ``step_settings`` differ.
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
        """Train for the rest of an epoch."""
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
    """MMEngine's loop over iterations that, when resuming, skips used samples without reading them."""

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, *args, **kwargs) -> None:
        if isinstance(dataloader, dict):
            dataloader = runner.build_dataloader(dataloader, runner.seed)
        # MMEngine's constructor starts the workers of its loader, before the position is known.
        super().__init__(runner, DataLoader(dataloader.dataset), *args, **kwargs)
        self.dataloader = seed_loader(dataloader, runner.seed, endless=True)

    def run(self) -> torch.nn.Module:
        """Train from the position of the resumed checkpoint, or from the start.

        Raises:
            InputError: if the checkpoint's ``step_settings`` differ.
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
