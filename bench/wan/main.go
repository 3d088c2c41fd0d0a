// Command wan measures snapshot transfers between two nodes over an emulated slow link, beside naive full copies.
//
// It starts two daemons of the built binary in two network namespaces with a link of 100 Mbit/s and 100 ms between them, and
// pushes 20 snapshots of a sandbox that works, from one to the other, for packet losses of 0, 0.1 and 1 %. The naive copy sends
// the whole snapshot each time over one connection with the cubic congestion control: its speed is measured over the same
// link, and its time follows. Run it as root: `make bench-wan`.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/internal/machine"
	"github.com/atoll-run/atoll/internal/wan"
)

// worker is the program that works in the sandbox: a table of 48 MB in memory, of which each step changes 2,000 places, and a
// log on disk that grows by 200 KB.
const worker = `
import os, random
r = random.Random(1)
words = [bytes(r.choices(b'abcdefghijklmnopqrstuvwxyz ', k=r.randint(3, 12))) for _ in range(4000)]
table = bytearray(b' '.join(r.choices(words, k=5_000_000))[:48 << 20])
if not os.path.exists('/tmp/steps'): os.mkfifo('/tmp/steps')
open('/tmp/ready', 'w').close()
while True:
    with open('/tmp/steps') as steps:
        for step in steps:
            for _ in range(2000):
                at = r.randrange(len(table) - 200)
                new = b' '.join(r.choices(words, k=12))
                table[at:at+len(new)] = new
            with open('/tmp/log', 'ab') as log:
                log.write(b'\n'.join(b' '.join(r.choices(words, k=10)) for _ in range(2500)))
            with open('/tmp/done', 'w') as done: done.write(step.strip())
`

