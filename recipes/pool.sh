# Sourced, from the root of the project, by scripts that train many runs. JOBS runs (default 2) go on at a time, each on
# its share of the cores, so that the seconds of runs side by side can be compared. `logs` is the folder for their
# stderr.
#     start NAME COMMAND...     starts a run as soon as fewer than JOBS are going on; it logs to $logs/NAME.log
#     finish [NAME]             waits for that run, or for all runs
# If a run has failed, both functions end the script and show the last lines of its log, except where it ended with the
# exit code in `may_fail`. No run outlives the script: when it ends, runs that are still going on are told to stop. They
# save, and go on when the script is run again.
# COMMAND must be a program, because a shell function would not receive the signal.
jobs=${JOBS:-2}
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=$((cores > jobs ? cores / jobs : 1))
mkdir -p "$logs"
running=  # PID:NAME of each run
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

reap() { # forget the runs that have ended successfully
    local each code left=
    for each in $running; do
        if kill -0 "${each%%:*}" 2> /dev/null; then
            left+=" $each"
        else
            code=0
            wait "${each%%:*}" || code=$?
            if [ $code != 0 ] && [ $code != "${may_fail:-0}" ]; then
                tail -n 3 "$logs/${each#*:}.log" >&2
                exit 1
            fi
        fi
    done
    running=$left
}
