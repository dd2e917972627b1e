#!/bin/bash
# Runs in the guest: attaches leakbpf to the program next to it, once in each mode, lets that run, and
# prints the program's truth, the stacks of the BPF programs, the agent's report and its messages.
# `cargo xtask test --kernel` compares.
set -u
# Otherwise what is started in the background ignores SIGINT.
set -m
here=$(cd "$(dirname "$0")" && pwd)

# waits SECONDS CONDITION...: until the condition holds or the agent or the program has ended.
waits() {
    local until=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $until ] && kill -0 "$agent" 2>/dev/null && kill -0 "$program" 2>/dev/null || return 1
        sleep 0.1
    done
}

# session MODE OPTIONS...: one agent, one program.
session() {
    local work
    work=$(mktemp -d)
    mkfifo "$work/go"
    "$here/blocks" <"$work/go" >"$work/truth" &
    program=$!
    exec 3>"$work/go"
    "$here/leakbpf" record -p $program --mode "$@" --blocks --interval 1h -o "$work/report.json" \
        >"$work/table" 2>"$work/messages" &
    agent=$!

    if waits 60 grep -q '^leakbpf: attached' "$work/messages"; then
        "$here/stacks" >"$work/stacks" 2>>"$work/messages"
        echo go >&3
        waits 60 grep -q '^end$' "$work/truth"
        kill -INT $agent
        waits 60 false
    fi
    kill -KILL $agent 2>/dev/null && echo "guest: leakbpf did not stop" >>"$work/messages"
    wait $agent
    local status=$?
    exec 3>&-

    echo "=== session $1"
    echo "=== status $status"
    echo "=== truth"
    cat "$work/truth"
    echo "=== stacks"
    cat "$work/stacks" 2>/dev/null
    echo "=== messages"
    cat "$work/messages"
    echo "=== report"
    cat "$work/report.json" 2>/dev/null
    echo
}

echo "=== kernel $(uname -r)"
session exact
session sample --sample-interval 1KiB
exit 0
