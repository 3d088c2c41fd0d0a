package native

import (
	"context"
	"database/sql"
	"errors"
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

	_ "modernc.org/sqlite" // the driver

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/guesttest"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/runtime/fake"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/snapshot"
	"github.com/atoll-run/atoll/tenant"
)

func TestMain(m *testing.M) { os.Exit(guesttest.Main(m)) }

// world is a node on a fake runtime, and the API in front of it.
type world struct {
	t     *testing.T
	fake  *fake.World
	local *Local
	keys  *tenant.Keys
	url   string
	root  string // the secret of the root key
}

// complaints is where the server tells of its own failures: it has none.
type complaints struct{ t *testing.T }

func (c complaints) Write(p []byte) (int, error) {
	c.t.Errorf("the server complains: %s", p)
	return len(p), nil
}

func newWorld(t *testing.T) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{t: t, fake: fake.NewWorld(t.TempDir(), guesttest.Binary(t))}
	t.Cleanup(w.fake.Close)
	db, err := sql.Open("sqlite", "file:"+filepath.Join(dir, "node.db"))
	if err != nil {
		t.Fatal(err)
	}
	db.SetMaxOpenConns(1)
	t.Cleanup(func() { _ = db.Close() })
	snapshots, _, err := snapshot.Open(filepath.Join(dir, "snapshots"))
	if err != nil {
		t.Fatal(err)
	}
	images, err := image.Open(filepath.Join(dir, "images"), image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if w.keys, err = tenant.OpenKeys(t.Context(), db); err != nil {
		t.Fatal(err)
	}
	quiet := slog.New(slog.DiscardHandler)
	n, err := node.Open(t.Context(), node.Config{
		Dir: dir, DB: db, Runtimes: []sandbox.Runtime{w.fake.Open(fake.Config{})}, Images: images, Snapshots: snapshots,
		NetworkError: errors.New("no network in this test"), Log: quiet,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Shutdown(context.Background()); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
	})
	w.local = NewLocal(n, w.keys, nil)
	if w.root, _, err = w.keys.Create(t.Context(), tenant.DefaultTeam, tenant.RootKey); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(New(Config{Node: n, Keys: w.keys, Log: quiet}))
	srv.Config.ErrorLog = log.New(complaints{t}, "", 0)
	srv.Start()
	t.Cleanup(srv.Close)
	w.url = srv.URL
	return w
}

// client returns a client with a key of its own for the team, or the root key.
func (w *world) client(team string) *Client {
	w.t.Helper()
	secret := w.root
	if team != "" {
		var err error
		if secret, _, err = w.keys.Create(w.t.Context(), team, team); err != nil {
			w.t.Fatal(err)
		}
	}
	c, err := NewClient(w.url, secret)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = c.Close() })
	return c
}

// backends runs a test on both implementations of Backend.
func backends(t *testing.T, test func(t *testing.T, b Backend)) {
	for name, open := range map[string]func(*world) Backend{
		"in-process": func(w *world) Backend { return w.local },
		"over HTTP":  func(w *world) Backend { return w.client("") },
	} {
		t.Run(name, func(t *testing.T) { test(t, open(newWorld(t))) })
	}
}

func must[T any](t *testing.T) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func wantKind(t *testing.T, err error, kind sandbox.Kind) {
	t.Helper()
	if !sandbox.Is(err, kind) {
		t.Fatalf("got %v (%s), want %s", err, sandbox.KindOf(err), kind)
	}
}

func TestSandboxLifeIsTheSameOverBothBackends(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		ctx := t.Context()
		sb := must[node.Sandbox](t)(b.Create(ctx, node.CreateRequest{
			Image: "host", Name: "first", Secure: true, Env: map[string]string{"A": "1"}, Metadata: map[string]string{"job": "7"}, Timeout: time.Hour,
		}))
		if sb.Name != "first" || sb.State != sandbox.Running || sb.GuestToken == "" || sb.EndAt == nil {
			t.Fatalf("created %+v", sb)
		}
		if got := must[node.Sandbox](t)(b.Get(ctx, sb.ID[:8])); got.ID != sb.ID || got.GuestToken != sb.GuestToken {
			t.Fatalf("by prefix: %+v", got)
		}
		found := must[[]node.Sandbox](t)(b.List(ctx, node.Filter{States: []sandbox.State{sandbox.Running}, Metadata: map[string]string{"job": "7"}}))
		if len(found) != 1 || found[0].ID != sb.ID || found[0].GuestToken != "" {
			t.Fatalf("listed %+v", found)
		}
		if none := must[[]node.Sandbox](t)(b.List(ctx, node.Filter{Metadata: map[string]string{"job": "8"}})); len(none) != 0 {
			t.Fatalf("the filter let %v through", none)
		}
		if _, err := b.Create(ctx, node.CreateRequest{Image: "host", Name: "first"}); !sandbox.Is(err, sandbox.Exists) {
			t.Fatalf("a second sandbox of the same name: %v", err)
		}
		if err := b.Rename(ctx, "first", "second"); err != nil {
			t.Fatal(err)
		}
		if err := b.SetTimeout(ctx, "second", 0); err != nil {
			t.Fatal(err)
		}
		if got := must[node.Sandbox](t)(b.Get(ctx, "second")); got.EndAt != nil {
			t.Fatalf("still ends at %v", got.EndAt)
		}
		if paused := must[node.Sandbox](t)(b.Pause(ctx, "second", node.PauseFrozen)); paused.State != sandbox.Paused {
			t.Fatalf("paused: %s", paused.State)
		}
		if resumed := must[node.Sandbox](t)(b.Resume(ctx, "second")); resumed.State != sandbox.Running {
			t.Fatalf("resumed: %s", resumed.State)
		}
		if s := must[sandbox.Stats](t)(b.Stats(ctx, "second")); s.Time.IsZero() {
			t.Fatalf("stats %+v", s)
		}
		if err := b.Remove(ctx, "second"); err != nil {
			t.Fatal(err)
		}
		_, err := b.Get(ctx, "second")
		wantKind(t, err, sandbox.NotFound)
	})
}

