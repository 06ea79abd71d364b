# Sourced from the root of the project by scripts that train many runs: JOBS of them at a time (2), each on its share of
# the cores, so that the seconds of runs side by side compare. `logs` is the folder for what they print to stderr.
#     start NAME COMMAND...     begins a run as soon as there is a place; it logs to $logs/NAME.log
#     finish [NAME]             waits for that run, or for all
# Where a run has failed, both end the script with the last lines of its log. No run outlives the script: those still
# going are told to stop; they save, and go on when it is run again. A COMMAND is a program, no function, to be told.
jobs=${JOBS:-2}
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=$((cores > jobs ? cores / jobs : 1))
mkdir -p "$logs"
running=  # PID:NAME of each
trap 'kill $(jobs -rp) 2> /dev/null && wait 2> /dev/null || true' EXIT

start() {
    while reap; [ "$(wc -w <<< "$running")" -ge "$jobs" ]; do sleep 0.2; done
    echo "$1"
    "${@:2}" 2> "$logs/$1.log" &
    running+=" $!:$1"
}

finish() {
    while reap; [[ "$running " = *:${1:-*}" "* ]]; do sleep 0.2; done
}

reap() { # forget the runs that have ended well
    local each left=
    for each in $running; do
        if kill -0 "${each%%:*}" 2> /dev/null; then
            left+=" $each"
        elif ! wait "${each%%:*}"; then
            tail -n 3 "$logs/${each#*:}.log" >&2
            exit 1
        fi
    done
    running=$left
}
