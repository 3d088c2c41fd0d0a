package daemon

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/guesttest"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/runtime/microvm"
	"github.com/atoll-run/atoll/sandbox"
)

// twoNodes runs two daemons with a runtime, each of which trusts the other.
func twoNodes(t *testing.T, runtime string) (a, b *native.Client, url string) {
	t.Helper()
	var clients [2]*native.Client
	for i := range clients {
		cfg := config(t)
		cfg.Runtimes, cfg.Name = []string{runtime}, "node"+strconv.Itoa(i)
		if runtime == microvm.Name {
			shareKernels(t, cfg.Home)
		}
		ep, _ := serve(t, cfg)
		clients[i] = client(t, cfg, ep)
		if i == 0 {
			url = ep.URL
		}
		t.Cleanup(func() {
			all, _ := clients[i].List(context.Background(), node.Filter{})
			for _, sb := range all {
				_ = clients[i].Remove(context.Background(), sb.ID)
			}
		})
	}
	token, err := clients[1].NodeToken(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := clients[0].JoinNode(t.Context(), token.Addr, token.Token); err != nil {
		t.Fatal(err)
	}
	return clients[0], clients[1], url
}

// follower is a command in a sandbox that counts, and whoever reads what it prints.
type follower struct {
	name   string
	agent  *guest.Client
	marker string // made when it is to end

	begun chan struct{}
	ended chan error
}

// follow starts one and returns when it has printed something.
func follow(t *testing.T, name string, agent *guest.Client) *follower {
	t.Helper()
	f := &follower{name: name, agent: agent, marker: "/end-" + name, begun: make(chan struct{}), ended: make(chan error, 1)}
	go func() { f.ended <- f.read(t.Context()) }()
	select {
	case <-f.begun:
	case err := <-f.ended:
		t.Fatalf("%s: %v", name, err)
	}
	return f
}

// read fails unless every number comes once.
func (f *follower) read(ctx context.Context) error {
	p, err := f.agent.Start(ctx, guest.Command{Args: []string{"/usr/bin/bash", "-c", "i=0; while [[ ! -e " + f.marker + " ]]; do echo $((i++)); sleep 0.005; done; echo end"}})
	if err != nil {
		return err
	}
	defer p.Close()
	from, to := io.Pipe()
	result := make(chan error, 1)
	go func() {
		res, err := p.Wait(to, io.Discard)
		if err == nil && res.ExitCode != 0 {
			err = fmt.Errorf("it ended with %d", res.ExitCode)
		}
		_ = to.Close()
		result <- err
	}()
	lines := bufio.NewScanner(from)
	for i := 0; lines.Scan(); i++ {
		if i == 0 {
			close(f.begun)
		}
		if lines.Text() == "end" {
			return <-result
		}
		if lines.Text() != strconv.Itoa(i) {
			return fmt.Errorf("after %d came %q", i-1, lines.Text())
		}
	}
	return fmt.Errorf("cut off: %w", <-result)
}

// conformance: V3
func TestWhoIsConnectedMissesNothingWhenASandboxMovesAway(t *testing.T) {
	testConnected(t, "gvisor")
}

// testConnected moves a sandbox there and back while clients of the first node read from it in every way that there is.
func testConnected(t *testing.T, runtime string) {
	ctx := t.Context()
	a, b, url := twoNodes(t, runtime)
	if _, err := a.ImportImage(ctx, "root", bytes.NewReader(rootTar(t))); err != nil {
		t.Fatal(err)
	}
	sb, err := a.Create(ctx, node.CreateRequest{Image: "root", Name: "mover", Network: sandbox.NetworkNone, User: "root",
		Resources: sandbox.Resources{Memory: 256 << 20, Disk: 1 << 30}, Secure: true})
	if err != nil {
		t.Fatal(err)
	}
	// A second agent stands for any server in the sandbox.
	agent := guest.New(func(ctx context.Context) (net.Conn, error) { return a.Dial(ctx, sb.ID, sandbox.GuestPort) }, guest.Options{Token: sb.GuestToken})
	server, err := os.Open(guesttest.Binary(t))
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if err := agent.WriteFile(ctx, "/server", server); err != nil {
		t.Fatal(err)
	}
	sh(t, a, sb, "chmod +x /server; (/server -listen tcp:127.0.0.1:8080 > /dev/null 2>&1 &); for i in {1..200}; do : 2>/dev/null < /dev/tcp/127.0.0.1/8080 && exit 0; sleep 0.05; done; exit 1")
	port, err := a.Expose(ctx, sb.ID, node.Port{Guest: 8080})
	if err != nil {
		t.Fatal(err)
	}
	exposed := func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port.Host)))
	}
	through := func(port int) *guest.Client {
		return guest.NewURL(url, guest.Options{Token: sb.GuestToken, Header: http.Header{"E2b-Sandbox-Id": {sb.ID}, "E2b-Sandbox-Port": {strconv.Itoa(port)}}})
	}
	ways := map[string]*guest.Client{
		"dial":    agent,
		"traffic": through(sandbox.GuestPort),
		"server":  through(8080),
		"exposed": guest.New(exposed, guest.Options{}),
	}
	var all []*follower
	for name, agent := range ways {
		all = append(all, follow(t, name, agent))
	}
	for _, move := range []struct {
		from *native.Client
		to   string
	}{{a, "node1"}, {b, "node0"}} {
		moved, err := move.from.Migrate(ctx, "mover", move.to, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("measured: V3 %s sandbox with clients connected to the first node, moved %s %s: downtime %v, copies %v, then %d bytes", runtime,
			moved.Way, moved.Why, moved.Downtime.Round(time.Millisecond), moved.Rounds, moved.Final+moved.Stream)
		if live := runtime == microvm.Name; live != (moved.Way == carry.Live) {
			t.Errorf("it was moved %s: %s", moved.Way, moved.Why)
		}
		// Whoever comes anew to the first node is served as before.
		for name, agent := range ways {
			out, err := agent.Run(ctx, guest.Command{Args: []string{"/usr/bin/bash", "-c", "echo new"}})
			if err != nil || string(out.Stdout) != "new\n" {
				t.Errorf("%s, after the move to %s: %+v, %v", name, move.to, out, err)
			}
		}
		if got, err := a.Get(ctx, "mover"); err != nil || got.State != sandbox.Running || got.GuestToken != sb.GuestToken {
			t.Errorf("the first node knows of %+v, %v", got, err)
		}
	}
	for _, f := range all {
		sh(t, a, sb, "> "+f.marker)
		if err := <-f.ended; err != nil {
			t.Errorf("%s: %v", f.name, err)
		}
	}
	// What is asked of the first node happens where the sandbox is.
	if _, err := a.Migrate(ctx, "mover", "node1", nil); err != nil {
		t.Fatal(err)
	}
	if err := a.Rename(ctx, "mover", "moved"); err != nil {
		t.Error(err)
	}
	if got, err := b.Get(ctx, "moved"); err != nil || got.ID != sb.ID {
		t.Errorf("%+v, %v", got, err)
	}
	if err := a.Remove(ctx, sb.ID); err != nil {
		t.Error(err)
	}
	if got, err := b.Get(ctx, sb.ID); err != nil || got.State != sandbox.Terminated {
		t.Errorf("%+v, %v", got, err)
	}
}
