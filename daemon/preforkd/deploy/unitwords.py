"""How words are written in units: systemd.syntax(7), systemd.unit(5), and "Command lines" of systemd.service(5)."""

import os
import re


def instance_of(name: str) -> str:
    """A name as that of an instance (systemd-escape(1))."""
    characters = [(byte, chr(byte)) for byte in os.fsencode(name)]
    plain = re.compile(r"[A-Za-z0-9:_.-]")
    return "".join(char if plain.match(char) else f"\\x{byte:02x}" for byte, char in characters)


def escaped(text: str) -> str:
    """With specifiers taken literally (systemd.unit(5))."""
    return text.replace("%", "%%")


def quoted(word: str) -> str:
    """One of several words."""
    plain = escaped(word).replace("\\", "\\\\")
    return '"' + plain.replace('"', '\\"') + '"' if re.search(r"[\s\"';\\]", word) or not word else plain


def command(*words: str) -> str:
    """A command line."""
    return " ".join(quoted(word.replace("$", "$$")) for word in words)