// conformance: FR5.1 FR5.3
func TestSnapshotRestoreAndForkOverBothBackends(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		ctx := t.Context()
		sb := must[node.Sandbox](t)(b.Create(ctx, node.CreateRequest{Image: "host"}))
		snap := must[node.Snapshot](t)(b.Snapshot(ctx, sb.ID, "point"))
		if all := must[[]node.Snapshot](t)(b.Snapshots(ctx, sb.Name)); len(all) != 1 || all[0].ID != snap.ID {
			t.Fatalf("snapshots %+v", all)
		}
		child := must[node.Sandbox](t)(b.Restore(ctx, "point", node.CreateRequest{Name: "child"}))
		if child.Name != "child" || child.Parent != snap.ID {
			t.Fatalf("restored %+v", child)
		}
		forks := must[[]node.ForkResult](t)(b.Fork(ctx, sb.ID, 3, node.CreateRequest{}))
		if len(forks) != 3 {
			t.Fatalf("%d forks", len(forks))
		}
		for _, f := range forks {
			if f.Err != nil || f.Sandbox.ID == sb.ID {
				t.Fatalf("fork %+v: %v", f.Sandbox, f.Err)
			}
		}
		if err := b.RemoveSnapshot(ctx, "point"); err != nil {
			t.Fatal(err)
		}
		_, err := b.GetSnapshot(ctx, "point")
		wantKind(t, err, sandbox.NotFound)
	})
}

func TestDialCarriesTheGuestProtocolAndEndsOfStreams(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		ctx := t.Context()
		sb := must[node.Sandbox](t)(b.Create(ctx, node.CreateRequest{Image: "host"}))
		g := guest.New(func(ctx context.Context) (net.Conn, error) { return b.Dial(ctx, sb.ID, sandbox.GuestPort) }, guest.Options{Token: sb.GuestToken})
		defer g.CloseIdle()
		// More than every buffer on the way, with every byte value, and its end.
		data := strings.Repeat("0123456789abcde\x00", 1<<16)
		p := must[*guest.Process](t)(g.Start(ctx, guest.Command{Args: []string{"cat"}, Stdin: true}))
		defer p.Close()
		go func() {
			_ = p.Write(ctx, []byte(data), false)
			_ = p.CloseStdin(ctx)
		}()
		var out strings.Builder
		if r := must[guest.Result](t)(p.Wait(&out, nil)); r.ExitCode != 0 || out.String() != data {
			t.Fatalf("cat ended with %d and %d of %d bytes", r.ExitCode, out.Len(), len(data))
		}
		_, err := b.Dial(ctx, "nosuch", sandbox.GuestPort)
		wantKind(t, err, sandbox.NotFound)
	})
}

func TestDialPassesOnTheEndOfOneDirection(t *testing.T) {
	w := newWorld(t)
	sb := must[node.Sandbox](t)(w.local.Create(t.Context(), node.CreateRequest{Image: "host"}))
	// The fake runtime's loopback is ours.
	l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		all, _ := io.ReadAll(c) // answers only once the request has ended
		_, _ = c.Write([]byte("got " + string(all)))
	}()
	conn := must[net.Conn](t)(w.client("").Dial(t.Context(), sb.ID, l.Addr().(*net.TCPAddr).Port))
	defer conn.Close()
	if _, err := conn.Write([]byte("half")); err != nil {
		t.Fatal(err)
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got := must[[]byte](t)(io.ReadAll(conn)); string(got) != "got half" {
		t.Fatalf("got %q", got)
	}
}

