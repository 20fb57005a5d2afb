"""The process of the fork server: it imports modules, then forks on request (`peft_gauge.isolation.fork_server`).

Run as a program, this module is the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import mmap
import os
import select
import selectors
import shutil
import signal
import socket
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_gauge.collector import no_collector
from peft_gauge.errors import one_line
from peft_gauge.isolation.messages import Messages
from peft_gauge.isolation.signals import kill_group

_REQUEST_SECONDS = 10.0  # time that a requester has to complete a request
_PARENT_CHECK_SECONDS = 1.0
_THREADS = Path("/proc/self/task")
_MAPS = Path("/proc/self/maps")
_PAGEMAP = Path("/proc/self/pagemap")
_FILE_PAGE_PRESENT = 1 << 63 | 1 << 61  # two bits of an entry in the page map: page in memory; page of a file
_POPULATE_READ = 22


def main() -> None:
    """Import the modules named on the command line, then fork until the requester closes the connection.

    In a forked child, the server's loop returns; the child then calls its function and exits like a program.
    """
    control = Messages(socket.socket(fileno=int(sys.argv[1])))
    parent = os.getppid()
    why_not = _import(sys.argv[2:], control.connection) or _why_unsafe()
    gc.freeze()  # imported objects are not garbage; a collection in a child need not go through them, which takes 0.3 s
    try:
        control.send({"why_not": why_not})
    except OSError:  # the requester has closed the connection
        return
    if why_not is None:
        task = _Forker(control.connection, parent).serve()
        if task is not None:
            task()


def _import(names: Sequence[str], control: socket.socket) -> str | None:
    for name in names:
        if select.select([control], [], [], 0)[0]:  # no request comes during imports, so the connection was closed
            sys.exit()
        try:
            with no_collector():
                importlib.import_module(name)
        except BaseException as error:  # a spawned process will raise the same error and report it
            return f"{name} cannot be preloaded: {type(error).__name__}: {one_line(error, 200)}"
    return None


def _why_unsafe() -> str | None:
    """Why this process cannot be forked after its imports; ``None`` if it can.

    A first child, which ends at once, tests whether CUDA still works in a child. The test is also needed before
    counting threads: OpenBLAS (in numpy and scipy) starts threads when it is loaded, but ends them before a fork.
    Threads that remain after a fork belong to other libraries.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        from peft_gauge._internals.torch import in_bad_fork
    else:

        def in_bad_fork() -> bool:
            return False

    pid = os.fork()
    if pid == 0:
        spoilt = True
        try:
            spoilt = in_bad_fork()
        finally:
            os._exit(spoilt)
    cuda_spoilt = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
    # Without a GPU, looking for one does no harm.
    if torch is not None and (torch.cuda.is_initialized() or (cuda_spoilt and torch.cuda.is_available())):
        return "importing the modules initialized CUDA, which then does not work in a forked process"
    return _why_threads()


def _why_threads() -> str | None:
    try:
        names = {int(thread.name): (thread / "comm").read_text().strip() for thread in _THREADS.iterdir()}
    except OSError as error:
        return f"cannot count threads: {error}"
    if len(names) == 1:
        return None
    others = ", ".join(sorted({name for number, name in names.items() if number != os.getpid()}))
    return f"{len(names)} threads run after importing the modules ({others}), but a forked process keeps only one"


