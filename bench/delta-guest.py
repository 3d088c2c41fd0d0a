#!/usr/bin/python3.11 -S
# The first process of the machine whose memory bench/delta-pairs copies: it is ready, then idle for 40 s, and then has worked.
import ast
import collections
import gc
import json
import os
import re
import sqlite3
import time

console = open("/dev/console", "w", buffering=1)


def say(word):
    gc.collect()
    print(word, file=console)
    time.sleep(2)  # for the copy to be made


def sources():
    for folder, _, names in os.walk("/usr/lib/python3.11"):
        for name in sorted(names):
            if name.endswith(".py"):
                with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as f:
                    yield os.path.join(folder, name), f.read()


read = dict(list(sources())[:300])
say("ready")
time.sleep(40)
say("idle")
words = collections.defaultdict(list)
db = sqlite3.connect("/tmp.db")
db.execute("create table calls(file text, line int, name text)")
for path, text in list(sources())[:100]:
    for n, line in enumerate(text.splitlines()):
        for word in re.findall(r"\w+", line):
            if len(words[word]) < 20:
                words[word].append((path, n))
    try:
        calls = [(path, c.lineno, c.func.id) for c in ast.walk(ast.parse(text)) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)]
    except SyntaxError:
        continue
    db.executemany("insert into calls values (?, ?, ?)", calls)
db.commit()
with open("/words.json", "w") as f:
    json.dump(words, f)
say("worked")
time.sleep(3600)
