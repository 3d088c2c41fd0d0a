package carry_test

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	_ "modernc.org/sqlite" // the driver of a node's database

	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/chunk/bucket"
	"github.com/atoll-run/atoll/chunk/cache"
	"github.com/atoll-run/atoll/guest/guesttest"
	"github.com/atoll-run/atoll/image"
	llmhost "github.com/atoll-run/atoll/llm/host"
	"github.com/atoll-run/atoll/migrate"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/pace"
	"github.com/atoll-run/atoll/peer/peertest"
	"github.com/atoll-run/atoll/runtime/fake"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/snapshot"
)

var ctx = context.Background()

func TestMain(m *testing.M) { os.Exit(guesttest.Main(m)) }

const mib = 1 << 20

// host is a node's stores, and the way to others.
type host struct {
	t testing.TB
	*carry.Carrier
	*peertest.Node
	snapshots *snapshot.Store
	images    *image.Store
	models    *llmhost.Store
	stage     *chunk.Disk
	dir       string
	world     *fake.World
	nodes     *node.Node // nil until it is asked for
	fault     func(migrate.Step) (migrate.Outcome, error)
	requests  *late
	options   options
}

// options are what some tests give a host.
type options struct {
	stageLimit int64
	fault      func(migrate.Step) (migrate.Outcome, error)
	snapshots  bool // its runtime sends nothing live
	site       string
	store      *bucket.Bucket
	rules      chunk.Rules // of the store
	tiers      []cache.Tier
	dir        string  // where the host's state is; empty: in a fresh directory
	rate       float64 // bytes per second that it sends; 0: no limit
	late       bool    // its runtime takes pages.img while it comes
	patience   time.Duration
}

// agent returns the program of the guest agent, which a host needs that starts sandboxes.
func (o options) agent(t testing.TB) string {
	if o.rate > 0 {
		return "" // one that is killed starts none
	}
	return guesttest.Binary(t)
}

// asked returns what was asked of the host since the last call.
func (h *host) asked() []string {
	h.requests.mu.Lock()
	defer h.requests.mu.Unlock()
	list := h.requests.asked
	h.requests.asked = nil
	return list
}

// late passes requests to a carrier that is made after it.
type late struct {
	c atomic.Pointer[carry.Carrier]

	mu    sync.Mutex
	asked []string // last part of the path of each request, in order
}

func (l *late) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	l.mu.Lock()
	l.asked = append(l.asked, path.Base(r.URL.Path))
	l.mu.Unlock()
	l.c.Load().Handler().ServeHTTP(w, r)
}

func newHost(t testing.TB, name string, stageLimit int64) *host {
	t.Helper()
	return newHostWith(t, name, options{stageLimit: stageLimit})
}

func newHostWith(t testing.TB, name string, o options) *host {
	t.Helper()
	h := newStores(t, o)
	l := &late{}
	l.c.Store(h.Carrier)
	h.requests = l
	h.Node = peertest.ListenAt(t, name, o.site, l, nil)
	h.Use(h.Group)
	return h
}

// newStores is a host without a way to others.
func newStores(t testing.TB, o options) *host {
	t.Helper()
	if o.dir == "" {
		o.dir = t.TempDir()
	}
	h := &host{t: t, dir: o.dir, fault: o.fault, options: o}
	var err error
	if h.images, err = image.Open(filepath.Join(h.dir, "images"), image.Options{}); err != nil {
		t.Fatal(err)
	}
	h.models = llmhost.OpenStore(filepath.Join(h.dir, "models"))
	if h.snapshots, _, err = snapshot.Open(filepath.Join(h.dir, "snapshots")); err != nil {
		t.Fatal(err)
	}
	if h.stage, err = chunk.OpenDisk(filepath.Join(h.dir, "stage"), chunk.DiskOptions{Limit: o.stageLimit}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.stage.Close() })
	h.Carrier = h.carrier()
	return h
}

func (h *host) carrier() *carry.Carrier {
	c := carry.New(carry.Config{Snapshots: h.snapshots, Images: h.images, Models: h.models, Stage: h.stage, Pacer: pace.New(h.options.rate, pace.DefaultShares),
		Log: slog.New(slog.DiscardHandler), Patience: cmp.Or(h.options.patience, 20*time.Second), Node: h.node(),
		Cache: cache.New(h.options.tiers...), Store: h.options.store, StoreRules: h.options.rules})
	c.Break(h.fault)
	return c
}

