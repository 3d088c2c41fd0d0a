package node

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	_ "modernc.org/sqlite" // the driver

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/guesttest"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/runtime/fake"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/snapshot"
)

func TestMain(m *testing.M) { os.Exit(guesttest.Main(m)) }

// host is a node and what it stands on; it can be crashed and opened again.
type host struct {
	*Node
	t     *testing.T
	dir   string
	world *fake.World
	caps  *sandbox.Capabilities // of the runtime; nil for the usual ones
	db    *sql.DB

	prewarm int
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, dir: t.TempDir(), world: fake.NewWorld(t.TempDir(), guesttest.Binary(t))}
	t.Cleanup(h.world.Close)
	h.open()
	t.Cleanup(func() {
		if err := h.Shutdown(context.Background()); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		_ = h.db.Close()
	})
	return h
}

func (h *host) open() {
	h.t.Helper()
	db, err := sql.Open("sqlite", "file:"+filepath.Join(h.dir, "node.db")+"?_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)")
	if err != nil {
		h.t.Fatal(err)
	}
	db.SetMaxOpenConns(1)
	snapshots, damaged, err := snapshot.Open(filepath.Join(h.dir, "snapshots"))
	if err != nil || len(damaged) > 0 {
		h.t.Fatal(err, damaged)
	}
	images, err := image.Open(filepath.Join(h.dir, "images"), image.Options{})
	if err != nil {
		h.t.Fatal(err)
	}
	h.db = db
	h.Node, err = Open(context.Background(), Config{
		Dir: h.dir, DB: db, Runtimes: []sandbox.Runtime{h.world.Open(fake.Config{Capabilities: h.caps})}, Images: images, Snapshots: snapshots,
		NetworkError: errors.New("no network in this test"), Prewarm: h.prewarm, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		h.t.Fatal(err)
	}
}

// crash drops the node as a kill -9 would: nothing is written or cleaned. The
// machines of the fake world live on.
func (h *host) crash() {
	h.t.Helper()
	h.stop()
	h.done.Wait()
	_ = h.db.Close()
}

func (h *host) create(req CreateRequest) Sandbox {
	h.t.Helper()
	if req.Image == "" {
		req.Image = HostImage
	}
	sb, err := h.Create(context.Background(), req)
	if err != nil {
		h.t.Fatal(err)
	}
	return sb
}

// sh runs a shell command in a sandbox and returns what it wrote.
func (h *host) sh(ref, command string) string {
	h.t.Helper()
	g, err := h.Guest(context.Background(), ref)
	if err != nil {
		h.t.Fatal(err)
	}
	out, err := g.Run(context.Background(), guest.Command{Args: []string{"/bin/sh", "-c", command}})
	if err != nil || out.ExitCode != 0 {
		h.t.Fatalf("%s: %v, %+v", command, err, out)
	}
	return strings.TrimSpace(string(out.Stdout))
}

func (h *host) state(ref string) sandbox.State {
	h.t.Helper()
	sb, err := h.Get(context.Background(), ref)
	if err != nil {
		h.t.Fatal(err)
	}
	return sb.State
}

func wantKind(t *testing.T, err error, kind sandbox.Kind) {
	t.Helper()
	if !sandbox.Is(err, kind) {
		t.Errorf("error is %v (%s), want %s", err, sandbox.KindOf(err), kind)
	}
}

// conformance: SPEC2 FR1.4
func TestALifeFromCreateToRemove(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	sb := h.create(CreateRequest{Name: "one", Env: map[string]string{"GREETING": "ahoy"}, Metadata: map[string]string{"k": "v"}})
	if got := h.sh("one", "echo $GREETING"); got != "ahoy" {
		t.Errorf("the environment did not arrive: %q", got)
	}
	for _, ref := range []string{sb.ID, "one", sb.ID[:6]} {
		if got, err := h.Get(ctx, ref); err != nil || got.ID != sb.ID {
			t.Errorf("Get %q: %v, %v", ref, got.ID, err)
		}
	}
	if l, err := h.List(ctx, Filter{Metadata: map[string]string{"k": "v"}}); err != nil || len(l) != 1 {
		t.Errorf("List: %v, %v", l, err)
	}
	if l, _ := h.List(ctx, Filter{Metadata: map[string]string{"k": "other"}}); len(l) != 0 {
		t.Errorf("a filter let %v pass", l)
	}
	if err := h.Remove(ctx, "one"); err != nil {
		t.Fatal(err)
	}
	wantKind(t, h.Remove(ctx, sb.ID), sandbox.NotFound)
	if l, _ := h.List(ctx, Filter{}); len(l) != 0 {
		t.Errorf("still listed: %v", l)
	}
	if got := h.create(CreateRequest{Name: "one"}); got.ID == sb.ID {
		t.Error("the name was not free again")
	}
}

func TestBadRequests(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	h.create(CreateRequest{Name: "taken"})
	reg := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer reg.Close()
	for name, tc := range map[string]struct {
		req  CreateRequest
		kind sandbox.Kind
	}{
		"no image":          {CreateRequest{}, sandbox.Invalid},
		"unknown image":     {CreateRequest{Image: strings.TrimPrefix(reg.URL, "http://") + "/no/such:image"}, sandbox.NotFound},
		"not a repository":  {CreateRequest{Image: t.TempDir()}, sandbox.Invalid},
		"name in use":       {CreateRequest{Image: HostImage, Name: "taken"}, sandbox.Exists},
		"bad name":          {CreateRequest{Image: HostImage, Name: "../x"}, sandbox.Invalid},
		"unknown runtime":   {CreateRequest{Image: HostImage, Runtimes: []string{"vmware"}}, sandbox.Invalid},
		"negative memory":   {CreateRequest{Image: HostImage, Resources: sandbox.Resources{Memory: -1}}, sandbox.Invalid},
		"too much memory":   {CreateRequest{Image: HostImage, Resources: sandbox.Resources{Memory: 1 << 60}}, sandbox.Invalid},
		"no such workdir":   {CreateRequest{Image: HostImage, Workdir: "/no/such"}, sandbox.Invalid},
		"too little memory": {CreateRequest{Image: HostImage, Resources: sandbox.Resources{Memory: 4096}}, sandbox.Invalid},
		"bad environment":   {CreateRequest{Image: HostImage, Env: map[string]string{"A": "b\x00c"}}, sandbox.Invalid},
		"bad port":          {CreateRequest{Image: HostImage, Ports: []Port{{Guest: 70000}}}, sandbox.Invalid},
		"no such network":   {CreateRequest{Image: HostImage, Network: "bridge"}, sandbox.Invalid},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := h.Create(ctx, tc.req)
			if err == nil {
				t.Fatal("accepted")
			}
			wantKind(t, err, tc.kind)
		})
	}
	if l, _ := h.List(ctx, Filter{All: true}); len(l) != 1 {
		t.Errorf("failed creations left %v", l)
	}
}

