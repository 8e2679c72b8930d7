"""Runs CPython's own ``test.test_socketserver`` with our classes in the place of the forking and threading ones.

A program of its own, for the test module meets the substitutes while it is imported. Exit status 5 when this
interpreter ships no ``test`` package.
"""

import socketserver
import sys
import types
import unittest

import preforkd


def substitute() -> types.ModuleType:
    """A ``socketserver`` whose Forking and Threading classes are ours; on 3.11 it has two more than the original."""
    module = types.ModuleType("socketserver", socketserver.__doc__)
    vars(module).update(
        {k: v for k, v in vars(socketserver).items() if k not in ("__name__", "__spec__", "__loader__")}
    )
    for kind in ("MixIn", "TCPServer", "UDPServer", "UnixStreamServer", "UnixDatagramServer"):
        setattr(module, f"Forking{kind}", getattr(preforkd, f"PreForking{kind}"))
        setattr(module, f"Threading{kind}", getattr(preforkd, f"ThreadPool{kind}"))
    # test_all is about the module, not about the classes: what is defined elsewhere is not expected.
    module.__all__ = [  # type: ignore[attr-defined]
        name for name in socketserver.__all__ if getattr(module, name).__module__ == "socketserver"
    ]
    return module


if __name__ == "__main__":
    try:
        import test.support  # noqa: F401 - whether there is one
    except ImportError:
        sys.exit(5)
    sys.modules["socketserver"] = substitute()
    import test.test_socketserver as theirs

    suite = unittest.defaultTestLoader.loadTestsFromModule(theirs)
    result = unittest.TextTestRunner(verbosity=2).run(suite)
    sys.exit(not result.wasSuccessful() or not result.testsRun)
