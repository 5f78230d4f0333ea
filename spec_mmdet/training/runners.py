"""MMEngine's runner with the commands' logging and atomic writing of the config."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

from mmengine.dist import master_only
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import nn

from ..files import write
from .terminal import ImportantLogHandler

_numbers = itertools.count()

# Names of MMEngine's default hooks, which it registers if a config does not name them.
DEFAULT_HOOKS = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')


class WholeConfigRunner(Runner):
    """MMEngine's runner that writes its config atomically and has its own visualiser."""

    def build_visualizer(self, visualizer: Visualizer | dict | None = None) -> Visualizer:
        """Build the visualiser with a new name; for a known name MMEngine would return that of an earlier run."""
        if isinstance(visualizer, dict):
            visualizer = dict(visualizer, name=f'{visualizer.get("name", "visualizer")}_{next(_numbers)}')
        return super().build_visualizer(visualizer)

    @master_only
    def dump_config(self) -> None:
        """Do nothing: :meth:`train` and :meth:`test` write the config."""

    @master_only
    def _write_config(self, folder: str) -> None:
        write(Path(folder, Path(self.cfg.filename).name), self.cfg.pretty_text)

    def train(self) -> nn.Module:
        """Train, after writing the config to the work directory."""
        self._write_config(self.work_dir)
        return super().train()

    def test(self) -> dict[str, float]:
        """Test, after writing the config next to the log, so that a training's config is not overwritten."""
        self._write_config(self.log_dir)
        return super().test()

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Register the default hooks; None turns any of them off."""
        hooks = {name: hook for name, hook in (hooks or {}).items() if hook is not None or name in DEFAULT_HOOKS}
        super().register_default_hooks(hooks)


class QuietRunner(WholeConfigRunner):
    """Runner that shows only important log records in the terminal; the file gets everything."""

    def build_logger(self, *args, **kwargs) -> MMLogger:
        """Build MMEngine's logger, and replace its handler for the terminal."""
        logger = super().build_logger(*args, **kwargs)
        logger.handlers = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
        logger.handlers.append(ImportantLogHandler())
        return logger