// node opens a node over the stores, with a runtime in memory.
func (h *host) node() *node.Node {
	if h.nodes != nil {
		return h.nodes
	}
	db, err := sql.Open("sqlite", "file:"+filepath.Join(h.dir, "node.db")+"?_pragma=journal_mode(WAL)")
	if err != nil {
		h.t.Fatal(err)
	}
	db.SetMaxOpenConns(1)
	caps := fake.Capabilities()
	caps.Memory = true // what a live move asks for
	caps.Live = !h.options.snapshots
	if h.options.late {
		caps.Late, caps.Beside = []string{"pages*"}, []string{"learned"}
	}
	h.world = fake.NewWorld(h.t.TempDir(), h.options.agent(h.t))
	h.nodes, err = node.Open(ctx, node.Config{Dir: h.dir, DB: db, Runtimes: []sandbox.Runtime{h.world.Open(fake.Config{Capabilities: &caps})}, Images: h.images,
		Snapshots: h.snapshots, NetworkError: errors.New("no network in this test"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		if err := h.nodes.Shutdown(ctx); err != nil {
			h.t.Error(err)
		}
		h.world.Close()
		_ = db.Close()
	})
	return h.nodes
}

func pairOf(t testing.TB) (a, b *host) {
	t.Helper()
	a, b = newHost(t, "a", 0), newHost(t, "b", 0)
	peertest.Join(t, a.Node, b.Node, b.Addr)
	return a, b
}

// content compresses about 3 to 1, as memories do.
func content(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, 5))
	out := make([]byte, 0, size+16)
	for len(out) < size {
		word := make([]byte, 4+r.IntN(8))
		for i := range word {
			word[i] = byte(r.IntN(64))
		}
		for range 1 + r.IntN(4) {
			out = append(out, word...)
		}
	}
	return out[:size]
}

