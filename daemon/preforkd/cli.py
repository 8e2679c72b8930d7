"""The command line: ``preforkd serve``, ``check``, ``settings``, ``deploy`` and ``supervisor``."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence

from preforkd import __version__, log, settings
from preforkd.exits import Exit
from preforkd.sources import EXPORTER, Checked, Faults, Value, check, from_environment, from_file, from_pairs
from preforkd.upgrade import PROOF, Handed
from preforkd.wakeup import release
from preforkd_workers.spec import MODULE, is_script

SAMPLE_TARGET = "preforkd_workers.samples:Upper"
SAMPLE_LISTEN = "tcp://127.0.0.1:9999"
SAMPLE_METRICS = "tcp://127.0.0.1:9109"

# The settings that have an option of their own: its value, and its help.
FLAGS = {
    "handler": ("NAME", "the handler of a server class"),
    "kind": ("KIND", "kind of worker: process, thread or gevent"),
    "threads": ("N", "of each worker of kind thread"),
    "greenlets": ("N", "of each worker of kind gevent"),
    "max_children": ("N", "workers of each service"),
    "metrics": ("URL", "serve Prometheus metrics there"),
    "control": ("PATH", "path of the control socket"),
    "ready_fd": ("N", "write a newline to this descriptor when ready"),
}


def flag_of(key: str) -> str:
    """The option of a setting."""
    return f"--{key.replace('_', '-')}"


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    if arguments[:1] == ["supervisor"]:
        from preforkd.supervisor import listener

        return listener.main(arguments[1:])
    handed = Handed.take(os.environ)
    parser = _parser(for_deploy=arguments[:1] == ["deploy"])
    ours, theirs = split(arguments)
    options = parser.parse_args(ours)
    if options.command == "settings":
        return _show(settings.reference())
    if options.module is not None and options.target:
        parser.error("give either TARGET or -m MODULE")
    options.target = options.target if options.module is None else f"{MODULE}{options.module}"
    options.args = theirs
    if options.config is not None and (options.target or options.listen):
        parser.error("-c FILE names targets and addresses: give either it, or TARGET and --listen")
    if options.command == "serve" and handed is not None:
        from preforkd.serve import resume

        return resume(handed, lambda: _checked(options), _watched(options))
    if options.command == "deploy":
        from preforkd.deploy.command import deploy

        return deploy(options, lambda: _checked(options))
    try:
        checked = _checked(options)
    except Faults as faults:
        _complain(faults.lines)
        return Exit.SETTINGS
    if not sys.platform.startswith("linux"):
        _complain(["needs Linux 5.10 or newer, this is " + sys.platform])
        return Exit.SYSTEM
    if options.dev:
        from preforkd import dev

        if not dev.is_possible():
            _complain([dev.MISSING])
            return Exit.SYSTEM
    if options.command == "check":
        release(signal.valid_signals())
        return _check(checked) if options.state_fd is None else _rehearse(checked, options.state_fd)
    from preforkd.serve import serve

    if not (options.target or options.config):
        log.event("sample", target=SAMPLE_TARGET, advice="for your own: preforkd serve TARGET --listen URL")
    return serve(checked, lambda: _checked(options), _watched(options))


def _show(text: str) -> Exit:
    try:
        print(text, flush=True)  # noqa: T201 - what the command is for
    except BrokenPipeError:  # nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return Exit.SYSTEM
    return Exit.STOPPED


def _check(checked: Checked) -> Exit:
    from preforkd.check import check_targets

    return check_targets(checked)


def _rehearse(checked: Checked, state_fd: int) -> Exit:
    """Find out whether we could take over from a daemon that runs, in a child of it."""
    from preforkd import handover, serve  # noqa: F401 - all that the successor needs

    try:
        state = handover.read(state_fd)
    except ValueError as fault:
        _complain([f"{sys.executable}, preforkd {__version__}: {fault}; restart the daemon instead"])
        return Exit.SYSTEM
    found = _check(handover.with_stand_ins(checked, state))
    if found is Exit.STOPPED:
        print(PROOF, flush=True)  # noqa: T201 - for the daemon
    return found


def _watched(options: argparse.Namespace) -> list[str] | None:
    """The files to watch beside the sources, in dev mode; None in any other."""
    return [options.config] * bool(options.config) if options.dev else None


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our part of a command line, and the arguments of the script: all that comes after its name, or after ``--``."""
    rest = iter(enumerate(arguments[1:], 1))
    for at, word in rest:
        if word.startswith("-m") or (not word.startswith("-") and is_script(word)):
            end = at + 1 + (word == "-m")
            theirs = [*arguments[end:]]
            return [*arguments[:end]], theirs[1:] if theirs[:1] == ["--"] else theirs
        if _takes_next(word):
            next(rest, None)
    return [*arguments], []


