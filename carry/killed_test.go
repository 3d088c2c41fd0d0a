package carry_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/peer"
	"github.com/atoll-run/atoll/peer/peertest"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/snapshot"
)

// ownNode names the directory of the node that a process of its own is, and ownAddr where it listens.
const ownNode, ownAddr = "ATOLL_TEST_CARRY_DIR", "ATOLL_TEST_CARRY_ADDR"

// slow is the rate at which the nodes of these tests send, in bytes per second: so that they are killed in the middle.
const slow = 6e6

// TestANodeOfItsOwn is not a test but the process that others kill.
func TestANodeOfItsOwn(t *testing.T) {
	dir := os.Getenv(ownNode)
	if dir == "" {
		t.Skip("it is started by other tests")
	}
	h := newStores(t, options{dir: dir, rate: slow})
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	g, err := peer.Open(peer.Config{Dir: filepath.Join(dir, "peers"), Name: "own", Cert: cert, Log: slog.New(slog.DiscardHandler), Handler: h.Handler()})
	if err != nil {
		t.Fatal(err)
	}
	h.Use(g)
	ln, err := net.Listen("tcp", os.Getenv(ownAddr))
	if err != nil {
		t.Fatal(err)
	}
	g.Advertise(ln.Addr().String())
	defer g.Split(ln, nil).Close()
	token, err := g.Token()
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "token.new"), []byte(token), 0o600)
	}
	if err == nil {
		err = os.Rename(filepath.Join(dir, "token.new"), filepath.Join(dir, "token"))
	}
	if err != nil {
		t.Fatal(err)
	}
	select {} // until it is killed
}

// ownProcess is such a node, seen from outside.
type ownProcess struct {
	t         *testing.T
	dir, addr string
	cmd       *exec.Cmd
}

// newOwnProcess starts a node in a directory, which may have state already.
func newOwnProcess(t *testing.T, dir string) *ownProcess {
	t.Helper()
	cert := peertest.Cert(t, "own")
	private, ok := cert.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		t.Fatalf("the key is a %T", cert.PrivateKey)
	}
	key, err := x509.MarshalECPrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	var chain bytes.Buffer
	for _, der := range cert.Certificate {
		err = errors.Join(err, pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	err = errors.Join(err, os.WriteFile(filepath.Join(dir, "cert.pem"), chain.Bytes(), 0o600),
		os.WriteFile(filepath.Join(dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: key}), 0o600))
	ln, listenErr := net.Listen("tcp", "127.0.0.1:0")
	if err := errors.Join(err, listenErr); err != nil {
		t.Fatal(err)
	}
	p := &ownProcess{t: t, dir: dir, addr: ln.Addr().String()}
	_ = ln.Close()
	p.start()
	t.Cleanup(p.kill)
	return p
}

// start starts the process and returns when it answers.
func (p *ownProcess) start() {
	p.t.Helper()
	token := filepath.Join(p.dir, "token")
	_ = os.Remove(token)
	p.cmd = exec.Command(os.Args[0], "-test.run", "^TestANodeOfItsOwn$")
	p.cmd.Env = append(os.Environ(), ownNode+"="+p.dir, ownAddr+"="+p.addr, "TMPDIR="+p.dir)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var said bytes.Buffer
	p.cmd.Stdout, p.cmd.Stderr = &said, &said
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	for range 6000 {
		if _, err := os.Stat(token); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	p.kill()
	p.t.Fatalf("the node does not start: %s", said.String())
}

// kill ends it as the kernel ends what takes too much memory.
func (p *ownProcess) kill() {
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	}
}

