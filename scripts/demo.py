"""Reads the Go and Markdown files below the working directory into memory and
answers, over HTTP, how often a word occurs in them; then forgets that word."""

import collections
import http.server
import os
import pathlib
import re

index = collections.defaultdict(collections.Counter)  # word: file: how often
files = [p for p in pathlib.Path(".").rglob("*") if p.suffix in (".go", ".md")]
for path in files:
    for word in re.findall(r"[a-z]+", path.read_text(errors="replace").lower()):
        index[word][str(path)] += 1
forgotten = []


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        word = self.path.strip("/")
        if word:
            counts = index.pop(word, collections.Counter())
            forgotten.append(word)
            (most, _), = counts.most_common(1) or [("-", 0)]
            fields = counts.total(), most, os.getpid(), len(forgotten)
            text = "\t".join(map(str, fields))
        else:
            text = f"  {len(index)} different words of {len(files)} files in the memory of process {os.getpid()}"
        self.send_response(200)
        self.end_headers()
        self.wfile.write((text + "\n").encode())


http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Answer).serve_forever()