// addImage imports an image of one file.
func (h *host) addImage(t testing.TB, name string, file []byte) image.Image {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "data", Mode: 0o644, Size: int64(len(file))}); err != nil {
		t.Fatal(err)
	}
	_, _ = w.Write(file)
	_ = w.Close()
	i, err := h.images.Import(ctx, &b, image.ImportOptions{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// save commits a snapshot of files.
func (h *host) save(t testing.TB, root sandbox.Root, parent string, files map[string][]byte) snapshot.Manifest {
	t.Helper()
	return h.saveAt(t, time.Now(), root, parent, files)
}

// runtime is what snapshots are said to be of.
func (h *host) runtime() string {
	if h.options.late {
		return "fake" // which is there
	}
	return "gvisor"
}

// saveAt is save by a clock that says so.
func (h *host) saveAt(t testing.TB, now time.Time, root sandbox.Root, parent string, files map[string][]byte) snapshot.Manifest {
	t.Helper()
	d, err := h.snapshots.Begin()
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range files {
		file := filepath.Join(d.Dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	spec := sandbox.Spec{ID: "box", Root: root, Network: sandbox.NetworkNone}
	meta, err := json.Marshal(node.Snapshot{Name: "saved", Sandbox: "box", Source: node.Sandbox{ID: "box", Spec: spec}})
	if err != nil {
		t.Fatal(err)
	}
	m, err := d.Commit(snapshot.Manifest{Parent: parent, Sandbox: "box", Runtime: h.runtime(), Spec: spec, Created: now.UTC(), Meta: meta}, true)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// same compares a snapshot on two hosts.
func same(t testing.TB, a, b *host, id string) {
	t.Helper()
	m, err := b.snapshots.Get(id)
	if err != nil {
		t.Fatal(err)
	}
	was, err := a.snapshots.Get(id)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(m.Files, was.Files) || m.Parent != was.Parent || !m.Created.Equal(was.Created) {
		t.Errorf("%+v, was %+v", m, was)
	}
	if err := b.snapshots.Verify(id); err != nil {
		t.Error(err)
	}
	if filepath.Dir(filepath.Dir(m.Spec.Root.Path)) != filepath.Join(b.dir, "images") || !b.images.Holds(m.Spec.Root.Digest) {
		t.Errorf("the root is %+v", m.Spec.Root)
	}
	var s node.Snapshot
	if err := json.Unmarshal(m.Meta, &s); err != nil || s.Source.Spec.Root != m.Spec.Root || s.Name != "saved" {
		t.Errorf("%+v, %v", s, err)
	}
	if used := b.stage.Used(); used != 0 {
		t.Errorf("%d bytes of chunks are left", used)
	}
}

func wantKind(t *testing.T, err error, kind sandbox.Kind) {
	t.Helper()
	if !sandbox.Is(err, kind) {
		t.Errorf("%v, want %s", err, kind)
	}
}

// conformance: W2
func TestASnapshotArrivesWholeAndItsChildAsADifference(t *testing.T) {
	a, b := pairOf(t)
	root := a.addImage(t, "base", content(1, 2*mib)).Root
	memory := content(2, 8*mib)
	first := a.save(t, root, "", map[string][]byte{"pages.img": memory, "kernel/state": content(3, 5000), "empty": nil})
	var seen []carry.Progress
	res, err := a.Push(ctx, carry.Snapshot, first.ID, "b", func(p carry.Progress) { seen = append(seen, p) })
	if err != nil {
		t.Fatal(err)
	}
	same(t, a, b, first.ID)
	if res.Wire < 2*mib || res.Wire > 8*mib || res.Held != 0 || len(res.Files) != 4 {
		t.Errorf("%+v", res)
	}
	next := bytes.Clone(memory)
	copy(next[3*mib:], content(4, 20_000))
	second := a.save(t, root, first.ID, map[string][]byte{"pages.img": next, "kernel/state": content(3, 5000), "empty": nil})
	res, err = a.Push(ctx, carry.Snapshot, second.ID, "b", nil)
	if err != nil {
		t.Fatal(err)
	}
	same(t, a, b, second.ID)
	if res.Wire > 30_000 {
		t.Errorf("of a small difference, %+v is sent", res)
	}
	t.Logf("measured: W2 20,000 changed bytes of 8 MiB: %d bytes sent", res.Wire)
	if res, err = a.Push(ctx, carry.Snapshot, second.ID, "b", nil); err != nil || res.Wire != 0 {
		t.Errorf("what is there is sent: %+v, %v", res, err)
	}
}

func TestAPullIsAPushThatTheReceiverAsksFor(t *testing.T) {
	a, b := pairOf(t) // a dials b, and b cannot dial a
	if err := b.Forget("a"); err != nil {
		t.Fatal(err)
	}
	token, err := b.Token()
	if err != nil {
		t.Fatal(err)
	}
	a.Advertise("127.0.0.1:1")
	if _, err := a.Join(ctx, b.Addr, token); err != nil {
		t.Fatal(err)
	}
	m := b.save(t, b.addImage(t, "base", content(1, mib)).Root, "", map[string][]byte{"pages.img": content(2, 3*mib)})
	res, err := a.Pull(ctx, carry.Snapshot, m.ID, "b", nil)
	if err != nil || res.Wire < mib {
		t.Fatalf("%+v, %v", res, err)
	}
	same(t, b, a, m.ID)
	_, err = a.Pull(ctx, carry.Snapshot, "nothing", "b", nil)
	wantKind(t, err, sandbox.NotFound)
}

func TestAnImageArrivesWithItsNameAndItsNextVersionAsADifference(t *testing.T) {
	a, b := pairOf(t)
	data := content(1, 4*mib)
	one := a.addImage(t, "app:1", data)
	if _, err := a.Push(ctx, carry.Image, "app:1", "b", nil); err != nil {
		t.Fatal(err)
	}
	copy(data[mib:], content(2, 10_000))
	two := a.addImage(t, "app:2", data)
	res, err := a.Push(ctx, carry.Image, "app:2", "b", nil)
	if err != nil || res.Wire > 40_000 {
		t.Fatalf("%+v, %v", res, err)
	}
	for name, want := range map[string]image.Image{"app:1": one, "app:2": two} {
		got, err := b.images.Get(name)
		if err != nil || got.ID != want.ID || got.Root.Digest != want.Root.Digest || !b.images.Holds(got.Root.Digest) {
			t.Errorf("%s is %+v, %v", name, got, err)
		}
	}
	_, err = a.Push(ctx, carry.Image, "host", "b", nil)
	wantKind(t, err, sandbox.Unsupported)
	_, err = a.Push(ctx, carry.Image, "app:3", "b", nil)
	wantKind(t, err, sandbox.NotFound)
	_, err = a.Push(ctx, carry.Image, "app:1", "c", nil)
	wantKind(t, err, sandbox.NotFound)
}

// cutter is a link that dies after so many bytes from the dialler, again and again.
type cutter struct {
	net.Listener
	to    string
	after atomic.Int64 // bytes that a connection lives; 0: for ever
	cut   atomic.Int64
	sent  atomic.Int64

	dead    atomic.Bool // connections are refused
	refused atomic.Int64

	mu    sync.Mutex
	conns []net.Conn
}

// drop ends the connections that there are.
func (c *cutter) drop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.conns {
		_ = conn.Close()
	}
	c.conns = nil
}

func newCutter(t testing.TB, to string) *cutter {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{Listener: ln, to: to}
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			if c.dead.Load() {
				c.refused.Add(1)
				_ = in.Close()
				continue
			}
			c.mu.Lock()
			c.conns = append(c.conns, in)
			c.mu.Unlock()
			go c.carry(in)
		}
	}()
	return c
}

func (c *cutter) carry(in net.Conn) {
	defer in.Close()
	out, err := net.Dial("tcp", c.to)
	if err != nil {
		return
	}
	defer out.Close()
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _ = io.Copy(in, out)
		_ = in.Close()
	})
	limit := c.after.Load()
	if limit == 0 {
		limit = 1 << 60
	}
	n, err := io.Copy(out, io.LimitReader(in, limit))
	c.sent.Add(n)
	if n == limit && err == nil {
		c.cut.Add(1)
	}
	_ = in.Close()
	_ = out.Close()
	wg.Wait()
}

