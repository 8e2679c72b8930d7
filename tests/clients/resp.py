"""A handler that speaks enough of RESP, the protocol of Redis, for redis-benchmark. It knows nothing of preforkd."""

from socketserver import StreamRequestHandler


class Resp(StreamRequestHandler):
    """PING, SET and GET; what is set is known to its connection only."""

    def handle(self) -> None:
        self.store: dict[bytes, bytes] = {}
        while words := self.read_command():
            self.wfile.write(self.answer(*words))

    def read_command(self) -> list[bytes]:
        """An array of bulk strings, or words in a line; nothing at the end of the connection."""
        line = self.rfile.readline()
        return [self.read_bulk() for _ in range(int(line[1:]))] if line.startswith(b"*") else line.split()

    def read_bulk(self) -> bytes:
        length = int(self.rfile.readline()[1:])
        return self.rfile.read(length + 2)[:length]

    def answer(self, command: bytes, *words: bytes) -> bytes:
        match command.upper(), *words:
            case (b"PING",):
                return b"+PONG\r\n"
            case b"SET", key, value:
                self.store[key] = value
                return b"+OK\r\n"
            case b"GET", key:
                found = self.store.get(key)
                return b"$-1\r\n" if found is None else b"$%d\r\n%b\r\n" % (len(found), found)
            case b"CONFIG", _, name:  # redis-benchmark shows them
                return b"*2\r\n$%d\r\n%b\r\n$0\r\n\r\n" % (len(name), name)
        return b"-ERR unknown command\r\n"
