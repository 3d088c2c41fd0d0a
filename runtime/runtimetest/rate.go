package runtimetest

import (
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/network"
	"github.com/atoll-run/atoll/sandbox"
)

func canNetwork(c sandbox.Capabilities) bool {
	return slices.Contains(c.Networks, sandbox.NetworkSandbox) && canIsolate(c)
}

// testRateLimit sends through a link with a limit, out of the sandbox and into it.
func testRateLimit(t *testing.T, s *suite) {
	const rate, amount = 512 << 10, 1 << 20 // bytes per second, bytes
	n, err := network.Open(network.Config{Dir: t.TempDir(), Prefix: fmt.Sprintf("rt%d", os.Getpid())})
	if sandbox.Is(err, sandbox.Denied) {
		t.Skipf("needs the right to make networks: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	spec := s.spec(func(spec *sandbox.Spec) { spec.Network = sandbox.NetworkSandbox })
	link, err := n.Attach(t.Context(), spec.ID, sandbox.NetworkPolicy{RateLimit: rate})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.destroyAll(t)
		if err := n.Sweep(nil); err != nil {
			t.Error(err)
		}
	})
	l, err := net.Listen("tcp", net.JoinHostPort(link.Gateway.String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	// The host itself is reachable by its single address alone.
	policy := sandbox.NetworkPolicy{RateLimit: rate, AllowOut: []string{link.Gateway.String()}}
	if err := n.Update(t.Context(), spec.ID, policy); err != nil {
		t.Fatal(err)
	}
	go serveAmount(l, amount)
	spec.Link = &link
	if err := s.Runtime.Create(deadline(t), spec); err != nil {
		t.Fatalf("Create: %v", err)
	}
	b := s.box(t, spec)
	if b.sh("command -v bash").Exit != 0 {
		t.Skip("needs bash in the sandbox")
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	open := fmt.Sprintf("exec 3<>/dev/tcp/%s/%s; ", link.Gateway, port)
	// Nothing is said about how long it takes at most. What a bucket lets through
	// at once is less than a quarter.
	const least = time.Second * amount * 3 / 4 / rate
	for what, script := range map[string]string{
		"sent":     fmt.Sprintf("echo take >&3; head -c %d /dev/zero >&3; cat <&3", amount),
		"received": "echo give >&3; wc -c <&3",
	} {
		begin := time.Now()
		if got := strings.TrimSpace(b.must("bash -c '" + open + script + "'")); got != fmt.Sprint(amount) {
			t.Errorf("%d bytes %s became %q", amount, what, got)
		}
		took := time.Since(begin)
		if took < least {
			t.Errorf("%d bytes were %s in %v, at a limit of %d a second", amount, what, took, rate)
		}
		t.Logf("measured: FR2.5 %d KiB %s in %v at a limit of %d KiB/s", amount>>10, what, took.Round(time.Millisecond), rate>>10)
	}
}

// serveAmount takes so many bytes from who says "take", and says how many they
// were, and gives as many to who says "give".
func serveAmount(l net.Listener, amount int64) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			word := make([]byte, len("take\n"))
			if _, err := io.ReadFull(c, word); err != nil {
				return
			}
			if string(word) == "give\n" {
				_, _ = c.Write(make([]byte, amount))
				return
			}
			n, _ := io.CopyN(io.Discard, c, amount)
			fmt.Fprintln(c, n)
		}()
	}
}
