# What train.sbatch and sweep.sbatch share; sourced by them. The batch shell is told before the job must go, passes it on
# to the ranks, which end their update and save, and puts the job back into the queue. It goes on in the same run folder.
#
#   LAUNCHER=srun      a task of Slurm's is a rank (default)
#   LAUNCHER=torchrun  a task per node, which starts SLURM_GPUS_ON_NODE or PROCESSES ranks
#   MAX_REQUEUES=100   times that the job goes back into the queue
set -uo pipefail

if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi # else what was on PATH when the job was submitted

# Node names need not resolve: addresses come from Slurm. All ranks meet at the first node.
address_of() { scontrol --oneliner show node "$1" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2; }
MASTER_ADDR=$(address_of "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)")
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000)) # below the ports that kernels hand out
export MASTER_ADDR MASTER_PORT
# The ranks find gloo's interface themselves: the one that reaches MASTER_ADDR. NCCL looks for the fastest one; where it
# finds the wrong one, name it: export NCCL_SOCKET_IFNAME=ib0 (and GLOO_SOCKET_IFNAME) before sbatch.
# What ranks write into the store where they meet is signed with this; other users of the hosts may reach the store.
export MOE_TRAIN_SECRET=${MOE_TRAIN_SECRET:-$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun has not taken it from the job since Slurm 22.05

# An array's number alone means all of its elements, and one of them has that number for its own.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job=${job:-$SLURM_JOB_ID}

asked=
stop() {
    asked=yes
    echo "asked to stop at $(date +%T): the ranks save"
    local try
    for try in 1 2 3; do
        timeout 15 scancel --signal=TERM "$job" && return # to every task; a TERM to srun itself would have it kill them
        echo "Slurm has not told the ranks (try $try of 3)"
        sleep 1
    done
}
trap stop USR1 TERM

# moe-train on all ranks; wait comes back early when a signal arrives. All ranks end together, rank 0 scores a run before
# the others go: who is there 20 seconds after the first end hangs, alone on its host.
on_all_ranks() {
    local step code
    if [[ ${LAUNCHER:-srun} == torchrun ]]; then
        srun --wait=20 --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" bash -c '
            address=$(scontrol --oneliner show node "$SLURMD_NODENAME" | grep -o "NodeAddr=[^ ]*" | cut -d= -f2)
            exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}" \
                --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \
                --rdzv-conf="is_host=$((SLURM_NODEID == 0))" --local-addr="$address" -m moe_train.commands.train "$@"' torchrun "$@" &
    else
        srun --wait=20 python -m moe_train.commands.train "$@" &
    fi
    step=$!
    wait "$step"
    code=$?
    while kill -0 "$step" 2>/dev/null; do
        wait "$step"
        code=$?
    done
    return "$code"
}

# A job that Slurm ends itself (cancelled, or preempted without time to spare) is left to it. A controller that is busy is
# asked again; where it does not answer, the job still runs, or this line would not.
requeue() {
    local try state
    if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_REQUEUES:-100})); then
        echo "was requeued ${SLURM_RESTART_COUNT} times: not again (MAX_REQUEUES)"
        return
    fi
    trap '' USR1 TERM # the ranks have gone
    for try in {1..6}; do
        state=$(timeout 10 scontrol --oneliner show job "$job" | grep -o 'JobState=[A-Z_]*' | cut -d= -f2)
        if [[ ${state:-RUNNING} != RUNNING ]]; then
            echo "is $state: not put back into the queue"
            return
        fi
        [[ -n $state ]] || echo "Slurm does not say whether the job still runs: assumed to be running"
        echo "back into the queue"
        timeout 10 scontrol requeue "$job" && return
        echo "Slurm did not requeue it (try $try of 6)"
        sleep 2
    done
    echo "saved, but not put back into the queue: submit it again with the same run folder"
}

# Trains in a folder and ends the script. 75: asked to stop, saved.
train_in() {
    local folder=$1 code
    shift
    on_all_ranks "$@" hydra.run.dir="$folder"
    code=$?
    if ((code != 0)) && [[ -n $asked || $code -eq 75 ]]; then
        requeue
        exit 75
    fi
    exit "$code"
}
