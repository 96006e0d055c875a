"""The other end of sd_notify(3): what systemd would hear."""

import socket


class Listener:
    """The socket that systemd would hold, and what came."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._socket.setblocking(False)
        self.heard: list[str] = []

    def said(self, text: str) -> bool:
        """Whether any datagram so far had a line that begins like this."""
        self.listen()
        return any(line.startswith(text) for told in self.heard for line in told.splitlines())

    def listen(self) -> int:
        """How many datagrams came since last asked."""
        before = len(self.heard)
        while True:
            try:
                self.heard.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return len(self.heard) - before

    def close(self) -> None:
        self._socket.close()