def _takes_next(word: str) -> bool:
    """Whether the next word of the command line is the value of this one."""
    if word.startswith("--"):
        return "=" not in word and not any(flag.startswith(word) for flag in ("--dev", "--help", "--force"))
    return word == "-c"


def _complain(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"preforkd: {line}", file=sys.stderr)  # noqa: T201 - the log is not open yet


def _parser(*, for_deploy: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="preforkd", description="Run a socketserver handler, unmodified, as a production daemon."
    )
    parser.add_argument("--version", action="version", version=f"preforkd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="serve|check|settings|deploy|supervisor")
    serve = commands.add_parser("serve", help="run the services in the foreground, until a signal stops them")
    serve.add_argument("--dev", action="store_true", help="reload when a source of the target is saved")
    checked = commands.add_parser("check", help="check the settings and import the targets, but serve nothing")
    checked.add_argument("--dev", action="store_true", help=argparse.SUPPRESS)  # from a daemon in dev mode
    checked.add_argument("--state-fd", type=int, help=argparse.SUPPRESS)  # from a daemon that wants to upgrade
    commands.add_parser("settings", help="print the reference of all settings")
    commands.add_parser("supervisor", help="listener: what stands beside supervisord")  # dispatched before we are asked
    files = commands.add_parser("deploy", help="print the files for systemd, supervisord or Prometheus, or write them")
    fitted = []
    if for_deploy:
        from preforkd.deploy.command import add_commands

        fitted = add_commands(files)
    for command in (serve, checked, *fitted):
        command.usage = "%(prog)s [OPTION ...] [TARGET | SCRIPT [ARG ...] | -m MODULE [-- ARG ...] | -c FILE]"
        _add_options(command, "files as they are shipped" if command in fitted else "a sample")
    return parser


def _add_options(command: argparse.ArgumentParser, without: str) -> None:
    add = command.add_argument
    add(
        "target",
        nargs="?",
        metavar="TARGET",
        help="module:name or path/to/file.py:name; or a script, path/to/file.py, and then its arguments; "
        f"without it and without -c, {without}",
    )
    add("-m", dest="module", metavar="MODULE", help="a module to run, as python -m does, and then its arguments")
    add("-c", "--config", metavar="FILE", help="settings in TOML, instead of TARGET")
    add(
        "--listen",
        action="append",
        metavar="URL",
        default=[],
        help="tcp://, udp://, unix:, unix-dgram: or fd: (repeatable)",
    )
    for key, (metavar, help_text) in FLAGS.items():
        add(flag_of(key), metavar=metavar, help=help_text)
    add("--set", action="append", metavar="KEY=VALUE", default=[], dest="pairs", help="any other setting (repeatable)")


def _checked(options: argparse.Namespace) -> Checked:
    """The settings of this command line. Raises Faults."""
    faults: list[str] = []
    if options.config is not None:
        name = os.path.basename(options.config).removesuffix(".toml")
        values, faults = from_file(options.config)
        own: list[Value] = []
    else:
        target = options.target or SAMPLE_TARGET
        name = service_name(target)
        values, own = [Value("TARGET", name, "target", target)], []
        if options.args:
            values.append(Value("TARGET", name, "args", options.args))
        listen = options.listen or ([] if options.target else [SAMPLE_LISTEN])
        if listen:
            own.append(Value("--listen", name, "listen", listen))
        if not options.target:
            values.append(Value("metrics", None, "metrics", SAMPLE_METRICS))
    given = [(key, getattr(options, key)) for key in FLAGS if getattr(options, key) is not None]
    own += [Value(flag_of(key), None, key, raw, is_text=True) for key, raw in given]
    try:
        own += from_pairs(options.pairs)
    except Faults as wrong:
        faults += wrong.lines
    if options.command == "serve" and options.dev:  # whoever has just saved waits for it
        values.insert(0, Value("--dev", None, "probation", "0", is_text=True))
    return check([*values, *from_environment(os.environ), *own], name, faults)


def service_name(target: str) -> str:
    """What a service given on the command line is called: after its target."""
    if is_script(target):
        file = os.path.basename(target.removeprefix(MODULE)).removesuffix(".py")
        name = re.sub(r"[^\w.@:-]", "_", file)
        return f"{name}.py" if name == EXPORTER else name
    name = target.rpartition(":")[2] or target
    return target if name == EXPORTER else name
