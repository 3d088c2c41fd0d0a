package daemon

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/guesttest"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/runtime/gvisor/sentry"
	"github.com/atoll-run/atoll/runtime/microvm/pager"
	"github.com/atoll-run/atoll/runtime/worktree"
	"github.com/atoll-run/atoll/sandbox"
)

func TestMain(m *testing.M) {
	if sentry.Wanted() {
		sentry.Main()
	}
	if worktree.IsReexec() {
		worktree.Main()
	}
	if pager.IsReexec() {
		pager.Main()
	}
	os.Exit(guesttest.Main(m))
}

func config(t *testing.T) Config {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, as sandboxes do")
	}
	return Config{Home: Home(t.TempDir()), Guest: guesttest.Binary(t), Addr: "127.0.0.1:0", Version: "test", Log: slog.New(slog.DiscardHandler)}
}

// serve runs a daemon until the returned function is called.
func serve(t *testing.T, cfg Config) (Endpoint, func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan Endpoint, 1), make(chan error, 1)
	cfg.Ready = func(ep Endpoint) { ready <- ep }
	go func() { ended <- Run(ctx, cfg) }()
	stopped := false
	stop := func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	t.Cleanup(stop)
	select {
	case ep := <-ready:
		return ep, stop
	case err := <-ended:
		t.Fatalf("Run: %v", err)
	case <-time.After(time.Minute):
		t.Fatal("the daemon does not serve")
	}
	return Endpoint{}, stop
}

// conformance: S1
func TestTheRootKeyOpensTheAPIOverTLSOfItsOwnAuthority(t *testing.T) {
	cfg := config(t)
	cfg.TLS, cfg.Domain = true, "sandboxes.example.com"
	ep, _ := serve(t, cfg)
	if info, err := os.Stat(cfg.Home.Credentials()); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("credentials: %v, %v", info, err)
	}
	key, err := os.ReadFile(cfg.Home.Credentials())
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(cfg.Home.CA())
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	for _, name := range []string{"localhost", "sandboxes.example.com", "49983-abc.sandboxes.example.com"} {
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: name}}}
		for secret, want := range map[string]int{strings.TrimSpace(string(key)): 200, "e2b_00": 401, "": 401} {
			req, err := http.NewRequest(http.MethodGet, ep.URL+"/v2/sandboxes", nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("X-API-Key", secret)
			res, err := client.Do(req)
			if err != nil {
				t.Fatalf("as %s: %v", name, err)
			}
			res.Body.Close()
			if res.StatusCode != want || res.TLS.Version != tls.VersionTLS13 {
				t.Errorf("as %s: status %d with TLS %x, want %d", name, res.StatusCode, res.TLS.Version, want)
			}
		}
		client.CloseIdleConnections()
	}
	if _, err := http.Get(ep.URL + "/health"); err == nil {
		t.Error("a client that does not know the authority was served")
	}
}

func TestTwoDaemonsOnOneDirectory(t *testing.T) {
	cfg := config(t)
	ep, stop := serve(t, cfg)
	err := Run(context.Background(), cfg)
	if !sandbox.Is(err, sandbox.Conflict) || !strings.Contains(err.Error(), ep.URL) || sandbox.HintOf(err) == "" {
		t.Errorf("the second says %v", err)
	}
	if got, err := cfg.Home.Endpoint(); err != nil || got != ep {
		t.Errorf("the endpoint is %v, %v", got, err)
	}
	stop()
	if _, err := cfg.Home.Endpoint(); !sandbox.Is(err, sandbox.NotFound) {
		t.Errorf("after the end: %v", err)
	}
}

func TestAnEndpointOfAKilledDaemonIsNotBelieved(t *testing.T) {
	cfg := config(t)
	if err := writeFile(cfg.Home.endpointFile(), []byte(`{"pid":1,"url":"http://127.0.0.1:1"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	lock, err := cfg.Home.lock()
	if err != nil {
		t.Fatal(err)
	}
	lock.Close() // as the kernel does for a process that was killed
	if ep, err := cfg.Home.Endpoint(); !sandbox.Is(err, sandbox.NotFound) {
		t.Errorf("%v, %v", ep, err)
	}
}

// conformance: NFR4.1
func TestMetricsCountSandboxes(t *testing.T) {
	cfg := config(t)
	p, err := Open(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.CloseTransient(context.Background()); err != nil {
			t.Error(err)
		}
	})
	if _, err := p.Node.Create(context.Background(), node.CreateRequest{Image: node.HostImage, Network: sandbox.NetworkNone}); err != nil {
		t.Fatal(err)
	}
	if err := p.rootKey(context.Background()); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(p.Home.Credentials())
	if err != nil {
		t.Fatal(err)
	}
	stranger, _, err := p.Keys.Create(context.Background(), "blue", "ci")
	if err != nil {
		t.Fatal(err)
	}
	ask := func(secret string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(http.MethodGet, "/metrics", nil)
		r.Header.Set("Authorization", "Bearer "+secret)
		answer := httptest.NewRecorder()
		p.handler(cfg).ServeHTTP(answer, r)
		return answer
	}
	for _, secret := range []string{"", stranger} {
		if got := ask(secret); got.Code != http.StatusUnauthorized {
			t.Errorf("without the root key: %d", got.Code)
		}
	}
	answer := ask(strings.TrimSpace(string(key)))
	if !strings.Contains(answer.Body.String(), `atoll_sandboxes{state="running"} 1`) {
		t.Errorf("metrics say\n%s", answer.Body)
	}
}

// A process that used a transient node and was killed leaves its directory and
// sandboxes; the next one removes them.
func TestATransientNodeOfAKilledProcessIsSweptByTheNext(t *testing.T) {
	cfg, ctx := config(t), context.Background()
	first, err := OpenTransient(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	sb, err := first.Node.Create(ctx, node.CreateRequest{Image: node.HostImage, Network: sandbox.NetworkNone})
	if err != nil {
		t.Fatal(err)
	}
	g, err := first.Node.Guest(ctx, sb.ID)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := g.Run(ctx, guest.Command{Args: []string{"true"}}); err != nil || out.ExitCode != 0 {
		t.Fatal(out, err)
	}
	// Everything is let go and nothing removed, as when a process dies.
	if err := first.Close(ctx); err != nil {
		t.Fatal(err)
	}
	second, err := OpenTransient(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if dirs, err := os.ReadDir(filepath.Join(string(cfg.Home), "run")); err != nil || len(dirs) != 1 {
		t.Errorf("transient nodes: %v, %v", dirs, err)
	}
	if err := second.CloseTransient(ctx); err != nil {
		t.Error(err)
	}
	if dirs, err := os.ReadDir(filepath.Join(string(cfg.Home), "run")); err != nil || len(dirs) != 0 {
		t.Errorf("left: %v, %v", dirs, err)
	}
}
