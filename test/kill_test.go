package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/image"
)

const (
	killsEnv = "ATOLL_TEST_KILLS" // how many moves are hit by a kill
	kills    = 8
	resolved = time.Minute // until a sandbox is in one place again
)

// conformance: V3
func TestADaemonKilledInTheMiddleOfAMoveLeavesTheSandboxInOnePlace(t *testing.T) {
	rounds := kills
	if s := os.Getenv(killsEnv); s != "" {
		var err error
		if rounds, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	nodes := pairOfNodes(t)
	if out, err := nodes[0].command("create", "base", "--name", "mover", "--network", "none", "--memory", "256M").CombinedOutput(); err != nil {
		t.Fatalf("create: %v\n%s", err, out)
	}
	nodes[0].script(t, "echo 0 > /n; (while :; do read i < /n; echo $((i+1)) > /m; mv /m /n; sleep 0.02; done) > /dev/null 2>&1 &")
	// One move without a kill says how long they take.
	at, began := 0, time.Now()
	if out, err := nodes[0].command("migrate", "mover", nodes[1].name()).CombinedOutput(); err != nil {
		t.Fatalf("migrate: %v\n%s", err, out)
	}
	whole, at := time.Since(began), 1-at
	r := rand.New(rand.NewPCG(7, 7))
	moved := 0
	for round := range rounds {
		source, target := nodes[at], nodes[1-at]
		before := source.counted(t)
		move := source.command("migrate", "mover", target.name())
		if err := move.Start(); err != nil {
			t.Fatal(err)
		}
		// Spread over the move, and beyond its end, since none is like the other.
		delay := time.Duration((float64(round) + r.Float64()) / float64(rounds) * 1.1 * float64(whole))
		victim := nodes[r.IntN(2)]
		time.Sleep(delay)
		_ = victim.cmd.Process.Kill()
		<-victim.exited
		victim.start(t)
		_ = move.Wait() // it may have failed, and that is seen below
		was := at
		at = settledAt(t, nodes)
		if at != was {
			moved++
		}
		if now := nodes[at].counted(t); now < before {
			t.Errorf("round %d: it had counted to %d, and now to %d", round, before, now)
		}
		t.Logf("round %d: %s killed after %v of %v; the sandbox is at %s, was at %s", round, victim.name(), delay.Round(time.Millisecond), whole.Round(time.Millisecond), nodes[at].name(), nodes[was].name())
	}
	t.Logf("measured: V3 %d moves hit by kill -9 of a daemon: %d moved, %d stayed, 0 in two places, 0 in none", rounds, moved, rounds-moved)
	nodes[at].removeAll(t)
	for _, n := range nodes {
		if out, err := n.command("snapshot", "ls", "-q").Output(); err != nil || len(bytes.TrimSpace(out)) > 0 {
			t.Errorf("snapshots are left behind: %s, %v", out, err)
		}
		if got := n.settled(t, nil)["control groups"]; got > spare {
			t.Errorf("%d control groups are left", got)
		}
	}
}

// spare is how many kernels, which wait for sandboxes, a node may have.
const spare = 4

// pairOfNodes starts two nodes that trust each other, each at an address that it keeps.
func pairOfNodes(t *testing.T) [2]*node {
	t.Helper()
	var nodes [2]*node
	for i := range nodes {
		images := t.TempDir()
		smallBase(t, images)
		n := newNode(t, os.Getenv("ATOLL_TEST_RUNTIME"), images)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		n.addr = l.Addr().String()
		_ = l.Close()
		n.args = []string{"--name", fmt.Sprintf("node%d", i), "--prewarm", "0"}
		n.start(t)
		t.Cleanup(func() { n.remove(t) })
		nodes[i] = n
	}
	token, err := nodes[1].command("node", "token", "-q").Output()
	if err != nil {
		t.Fatal(describe(err))
	}
	if out, err := nodes[0].command("node", "join", nodes[1].addr, strings.TrimSpace(string(token))).CombinedOutput(); err != nil {
		t.Fatalf("join: %v\n%s", err, out)
	}
	return nodes
}

// smallBase makes an image named base of a few of this host's programs, so that none is built.
func smallBase(t *testing.T, dir string) {
	t.Helper()
	const script = `(echo /etc/passwd; echo /etc/group; for p in $(command -v bash cat mv sleep); do echo "$p"; ldd "$p" | grep -o '/[^ ]*'; done) | sort -u | sed "s,^/,," | tar -C / -chf - -T -`
	root, err := exec.Command("bash", "-c", script).Output()
	if err != nil {
		t.Skip("a root cannot be made from this host's tools:", err)
	}
	images, err := image.Open(dir, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := images.Import(t.Context(), bytes.NewReader(root), image.ImportOptions{Name: image.BaseName}); err != nil {
		t.Fatal(err)
	}
}

func (n *node) name() string { return n.args[1] }

// script runs a shell script in the sandbox and returns what it prints.
func (n *node) script(t *testing.T, text string) string {
	t.Helper()
	out, err := n.command("exec", "-u", "root", "-w", "/", "mover", "--", "/usr/bin/bash", "-c", text).Output()
	if err != nil {
		t.Fatalf("%s: exec %q: %s%v", n.name(), text, out, describe(err))
	}
	return strings.TrimSpace(string(out))
}

// counted returns how far the sandbox has counted, and fails unless it goes on.
func (n *node) counted(t *testing.T) int {
	t.Helper()
	out := n.script(t, "read a < /n; b=$a; for i in {1..1000}; do read b < /n; [[ -n $b && $b != $a ]] && break; sleep 0.02; done; echo $a $b")
	var a, b int
	if _, err := fmt.Sscan(out, &a, &b); err != nil || b <= a {
		t.Fatalf("%s: it stands still: %q, %v", n.name(), out, err)
	}
	return b
}

// settledAt returns which node has the sandbox, once just one has and it is under way no more.
func settledAt(t *testing.T, nodes [2]*node) int {
	t.Helper()
	for end := time.Now().Add(resolved); ; time.Sleep(100 * time.Millisecond) {
		var have []int
		still := true
		for i, n := range nodes {
			out, err := n.command("ls", "-o", "json").Output()
			if err != nil {
				t.Fatal(describe(err))
			}
			var list []struct{ Name, State, Moving string }
			if err := json.Unmarshal(out, &list); err != nil {
				t.Fatalf("%s: %v", out, err)
			}
			for _, sb := range list {
				have = append(have, i)
				still = still && sb.State == "running" && sb.Moving == ""
			}
		}
		if len(have) == 1 && still {
			return have[0]
		}
		if time.Now().After(end) {
			t.Fatalf("the sandbox is at %v of the nodes, settled: %v\n%s\n%s", have, still, nodes[0].complaints(), nodes[1].complaints())
		}
	}
}
