"""``[ctlplugin:preforkd]``: ``supervisorctl workers · scale · roll · reload`` of programs that are daemons of ours.

It is imported by supervisorctl and asks supervisord only, which has ``[rpcinterface:preforkd]``. ``reload`` alone stays
what it was: it restarts supervisord.
"""

import json
import sys
from collections.abc import Callable
from typing import Any
from xmlrpc.client import Fault

from supervisor.options import make_namespec, split_namespec
from supervisor.supervisorctl import ControllerPluginBase, LSBInitExitStatuses
from supervisor.xmlrpc import Faults

from preforkd.commands import COMMANDS

# What a fault of supervisord's own means, as supervisorctl says it.
_MEANINGS = {
    Faults.BAD_NAME: "no such process",
    Faults.NOT_RUNNING: "not running",
    Faults.SHUTDOWN_STATE: "supervisor shutting down",
    Faults.UNKNOWN_METHOD: "supervisord does not know preforkd: is [rpcinterface:preforkd] in its configuration file, "
    "and has it been restarted since?",
}

_HELP = {
    "workers": "workers <name>\t\tShow the services, listeners and workers of a preforkd",
    "scale": "scale <name> [<service>] <n>\tHave n workers; the service may be left out where there is one",
    "roll": "roll <name> [<service>]\tReplace all workers by fresh ones of the same code",
    "reload": "reload <name> [<service>]\tHave a preforkd read settings and code anew; roll back if they fail",
}

Ask = Callable[[Any, str], str]


def make(controller: Any, **options: str) -> "Preforkd":
    """The factory that supervisorctl's settings name.

    A command is looked for in the controller, then in the plugins, and in supervisorctl's own before ours: so what is
    to come before its own is put into the controller.
    """
    if options:
        raise ValueError(f"[ctlplugin:preforkd] has no option {', '.join(options)}")
    plugin = Preforkd(controller)
    controller.do_reload, controller.do_help = plugin.do_reload, plugin.help
    return plugin


class Preforkd(ControllerPluginBase):  # type: ignore[misc] # supervisor has no annotations
    """The commands. Each takes a program as ``name``, ``group:name``, or ``group:*`` for one after the other."""

    name = "preforkd"

    def do_workers(self, arg: str) -> None:
        if not arg.split():
            return self._misused("workers", "a process name is required")
        for name in arg.split():
            for program in self._programs(name):
                self._one(program, self._table)
        return None

    def do_scale(self, arg: str) -> None:
        words = arg.split()
        if len(words) not in (2, 3):
            return self._misused("scale", "want a process name and a number")
        name, *service, number = words
        declared = next(each for each in COMMANDS["scale"].arguments if each.name == "workers")
        try:
            workers = declared.checked(int(number) if number.isdecimal() else number)
        except ValueError as fault:
            return self._misused("scale", str(fault))
        return self._each(name, lambda rpc, program: _sizes(rpc.scale(program, workers, *service)))

    def do_roll(self, arg: str) -> None:
        name, *service = arg.split() or [""]
        if not name or len(service) > 1:
            return self._misused("roll", "want a process name, and perhaps a service")
        return self._each(name, lambda rpc, program: _sizes(rpc.roll(program, *service)))

    def do_reload(self, arg: str) -> None:
        name, *service = arg.split() or [""]
        if not name:  # supervisord is to restart
            self._supervisorctls_own.do_reload(arg)
        elif len(service) > 1:
            self._misused("reload", "want a process name, and perhaps a service")
        else:
            self._each(name, lambda rpc, program: _verdict(rpc.reload(program, *service)))

    @property
    def _supervisorctls_own(self) -> Any:
        return self.ctl.options.plugins[0]

    def _table(self, rpc: Any, program: str) -> str:
        from preforkd import view

        report = json.loads(rpc.workers(program))
        if self.ctl.options.serverurl.startswith("unix:"):  # else it may be another machine's
            view.add_what_the_machine_knows(report)
        return view.table(report, sys.stdout.isatty()) + "\n"

    # One program after the other, and what is said of each.

    def _each(self, name: str, ask: Ask) -> None:
        """Change each program that the name means. Those behind one that fails are left as they are."""
        left = self._programs(name)
        while left and self._one(left.pop(0), ask):
            pass
        for program in left:
            self._say(f"{program}: left as it is")

    def _one(self, program: str, ask: Ask) -> bool:
        try:
            self._say(f"{program}: {ask(self.ctl.get_server_proxy('preforkd'), program)}")
        except Fault as fault:
            self._fail(program, fault.faultCode, _reason(fault))
        except KeyboardInterrupt:
            self._fail(program, Faults.FAILED, "interrupted; what was asked for goes on")
        else:
            return True
        return False

    def _programs(self, name: str) -> list[str]:
        """All that the name means; none, when there is a reason, which is said."""
        if not self.ctl.upcheck():
            return []
        group, process = split_namespec(name)
        try:
            infos = [info for info in self.ctl.get_supervisor().getAllProcessInfo() if info["group"] == group]
        except Fault as fault:
            self._fail(name, fault.faultCode, _reason(fault))
            return []
        found = [make_namespec(group, info["name"]) for info in infos if process in (None, info["name"])]
        if not found:
            there = ", ".join(make_namespec(group, info["name"]) for info in infos)
            hint = f"; the group has {there}, and {group}:* means all" if there else ""
            self._fail(name, Faults.BAD_NAME, _MEANINGS[Faults.BAD_NAME] + hint)
        return found

    def _fail(self, name: str, code: int, reason: str) -> None:
        self._say(f"{name}: ERROR: {reason}" if "\n" in reason else f"{name}: ERROR ({reason})")
        self.ctl.set_exitstatus_from_xmlrpc_fault(code)

    def _misused(self, command: str, reason: str) -> None:
        self._say(f"Error: {reason}")
        self._say(_HELP[command])
        self.ctl.exitstatus = LSBInitExitStatuses.GENERIC

    def _say(self, text: str) -> None:
        encoding = sys.stdout.encoding or "ascii"
        self.ctl.output(text.encode(encoding, "backslashreplace").decode(encoding))

    # Help.

    def help(self, topic: str) -> None:
        """In place of the controller's own, which asks all plugins, so that each says that it has no help on ours."""
        if topic in _HELP and topic != "reload":
            self.do_help(topic)
        else:
            type(self.ctl).do_help(self.ctl, topic)

    def do_help(self, arg: str) -> None:
        # Only on what is ours: whoever has no help on a topic says so. (No docstring: it would be listed as a command.)
        if arg in _HELP:
            self._say(_HELP[arg])
        elif not arg:
            super().do_help(arg)


for _command, _text in _HELP.items():  # supervisorctl lists those that have help
    getattr(Preforkd, f"do_{_command}").__doc__ = _text


def _sizes(answer: str) -> str:
    """``smtp has 4 workers``, and how many others still finish what they hold."""
    said = json.loads(answer)
    sizes = ", ".join(f"{service} has {size} worker{'s' * (size != 1)}" for service, size in said["workers"].items())
    return sizes + (f" ({said['draining']} on their way out)" if said["draining"] else "")


def _verdict(answer: str) -> str:
    said = json.loads(answer)
    by = "" if said["what"] == "reload" else f", by an {said['what']}"
    return f"reloaded{by}: generation {said['generation']} after {said['seconds']:.1f} s"


def _reason(fault: Fault) -> str:
    """What it says, without what supervisord begins every failure with."""
    return _MEANINGS.get(fault.faultCode) or fault.faultString.removeprefix("FAILED: ")