func TestAFailedCreateLeavesNothing(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	h.world.Inject(fake.Fault{Op: "Create", Kind: sandbox.Exhausted, Times: 1})
	_, err := h.Create(ctx, CreateRequest{Image: HostImage, Name: "x"})
	wantKind(t, err, sandbox.Exhausted)
	if l, _ := h.List(ctx, Filter{All: true}); len(l) != 0 {
		t.Errorf("left %v", l)
	}
	h.create(CreateRequest{Name: "x"})
}

// conformance: FR5.2
func TestPauseOnDiskAndResume(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	sb := h.create(CreateRequest{Name: "p"})
	h.sh("p", "echo kept > note")
	paused, err := h.Pause(ctx, "p", PauseDisk)
	if err != nil || paused.State != sandbox.Paused || paused.Suspended == "" {
		t.Fatalf("%+v, %v", paused, err)
	}
	_, err = h.Pause(ctx, "p", PauseDisk)
	wantKind(t, err, sandbox.Conflict)
	_, err = h.Dial(ctx, "p", sandbox.GuestPort)
	wantKind(t, err, sandbox.Conflict)
	wantKind(t, h.RemoveSnapshot(ctx, paused.Suspended), sandbox.Conflict)
	if _, resumed, err := h.Connect(ctx, "p", time.Minute); err != nil || !resumed {
		t.Fatalf("Connect: %v, %v", resumed, err)
	}
	if got := h.sh(sb.ID, "cat note"); got != "kept" {
		t.Errorf("the file says %q", got)
	}
	if l := h.cfg.Snapshots.List(); len(l) != 0 {
		t.Errorf("the snapshot of the pause is still there: %v", l)
	}
}

func TestAFailedPauseGoesOn(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	h.create(CreateRequest{Name: "p"})
	h.world.Inject(fake.Fault{Op: "Snapshot", Kind: sandbox.Exhausted, Times: 1})
	_, err := h.Pause(ctx, "p", PauseDisk)
	wantKind(t, err, sandbox.Exhausted)
	if got := h.sh("p", "echo on"); got != "on" || h.state("p") != sandbox.Running {
		t.Errorf("%q, %s", got, h.state("p"))
	}
}

func TestASandboxThatCannotBePausedOnDiskInTimeIsKeptInMemory(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	h.world.Inject(fake.Fault{Op: "Snapshot", Kind: sandbox.Exhausted, Times: 1})
	h.create(CreateRequest{Name: "p", Timeout: 50 * time.Millisecond, Lifecycle: Lifecycle{OnTimeout: TimeoutPause}})
	ctx, stop := context.WithTimeout(ctx, 20*time.Second)
	defer stop()
	sb, err := h.Wait(ctx, "p", sandbox.Paused)
	if err != nil || sb.Suspended != "" {
		t.Fatalf("%+v, %v", sb, err)
	}
	if _, err := h.Resume(ctx, "p"); err != nil {
		t.Fatal(err)
	}
}

