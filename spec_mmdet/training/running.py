"""Run a training: check its inputs, choose its checkpoint, build its runner, and explain its errors in one line."""

from __future__ import annotations

import copy
import errno
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from mmdet.models import FCNMaskHead
from mmdet.registry import MODELS, OPTIM_WRAPPERS, RUNNERS
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import get_world_size
from mmengine.optim import AmpOptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from ..checkpoints.reading import fetch, get_classes, load, verify_checkpoint
from ..configs import is_kind_of, walk
from ..data.fitting import drop_pretrained
from ..data.tasks import find_task
from ..errors import InputError
from ..processes import decide_on_main, leave_group, tell
from .guards import end_workers
from .resume import explain_resume_errors, find_newest_checkpoint, lock_folder, require_no_checkpoints
from .runners import QuietRunner, WholeConfigRunner
from .saving import stop_on_signals
from .terminal import Terminal

RESUME = 'Fix this, then continue from the last checkpoint with --resume'
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
# Parts of the messages of PyTorch (OutOfMemoryError, AcceleratorError), cuBLAS, cuDNN and NCCL.
OUT_OF_MEMORY = re.compile('out of memory|ALLOC(ATION)?_FAILED|DefaultCPUAllocator')
# Parts of PyTorch's messages about faults outside the program or of the input, and their meaning.
TROUBLES = {
    'DataLoader worker': 'a data-loader worker died, often for lack of memory or shared memory (check df /dev/shm; use '
    'docker run --shm-size=8g or --cfg-options train_dataloader.num_workers=0)',
    'DataLoader timed out': 'no data-loader worker has sent a batch within the time limit, because a disk does not '
    'answer or a process is stopped',
    'Timed out waiting': 'another process has not answered within env_cfg.dist_cfg.timeout: it hangs, or has ended',
    'Connection closed by peer': 'another process has ended',
    'Connection reset by peer': 'another process has ended',
    'Operation timed out': 'another process has not answered for 10 minutes: it hangs, or has ended',
    'Watchdog caught collective operation timeout': 'another process has not answered within '
    'env_cfg.dist_cfg.timeout: it hangs, or has ended',
    'NCCL communicator was aborted': 'another process hangs, or has ended',
    'remote process exited': 'another process has ended, or the network to it has failed',
    'selected index k out of range': 'the images have fewer positions than the detector has queries. Use larger images '
    'or a smaller model.num_queries',
    'inconsistent with step sign': 'MMDetection cannot draw masks of boxes outside of the image on a CPU. Train '
    'longer, or use a GPU',
    'Index put requires the source and destination dtypes': 'this detector has no mixed precision. Train without --amp',
    'NCCL error': 'the GPUs cannot exchange data (NCCL_DEBUG=INFO shows why)',
}


def adapt_to_data(cfg: Config, loops: Sequence[str], classes: Sequence[str] | None, thorough: bool = True) -> None:
    """Check in the main process the data that a run reads, and adapt the config to it; changes ``cfg``.

    Args:
        cfg: the complete config.
        loops: loops of the run, of 'train', 'val' and 'test'; the first one's data set defines the classes.
        classes: the required classes, if known.
        thorough: whether to check each annotation and image.
    """

    task = find_task(cfg)
    adapted = copy.deepcopy(cfg)
    found = decide_on_main(lambda: task.adapt(adapted, loops, classes, True, thorough))
    task.adapt(cfg, loops, found, False, thorough)


def require_complete_models(cfg: Config) -> None:
    """Raise InputError if a config shards the model (FSDP, DeepSpeed), whose checkpoints one process cannot write."""
    wrapper = str((cfg.get('model_wrapper_cfg') or {}).get('type'))
    if 'strategy' in cfg or 'FullySharded' in wrapper:
        setting = 'strategy' if 'strategy' in cfg else f'model_wrapper_cfg.type={wrapper}'
        raise InputError(
            f'{setting}: sharded models are not supported. Remove it; to save memory, use --cfg-options '
            'model.backbone.with_cp=True'
        )


def set_precision(cfg: Config, amp: bool) -> None:
    """Set mixed precision if wanted, and float32 without a GPU, as MMEngine requires one; changes ``cfg``."""
    if amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    if is_kind_of(cfg.optim_wrapper, OPTIM_WRAPPERS, AmpOptimWrapper) and get_device() == 'cpu':
        tell('no GPU: training uses float32 instead of mixed precision')
        cfg.optim_wrapper.type = 'OptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            cfg.optim_wrapper.pop(key, None)


def set_normalisation(cfg: Config) -> None:
    """Replace SyncBN by BN in several processes without a GPU, where PyTorch has no SyncBN; changes ``cfg``."""
    if get_world_size() == 1 or get_device() != 'cpu':
        return
    found = [node for _, node in walk(cfg.model) if is_kind_of(node, MODELS, nn.SyncBatchNorm)]
    if found:
        tell('no GPU: BN instead of SyncBN, so in training each process uses the statistics of its own images')
    for node in found:
        node['type'] = 'BN'