func TestAPushThatIsBrokenOffGoesOnWhereItWas(t *testing.T) {
	a, b := newHost(t, "a", 0), newHost(t, "b", 0)
	line := newCutter(t, b.Addr)
	peertest.Join(t, a.Node, b.Node, line.Addr().String())
	m := a.save(t, a.addImage(t, "base", content(1, mib)).Root, "", map[string][]byte{"pages.img": content(2, 12*mib)})
	line.after.Store(350_000) // of each flow
	res, err := a.Push(ctx, carry.Snapshot, m.ID, "b", nil)
	if err != nil {
		t.Fatal(err)
	}
	same(t, a, b, m.ID)
	if line.cut.Load() < 2 {
		t.Fatalf("the line was cut %d times", line.cut.Load())
	}
	t.Logf("cut %d times: %d bytes taken, %d sent", line.cut.Load(), res.Wire, line.sent.Load())
	if line.sent.Load() > 2*res.Wire+8*mib {
		t.Errorf("%d bytes were sent for %d", line.sent.Load(), res.Wire)
	}
}

func TestAReceiverThatStartsAnewGoesOn(t *testing.T) {
	a, b := newHost(t, "a", 0), newHost(t, "b", 0)
	peertest.Join(t, a.Node, b.Node, b.Addr)
	m := a.save(t, a.addImage(t, "base", content(1, mib)).Root, "", map[string][]byte{"pages.img": content(2, 12*mib)})
	limited, stop := context.WithCancel(ctx)
	_, err := a.Push(limited, carry.Snapshot, m.ID, "b", func(p carry.Progress) {
		if p.Wire > 0 {
			stop() // as if the sender was killed
		}
	})
	if err == nil {
		t.Skip("the push was done before it could be broken off")
	}
	stop()
	if _, err := b.snapshots.Get(m.ID); !sandbox.Is(err, sandbox.NotFound) {
		t.Fatalf("half of it is visible: %v", err)
	}
	if b.stage.Used() == 0 {
		t.Fatal("nothing was kept")
	}
	again := newHostOn(t, b)
	peertest.Join(t, a.Node, again.Node, again.Addr)
	res, err := a.Push(ctx, carry.Snapshot, m.ID, again.ID(), nil)
	if err != nil {
		t.Fatal(err)
	}
	same(t, a, again, m.ID)
	var whole int64
	for _, f := range res.Files {
		whole += f.Wire
	}
	if res.Wire >= whole {
		t.Errorf("all %d bytes are sent again", res.Wire)
	}
}

// newHostOn is a daemon that takes over the state of another.
func newHostOn(t testing.TB, old *host) *host {
	t.Helper()
	h := *old
	h.Carrier = h.carrier()
	h.Node = peertest.Listen(t, "again", h.Handler(), nil)
	h.Use(h.Group)
	return &h
}