func TestRename(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	sb := h.create(CreateRequest{Name: "before"})
	h.create(CreateRequest{Name: "other"})
	wantKind(t, h.Rename(ctx, "before", "other"), sandbox.Exists)
	// The record cannot be written: both names must stay as they were.
	if err := h.db.Close(); err != nil {
		t.Fatal(err)
	}
	wantKind(t, h.Rename(ctx, "before", "after"), sandbox.Unavailable)
	h.crash()
	h.open()
	if err := h.Rename(ctx, "before", "after"); err != nil {
		t.Fatal(err)
	}
	if got, err := h.Get(ctx, "after"); err != nil || got.ID != sb.ID {
		t.Errorf("%v, %v", got.ID, err)
	}
	_, err := h.Get(ctx, "before")
	wantKind(t, err, sandbox.NotFound)
}

func TestADamagedSnapshotIsNotRestored(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	h.create(CreateRequest{Name: "a"})
	s, err := h.Snapshot(ctx, "a", "point")
	if err != nil {
		t.Fatal(err)
	}
	m, err := h.cfg.Snapshots.Get(s.ID)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(h.cfg.Snapshots.Dir(s.ID), m.Files[0].Name)
	data, err := os.ReadFile(file)
	if err != nil || len(data) == 0 {
		t.Fatal(len(data), err)
	}
	data[len(data)/2] ^= 1
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = h.Restore(ctx, "point", CreateRequest{})
	wantKind(t, err, sandbox.Invalid)
}

func TestAFailedResumeStaysPaused(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	h.create(CreateRequest{Name: "p"})
	if _, err := h.Pause(ctx, "p", PauseDisk); err != nil {
		t.Fatal(err)
	}
	h.world.Inject(fake.Fault{Op: "Restore", Kind: sandbox.Unavailable, Times: 1})
	_, err := h.Resume(ctx, "p")
	wantKind(t, err, sandbox.Unavailable)
	if h.state("p") != sandbox.Paused {
		t.Fatalf("it is %s", h.state("p"))
	}
	if _, err := h.Resume(ctx, "p"); err != nil {
		t.Fatal(err)
	}
}

func TestTrafficResumesASandboxThatAskedForIt(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	h.create(CreateRequest{Name: "auto", Lifecycle: Lifecycle{AutoResume: true}})
	if _, err := h.Pause(ctx, "auto", PauseDisk); err != nil {
		t.Fatal(err)
	}
	if got := h.sh("auto", "echo awake"); got != "awake" || h.state("auto") != sandbox.Running {
		t.Errorf("%q, %s", got, h.state("auto"))
	}
}

// conformance: FR5.3 FR5.4
func TestForkedChildrenGoTheirOwnWays(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	h.create(CreateRequest{Name: "parent", Secure: true})
	h.sh("parent", "echo common > note")
	children, err := h.Fork(ctx, "parent", 3, CreateRequest{})
	if err != nil {
		t.Fatal(err)
	}
	tokens := map[string]bool{}
	for i, c := range children {
		if c.Err != nil {
			t.Fatal(c.Err)
		}
		h.sh(c.Sandbox.ID, fmt.Sprintf("echo %d >> note", i))
		tokens[c.Sandbox.GuestToken] = true
	}
	for i, c := range children {
		if got := h.sh(c.Sandbox.ID, "cat note"); got != fmt.Sprintf("common\n%d", i) {
			t.Errorf("child %d has %q", i, got)
		}
	}
	if got := h.sh("parent", "cat note"); got != "common" {
		t.Errorf("the parent has %q", got)
	}
	if len(tokens) != 3 || tokens[""] {
		t.Errorf("children share tokens: %v", tokens)
	}
	for i, c := range children {
		if n := len(h.cfg.Snapshots.List()); n != 1 {
			t.Errorf("%d snapshots while %d children live", n, 3-i)
		}
		if err := h.Remove(ctx, c.Sandbox.ID); err != nil {
			t.Fatal(err)
		}
	}
	if l := h.cfg.Snapshots.List(); len(l) != 0 {
		t.Errorf("left over: %v", l)
	}
	_, err = h.Fork(ctx, "parent", 0, CreateRequest{})
	wantKind(t, err, sandbox.Invalid)
}

