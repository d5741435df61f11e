# What every worker of a TPU VM does when it starts, at every start: fetches the commit, installs it, runs the job, and tells
# the bucket how it ended. tpu_vm.py sets above: bundle, logs, environment, command.
set -uo pipefail
export HOME="${HOME:-/root}" # a startup script has none
cd "$HOME"
rm -f flowlm.pid
worker=$(curl -sf -H 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || echo 0)
log="$HOME/flowlm.log"
send() { gcloud storage cp --quiet "$log" "$logs/$worker.log" >/dev/null 2>&1; }
while sleep 20; do send; done &
sender=$!

(
    set -e
    echo "== worker $worker of $(hostname), $(date -u +%FT%TZ)"
    apt-get -qq -o DPkg::Lock::Timeout=600 update
    apt-get -qq -o DPkg::Lock::Timeout=600 install -y git python3.11-venv
    gcloud storage cp --quiet "$bundle" flowlm.bundle
    [ -d flowlm ] || git clone --quiet flowlm.bundle flowlm
    cd flowlm
    git fetch --quiet ../flowlm.bundle HEAD
    git checkout --quiet --detach FETCH_HEAD
    LOCKED=1 PYTHON=python3.11 bash launch/setup.sh tpu,gcp # a restart goes on with the same versions
    echo "$BASHPID" > ../flowlm.pid # which the line below keeps: where to send SIGTERM
    exec env "${environment[@]}" .venv/bin/python "${command[@]}"
) >>"$log" 2>&1
status=$?

kill "$sender"
send
echo "$status" | gcloud storage cp --quiet - "$logs/$worker.exit"
