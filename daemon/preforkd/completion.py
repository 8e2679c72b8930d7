"""Shell completion for preforkctl, written from the table of commands."""

from preforkd.command import Command
from preforkd.commands import COMMANDS


def _flags(command: Command) -> list[str]:
    return [flag for argument in command.arguments for flag in argument.flags if flag.startswith("--")] + ["--json"]


def bash() -> str:
    """For ``/usr/share/bash-completion/completions/preforkctl``."""
    cases = "\n".join(f"        {name}) words={' '.join(_flags(command))!r} ;;" for name, command in COMMANDS.items())
    return f"""\
# Completion of preforkctl for bash. Made by: python -m preforkd.ctl --completion bash
_preforkctl() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} command each
    local commands={" ".join(COMMANDS)!r}
    local words="-s --socket --help --version $commands"
    if [[ $before == -s || $before == --socket ]]; then
        mapfile -t COMPREPLY < <(compgen -f -- "$word")
        return
    fi
    for each in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        if [[ " $commands " == *" $each "* ]]; then
            command=$each
            break
        fi
    done
    case $command in
{cases}
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}}
complete -F _preforkctl preforkctl
"""


def zsh() -> str:
    """For a file ``_preforkctl`` in a directory of ``fpath``."""
    described = "\n".join(f"        {_quoted(f'{name}:{command.help}')}" for name, command in COMMANDS.items())
    cases = "\n".join(
        f"        {name}) flags=({' '.join(map(_quoted, _described_flags(command)))}) ;;"
        for name, command in COMMANDS.items()
    )
    return f"""\
#compdef preforkctl
# Completion of preforkctl for zsh. Made by: python -m preforkd.ctl --completion zsh
_preforkctl() {{
    local -a commands=(
{described}
    )
    local -a flags
    local each
    for each in ${{words[2,CURRENT-1]}}; do
        case $each in
{cases}
        *) continue ;;
        esac
        _describe -o option flags
        return
    done
    if [[ ${{words[CURRENT-1]}} == (-s|--socket) ]]; then
        _files
    else
        _describe command commands
    fi
}}
_preforkctl "$@"
"""


def _described_flags(command: Command) -> list[str]:
    helps = {flag: argument.help for argument in command.arguments for flag in argument.flags}
    return [f"{flag}:{helps.get(flag, 'as JSON')}" for flag in _flags(command)]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


SHELLS = {"bash": bash, "zsh": zsh}