// conformance: FR5.1
func TestASnapshotCanBeRestoredAfterItsSandboxIsGone(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	h.create(CreateRequest{Name: "a"})
	h.sh("a", "echo saved > note")
	snap, err := h.Snapshot(ctx, "a", "point")
	if err != nil {
		t.Fatal(err)
	}
	h.sh("a", "echo later > note")
	if err := h.Remove(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Restore(ctx, "point", CreateRequest{Name: "b"}); err != nil {
		t.Fatal(err)
	}
	if got := h.sh("b", "cat note"); got != "saved" {
		t.Errorf("restored %q", got)
	}
	if l, err := h.Snapshots(ctx, ""); err != nil || len(l) != 1 || l[0].ID != snap.ID {
		t.Errorf("Snapshots: %v, %v", l, err)
	}
	if err := h.RemoveSnapshot(ctx, snap.ID[:8]); err != nil {
		t.Error(err)
	}
	_, err = h.Restore(ctx, "point", CreateRequest{})
	wantKind(t, err, sandbox.NotFound)
}

func TestATimeoutEndsOrPauses(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	h.create(CreateRequest{Name: "kill", Timeout: 50 * time.Millisecond})
	h.create(CreateRequest{Name: "pause", Timeout: 50 * time.Millisecond, Lifecycle: Lifecycle{OnTimeout: TimeoutPause}})
	ctx, stop := context.WithTimeout(ctx, 20*time.Second)
	defer stop()
	if _, err := h.Wait(ctx, "pause", sandbox.Paused); err != nil {
		t.Error(err)
	}
	for {
		l, err := h.List(ctx, Filter{States: []sandbox.State{sandbox.Running}})
		if err != nil || ctx.Err() != nil {
			t.Fatal(err, ctx.Err())
		}
		if len(l) == 0 {
			return
		}
	}
}

func TestConnectOnlyExtendsALife(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	sb := h.create(CreateRequest{Timeout: time.Hour})
	same, _, err := h.Connect(ctx, sb.ID, time.Minute)
	if err != nil || !same.EndAt.Equal(*sb.EndAt) {
		t.Errorf("shortened from %v to %v, %v", sb.EndAt, same.EndAt, err)
	}
	longer, _, err := h.Connect(ctx, sb.ID, 2*time.Hour)
	if err != nil || !longer.EndAt.After(*sb.EndAt) {
		t.Errorf("not extended: %v, %v", longer.EndAt, err)
	}
}

func TestASandboxThatDiesIsReported(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	sb := h.create(CreateRequest{Name: "doomed"})
	h.world.Kill(sb.ID, "out of memory")
	ctx, stop := context.WithTimeout(ctx, 20*time.Second)
	defer stop()
	got, err := h.Wait(ctx, sb.ID, sandbox.Error)
	if err != nil || got.Reason != "out of memory" {
		t.Fatalf("%q, %v", got.Reason, err)
	}
	wantKind(t, h.SetTimeout(ctx, sb.ID, time.Minute), sandbox.Conflict)
	if err := h.Remove(ctx, sb.ID); err != nil {
		t.Error(err)
	}
}

// conformance: FR2.6
func TestASandboxThatAskedForItIsMadeAnewButNotForEver(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	sb := h.create(CreateRequest{Name: "phoenix", Lifecycle: Lifecycle{Restart: true}})
	ctx, stop := context.WithTimeout(ctx, time.Minute)
	defer stop()
	for life := 1; life <= maxRestarts; life++ {
		h.world.Kill(sb.ID, "its kernel crashed")
		for {
			got, err := h.Get(ctx, sb.ID)
			if err != nil {
				t.Fatal(err)
			}
			if got.State == sandbox.Running && got.Restarts == life {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		g, err := h.Guest(ctx, "phoenix")
		if err != nil || g.Health(ctx) != nil {
			t.Fatalf("in life %d it does not answer: %v", life, err)
		}
	}
	h.world.Kill(sb.ID, "its kernel crashed")
	if got, err := h.Wait(ctx, sb.ID, sandbox.Error); err != nil || got.Reason != "its kernel crashed" {
		t.Errorf("lost once too often it is %s: %q, %v", got.State, got.Reason, err)
	}
}

func TestAPublishedPortCarriesBothWaysAndCloses(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	sb := h.create(CreateRequest{Ports: []Port{{Guest: sandbox.GuestPort}}})
	addr := net.JoinHostPort(sb.Ports[0].HostIP, fmt.Sprint(sb.Ports[0].Host))
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "GET /health HTTP/1.0\r\n\r\n")
	answer, err := io.ReadAll(c)
	if err != nil || !bytes.Contains(answer, []byte(" 204 ")) {
		t.Fatalf("%q, %v", answer, err)
	}
	if err := h.Unexpose(ctx, sb.ID, sandbox.GuestPort); err != nil {
		t.Fatal(err)
	}
	if c, err := net.Dial("tcp", addr); err == nil {
		c.Close()
		t.Error("the port is still open")
	}
}
