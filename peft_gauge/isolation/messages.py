"""JSON messages between a fork server, its requesters and its children."""

from __future__ import annotations

import json
import socket
import time
from typing import Any


class Messages:
    """JSON values over ``connection``, one per line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._received = b""

    def send(self, message: Any) -> None:
        self.connection.settimeout(None)
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, limit_seconds: float | None = None) -> Any:
        """The next message; ``None`` if the other side has closed the connection. Raises `TimeoutError` after
        ``limit_seconds``."""
        end = None if limit_seconds is None else time.monotonic() + limit_seconds
        while b"\n" not in self._received:
            self.connection.settimeout(None if end is None else max(end - time.monotonic(), 0.001))
            try:
                part = self.connection.recv(65_536)
            except ConnectionResetError:  # it was closed with unread messages
                part = b""
            if not part:
                return None
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)
