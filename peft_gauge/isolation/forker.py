"""The fork server's own process: it imports, then forks at request (`peft_gauge.isolation.fork_server`).

Run as a program, this module is the server.
"""

from __future__ import annotations

import contextlib
import ctypes
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

from peft_gauge.errors import one_line
from peft_gauge.isolation.messages import Messages
from peft_gauge.isolation.signals import kill_group

_REQUEST_SECONDS = 10.0  # so long a requester may take to send what it has begun to send
_PARENT_CHECK_SECONDS = 1.0
_THREADS = Path("/proc/self/task")
_MAPS = Path("/proc/self/maps")
_PAGEMAP = Path("/proc/self/pagemap")
_FILE_PAGE_PRESENT = 1 << 63 | 1 << 61  # two bits of a page map's entry: in memory; of a file
_POPULATE_READ = 22


def main() -> None:
    """Import the modules named on the command line, then fork until the requester lets go.

    In a forked child this returns from the server's loop, calls the child's function, and ends as a program ends.
    """
    control = Messages(socket.socket(fileno=int(sys.argv[1])))
    parent = os.getppid()
    why_not = _import(sys.argv[2:], control.connection) or _why_unsafe()
    try:
        control.send({"why_not": why_not})
    except OSError:  # nobody waits for it any more
        return
    if why_not is None:
        task = _Forker(control.connection, parent).serve()
        if task is not None:
            task()


def _import(names: Sequence[str], control: socket.socket) -> str | None:
    for name in names:
        if select.select([control], [], [], 0)[0]:  # nothing is sent before this has ended: it was closed
            sys.exit()
        try:
            importlib.import_module(name)
        except BaseException as error:  # whatever it is, a spawned process will meet it, and say so
            return f"{name} cannot be imported ahead: {type(error).__name__}: {one_line(error, 200)}"
    return None


def _why_unsafe() -> str | None:
    """Why this process cannot be forked with all that is imported; ``None`` if it can.

    A first child, which ends at once, sees whether CUDA still works in one. And OpenBLAS (numpy's, scipy's), which
    starts threads when it is loaded, ends them before a fork and starts them anew where they are needed: what is
    there after a fork is somebody else's.
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
    # A look at a GPU that is not there spoils nothing.
    if torch is not None and (torch.cuda.is_initialized() or (cuda_spoilt and torch.cuda.is_available())):
        return "CUDA was in use once the modules were imported, and would not work in a forked process"
    return _why_threads()


def _why_threads() -> str | None:
    try:
        number = len(list(_THREADS.iterdir()))
    except OSError as error:
        return f"threads cannot be counted: {error}"
    if number == 1:
        return None
    return f"{number} threads ran once the modules were imported, and only the one that forks would live on"


def _pages_of_files() -> list[tuple[int, int]]:
    """Address and length of what this process has in memory of mapped files, its libraries above all.

    A forked process has to fault them in anew, and would seem smaller than a new interpreter by all that its imports
    have read.
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
    except (OSError, ValueError):  # a sandbox without a page map: then a forked process does seem smaller
        return []
    return ranges


def _fault_in(ranges: Sequence[tuple[int, int]]) -> None:
    """Have the kernel map ``ranges`` (madvise's ``MADV_POPULATE_READ``, Linux 5.14; before, nothing comes of it)."""
    advise = ctypes.CDLL(None).madvise
    for address, length in ranges:
        advise(ctypes.c_void_p(address), ctypes.c_size_t(length), _POPULATE_READ)


@dataclass
class _Child:
    """A forked process, its requester's connection, and what to remove if that is gone first."""

    pid: int
    connection: socket.socket
    folder: str | None
    told: bool = False
    abandoned: bool = False


class _Forker:
    """Forks at request, tells how children ended, and kills those whose requester has let go."""

    def __init__(self, control: socket.socket, parent: int) -> None:
        self._control = control
        self._parent = parent
        self._children: list[_Child] = []
        self._pages = _pages_of_files()
        # Not epoll, whose list a child would share.
        self._selector = selectors.PollSelector()
        self._awake, self._waker = socket.socketpair()

    def serve(self) -> Callable[[], None] | None:
        """Until the requester lets go, or is gone; in a forked child what it is to do."""
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
        """A request's connection and its standard streams; ``None`` at the end."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, 1, 4, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:  # it is gone, and had not read all that it was told
            return None
        if not data:
            return None
        connection, *streams = descriptors
        return Messages(socket.socket(fileno=connection)), streams

    def _fork(self, messages: Messages, streams: Sequence[int]) -> Callable[[], None] | None:
        """Do what is asked over ``messages``. In the child, what it is to do; in the server ``None``."""
        with _closing(streams):
            try:
                request = messages.receive(_REQUEST_SECONDS)
            except TimeoutError:
                request = None
            if request is None:  # it was interrupted meanwhile
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
        """Make this fork of the server the process that is asked for."""
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
        # As in a new process, from the system's entropy. Python seeds its own generator anew after every fork, and
        # those of CUDA devices do not exist yet.
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
        """Tell who waits how a child ended. It is not collected before they let go: until then its pid is its own."""
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
        """The requester of ``child`` has let go of it, or is gone."""
        self._selector.unregister(child.connection)
        child.connection.close()
        if child.told:
            child.folder = None  # it is the requester's, who knows of the end
            self._collect(child)
        else:
            child.abandoned = True
            _kill(child.pid)
            self._look_for_ends()  # it may have ended by itself a moment before

    def _collect(self, child: _Child) -> None:
        _kill(child.pid)  # what it left behind: a grandchild could hold the GPU
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
    """Kill a child that is not collected yet, and its group, which it may not have founded yet."""
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
    # Here this file is the module `__main__`; whoever imports it by its name gets that one.
    from peft_gauge.isolation import forker

    forker.main()
