"""How the worker processes of a DataLoader are started, and how they take signals."""

import multiprocessing
import os
import signal
import sys
import threading
from types import TracebackType
from typing import Any


def arguments_for(num_workers: int) -> dict[str, Any]:
    """
    Of a DataLoader with so many workers: their number, and what prepares and starts them.

    On Linux that is fork, unless somebody has chosen another method than Python's default. Since Python 3.14 that is
    forkserver, whose workers import PyTorch and this package anew: longer than labelling a hundred photographs takes.
    """
    arguments: dict[str, Any] = {"num_workers": num_workers, "worker_init_fn": prepare_worker}
    if num_workers and sys.platform == "linux":
        # A progress bar's lock is enough to settle for the default: nobody has chosen it.
        method = multiprocessing.get_start_method(allow_none=True)
        if method in (None, multiprocessing.get_all_start_methods()[0]):
            arguments["multiprocessing_context"] = "fork"
    return arguments


def prepare_worker(worker_id: int) -> None:
    """Worker initialiser of a DataLoader: leaves it to the main process what to do about Ctrl-C and SIGTERM."""
    # Ctrl-C and a scheduler's SIGTERM reach every process of a job. The main process alone decides what to do then,
    # and needs its workers while it saves: they end when it tells them to, or dies.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _unless_left
    if hasattr(signal, "sigwaitinfo"):
        # Before any thread is started: they take over the mask, and one without it would die with the whole worker.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()
    parent = multiprocessing.parent_process()
    if parent is not None:
        # PyTorch asks for the parent's process id instead, which under `forkserver` is the fork server's: workers of a
        # main process that was killed would stay for ever.
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _unless_left(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    # The thread that hands tensors over reports with a traceback that somebody has hung up on it. That is the main
    # process on its way out, which has said why.
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
