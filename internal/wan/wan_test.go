package wan_test

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/internal/wan"
)

func open(t *testing.T, p wan.Path) *wan.Link {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, as network namespaces do")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("needs /dev/net/tun")
	}
	l, err := wan.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func TestALossyLinkCarriesTCPWhole(t *testing.T) {
	l := open(t, wan.Path{Rate: 200e6, Delay: 2 * time.Millisecond, Loss: 0.01, Seed: 7})
	var ln net.Listener
	if err := l.Do(1, func() (err error) {
		ln, err = net.Listen("tcp", wan.AddrB.String()+":9000")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	want := make([]byte, 3<<20)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range want {
		want[i] = byte(r.Uint32())
	}
	got := make(chan []byte, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			got <- nil
			return
		}
		defer c.Close()
		b, _ := io.ReadAll(c)
		got <- b
	}()
	var c net.Conn
	if err := l.Do(0, func() (err error) {
		c, err = net.Dial("tcp", wan.AddrB.String()+":9000")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(want); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if !bytes.Equal(<-got, want) {
		t.Error("what arrived is something else")
	}
	if lost := l.There.Lost.Load(); lost == 0 || l.Back.Lost.Load() > 0 {
		t.Errorf("%d packets were lost there, %d back", lost, l.Back.Lost.Load())
	}
	if n := l.There.Bytes.Load(); n < int64(len(want)) || n > 2*int64(len(want)) {
		t.Errorf("%d bytes were carried for %d", n, len(want))
	}
}

func TestALinkThatIsClosedLeavesNothing(t *testing.T) {
	before := descriptors(t)
	for range 3 {
		l := open(t, wan.Path{Rate: 100e6, Delay: time.Millisecond, Seed: 1})
		if n := descriptors(t); n <= before {
			t.Fatalf("%d descriptors before, %d with a link", before, n)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if n := descriptors(t); n != before {
		t.Errorf("%d descriptors of namespaces and devices before, %d after", before, n)
	}
	if _, err := net.InterfaceByName("wan0"); err == nil {
		t.Error("a device is left")
	}
}

// descriptors counts those that keep a namespace or a device.
func descriptors(t *testing.T) (n int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		to, _ := os.Readlink("/proc/self/fd/" + e.Name())
		if strings.HasPrefix(to, "/proc/") && strings.HasSuffix(to, "/ns/net") || strings.HasPrefix(to, "net:") || to == "/dev/net/tun" {
			n++
		}
	}
	return n
}

func TestNothingElseIsReachedFromTheEnds(t *testing.T) {
	l := open(t, wan.Path{Rate: 1e9, Seed: 1})
	if err := l.Do(0, func() error {
		c, err := net.DialTimeout("tcp", "192.0.2.1:80", time.Second)
		if err == nil {
			_ = c.Close()
			t.Error("the outside is reached")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