def scale_learning_rate(cfg: Config) -> None:
    """Make the runner scale the learning rate by the total batch size; changes ``cfg``.

    Raises:
        InputError: if the config does not define the batch size that its learning rate assumes.
    """
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        raise InputError('--auto-scale-lr: the config has no auto_scale_lr.base_batch_size, the total batch size that '
                         'its learning rate assumes. Set it with --cfg-options')  # fmt: skip
    cfg.auto_scale_lr.enable = True


def order_channels_last(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a mask head's inputs with their channels last, which saves a CPU a third of the head's time."""
    return inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:]


def build_runner(cfg: Config, terminal: Terminal | None = None) -> Runner:
    """Build MMEngine's runner, or the config's own.

    Args:
        cfg: the complete config; changed.
        terminal: an entered :class:`Terminal` that shows the run; by default the complete log is shown.
    """
    set_normalisation(cfg)
    kind = WholeConfigRunner if terminal is None else QuietRunner
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else kind.from_cfg(cfg)
    for module in runner.model.modules():
        if isinstance(module, FCNMaskHead) and next(module.parameters()).device.type == 'cpu':
            module.register_forward_pre_hook(order_channels_last)
    if terminal is not None:
        terminal.attach(runner)
    return runner


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn known runtime errors into one-line InputErrors, and leave the process group at the end."""
    logging.raiseExceptions = False  # on a full disk, every log record would print a traceback
    try:
        yield
    except InputError as error:  # one from a loader's worker contains that process's traceback
        raise InputError(str(error).rpartition('InputError: ')[2].removesuffix(r'\n')) from error
    except (RuntimeError, MemoryError) as error:
        first = str(error).partition('\n')[0]
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            raise InputError(
                f'out of memory ({first}). Add to --cfg-options: model.backbone.with_cp=True (recomputes activations '
                'instead of keeping them; possible with --resume) or, for a new training, '
                'train_dataloader.batch_size=1 optim_wrapper.accumulative_counts=2 (accumulates the same step from '
                'smaller batches)'
            ) from error
        for part, meaning in TROUBLES.items():
            if part in str(error):
                raise InputError(f'{meaning} ({first}). {RESUME}') from error
        raise
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        name = error.filename or 'a file of the run'
        raise InputError(f'{name}: could not be written ({error.strerror}). {RESUME}') from error
    except SystemExit:
        leave_group()
        raise
    leave_group()


def train(
    cfg: Config,
    adapt: Callable[[list[str] | None], None],
    resume: str | None = None,
    amp: bool = False,
    auto_scale_lr: bool = False,
    verbose: bool = False,
    save_on_signals: bool = True,
) -> None:
    """Train from the start or from a checkpoint; all processes call this function.

    Args:
        cfg: the complete config; changed.
        adapt: function that checks the data and sets the classes in the config, given those of the checkpoint or None.
        resume: a checkpoint, or 'auto' for the newest intact one in the work directory.
        amp: whether to train in mixed precision.
        auto_scale_lr: whether to scale the learning rate by the total batch size.
        verbose: whether to show the whole log.
        save_on_signals: whether the config's checkpoint hook saves and stops on SIGTERM and SIGINT.

    Raises:
        InputError: if an input is invalid, or the training fails for a known reason.
    """
    work = Path(cfg.work_dir)

    def choose() -> tuple[str | None, list[str] | None]:
        """Return the checkpoint to resume from and its classes."""
        require_complete_models(cfg)
        if resume is None:
            require_no_checkpoints(work, cfg)
        chosen = find_newest_checkpoint(work, cfg) if resume == 'auto' else resume
        if not chosen:
            if cfg.get('load_from'):
                verify_checkpoint(cfg.load_from)  # a new training may have other classes
            return None, None
        # find_newest_checkpoint has verified its choice.
        content = load(chosen, mmap=True) if resume == 'auto' else verify_checkpoint(chosen, resume=True)
        return str(chosen), get_classes(content)

    chosen, classes = decide_on_main(choose)
    if chosen:
        if cfg.get('load_from'):
            print(f'load_from {cfg.load_from} is not used, because the training is resumed')
        cfg.resume, cfg.load_from = True, fetch(chosen)
        drop_pretrained(cfg.get('model'))  # the files may be gone
    elif cfg.get('load_from'):
        cfg.load_from = fetch(cfg.load_from)
    adapt(classes)
    set_precision(cfg, amp)
    if auto_scale_lr:
        scale_learning_rate(cfg)
    setup_cache_size_limit_of_dynamo()
    terminal = None if verbose else Terminal()
    signals = stop_on_signals() if save_on_signals else nullcontext()
    with ExitStack() as lock, one_line_errors(), signals, terminal or nullcontext():
        decide_on_main(lambda: lock.enter_context(lock_folder(work)))
        runner = build_runner(cfg, terminal)
        explain_resume_errors(runner)
        try:
            runner.train()
        finally:
            end_workers(runner)
