"""A handler that dies, or grows, as told."""

import os
from socketserver import StreamRequestHandler


class Mortal(StreamRequestHandler):
    """Does what the line says."""

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(self.obey(*line.decode().split()))

    def obey(self, order: str, *words: str) -> bytes:
        match order:
            case "pid":
                return b"%d\n" % os.getpid()
            case "die":
                os.kill(os.getpid(), int(words[0]))
            case "os_exit":
                os._exit(int(words[0]))
            case "grow":
                ballast.append(b"x" * (int(words[0]) << 20))
                return b"grown\n"
            case "grow_and_spin":
                ballast.append(b"x" * (int(words[0]) << 20))
                while True:
                    pass
            case "spin":
                self.wfile.write(b"spinning\n")
                while True:
                    pass
            case "limits":
                cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
                return f"{os.nice(0)} {cpus} {open('/proc/self/oom_score_adj').read().strip()}\n".encode()
            case "rlimit":
                import resource

                return b"%d %d\n" % resource.getrlimit(getattr(resource, f"RLIMIT_{words[0].upper()}"))
        return b"what?\n"


ballast: list[bytes] = []
