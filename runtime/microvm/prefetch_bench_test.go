package microvm_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/prefetch"
	"github.com/atoll-run/atoll/runtime/microvm"
	"github.com/atoll-run/atoll/runtime/microvm/microvmtest"
	"github.com/atoll-run/atoll/sandbox"
)

// workload is what a machine did before its snapshot, and what it does when it is
// restored, which differs a little from one restore to the next.
type workload struct {
	name   string
	before string
	after  func(b *testing.B, r *microvm.Runtime, id string, i int)
}

var workloads = []workload{
	{"python starts", "python3 -c 'import json, re, subprocess, argparse, logging'",
		func(b *testing.B, r *microvm.Runtime, id string, i int) {
			must(b, r, id, fmt.Sprintf("python3 -c 'import json, re, subprocess, argparse; print(json.dumps(list(range(%d))))' > /tmp/out", 100*i+10))
		}},
	{"a package is compiled", "L=$(echo /usr/lib/python3*); mkdir -p /src; cp -r $L/json $L/email $L/http /src; rm -rf /src/*/__pycache__; python3 -m compileall -q /src/email; rm -rf /src/*/__pycache__",
		func(b *testing.B, r *microvm.Runtime, id string, i int) {
			must(b, r, id, fmt.Sprintf("echo 'x = %d' >> /src/json/decoder.py; python3 -m compileall -q /src/json", i))
		}},
	{"a server answers", "mkdir -p /www; for i in $(seq 50); do seq $((i * 400)) > /www/$i; done; cd /www; setsid python3 -m http.server --bind 127.0.0.1 8000 > /tmp/log 2>&1 < /dev/null & for i in $(seq 60); do python3 -c 'import urllib.request; urllib.request.urlopen(\"http://127.0.0.1:8000/7\").read()' 2> /tmp/err && exit; sleep 1; done; cat /tmp/log /tmp/err",
		func(b *testing.B, r *microvm.Runtime, id string, i int) {
			for page := range 10 {
				ask(b, r, id, fmt.Sprintf("/%d", (i*7+page)%50+1))
			}
		}},
}

// must runs a script that prints nothing unless it fails.
func must(b *testing.B, r *microvm.Runtime, id, script string) {
	b.Helper()
	if out := sh(b, r, id, script); out != "" {
		b.Fatalf("%s: %s", script, out)
	}
}

// ask gets a page from the server in a sandbox.
func ask(b *testing.B, r *microvm.Runtime, id, path string) {
	b.Helper()
	conn, err := r.Dial(b.Context(), id, 8000)
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	req, err := http.NewRequestWithContext(b.Context(), http.MethodGet, "http://sandbox"+path, nil)
	if err != nil {
		b.Fatal(err)
	}
	if err := req.Write(conn); err != nil {
		b.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), req)
	if err != nil {
		b.Fatal(err)
	}
	defer resp.Body.Close()
	if n, err := io.Copy(io.Discard, resp.Body); err != nil || n == 0 || resp.StatusCode != http.StatusOK {
		b.Fatalf("%s: %s, %d bytes, %v", path, resp.Status, n, err)
	}
}

// BenchmarkPrefetch measures restores of machines of 256 MiB whose snapshot is not in
// the host's memory: two to learn from, and then as many as -benchtime says, each
// with all memory read before, with pages when they are touched, and with those
// that were learned fetched ahead. What the later ones learn is thrown away.
func BenchmarkPrefetch(b *testing.B) {
	root := microvmtest.PythonRoot(b)
	b.Logf("| workload | MB in the snapshot | pages touched | fetched ahead | of those touched | in vain | first answer, ms: whole | lazy | ahead | work done, ms: whole | lazy | ahead |")
	for _, w := range workloads {
		b.Run(w.name, func(b *testing.B) { benchPrefetch(b, w, root) })
	}
}

