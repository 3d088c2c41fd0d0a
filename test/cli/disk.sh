#!/usr/bin/env bash
# conformance: V6
# A disk image becomes a machine that boots its own system; here without the agent,
# so that only its console and its network say that it runs.
. ./_lib.sh

command -v mmdebstrap >/dev/null && ((EUID == 0)) || { echo "needs root and mmdebstrap, which scripts/deps installs, to make a cloud image"; exit 77; }
script=../../runtime/microvm/microvmtest/cloudimage.sh
cache=${XDG_CACHE_HOME:-$HOME/.cache}/atoll-test/cloudimage # where tests in Go keep it, too
disk=$cache/$(sha256sum $script | cut -c 1-20).raw
mkdir -p "$cache"
(
	flock 9
	[[ -e $disk ]] || PATH=$PATH:/usr/sbin:/sbin sh $script "$disk"
) 9>"$cache/lock"

atoll image import "$disk" disk-vm >/dev/null
made=(disk-vm)
trap 'atoll rm -f disk-vm >/dev/null 2>&1 || true; atoll image rm disk-vm >/dev/null 2>&1 || true; atoll prune >/dev/null 2>&1 || true' EXIT
has "$(atoll image ls)" 'disk-vm.*disk image \(raw\)'

# What cannot be is said before anything is made.
head -c 3000000 "$disk" >"$TMPDIR/cut.raw"
qemu-img convert -O qcow2 "$TMPDIR/cut.raw" "$TMPDIR/whole.qcow2"
head -c 600000 "$TMPDIR/whole.qcow2" >"$TMPDIR/cut.qcow2"
fails 1 'cut short' atoll image import "$TMPDIR/cut.qcow2" cut
fails 1 'not disk images' atoll create disk-vm --runtime gvisor
fails 125 'leave out --no-agent' atoll run --no-agent disk-vm -- true
fails 1 '500 MiB' atoll create disk-vm --disk 500m
fails 1 'boot of its own' atoll create base --no-agent

cat >"$TMPDIR/user-data" <<'DATA'
#cloud-boothook
#!/bin/sh
echo told by the user >/run/told
systemd-run --no-block --property DefaultDependencies=no python3 -m http.server 8000 --directory /run
DATA
atoll create disk-vm --name disk-vm --memory 384m --no-agent --user-data "$TMPDIR/user-data" -p 0:8000 >/dev/null
port=$(atoll port disk-vm | awk '$1 == 8000 { sub(/.*:/, "", $2); print $2 }')
fails 125 'without the guest agent' atoll exec disk-vm -- true
fails 1 'without the guest agent' atoll snapshot disk-vm
until curl -sf --max-time 5 "http://127.0.0.1:$port/told" >"$TMPDIR/told"; do
	[[ $(atoll inspect disk-vm) == *'"running"'* ]] || fail "the machine ended: $(atoll logs -n 20 disk-vm)"
	sleep 1 # the script's own time bounds it
done
equal "$(cat "$TMPDIR/told")" 'told by the user'
has "$(atoll logs disk-vm)" 'loading the kernel'
# The system writes of that when it finds time.
until [[ $(atoll logs disk-vm) == *"running 'init'"* ]]; do sleep 1; done
equal "$(atoll logs -n 3 disk-vm | wc -l)" 3
