#!/usr/bin/env bash
# Several processes on this machine, as a rehearsal for many machines: the same program, the same files, gloo between
# them. Starts PROCESSES processes of DEVICES simulated devices each; the arguments go to lss_jax.train.
#
#     PROCESSES=2 DEVICES=4 experiments/launch/several_processes.sh --config configs/default.py --workdir runs/two
#
# Ctrl-C stops all of them after the same step; the same command resumes. Exits with the worst of their codes.
set -uo pipefail
processes=${PROCESSES:-2}
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=${DEVICES:-4}
coordinator=${COORDINATOR:-127.0.0.1:29400}

children=()
for ((i = 0; i < processes; i++)); do
    python -m lss_jax.train "$@" --coordinator "$coordinator" --processes "$processes" --process "$i" &
    children+=($!)
done
trap 'kill -INT "${children[@]}" 2>/dev/null' INT
trap 'kill -TERM "${children[@]}" 2>/dev/null' TERM

worst=0
for child in "${children[@]}"; do
    wait "$child"
    code=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done # a trap interrupts the first wait
    ((code > worst)) && worst=$code
done
exit "$worst"