func TestErrorsKeepKindSubjectAndHintOverTheWire(t *testing.T) {
	w := newWorld(t)
	_, near := w.local.Get(t.Context(), "nosuch")
	_, far := w.client("").Get(t.Context(), "nosuch")
	a, b := ProblemOf(near), ProblemOf(far)
	if a != b {
		t.Fatalf("in-process %+v\nover HTTP  %+v", a, b)
	}
	if a.Kind != sandbox.NotFound || a.Subject != "nosuch" || a.Status != 404 {
		t.Fatalf("%+v", a)
	}
}

func TestWaitReturnsWhenTheStateComes(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		sb := must[node.Sandbox](t)(b.Create(t.Context(), node.CreateRequest{Image: "host"}))
		ended := make(chan error, 1)
		go func() {
			_, err := b.Wait(t.Context(), sb.ID, sandbox.Terminated)
			ended <- err
		}()
		if err := b.Remove(t.Context(), sb.ID); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; err != nil && !sandbox.Is(err, sandbox.NotFound) { // removed before Wait looked
			t.Fatal(err)
		}
	})
}

func TestEventsArriveInOrderAndEndWithTheContext(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		events := must[<-chan sandbox.Event](t)(b.Events(ctx, 0))
		sb := must[node.Sandbox](t)(b.Create(ctx, node.CreateRequest{Image: "host"}))
		var last uint64
		for e := range events {
			if e.Seq <= last {
				t.Fatalf("event %d after %d", e.Seq, last)
			}
			last = e.Seq
			if e.Sandbox == sb.ID && e.State == sandbox.Running {
				cancel()
			}
		}
		if ctx.Err() == nil {
			t.Fatal("the events ended by themselves")
		}
	})
}

func TestKeysAreMadeShownOnceAndRevoked(t *testing.T) {
	w := newWorld(t)
	admin := w.client("")
	key := must[NewKey](t)(admin.CreateKey(t.Context(), "blue", "ci"))
	c := must[*Client](t)(NewClient(w.url, key.Secret))
	if _, err := c.List(t.Context(), node.Filter{}); err != nil {
		t.Fatal(err)
	}
	_, err := admin.CreateKey(t.Context(), "blue", tenant.RootKey)
	wantKind(t, err, sandbox.Exists)
	if err := admin.RevokeKey(t.Context(), "ci"); err != nil {
		t.Fatal(err)
	}
	_, err = c.List(t.Context(), node.Filter{})
	wantKind(t, err, sandbox.Denied)
}

func TestClientOfNobodySaysHowToStartADaemon(t *testing.T) {
	l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	addr := l.Addr().String()
	l.Close()
	c := must[*Client](t)(NewClient(addr, "e2b_0"))
	_, err := c.List(t.Context(), node.Filter{})
	wantKind(t, err, sandbox.Unavailable)
	if !strings.Contains(sandbox.HintOf(err), "atoll up") {
		t.Fatalf("hint %q", sandbox.HintOf(err))
	}
	_, err = c.Dial(t.Context(), "x", 1)
	wantKind(t, err, sandbox.Unavailable)
}

func TestOnlyWorkingTreesCanBeMerged(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		sb := must[node.Sandbox](t)(b.Create(t.Context(), node.CreateRequest{Image: "host"}))
		_, err := b.Merge(t.Context(), sb.ID, MergeRequest{})
		wantKind(t, err, sandbox.Unsupported)
		wantKind(t, b.Diff(t.Context(), sb.ID, io.Discard), sandbox.Unsupported)
	})
}

// conformance: FR3.5
func TestImageIsBuiltFromAContextOverBothBackends(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		dir := t.TempDir()
		must[none](t)(none{}, os.WriteFile(filepath.Join(dir, "app"), []byte("content"), 0o755))
		var steps []string
		i := must[image.Image](t)(b.BuildImage(t.Context(), BuildImageRequest{
			Dockerfile: "FROM scratch\nCOPY app /app\nENV A=1\nCMD [\"/app\"]\n", Names: []string{"built:1"}, Context: dir,
		}, func(l node.LogLine) { steps = append(steps, l.Text) }))
		if len(i.Names) != 1 || i.Names[0] != "built:1" || len(i.Config.Cmd) != 1 || len(steps) == 0 {
			t.Fatalf("%+v, steps %q", i, steps)
		}
		var archive strings.Builder
		if err := b.ExportImage(t.Context(), "built:1", &archive); err != nil || archive.Len() == 0 {
			t.Fatalf("exported %d bytes: %v", archive.Len(), err)
		}
		again := must[image.Image](t)(b.ImportImage(t.Context(), "again:1", strings.NewReader(archive.String())))
		if again.Root.Digest != i.Root.Digest {
			t.Errorf("came back as %s, not %s", again.Root.Digest, i.Root.Digest)
		}
		if err := b.RemoveImage(t.Context(), "again:1"); err != nil {
			t.Fatal(err)
		}
		_, err := b.GetImage(t.Context(), "again:1")
		wantKind(t, err, sandbox.NotFound)
		_, err = b.BuildImage(t.Context(), BuildImageRequest{Dockerfile: "FRMO x\n"}, nil)
		wantKind(t, err, sandbox.Invalid)
	})
}
