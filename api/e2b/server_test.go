package e2b

import (
	"archive/tar"
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	_ "modernc.org/sqlite" // the driver

	"github.com/atoll-run/atoll/guest/guesttest"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/runtime/fake"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/snapshot"
	"github.com/atoll-run/atoll/tenant"
)

func TestMain(m *testing.M) { os.Exit(guesttest.Main(m)) }

// server is the API on a node whose sandboxes are agents without isolation.
type server struct {
	t     *testing.T
	world *fake.World
	node  *node.Node
	http  *httptest.Server
	key   string // of team "team"
	other string // of team "other"
}

// testVolumeSize is how much a volume of the tests holds, in bytes.
const testVolumeSize = 1 << 20

// plainTemplate is the one that every server of the tests has.
const plainTemplate = "plain"

func newServer(t *testing.T) *server {
	t.Helper()
	dir := t.TempDir()
	s := &server{t: t, world: fake.NewWorld(t.TempDir(), guesttest.Binary(t))}
	t.Cleanup(s.world.Close)
	db, err := sql.Open("sqlite", "file:"+filepath.Join(dir, "node.db")+"?_pragma=journal_mode(WAL)")
	must(t, err)
	t.Cleanup(func() { _ = db.Close() })
	db.SetMaxOpenConns(1)
	snapshots, _, err := snapshot.Open(filepath.Join(dir, "snapshots"))
	must(t, err)
	images, err := image.Open(filepath.Join(dir, "images"), image.Options{})
	must(t, err)
	log := slog.New(slog.DiscardHandler)
	s.node, err = node.Open(t.Context(), node.Config{
		Dir: dir, DB: db, Runtimes: []sandbox.Runtime{s.world.Open(fake.Config{})}, Images: images, Snapshots: snapshots,
		VolumeSize: testVolumeSize, NetworkError: errors.New("no network in this test"), Defaults: sandbox.Resources{CPUs: 2, Memory: 512 << 20, Disk: 1 << 30}, Log: log,
	})
	must(t, err)
	t.Cleanup(func() { _ = s.node.Shutdown(context.Background()) })
	keys, err := tenant.OpenKeys(t.Context(), db)
	must(t, err)
	s.key, _, err = keys.Create(t.Context(), "team", "one")
	must(t, err)
	s.other, _, err = keys.Create(t.Context(), "other", "two")
	must(t, err)
	s.addTemplate(images)
	s.http = httptest.NewServer(New(Config{Node: s.node, Keys: keys, Domain: "sandbox.test", Log: log}))
	t.Cleanup(s.http.Close)
	return s
}

// addTemplate makes the tests' template from an archive with one file.
func (s *server) addTemplate(images *image.Store) {
	s.t.Helper()
	var archive bytes.Buffer
	tw := tar.NewWriter(&archive)
	must(s.t, tw.WriteHeader(&tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755}))
	must(s.t, tw.Close())
	img, err := images.Import(s.t.Context(), &archive, image.ImportOptions{Name: plainTemplate})
	must(s.t, err)
	t, _, err := s.node.CreateTemplate(s.t.Context(), node.Template{Names: []string{plainTemplate}, Team: "team", Public: true})
	must(s.t, err)
	s.ready(t.ID, img.Root.Digest)
}

// ready finishes a template's newest build without building anything.
func (s *server) ready(id, root string) {
	s.t.Helper()
	_, err := s.node.UpdateTemplate(s.t.Context(), id, func(t *node.Template) error {
		t.Builds[0].State, t.Builds[0].Image, t.Builds[0].Root = node.BuildReady, plainTemplate, root
		return nil
	})
	must(s.t, err)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// reply is an answer, read to its end.
type reply struct {
	status  int
	header  http.Header
	trailer http.Header
	body    []byte
}

// into reads the answer's JSON.
func (r reply) into(t *testing.T, v any) {
	t.Helper()
	if err := json.Unmarshal(r.body, v); err != nil {
		t.Fatalf("%d %q: %v", r.status, r.body, err)
	}
}

// message is the text of an error.
func (r reply) message() string {
	var e apiError
	_ = json.Unmarshal(r.body, &e)
	return e.Message
}

// do sends a request with the first team's key.
func (s *server) do(method, path, body string) reply { return s.as(s.key, method, path, body) }

func (s *server) as(key, method, path, body string) reply {
	s.t.Helper()
	return s.send(method, path, body, http.Header{"X-API-Key": {key}, "Content-Type": {"application/json"}}, "")
}

// send sends a request as it is told; host overrides the Host header.
func (s *server) send(method, path, body string, header http.Header, host string) reply {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), method, s.http.URL+path, strings.NewReader(body))
	must(s.t, err)
	for k, v := range header {
		req.Header[k] = v
	}
	req.Host = host
	res, err := http.DefaultTransport.RoundTrip(req)
	must(s.t, err)
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	must(s.t, err)
	return reply{res.StatusCode, res.Header, res.Trailer, data}
}

// want fails the test unless the answer has the status.
func (s *server) want(r reply, status int) reply {
	s.t.Helper()
	if r.status != status {
		s.t.Fatalf("status %d, want %d: %s", r.status, status, r.body)
	}
	return r
}

// create makes a sandbox by the newer generation; extra is more JSON fields.
func (s *server) create(extra string) createdSandbox {
	s.t.Helper()
	if extra != "" {
		extra = "," + extra
	}
	var sb createdSandbox
	s.want(s.do("POST", "/v2/sandboxes", `{"templateID":"`+plainTemplate+`"`+extra+`}`), 201).into(s.t, &sb)
	return sb
}

func (s *server) detail(id string) sandboxDetail {
	s.t.Helper()
	var d sandboxDetail
	s.want(s.do("GET", "/sandboxes/"+id, ""), 200).into(s.t, &d)
	return d
}
