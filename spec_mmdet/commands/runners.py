"""MMEngine's runner as the commands run it."""

from __future__ import annotations

import logging
from pathlib import Path

from mmengine.dist import master_only
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from ..files import write
from .terminal import ImportantLogHandler


class WholeConfigRunner(Runner):
    """MMEngine's runner, whose config takes the place of an earlier run's only when it is whole."""

    @master_only
    def dump_config(self) -> None:
        """Write the config to the work directory."""
        write(Path(self.work_dir, Path(self.cfg.filename).name), self.cfg.pretty_text)


class QuietRunner(WholeConfigRunner):
    """One of whose log the terminal has what must be known."""

    def build_logger(self, *args, **kwargs) -> MMLogger:
        """MMEngine's logger, all of it in the file."""
        logger = super().build_logger(*args, **kwargs)
        logger.handlers = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
        logger.handlers.append(ImportantLogHandler())
        return logger
