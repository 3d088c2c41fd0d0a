#!/usr/bin/env bash
# conformance: NFR1.3
# Sandboxes reach neither the host nor each other unless they may.
. ./_lib.sh

sandbox a
sandbox b
address() { atoll exec "$1" -- hostname -I | tr -d ' '; }
atoll exec -d b -- python3 -m http.server 8000 --bind 0.0.0.0 >/dev/null
atoll exec b -- timeout 60 sh -c 'until curl -s -o /dev/null http://127.0.0.1:8000/; do sleep 0.1; done'
reach() { atoll exec "$1" -- curl -s -o /dev/null --connect-timeout 3 "$2"; }

reach b "http://127.0.0.1:8000/" || fail "the server is not there"
reach a "http://$(address b):8000/" && fail "a sandbox reaches another"
gateway=$(atoll exec a -- sed -n 's/^nameserver //p' /etc/resolv.conf) # the gateway is also the resolver
for address in "$gateway" $(hostname -I); do
	reach a "http://$address:${ATOLL_URL##*:}/health" && fail "a sandbox reaches the host at $address"
done
reach a "http://169.254.169.254/" && fail "a sandbox reaches the cloud's metadata"

# Mode none has loopback only.
atoll create base --name none --network none >/dev/null
made+=(none)
equal "$(atoll exec none -- python3 -c 'import socket; print(*[name for _, name in socket.if_nameindex()])')" lo

# A published port is reachable here, and only while it is published.
atoll port b 0:8000 >/dev/null
host=$(atoll inspect b | sed -n 's/.*"host": \([0-9]*\).*/\1/p' | head -n 1)
has "$(curl -s --max-time 10 "http://127.0.0.1:$host/")" 'Directory listing'