func TestAFullReceiverSaysSoAndShowsNothing(t *testing.T) {
	a, b := newHost(t, "a", 0), newHost(t, "b", mib)
	peertest.Join(t, a.Node, b.Node, b.Addr)
	m := a.save(t, a.addImage(t, "base", content(1, mib)).Root, "", map[string][]byte{"pages.img": content(2, 12*mib)})
	_, err := a.Push(ctx, carry.Snapshot, m.ID, "b", nil)
	wantKind(t, err, sandbox.Exhausted)
	if len(b.snapshots.List()) > 0 {
		t.Error("half a snapshot is visible")
	}
}

func TestTwoSendersOfOneThingBothSucceed(t *testing.T) {
	a, b := pairOf(t)
	m := a.save(t, a.addImage(t, "base", content(1, mib)).Root, "", map[string][]byte{"pages.img": content(2, 6*mib)})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if _, err := a.Push(ctx, carry.Snapshot, m.ID, "b", nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := b.snapshots.Verify(m.ID); err != nil {
		t.Error(err)
	}
	if entries, err := os.ReadDir(filepath.Join(b.dir, "snapshots")); err != nil || len(entries) != 1 {
		t.Errorf("drafts are left: %v, %v", entries, err)
	}
	if err := b.Sweep(ctx, time.Now().Add(48*time.Hour)); err != nil || b.stage.Used() != 0 {
		t.Errorf("%d bytes of chunks are left, %v", b.stage.Used(), err)
	}
}

func TestWhatCannotBeUsedElsewhereIsNotSent(t *testing.T) {
	a, _ := pairOf(t)
	m := a.save(t, sandbox.Root{Kind: sandbox.RootHost}, "", map[string][]byte{"pages.img": content(2, 100)})
	_, err := a.Push(ctx, carry.Snapshot, m.ID, "b", nil)
	wantKind(t, err, sandbox.Unsupported)
}

func TestABaseThatVanishedOrIsDamagedDoesNotCorrupt(t *testing.T) {
	a, b := pairOf(t)
	root := a.addImage(t, "base", content(1, mib)).Root
	memory := content(2, 4*mib)
	first := a.save(t, root, "", map[string][]byte{"pages.img": memory})
	if _, err := a.Push(ctx, carry.Snapshot, first.ID, "b", nil); err != nil {
		t.Fatal(err)
	}
	// A bit flips on the receiver's disk.
	file := filepath.Join(b.snapshots.Dir(first.ID), "pages.img")
	bad := bytes.Clone(memory)
	bad[5000] ^= 1
	if err := os.WriteFile(file, bad, 0o600); err != nil {
		t.Fatal(err)
	}
	next := bytes.Clone(memory)
	copy(next[mib:], content(4, 9000))
	second := a.save(t, root, first.ID, map[string][]byte{"pages.img": next})
	_, err := a.Push(ctx, carry.Snapshot, second.ID, "b", nil)
	wantKind(t, err, sandbox.Invalid)
	if _, err := b.snapshots.Get(second.ID); err == nil {
		t.Error("it is visible all the same")
	}
}

// What a transfer takes over a link that is slow enough is what is sent; `make bench-wan` measures time.
//
// conformance: W8
func TestTwentySnapshotsOfAWorkingSandboxAreAFractionOfTheirCopies(t *testing.T) {
	a, b := pairOf(t)
	root := a.addImage(t, "base", content(1, mib)).Root
	memory, disk := content(2, 8*mib), content(3, mib)
	r := rand.New(rand.NewPCG(9, 9))
	var naive, sent int64
	parent := ""
	for i := range 20 {
		for range 40 { // objects that changed, all over the memory
			copy(memory[r.IntN(len(memory)-4000):], content(r.Uint64(), 200+r.IntN(3000)))
		}
		disk = append(disk, content(uint64(100+i), 30_000)...)
		m := a.save(t, root, parent, map[string][]byte{"pages.img": memory, "disk": disk})
		res, err := a.Push(ctx, carry.Snapshot, m.ID, "b", nil)
		if err != nil {
			t.Fatal(err)
		}
		parent, naive, sent = m.ID, naive+m.Size(), sent+res.Wire
	}
	t.Logf("measured: W8 20 snapshots: %d bytes naively, %d sent, %.1f times fewer", naive, sent, float64(naive)/float64(sent))
	if float64(naive)/float64(sent) < 9.39 {
		t.Errorf("%d bytes are sent for %d", sent, naive)
	}
	if err := b.snapshots.Verify(parent); err != nil {
		t.Error(err)
	}
}
