"""The command line: ``preforkd serve``, ``check`` and ``settings``."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from preforkd import __version__, log, settings
from preforkd.exits import Exit
from preforkd.sources import EXPORTER, Checked, Faults, Value, check, from_environment, from_file, from_pairs
from preforkd.upgrade import PROOF, Handed
from preforkd.wakeup import release

SAMPLE_TARGET = "preforkd_workers.samples:Upper"
SAMPLE_LISTEN = "tcp://127.0.0.1:9999"
SAMPLE_METRICS = "tcp://127.0.0.1:9109"


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    handed = Handed.take(os.environ)
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "settings":
        print(settings.reference())  # noqa: T201 - what the command is for
        return Exit.STOPPED
    if options.config is not None and (options.target or options.listen):
        parser.error("-c FILE names targets and addresses: give either it, or TARGET and --listen")
    if options.command == "serve" and handed is not None:
        from preforkd.serve import resume

        return resume(handed, lambda: _checked(options), _watched(options))
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


def _complain(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"preforkd: {line}", file=sys.stderr)  # noqa: T201 - the log is not open yet


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="preforkd", description="Run a socketserver handler, unmodified, as a production daemon."
    )
    parser.add_argument("--version", action="version", version=f"preforkd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="serve|check|settings")
    serve = commands.add_parser("serve", help="run the services in the foreground, until a signal stops them")
    serve.add_argument("--dev", action="store_true", help="reload when a source of the target is saved")
    checked = commands.add_parser("check", help="check the settings and import the targets, but serve nothing")
    checked.add_argument("--dev", action="store_true", help=argparse.SUPPRESS)  # from a daemon in dev mode
    checked.add_argument("--state-fd", type=int, help=argparse.SUPPRESS)  # from a daemon that wants to upgrade
    commands.add_parser("settings", help="print the reference of all settings")
    for command in (serve, checked):
        _add_options(command)
    return parser


def _add_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "target",
        nargs="?",
        metavar="TARGET",
        help="module:name or path/to/file.py:name; without it and without -c, a sample",
    )
    add("-c", "--config", metavar="FILE", help="settings in TOML, instead of TARGET")
    add(
        "--listen",
        action="append",
        metavar="URL",
        default=[],
        help="tcp://, udp://, unix:, unix-dgram: or fd: (repeatable)",
    )
    add("--handler", metavar="NAME", help="the handler of a server class")
    add("--kind", metavar="KIND", help="kind of worker")
    add("--max-children", metavar="N", help="workers of each service")
    add("--metrics", metavar="URL", help="serve Prometheus metrics there")
    add("--control", metavar="PATH", help="path of the control socket")
    add("--ready-fd", metavar="N", help="write a newline to this descriptor when ready")
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
        listen = options.listen or ([] if options.target else [SAMPLE_LISTEN])
        if listen:
            own.append(Value("--listen", name, "listen", listen))
        if not options.target:
            values.append(Value("metrics", None, "metrics", SAMPLE_METRICS))
    flags = ("handler", "kind", "max_children", "metrics", "control", "ready_fd")
    given = [(flag, getattr(options, flag)) for flag in flags if getattr(options, flag) is not None]
    own += [Value(f"--{flag.replace('_', '-')}", None, flag, raw, is_text=True) for flag, raw in given]
    try:
        own += from_pairs(options.pairs)
    except Faults as wrong:
        faults += wrong.lines
    if options.command == "serve" and options.dev:  # whoever has just saved waits for it
        values.insert(0, Value("--dev", None, "probation", "0", is_text=True))
    return check([*values, *from_environment(os.environ), *own], name, faults)


def service_name(target: str) -> str:
    """What a service given on the command line is called: after its target."""
    name = target.rpartition(":")[2] or target
    return target if name == EXPORTER else name
