"""The files of ``systemd/`` as they are shipped, installed in the private systemd, and instances of them.

The units run the venv /opt/preforkd, see nothing of /root or /home, and nothing of the /tmp that we see: so Python, the
sources and what they need are mounted below /opt, and the venv is made of them.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import preforkd
import preforkd_workers
from tests.conftest import TARGETS
from tests.systemd.unit import Service, systemctl

SHIPPED = Path(__file__).parents[2] / "systemd"
UNITS = Path("/etc/systemd/system")
PROGRAMS = Path("/opt/preforkd/bin")
SOURCES = Path("/opt/sources")  # the handlers of the tests among them
ETC = Path("/etc/preforkd")

ADDRESS = ("127.0.0.1", 9000)  # of the instance under test
_WEB = """
metrics = "tcp://127.0.0.1:9109"
[services.web]
target = "{target}"
listen = ["tcp://127.0.0.1:9000"]
probation = 0
"""

_PYTHON, _LIBRARIES = Path("/opt/python"), Path("/opt/libraries")
_SCRIPT = "#!{python}\nimport sys\nfrom preforkd.{module} import main\nsys.exit(main())\n"


def install() -> None:
    """What an administrator does on a machine of his, and the mounts before it."""
    _make_venv()
    places = {"sysusers": "/etc/sysusers.d", "tmpfiles": "/etc/tmpfiles.d"}
    for unit in ("preforkd@.service", "preforkd@.socket"):
        shutil.copy(SHIPPED / unit, UNITS)
    for kind, place in places.items():
        os.makedirs(place, exist_ok=True)
        shutil.copy(SHIPPED / f"preforkd.{kind}", f"{place}/preforkd.conf")
    for command in (["systemd-sysusers"], ["systemd-tmpfiles", "--create", "/etc/tmpfiles.d/preforkd.conf"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        complaints = [line for line in done.stderr.splitlines() if not line.startswith("Creating ")]
        assert (done.returncode, complaints) == (0, [])
    systemctl("daemon-reload")


def _make_venv() -> None:
    ours = {str(Path(str(each.__file__)).parents[1]): SOURCES / each.__name__ for each in (preforkd, preforkd_workers)}
    imported = {sysconfig.get_path("purelib"): _LIBRARIES, **ours}
    for source, place in {sys.base_prefix: _PYTHON, str(TARGETS.parent): SOURCES / "tests", **imported}.items():
        place.mkdir(parents=True)
        subprocess.run(["mount", "--bind", source, place], check=True)
    # A Python that was built to be where it is finds its own library by that; here it is elsewhere.
    Path("/etc/ld.so.conf.d/python.conf").write_text(f"{_PYTHON}/lib\n")
    subprocess.run(["ldconfig"], check=True, capture_output=True)
    packages = PROGRAMS.parent / f"lib/python{sysconfig.get_python_version()}/site-packages"
    packages.mkdir(parents=True)
    (packages / "all.pth").write_text("".join(f"{place}\n" for place in imported.values()))
    PROGRAMS.mkdir()
    (PROGRAMS / "python").symlink_to(_PYTHON / f"bin/python{sysconfig.get_python_version()}")
    (PROGRAMS.parent / "pyvenv.cfg").write_text(f"home = {_PYTHON}/bin\ninclude-system-site-packages = false\n")
    for program, module in (("preforkd", "__main__"), ("preforkctl", "ctl")):
        (PROGRAMS / program).write_text(_SCRIPT.format(python=PROGRAMS / "python", module=module))
        (PROGRAMS / program).chmod(0o755)


def web(name: str = ":Upper", *more: str) -> str:
    """Settings with a service and the exporter. ``:name`` is a target of ``targets.py``; ``more`` lines of it."""
    lines = _WEB.format(target=target(name[1:]) if name.startswith(":") else name)
    return "\n".join([lines, *more, ""])


def target(name: str, file: str = "targets.py") -> str:
    """A handler of the tests, where the units see it."""
    return f"{SOURCES}/tests/{file}:{name}"


def drop_in(unit: str, section: str = "Service", **changes: str) -> None:
    """Change a unit, as systemctl edit does. A value of several lines gives the key several times."""
    directory = UNITS / f"{unit}.d"
    directory.mkdir(exist_ok=True)
    lines = [f"{key}={value}" for key, values in changes.items() for value in values.split("\n")]
    (directory / f"{section}.conf").write_text("\n".join([f"[{section}]", *lines, ""]))


class Instance(Service):
    """preforkd@web as installed, with these settings. ``changes``: of its unit, what the test cannot do without."""

    def __init__(self, settings: str, *, start: bool = True, **changes: str) -> None:
        super().__init__("preforkd@web.service", start=start)
        install()
        self.write(settings)
        drop_in(self.name, **changes)

    def write(self, settings: str) -> None:
        """Have it say so at the next start, or reload."""
        (ETC / "web.toml").write_text(settings)
        (ETC / "web.toml").chmod(0o644)

    def ctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        """preforkctl web WORDS, as root types it."""
        return subprocess.run(
            [str(PROGRAMS / "preforkctl"), "web", *words], capture_output=True, text=True, check=False
        )
