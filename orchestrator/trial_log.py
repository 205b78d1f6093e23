"""The log of one trial: a plain file in its folder, written by its workers themselves."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOG = "log.txt"
log = logging.getLogger("codetr.trial")


@contextmanager
def trial_log(folder: Path, rank: int, world_size: int) -> Iterator[None]:
    """Append what this worker says to the trial's log: ``codetr.trial`` from rank 0, warnings of
    every library and the traceback of what is raised from all ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / LOG)
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank}  %(message)s"))
    handler.addFilter(lambda r: r.levelno >= logging.WARNING or (r.name == log.name and rank == 0))
    root, level = logging.getLogger(), log.level
    root.addHandler(handler)
    log.setLevel(logging.INFO)
    logging.captureWarnings(True)
    log.info("%s, process %d, %d worker(s)", socket.gethostname(), os.getpid(), world_size)
    try:
        yield
    except Exception:
        log.exception("ended by")
        raise
    finally:
        logging.captureWarnings(False)
        log.setLevel(level)
        root.removeHandler(handler)
        handler.close()