// join makes a host and the process know each other.
func (p *ownProcess) join(h *host) {
	p.t.Helper()
	token, err := os.ReadFile(filepath.Join(p.dir, "token"))
	if err == nil {
		_, err = h.Join(ctx, p.addr, strings.TrimSpace(string(token)))
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// whole fails unless a directory has these snapshots and nothing that was left half done.
func whole(t *testing.T, dir string, ids ...string) {
	t.Helper()
	s, damaged, err := snapshot.Open(filepath.Join(dir, "snapshots"))
	if err != nil || len(damaged) > 0 || len(s.List()) != len(ids) {
		t.Fatalf("%d snapshots of %d, damaged %v: %v", len(s.List()), len(ids), damaged, err)
	}
	for _, id := range ids {
		if err := s.Verify(id); err != nil {
			t.Error(err)
		}
	}
}

const kills = 6

// A receiver is killed at moments that nobody chose: while chunks come, while files are rebuilt, while a stream is applied.
func TestAReceiverThatIsKilledAtAnyMomentHasAllOrNothing(t *testing.T) {
	a := newHostWith(t, "a", options{rate: slow})
	p := newOwnProcess(t, t.TempDir())
	p.join(a)
	l := newLine(t, a, 12*mib)
	r := rand.New(rand.NewPCG(4, 2))
	var ids []string
	for i := range kills {
		id := l.next(400_000 * min(i, 1)) // the first goes in chunks, the others in streams
		done := make(chan error, 1)
		go func() {
			_, err := a.Push(ctx, carry.Snapshot, id, "own", nil)
			done <- err
		}()
		time.Sleep(time.Duration(r.IntN(400)) * time.Millisecond)
		p.kill()
		if s, damaged, err := snapshot.Open(filepath.Join(p.dir, "snapshots")); err != nil || len(damaged) > 0 || len(s.List()) < len(ids) {
			t.Fatalf("after a kill: %v, %v", damaged, err)
		}
		p.start()
		if err := <-done; err != nil { // the push goes on by itself
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	p.kill()
	whole(t, p.dir, ids...)
}

// A sender is killed at such moments: whoever pulled asks again, and what had come is not sent again.
func TestASenderThatIsKilledAtAnyMomentIsAskedAgain(t *testing.T) {
	source := newStores(t, options{})
	l := newLine(t, source, 24*mib)
	id := l.next(0)
	_ = source.stage.Close()
	p := newOwnProcess(t, source.dir)
	a := newHost(t, "a", 0)
	p.join(a)
	r := rand.New(rand.NewPCG(5, 2))
	killed := 0
	for range kills {
		var sent atomic.Bool
		done := make(chan error, 1)
		go func() {
			_, err := a.Pull(ctx, carry.Snapshot, id, "own", func(g carry.Progress) { sent.Store(g.Wire > 0) })
			done <- err
		}()
		time.Sleep(time.Duration(100+r.IntN(400)) * time.Millisecond)
		p.kill()
		if err := <-done; err == nil {
			break
		} else if !sandbox.Is(err, sandbox.Unavailable) {
			t.Fatal(err)
		}
		killed++
		if _, err := a.snapshots.Get(id); err == nil {
			break // only the answer was lost; it is whole, as is seen below
		} else if !sandbox.Is(err, sandbox.NotFound) {
			t.Fatalf("half of it is visible: %v", err)
		}
		p.start()
	}
	if killed == 0 {
		t.Fatal("it was never killed in the middle")
	}
	if killed == kills {
		if _, err := a.Pull(ctx, carry.Snapshot, id, "own", nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.snapshots.Verify(id); err != nil {
		t.Error(err)
	}
	whole(t, a.dir, id)
}

// Two nodes send the next version of one sandbox at once, the same one and another: all arrive whole.
func TestTwoSendersOfStreamsBothSucceed(t *testing.T) {
	a, b := pairOf(t)
	c := newHost(t, "c", 0)
	peertest.Join(t, c.Node, b.Node, b.Addr)
	peertest.Join(t, c.Node, a.Node, a.Addr)
	l := newLine(t, a, 8*mib)
	first := l.next(0)
	push(t, a, first)
	second := l.next(20_000)
	for _, id := range []string{first, second} { // c learns what b has by sending it
		if _, err := a.Push(ctx, carry.Snapshot, id, "c", nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Push(ctx, carry.Snapshot, first, "b", nil); err != nil {
		t.Fatal(err)
	}
	third := l.next(20_000)
	b.asked()
	errs := make(chan error, 3)
	for _, s := range []struct {
		from *host
		id   string
	}{{a, second}, {c, second}, {a, third}} {
		go func() {
			_, err := s.from.Push(ctx, carry.Snapshot, s.id, "b", nil)
			errs <- err
		}()
	}
	for range 3 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	same(t, a, b, second)
	same(t, a, b, third)
	for _, asked := range b.asked() {
		if asked != "streams" {
			t.Logf("asked for %s too", asked)
		}
	}
	if entries, err := os.ReadDir(filepath.Join(b.dir, "snapshots")); err != nil || len(entries) != 3 {
		t.Errorf("drafts are left: %v, %v", entries, err)
	}
}

// Times of snapshots are those of whoever made them. They may lie days ahead or go backward: what is described by what changes
// in nothing but bytes.
func TestTimesThatGoBackwardHinderNoPush(t *testing.T) {
	a, b := pairOf(t)
	l := newLine(t, a, 4*mib)
	for i, skew := range []time.Duration{0, 72 * time.Hour, -72 * time.Hour, 10 * 365 * 24 * time.Hour, 0} {
		l.skew = skew
		id := l.next(5000)
		res := push(t, a, id)
		same(t, a, b, id)
		if i > 0 && res.Wire > 40_000 {
			t.Errorf("with a clock that is %v ahead %d bytes are sent", skew, res.Wire)
		}
	}
	for _, skew := range []time.Duration{-72 * time.Hour, 72 * time.Hour} { // and the receiver's clock may jump
		if err := b.Sweep(ctx, time.Now().Add(skew)); err != nil {
			t.Error(err)
		}
	}
	push(t, a, l.next(5000))
}
