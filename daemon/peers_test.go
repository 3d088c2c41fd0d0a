package daemon

import (
	"bytes"
	"context"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// rootTar is an archive of a root with a shell, a few tools and their libraries, from this host.
func rootTar(t *testing.T) []byte {
	t.Helper()
	const script = `for p in $(command -v bash cat chmod sleep); do echo "$p"; ldd "$p" | grep -o '/[^ ]*'; done | sort -u | sed 's,^/,,' | tar -C / -chf - -T -`
	cmd := exec.Command("bash", "-c", script)
	out, err := cmd.Output()
	if err != nil {
		t.Skip("a root cannot be made from this host's tools:", err)
	}
	return out
}

// client asks a daemon with its root key.
func client(t *testing.T, cfg Config, ep Endpoint) *native.Client {
	t.Helper()
	key, err := os.ReadFile(cfg.Home.Credentials())
	if err != nil {
		t.Fatal(err)
	}
	c, err := native.NewClient(ep.URL, strings.TrimSpace(string(key)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// sh runs a command in a sandbox and returns what it prints.
func sh(t *testing.T, c *native.Client, sb node.Sandbox, script string) string {
	t.Helper()
	g := guest.New(func(ctx context.Context) (net.Conn, error) { return c.Dial(ctx, sb.ID, sandbox.GuestPort) }, guest.Options{Token: sb.GuestToken})
	defer g.CloseIdle()
	out, err := g.Run(t.Context(), guest.Command{Args: []string{"/usr/bin/bash", "-c", script}})
	if err != nil || out.ExitCode != 0 {
		t.Fatalf("%q: %+v, %v", script, out, err)
	}
	return strings.TrimSpace(string(out.Stdout))
}

// conformance: V3
func TestTwoNodesExchangeSnapshotsAndARunningSandbox(t *testing.T) {
	ctx := t.Context()
	var clients [2]*native.Client
	for i := range clients {
		cfg := config(t)
		cfg.Runtimes, cfg.Name = []string{"gvisor"}, "node"+strconv.Itoa(i)
		ep, _ := serve(t, cfg)
		clients[i] = client(t, cfg, ep)
		t.Cleanup(func() {
			all, _ := clients[i].List(context.Background(), node.Filter{})
			for _, sb := range all {
				_ = clients[i].Remove(context.Background(), sb.ID)
			}
		})
	}
	a, b := clients[0], clients[1]
	token, err := b.NodeToken(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := a.JoinNode(ctx, token.Addr, token.Token); err != nil || n.Name != "node1" || n.Error != "" {
		t.Fatalf("%+v, %v", n, err)
	}
	if nodes, err := b.Nodes(ctx); err != nil || len(nodes) != 1 || nodes[0].Name != "node0" || nodes[0].Error != "" {
		t.Fatalf("%+v, %v", nodes, err)
	}
	if _, err := a.ImportImage(ctx, "root", bytes.NewReader(rootTar(t))); err != nil {
		t.Fatal(err)
	}
	sb, err := a.Create(ctx, node.CreateRequest{Image: "root", Name: "mover", Network: sandbox.NetworkNone, User: "root"})
	if err != nil {
		t.Fatal(err)
	}
	sh(t, a, sb, "echo 0 > /n; (i=0; while :; do echo $((++i)) > /n; sleep 0.02; done) > /dev/null 2>&1 &")

	snap, err := a.Snapshot(ctx, sb.ID, "first")
	if err != nil {
		t.Fatal(err)
	}
	first, err := a.Carry(ctx, native.CarryRequest{Kind: carry.Snapshot, Ref: "first", Node: "node1"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	twin, err := b.Restore(ctx, snap.ID, node.CreateRequest{Name: "twin"})
	if err != nil {
		t.Fatal(err)
	}
	counts(t, b, twin)
	if _, err := a.Snapshot(ctx, sb.ID, "second"); err != nil {
		t.Fatal(err)
	}
	second, err := b.Carry(ctx, native.CarryRequest{Kind: carry.Snapshot, Ref: "second", Node: "node0", Pull: true}, nil)
	if err != nil || second.Wire*10 > second.Size {
		t.Fatalf("%+v, %v", second, err)
	}
	t.Logf("measured: W2 a running sandbox's snapshot of %d bytes: %d sent; the next: %d", first.Size, first.Wire, second.Wire)

	before := counts(t, a, sb)
	moved, err := a.Migrate(ctx, "mover", "node1", nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := b.Get(ctx, "mover")
	if err != nil || got.ID != sb.ID || got.State != sandbox.Running {
		t.Fatalf("%+v, %v", got, err)
	}
	if after := counts(t, b, got); after < before {
		t.Errorf("it counted to %d, and now to %d", before, after)
	}
	if old, err := a.List(ctx, node.Filter{}); err != nil || len(old) != 0 {
		t.Errorf("the source still has %+v, %v", old, err)
	}
	t.Logf("measured: V3 gVisor sandbox between two nodes: downtime %v, copies %v, then %d bytes", moved.Downtime.Round(time.Millisecond), moved.Rounds, moved.Final)
	if _, err := a.Migrate(ctx, "mover", "node1", nil); err == nil {
		t.Error("what is gone is moved again")
	}
	// A stranger's request to the same port is still plain HTTP.
	resp, err := http.Get("http://" + token.Addr + "/health")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
}

// counts returns how far the loop in a sandbox is, and fails unless it goes on.
func counts(t *testing.T, c *native.Client, sb node.Sandbox) int {
	t.Helper()
	out := sh(t, c, sb, "a=$(cat /n); b=$a; for i in {1..1000}; do b=$(cat /n); [[ -n $b && $b != $a ]] && break; sleep 0.02; done; echo $a $b")
	var nums []int
	for _, f := range strings.Fields(out) {
		n, err := strconv.Atoi(f)
		if err != nil {
			t.Fatalf("%q", out)
		}
		nums = append(nums, n)
	}
	if len(nums) != 2 || nums[1] <= nums[0] {
		t.Errorf("its processes stand still: %q", out)
	}
	return nums[len(nums)-1]
}
