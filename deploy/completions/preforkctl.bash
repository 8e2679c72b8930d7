# Completion of preforkctl for bash. Made by: python -m preforkd.ctl --completion bash
_preforkctl() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} command each
    local commands='ping status top events stacks reload upgrade outcome scale roll drain refill kill log-level stop'
    local words="-s --socket --help --version $commands"
    if [[ $before == -s || $before == --socket ]]; then
        mapfile -t COMPREPLY < <(compgen -f -- "$word")
        return
    fi
    for each in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        if [[ " $commands " == *" $each "* ]]; then
            command=$each
            break
        fi
    done
    case $command in
        ping) words='--json' ;;
        status) words='--json' ;;
        top) words='--json' ;;
        events) words='--follow --json' ;;
        stacks) words='--json' ;;
        reload) words='--no-wait --json' ;;
        upgrade) words='--no-wait --json' ;;
        outcome) words='--json' ;;
        scale) words='--no-wait --json' ;;
        roll) words='--no-wait --json' ;;
        drain) words='--no-wait --json' ;;
        refill) words='--no-wait --json' ;;
        kill) words='--no-wait --json' ;;
        log-level) words='--json' ;;
        stop) words='--now --no-wait --json' ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}
complete -F _preforkctl preforkctl