func benchPrefetch(b *testing.B, w workload, root string) {
	dir, state := b.TempDir(), b.TempDir()
	larger := func(c *microvm.Config) { c.Defaults.Memory = 256 << 20 }
	r, s := open(b, dir, larger), spec(b, "first")
	s.Root.Path, s.Root.Digest = root, "blake3:python"
	if err := r.Create(b.Context(), s); err != nil {
		b.Fatal(err)
	}
	must(b, r, s.ID, w.before)
	if err := r.Snapshot(b.Context(), s.ID, state, sandbox.SnapshotOptions{Stop: true}); err != nil {
		b.Fatal(err)
	}
	if err := r.Close(); err != nil {
		b.Fatal(err)
	}
	n := 0
	restore := func(how string) (answer, done time.Duration, asked []uint32) {
		n++
		evict(b, state)
		r := open(b, dir, larger) // one that holds no memory of it
		defer destroyAll(b, r)
		s.ID, s.Labels = fmt.Sprintf("r%d", n), map[string]string{microvm.LabelMemory: how}
		begin := time.Now()
		if err := r.Restore(b.Context(), s, state); err != nil {
			b.Fatal(err)
		}
		answer = time.Since(begin)
		w.after(b, r, s.ID, n)
		done = time.Since(begin)
		if how == microvm.MemoryLazy {
			var err error
			if asked, err = r.Asked(b.Context(), s.ID); err != nil {
				b.Fatal(err)
			}
		}
		return answer, done, asked
	}
	for range 2 {
		restore("")
	}
	learned := filepath.Join(state, "prefetch.learned")
	model, err := os.ReadFile(learned)
	if err != nil {
		b.Fatal(err)
	}
	parsed, err := prefetch.Parse(model)
	if err != nil {
		b.Fatal(err)
	}
	plan := parsed.Plan()
	hows := []string{microvm.MemoryWhole, microvm.MemoryLazy, ""}
	answers, dones := make([][]time.Duration, len(hows)), make([][]time.Duration, len(hows))
	var sum prefetch.Score
	rounds := 0
	for b.Loop() {
		for i, how := range hows {
			if err := os.WriteFile(learned, model, 0o600); err != nil {
				b.Fatal(err)
			}
			answer, done, asked := restore(how)
			answers[i], dones[i] = append(answers[i], answer), append(dones[i], done)
			if asked != nil {
				score := prefetch.Compare(plan, asked)
				sum.Touched, sum.Planned, sum.Hits = sum.Touched+score.Touched, sum.Planned+score.Planned, sum.Hits+score.Hits
			}
		}
		rounds++
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(100*sum.Coverage(), "coverage-%")
	b.ReportMetric(100*(1-sum.Accuracy()), "waste-%")
	var row bytes.Buffer
	fmt.Fprintf(&row, "| %s | %.0f | %d | %d | %.1f %% | %.1f %% |", w.name, float64(memoryBytes(b, state))/1e6, sum.Touched/rounds, len(plan), 100*sum.Coverage(), 100*(1-sum.Accuracy()))
	for _, times := range slices.Concat(answers, dones) {
		slices.Sort(times)
		fmt.Fprintf(&row, " %d |", times[len(times)/2].Milliseconds())
	}
	b.Log(row.String())
}

// memoryBytes is how much memory a snapshot has on disk.
func memoryBytes(b *testing.B, state string) (n int64) {
	b.Helper()
	names, err := filepath.Glob(filepath.Join(state, "memory*"))
	if err != nil {
		b.Fatal(err)
	}
	for _, name := range names {
		st, err := os.Stat(name)
		if err != nil {
			b.Fatal(err)
		}
		n += st.Size()
	}
	return n
}

// evict drops a snapshot's files from the host's memory.
func evict(b *testing.B, state string) {
	b.Helper()
	entries, err := os.ReadDir(state)
	if err != nil {
		b.Fatal(err)
	}
	for _, e := range entries {
		f, err := os.Open(filepath.Join(state, e.Name()))
		if err != nil {
			b.Fatal(err)
		}
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
}
