#!/usr/bin/env bash
# conformance: FR5.1 FR5.2 FR5.3 FR5.4
# A running process goes on from its snapshot, in any number of sandboxes.
. ./_lib.sh

sandbox origin
# Counts in memory, writes what it counted to an open file, listens on a port.
atoll exec -i origin -- sh -c 'cat >/tmp/count.py' <<'PY'
import http.server, os
count, log = 0, open("/tmp/log", "w")
class Count(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global count
        count += 1
        log.write(f"{count}\n"); log.flush()
        self.send_response(200); self.end_headers()
        self.wfile.write(f"{os.getpid()} {count}".encode())
http.server.HTTPServer(("127.0.0.1", 8000), Count).serve_forever()
PY
atoll exec -d origin -- python3 /tmp/count.py >/dev/null
count() { atoll exec "$1" -- timeout 60 sh -c 'until curl -s http://127.0.0.1:8000/; do sleep 0.1; done'; }

read -r pid n < <(count origin; echo)
equal "$n" 1
equal "$(count origin)" "$pid 2"
snapshot=$(atoll snapshot origin -q)
equal "$(count origin)" "$pid 3" # it goes on

# Restored: same process, same memory, same open file, whatever came later.
for name in one two; do
	atoll restore "$snapshot" --name $name -q >/dev/null
	made+=($name)
	equal "$(count $name)" "$pid 3"
	equal "$(atoll exec $name -- tail -n 1 /tmp/log)" 3
done
equal "$(count one)" "$pid 4"
equal "$(count two)" "$pid 4"
equal "$(count origin)" "$pid 4"

# Ten children, each with a life of its own.
mapfile -t children < <(atoll fork origin -n 10 -q)
made+=("${children[@]}")
equal "${#children[@]}" 10
for i in "${!children[@]}"; do
	for ((k = 0; k < i; k++)); do count "${children[$i]}" >/dev/null; done
done
for i in "${!children[@]}"; do
	equal "$(count "${children[$i]}")" "$pid $((5 + i))"
done
equal "$(count origin)" "$pid 5"
equal "$(for c in "${children[@]}"; do atoll exec "$c" -- cat /proc/sys/kernel/random/uuid; done | sort -u | wc -l)" 10

# Paused with its files only, it boots anew from them; a child of it does too.
atoll exec --user root two -- sh -c 'rm /etc/issue /etc/debian_version; echo mine >/etc/mine'
boot=$(atoll exec two -- cat /proc/sys/kernel/random/boot_id)
atoll pause --files two >/dev/null
shelved=$(atoll fork two -q)
made+=("$shelved")
atoll resume two >/dev/null
for name in two "$shelved"; do
	equal "$(atoll exec $name -- sh -c 'cat /etc/mine; ls /etc/issue /etc/debian_version 2>/dev/null; tail -n 1 /tmp/log')" $'mine\n4'
	[[ $(atoll exec $name -- cat /proc/sys/kernel/random/boot_id) != "$boot" ]]
done

# Lineage, and removal that spares what is in use.
has "$(atoll snapshot ls)" origin
equal "$(atoll snapshot ls origin -q)" "$snapshot"
atoll snapshot rm "$snapshot" >/dev/null
equal "$(count one)" "$pid 5"
fails 1 'snapshot' atoll restore "$snapshot"
