#!/usr/bin/env bash
# conformance: SPEC2 FR2.7
# The life of a sandbox as the command line shows it.
. ./_lib.sh

sandbox life --metadata purpose=test --cpus 1
equal "$(atoll ls -q | wc -l)" 1
id=$(atoll ls -q)
equal "$(atoll ls -q --metadata purpose=test)" "$id"
equal "$(atoll ls -q --metadata purpose=other)" ''
equal "$(atoll ls -q --state paused)" ''
has "$(atoll ls)" '^NAME .*STATE'
has "$(atoll ls -o json)" "\"id\": \"$id\""
has "$(atoll ls -o yaml)" "id: \"?$id\"?$" # quoted when it could be a number
has "$(atoll inspect "${id:0:6}")" '"name": "life"'
has "$(atoll stats life)" life

# Paused to disk: nothing runs, and everything is there again.
pid=$(atoll exec life -- sh -c 'sleep 1000 >/dev/null 2>&1 & echo $!')
atoll pause life >/dev/null
equal "$(atoll ls -q --state paused)" "$id"
fails 125 'paused' atoll exec life -- true
atoll resume life >/dev/null
equal "$(atoll exec life -- cat "/proc/$pid/comm")" sleep

# Frozen in memory.
atoll pause --memory life >/dev/null
atoll resume life >/dev/null
equal "$(atoll exec life -- cat "/proc/$pid/comm")" sleep

# Names.
atoll rename life other
made+=(other)
fails 125 'life: no such' atoll exec life -- true
fails 1 'other' atoll create base --name other
fails 1 'running' atoll rm other

# Time-out, and waiting for it.
atoll ttl other 1s
timeout 60 atoll wait other >/dev/null
equal "$(atoll ls -q)" ''
atoll rm -f no-such >/dev/null