func main() {
	transfers := flag.Int("n", 20, "how many `snapshots` to transfer")
	home := flag.String("home", filepath.Join(os.TempDir(), "atoll-bench-wan"), "the `directory` for both nodes; the base image in it is kept")
	out := flag.String("o", filepath.Join("docs", "wan.md"), "the `file` that the table goes to")
	only := flag.Float64("loss", -1, "measure this `part` of packets lost only, and print instead of writing")
	late := flag.Bool("late", false, "measure instead how soon a machine answers whose snapshot lies on the other node, and print that")
	flag.Parse()
	losses := []float64{0, 0.001, 0.01}
	if *only >= 0 {
		losses, *out = []float64{*only}, os.DevNull
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	measure := func() error { return run(ctx, *home, *out, *transfers, losses) }
	if *late {
		measure = func() error { return runLate(ctx, *home, losses[0]) }
	}
	if err := measure(); err != nil {
		fmt.Fprintln(os.Stderr, "bench-wan:", err)
		os.Exit(1)
	}
}

// figures are those of one cell.
type figures struct {
	size, wire  int64
	took        time.Duration
	first, rest time.Duration
	naive       float64 // bytes per second
}

func run(ctx context.Context, home, out string, transfers int, losses []float64) error {
	atoll, err := filepath.Abs("bin/atoll")
	if err != nil {
		return err
	}
	base := filepath.Join(home, "base")
	if err := prepare(ctx, atoll, base, "gvisor"); err != nil {
		return fmt.Errorf("making the base image: %w", err)
	}
	text := fmt.Sprintf(preface, transfers, machine.Describe())
	for _, loss := range losses {
		f, err := cell(ctx, atoll, home, base, loss, transfers)
		if err != nil {
			return err
		}
		naive := float64(f.size) / f.naive
		row := fmt.Sprintf("| %.1f %% | %.1f MB | %.2f MB | %.1f | %.1f | %.1f | %.2f | %.0f at %.1f Mbit/s | **%.1f** |\n", loss*100, float64(f.size)/1e6,
			float64(f.wire)/1e6, float64(f.size)/float64(f.wire), f.took.Seconds(), f.first.Seconds(), f.rest.Seconds()/float64(max(transfers-1, 1)),
			naive, f.naive*8/1e6, naive/f.took.Seconds())
		fmt.Print(row)
		text += row
	}
	return os.WriteFile(out, []byte(text), 0o644)
}

const preface = `# Moves over a slow link

Written by ` + "`make bench-wan`" + `, which needs root; do not edit. Two nodes, each in a network namespace, with 100 Mbit/s and a
round trip of 100 ms between them (` + "`internal/wan`" + `: kernels' TCP over a queue in user space that loses packets by a seed). A
gVisor sandbox works on a table of 48 MB in memory and a growing log. %d times it does a step, is saved while it runs, and
the snapshot is pushed to the other node, which has at first the sandbox's image and what each node of its version has.

- *sent* is what the nodes say that they sent: deltas and what describes them, without the headers of TLS and TCP.
- *time* is from asking for a push until the snapshot is verified and on disk at the other end, of all of them together;
  processor time to make and apply the deltas is in it.
- *naive copies* send all bytes of each snapshot over one connection with the cubic congestion control. Their time is
  **computed**: all bytes, by the speed that such a connection reached over the same link in 15 s, after 5 s of getting
  there. Neither reading nor verifying nor connecting is counted: it is what one warm connection gives at best.

On %s:

| loss | snapshots | sent | times fewer bytes | time, s | of the first, s | of each other, s | naive copies, s | times faster |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
`

// prepare makes the base image, and what machines need, in a home that all nodes start from.
func prepare(ctx context.Context, atoll, base, kind string) error {
	cmd := exec.CommandContext(ctx, atoll, "--home", base, "run", "--rm", "--runtime", kind, "--network", "none", "--memory", "512M", "base", "--", "true")
	cmd.Stderr = os.Stderr
	return cmd.Run()
}

// side is one node in its namespace.
type side struct {
	link   *wan.Link
	number int
	atoll  string
	kind   string // of runtime
	home   string
	addr   string
	daemon *exec.Cmd
}

// run runs the command line in the side's namespace and returns what it printed.
func (s *side) run(ctx context.Context, args ...string) (string, error) {
	var out, said bytes.Buffer
	cmd := exec.CommandContext(ctx, s.atoll, args...)
	cmd.Env = append(os.Environ(), "ATOLL_HOME="+s.home, "ATOLL_ADDR="+s.addr)
	cmd.Stdout, cmd.Stderr = &out, &said
	err := s.link.Start(s.number, cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return "", fmt.Errorf("atoll %s: %w: %s", strings.Join(args, " "), err, said.String())
	}
	return strings.TrimSpace(out.String()), nil
}

// start starts the side's daemon from a copy of the base home's images.
func (s *side) start(ctx context.Context, base string) error {
	if err := errors.Join(os.RemoveAll(s.home), os.MkdirAll(s.home, 0o700)); err != nil {
		return err
	}
	have := []string{"-a", filepath.Join(base, "images")}
	if s.kind == "microvm" {
		have = append(have, filepath.Join(base, "machines")) // kernel and template
	}
	if err := exec.CommandContext(ctx, "cp", append(have, s.home)...).Run(); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(s.home, "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	s.daemon = exec.Command(s.atoll, "up", "--runtime", s.kind, "--name", "node"+fmt.Sprint(s.number))
	s.daemon.Env = append(os.Environ(), "ATOLL_HOME="+s.home, "ATOLL_ADDR="+s.addr)
	s.daemon.Stdout, s.daemon.Stderr = log, log
	if err := s.link.Start(s.number, s.daemon); err != nil {
		return err
	}
	for range 600 {
		if _, err = s.run(ctx, "info"); err == nil || ctx.Err() != nil {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

func (s *side) end() {
	if s.daemon != nil && s.daemon.Process != nil {
		_, _ = s.run(context.Background(), "rm", "-f", "worker", "other")
		_ = s.daemon.Process.Signal(syscall.SIGTERM)
		_ = s.daemon.Wait()
	}
}

// slow is the path between the nodes.
func slow(loss float64) wan.Path {
	return wan.Path{Rate: 100e6, Delay: 50 * time.Millisecond, Loss: loss, Queue: 625_000, Seed: 1}
}

// sides are two nodes that are yet to be started.
func sides(l *wan.Link, atoll, home, kind string) (a, b *side) {
	return &side{link: l, number: 0, atoll: atoll, kind: kind, home: filepath.Join(home, "a"), addr: wan.AddrA.String() + ":7700"},
		&side{link: l, number: 1, atoll: atoll, kind: kind, home: filepath.Join(home, "b"), addr: wan.AddrB.String() + ":7700"}
}

// meet starts two nodes and has them know each other.
func meet(ctx context.Context, a, b *side, base string) error {
	for _, s := range []*side{a, b} {
		if err := s.start(ctx, base); err != nil {
			return err
		}
	}
	token, err := b.run(ctx, "node", "token", "-q")
	if err == nil {
		_, err = a.run(ctx, "node", "join", b.addr, token)
	}
	return err
}

// cell measures one loss.
func cell(ctx context.Context, atoll, home, base string, loss float64, transfers int) (f figures, err error) {
	l, err := wan.Open(slow(loss))
	if err != nil {
		return f, err
	}
	defer l.Close()
	a, b := sides(l, atoll, home, "gvisor")
	defer a.end()
	defer b.end()
	err = meet(ctx, a, b, base)
	if err == nil {
		_, err = a.run(ctx, "create", "base", "--name", "worker", "--network", "none", "--memory", "512M")
	}
	if err == nil {
		_, err = a.run(ctx, "exec", "worker", "--", "bash", "-c", "cat > /tmp/worker.py <<'EOF'\n"+worker+"\nEOF\nsetsid nohup python3 /tmp/worker.py > /tmp/worker.log 2>&1 &\nwhile ! [ -e /tmp/ready ]; do sleep 0.1; done")
	}
	for i := 0; i < transfers && err == nil; i++ {
		err = f.transfer(ctx, a, i)
	}
	if err == nil {
		f.naive, err = naive(l)
	}
	return f, err
}

// transfer lets the sandbox work, saves it and pushes that.
func (f *figures) transfer(ctx context.Context, a *side, i int) error {
	work := fmt.Sprintf("echo %d > /tmp/steps; while [ \"$(cat /tmp/done 2>/dev/null)\" != %d ]; do sleep 0.05; done", i, i)
	if _, err := a.run(ctx, "exec", "worker", "--", "bash", "-c", work); err != nil {
		return err
	}
	id, err := a.run(ctx, "snapshot", "worker", "-q")
	if err != nil {
		return err
	}
	out, err := a.run(ctx, "snapshot", "push", id, "node1", "-o", "json")
	if err != nil {
		return err
	}
	var res struct {
		Wire int64         `json:"wire"`
		Took time.Duration `json:"took"`
	}
	if err := json.Unmarshal([]byte(out), &res); err != nil {
		return err
	}
	// The naive copy need not send the root either: the state only counts.
	out, err = a.run(ctx, "snapshot", "inspect", id)
	var snap struct {
		Size int64 `json:"size"`
	}
	if err == nil {
		err = json.Unmarshal([]byte(out), &snap)
	}
	f.size, f.wire, f.took = f.size+snap.Size, f.wire+res.Wire, f.took+res.Took
	if i == 0 {
		f.first = res.Took
	} else {
		f.rest += res.Took
	}
	return err
}

// naive measures how many bytes per second one connection with cubic carries, over 15 s after its first 5.
func naive(l *wan.Link) (float64, error) {
	const settle, measure = 5 * time.Second, 15 * time.Second
	var ln net.Listener
	if err := l.Do(1, func() (err error) {
		ln, err = net.Listen("tcp", wan.AddrB.String()+":9999")
		return err
	}); err != nil {
		return 0, err
	}
	defer ln.Close()
	got := make(chan float64, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			got <- 0
			return
		}
		defer c.Close()
		began, n := time.Now(), int64(0)
		for buf := make([]byte, 256<<10); time.Since(began) < settle+measure; {
			k, err := c.Read(buf)
			if time.Since(began) > settle {
				n += int64(k)
			}
			if err != nil {
				break
			}
		}
		got <- float64(n) / (time.Since(began) - settle).Seconds()
	}()
	var c net.Conn
	if err := l.Do(0, func() (err error) {
		d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
			var refused error
			err := raw.Control(func(fd uintptr) {
				refused = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "cubic")
			})
			return errors.Join(err, refused)
		}}
		c, err = d.Dial("tcp", wan.AddrB.String()+":9999")
		return err
	}); err != nil {
		return 0, err
	}
	go func() {
		_, _ = io.Copy(c, zeros{}) // until the other end has seen enough
		_ = c.Close()
	}()
	return <-got, nil
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
