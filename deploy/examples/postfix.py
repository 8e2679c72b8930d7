"""A policy and a table for Postfix."""

from socketserver import StreamRequestHandler

OURS = "@example.test"
TABLES = {
    "aliases": {
        "info@example.test": "ann@example.test, bob@example.test",
        "postmaster@example.test": "ann@example.test",
    }
}


class Policy(StreamRequestHandler):
    """Whoever sends in our name must have logged in. A question is lines of name=value, and then an empty one."""

    def handle(self):
        question = {}
        for line in self.rfile:
            name, equals, value = line.decode(errors="replace").rstrip("\r\n").partition("=")
            if equals:
                question[name] = value
            elif not name:
                self.wfile.write(f"action={self.decide(question)}\n\n".encode())
                question = {}

    def decide(self, question):
        if question.get("sender", "").lower().endswith(OURS) and not question.get("sasl_username"):
            return "REJECT log in to send mail from here"
        return "DUNNO"


class Socketmap(StreamRequestHandler):
    """A question is a netstring: the name of a table, a blank, and the key."""

    def handle(self):
        while (question := self.read()) is not None:
            table, _, key = question.decode(errors="replace").partition(" ")
            self.wfile.write(self.netstring(self.look_up(table, key).encode()))

    def read(self):
        length = b""
        while (byte := self.rfile.read(1)) != b":":
            if not byte.isdigit() or len(length) == 6:
                return None  # the end, or not a netstring
            length += byte
        body = self.rfile.read(int(length or b"0") + 1)
        return body[:-1] if body.endswith(b",") else None

    @staticmethod
    def netstring(body):
        return b"%d:%b," % (len(body), body)

    @staticmethod
    def look_up(table, key):
        if table not in TABLES:
            return f"PERM no table {table}"
        found = TABLES[table].get(key.lower())
        return "NOTFOUND " if found is None else f"OK {found}"
