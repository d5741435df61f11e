#!/usr/bin/env bash
# A SLURM cluster of two nodes on this machine, for the tests.   usage: bash tests/slurm_cluster.sh start|stop DIR
# Needs root. `start` installs slurm-wlm and munge where they are missing and prints the SLURM_CONF to use; `stop` ends the
# daemons and takes the nodes out of /etc/hosts again. Everything else is in DIR.
set -euo pipefail
action=$1 dir=$2
nodes=(flowlm-node1 flowlm-node2)

start() {
    if ! command -v slurmctld slurmd munged >/dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq >&2
        apt-get install -y -qq --no-install-recommends slurm-wlm munge >&2
    fi
    mkdir -p "$dir/state"
    for node in "${nodes[@]}"; do
        mkdir -p "$dir/$node"
        grep -q " $node\$" /etc/hosts || echo "127.0.0.1 $node" >>/etc/hosts
    done
    host=$(hostname -s)
    cpus=$(nproc)
    # cred_expire: how long a job that was requeued waits at least. linuxproc, task/none: no cgroups needed.
    cat >"$dir/slurm.conf" <<EOF
ClusterName=flowlm
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=26817
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
StateSaveLocation=$dir/state
SlurmdPidFile=$dir/%n/slurmd.pid
SlurmdLogFile=$dir/%n/slurmd.log
SlurmdSpoolDir=$dir/%n
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
KillWait=10
NodeName=${nodes[0]} NodeHostname=$host NodeAddr=127.0.0.1 Port=26821 CPUs=$cpus
NodeName=${nodes[1]} NodeHostname=$host NodeAddr=127.0.0.1 Port=26822 CPUs=$cpus
PartitionName=main Nodes=${nodes[0]},${nodes[1]} Default=YES MaxTime=60 State=UP
EOF
    export SLURM_CONF=$dir/slurm.conf
    if ! munge -n >/dev/null 2>&1; then
        mkdir -p /run/munge
        chown munge: /run/munge
        [ -s /etc/munge/munge.key ] || runuser -u munge -- mungekey
        runuser -u munge -- munged
        touch "$dir/munged.ours"
    fi
    slurmctld -c
    for node in "${nodes[@]}"; do slurmd -N "$node"; done
    for _ in $(seq 150); do
        [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" = ${#nodes[@]} ] && break
        sleep 0.2
    done
    sinfo >&2
    [ "$(sinfo --noheader --states=idle --format=%D)" = ${#nodes[@]} ]
    echo "$SLURM_CONF"
}

end() { # the process that a file names, and waits for its last word
    [ -e "$1" ] || return 0
    pid=$(cat "$1")
    kill "$pid" 2>/dev/null || return 0
    while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
}

stop() {
    for node in "${nodes[@]}"; do end "$dir/$node/slurmd.pid"; done
    end "$dir/slurmctld.pid"
    [ ! -e "$dir/munged.ours" ] || end /run/munge/munged.pid
    for node in "${nodes[@]}"; do
        grep -v " $node\$" /etc/hosts >"$dir/hosts" || true
        cat "$dir/hosts" >/etc/hosts # in a container the file can be written but not replaced
    done
}

"$action"
