#!/usr/bin/env bash
# sbatch recipes/slurm.sh train_cls.py recipes/imagenet_r50_r18.yaml [more options of the script]
#
# This runs on two nodes of eight GPUs each; for other numbers, give sbatch the options --nodes N --gpus-per-node M.
# Submit it from the root of the project, on a disk that all nodes can access, with the project's Python environment
# active. The options --output, --name and --seed come from the environment (OUTPUT, NAME, SEED), because this script
# reads OUTPUT/NAME/summary.json. The launcher exits with 1 whatever exit code a failed run returned, so the next step
# depends on the status that the run itself has written. Two minutes before the time is up, the run is told to stop and
# saves. The job is then queued again and goes on from there.
#
#SBATCH --job-name=w2s
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

MAX_CRASHES=3 # launches that may crash without reporting a failure before the job gives up

# The status in a summary.json, or "none" if it cannot be read.
status_of() {
    python -c 'import json, sys; print(json.load(open(sys.argv[1]))["status"])' "$1" 2>/dev/null || echo none
}

# Changes whenever the file is written again; "absent" if there is no file.
version_of() {
    stat --format '%i %y' "$1" 2>/dev/null || echo absent
}

# What to do after a launch: done, failed, requeue, retry, refused or hopeless.
#   $1 status in summary.json   $2 written: yes if this launch wrote it, no if not   $3 crashes so far, this one included
decide() {
    case "$1:$2" in
        finished:*) echo done ;;
        *:no) echo refused ;; # the run never began (bad input, or no GPU); trying again would not help
        failed:*) echo failed ;;
        preempted:*) echo requeue ;;
        *) if [ "$3" -lt "$MAX_CRASHES" ]; then echo retry; else echo hopeless; fi ;;
    esac
}

# Launches the run once on all nodes, always with --resume auto.
launch() {
    local head address
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    address=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it from sbatch
    # SLURM_NODEID is only known inside the task
    # shellcheck disable=SC2016
    srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
        bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' accelerate \
        --config_file "$ACCELERATE_CONFIG" \
        --num_machines "$SLURM_NNODES" \
        --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
        --main_process_ip "${address:-$head}" \
        --main_process_port "$((20000 + SLURM_JOB_ID % 10000))" \
        "$@" --output "$OUTPUT" --name "$NAME" --seed "$SEED" --resume auto
}

main() {
    if [ $# -lt 2 ]; then
        echo "usage: sbatch recipes/slurm.sh SCRIPT RECIPE [options]" >&2
        return 2
    fi
    local script=$1 recipe=$2 option summary before status written crashes=0
    shift 2
    for option in "$@"; do
        case "$option" in
            --output | --output=* | --name | --name=* | --seed | --seed=* | --resume | --resume=*)
                echo "error: ${option%%=*} is set by OUTPUT, NAME and SEED of the environment; --resume is always auto" >&2
                return 2
                ;;
        esac
    done
    SEED=${SEED:-0}
    OUTPUT=${OUTPUT:-output}
    NAME=${NAME:-$(basename "${recipe%.*}")-seed$SEED}
    ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-recipes/accelerate/two_nodes.yaml}
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100} # seconds for saving, instead of 30
    summary=$OUTPUT/$NAME/summary.json

    while true; do
        before=$(version_of "$summary")
        launch "$script" -c "$recipe" "$@"
        status=$(status_of "$summary")
        written=yes
        [ "$(version_of "$summary")" != "$before" ] || written=no
        crashes=$((crashes + 1))
        case "$(decide "$status" "$written" "$crashes")" in
            done)
                echo "slurm.sh: $OUTPUT/$NAME is finished"
                return 0
                ;;
            requeue)
                echo "slurm.sh: $OUTPUT/$NAME is saved; queueing job $SLURM_JOB_ID again"
                scontrol requeue "$SLURM_JOB_ID" && return 0
                echo "slurm.sh: could not queue it again; sbatch the same command to go on" >&2
                return 75
                ;;
            retry)
                echo "slurm.sh: $OUTPUT/$NAME died (crash $crashes of $MAX_CRASHES); starting again from its checkpoint" >&2
                ;;
            failed)
                echo "slurm.sh: $OUTPUT/$NAME failed, see above; trying again would not change that" >&2
                return 3
                ;;
            refused)
                echo "slurm.sh: the run did not begin ($summary: $status), see above; not trying again" >&2
                return 2
                ;;
            *)
                echo "slurm.sh: $OUTPUT/$NAME died $crashes times; giving up" >&2
                return 1
                ;;
        esac
    done
}

# The tests source this file to get the functions only.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    main "$@"
    exit
fi