def _pages_of_files() -> list[tuple[int, int]]:
    """Address and length of the pages of mapped files, mostly libraries, that are in this process's memory.

    A forked process does not have them mapped until it uses them. Without `_fault_in` its memory would therefore appear
    smaller than that of a new interpreter.
    """
    ranges: list[tuple[int, int]] = []
    try:
        with _MAPS.open() as lines, _PAGEMAP.open("rb", buffering=0) as pages:
            for line in lines:
                addresses, permissions, _, _, inode, *_ = line.split()
                if inode == "0" or not permissions.startswith("r"):
                    continue
                start, end = (int(address, 16) for address in addresses.split("-"))
                pages.seek(start // mmap.PAGESIZE * 8)
                entries = array("Q", pages.read((end - start) // mmap.PAGESIZE * 8))
                for number, entry in enumerate(entries):
                    if entry & _FILE_PAGE_PRESENT != _FILE_PAGE_PRESENT:
                        continue
                    address = start + number * mmap.PAGESIZE
                    if ranges and sum(ranges[-1]) == address:
                        ranges[-1] = (ranges[-1][0], ranges[-1][1] + mmap.PAGESIZE)
                    else:
                        ranges.append((address, mmap.PAGESIZE))
    except (OSError, ValueError):  # a sandbox without a page map: forked processes then appear smaller
        return []
    return ranges


def _fault_in(ranges: Sequence[tuple[int, int]]) -> None:
    """Make the kernel map ``ranges`` (``MADV_POPULATE_READ`` of ``madvise``; no effect before Linux 5.14)."""
    advise = ctypes.CDLL(None).madvise
    for address, length in ranges:
        advise(ctypes.c_void_p(address), ctypes.c_size_t(length), _POPULATE_READ)


@dataclass
class _Child:
    """A forked process, its requester's connection, and the folder to remove if the requester ends first."""

    pid: int
    connection: socket.socket
    folder: str | None
    told: bool = False
    abandoned: bool = False


class _Forker:
    """Forks on request, reports how children ended, and kills children whose requester has closed the connection."""

    def __init__(self, control: socket.socket, parent: int) -> None:
        self._control = control
        self._parent = parent
        self._children: list[_Child] = []
        self._pages = _pages_of_files()
        # Not epoll, because a child would share its state.
        self._selector = selectors.PollSelector()
        self._awake, self._waker = socket.socketpair()

    def serve(self) -> Callable[[], None] | None:
        """Serve until the requester closes the connection or ends. In a forked child, return the function to call."""
        for end in (self._awake, self._waker):
            end.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._selector.register(self._control, selectors.EVENT_READ)
        self._selector.register(self._awake, selectors.EVENT_READ)
        while os.getppid() == self._parent:
            ready = {key.fileobj for key, _ in self._selector.select(_PARENT_CHECK_SECONDS)}
            if self._awake in ready:
                with contextlib.suppress(BlockingIOError):
                    self._awake.recv(4096)
                self._look_for_ends()
            for child in [child for child in self._children if child.connection in ready]:
                self._release(child)
            if self._control in ready:
                received = self._receive()
                if received is None:
                    break
                task = self._fork(*received)
                if task is not None:
                    return task
        self._end()
        return None

    def _receive(self) -> tuple[Messages, list[int]] | None:
        """The connection and the standard streams of a request; ``None`` if the requester has closed the connection."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, 1, 4, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:  # it has ended with unread messages
            return None
        if not data:
            return None
        connection, *streams = descriptors
        return Messages(socket.socket(fileno=connection)), streams

    def _fork(self, messages: Messages, streams: Sequence[int]) -> Callable[[], None] | None:
        """Fulfill the request in ``messages``. In the child, return the function to call; in the server, ``None``."""
        with _closing(streams):
            try:
                request = messages.receive(_REQUEST_SECONDS)
            except TimeoutError:
                request = None
            if request is None:  # the requester was interrupted
                messages.connection.close()
                return None
            why_not = _why_threads()
            try:
                pid = os.fork() if why_not is None else None
            except OSError as error:
                pid, why_not = None, f"the fork server cannot fork: {error.strerror or error}"
            if pid == 0:
                return self._become(request, messages, streams)
        if pid is None:
            with contextlib.suppress(OSError):
                messages.send({"why_not": why_not})
            messages.connection.close()
            return None
        messages.connection.settimeout(None)
        self._children.append(_Child(pid, messages.connection, request["folder"]))
        self._selector.register(messages.connection, selectors.EVENT_READ)
        return None

    def _become(self, request: Mapping[str, Any], messages: Messages, streams: Sequence[int]) -> Callable[[], None]:
        """Turn this fork of the server into the requested process."""
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for end in (self._control, self._awake, self._waker, *(child.connection for child in self._children)):
            end.close()
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
        os.chdir(request["working_directory"])
        for name, value in request["variables"].items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        sys.argv[1:] = request["arguments"]
        _fault_in(self._pages)
        # Seed from the system's entropy, as in a new process. Python seeds its own generator after every fork, and
        # the generators of CUDA devices do not exist yet.
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed()
        if "torch" in sys.modules:
            sys.modules["torch"].default_generator.seed()
        messages.send({"pid": os.getpid()})
        messages.connection.close()
        module, _, name = request["target"].partition(":")
        arguments = request["arguments"]
        return lambda: getattr(importlib.import_module(module), name)(*arguments)

    def _look_for_ends(self) -> None:
        """Report ended children to their requesters. A child is not reaped before its requester closes the connection,
        so that its pid is not reused."""
        for child in list(self._children):
            ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                continue
            if child.abandoned:
                self._collect(child)
            elif not child.told:
                child.told = True
                code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                with contextlib.suppress(OSError):
                    Messages(child.connection).send({"code": code})

    def _release(self, child: _Child) -> None:
        """Handle that the requester of ``child`` has closed the connection or ended."""
        self._selector.unregister(child.connection)
        child.connection.close()
        if child.told:
            child.folder = None  # the requester, which knows of the end, removes it
            self._collect(child)
        else:
            child.abandoned = True
            _kill(child.pid)
            self._look_for_ends()  # it may have ended just before

    def _collect(self, child: _Child) -> None:
        _kill(child.pid)  # also kill grandchildren, which could still use the GPU
        os.waitpid(child.pid, 0)
        if child.folder is not None:
            shutil.rmtree(child.folder, ignore_errors=True)
        self._children.remove(child)

    def _end(self) -> None:
        for child in list(self._children):
            if child.told:
                child.folder = None
            self._collect(child)


def _kill(pid: int) -> None:
    """Kill a child that is not reaped yet, and its group, which may not exist yet."""
    os.kill(pid, signal.SIGKILL)
    kill_group(pid)


@contextlib.contextmanager
def _closing(descriptors: Sequence[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


if __name__ == "__main__":
    # This file runs as the module `__main__`; call the imported module, which other code sees.
    from peft_gauge.isolation import forker

    forker.main()
