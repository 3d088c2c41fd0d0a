package image

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/atoll-run/atoll/sandbox"
)

// testRegistry is a real registry with a gate in front of it, where tests cut
// connections and falsify contents.
type testRegistry struct {
	host string

	mu     sync.Mutex
	cut    int64 // bytes of a layer after which the connection is cut; 0: never
	ranges []string
	forge  bool   // send other bytes than were asked for
	user   string // needed to read; empty: nobody

	requests atomic.Int64 // for layers
}

func newRegistry(t testing.TB) *testRegistry {
	t.Helper()
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	r := &testRegistry{}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) { r.serve(inner, w, req) }))
	t.Cleanup(srv.Close)
	r.host = strings.TrimPrefix(srv.URL, "http://")
	return r
}

func (r *testRegistry) serve(inner http.Handler, w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	cut, forge, user := r.cut, r.forge, r.user
	layer := req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/sha256:")
	if layer && req.Header.Get("Range") != "" {
		r.ranges = append(r.ranges, req.Header.Get("Range"))
	}
	r.mu.Unlock()
	if name, password, _ := req.BasicAuth(); user != "" && (name != user || password != "secret") {
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	if !layer {
		inner.ServeHTTP(w, req)
		return
	}
	r.requests.Add(1)
	ranged := req.Header.Get("Range")
	req.Header.Del("Range") // the inner registry wants both ends
	rec := httptest.NewRecorder()
	inner.ServeHTTP(rec, req)
	body := rec.Body.Bytes()
	if forge && len(body) > 1000 {
		body[500] ^= 1
	}
	var start int
	if _, err := fmt.Sscanf(ranged, "bytes=%d-", &start); err == nil {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", start, len(body)-1, len(body)))
		rec.Code, body = http.StatusPartialContent, body[start:]
	}
	w.Header().Set("Content-Length", fmt.Sprint(len(body)))
	w.WriteHeader(rec.Code)
	if cut > 0 && int64(len(body)) > cut {
		_, _ = w.Write(body[:cut])
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
	_, _ = w.Write(body)
}

// push makes an image of layers and pushes it.
func (r *testRegistry) push(t testing.TB, ref string, layers ...[]byte) v1.Image {
	t.Helper()
	img, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: "linux", Architecture: strings.TrimPrefix(HostPlatform(), "linux/"), Config: v1.Config{
		Env: []string{"A=b"}, User: "7", WorkingDir: "/srv", Cmd: []string{"serve"}, ExposedPorts: map[string]struct{}{"80/tcp": {}}, Labels: map[string]string{"k": "v"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(l)), nil })
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, layer); err != nil {
			t.Fatal(err)
		}
	}
	target, err := name.ParseReference(r.host + "/" + ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(target, img, remote.WithAuth(authn.Anonymous)); err != nil {
		t.Fatal(err)
	}
	return img
}

// noise is a layer that does not compress.
func noise(t testing.TB, size int) []byte {
	t.Helper()
	b := make([]byte, size)
	_, _ = rand.Read(b)
	return testLayer(t, file("noise", string(b)))
}

// rootDescription lists what is in an image's root.
func rootDescription(t testing.TB, i Image) string {
	t.Helper()
	f, err := os.Open(i.Root.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	u, _ := unpack(t)
	if err := u.addEROFS(f, i.Size); err != nil {
		t.Fatal(err)
	}
	return describe(t, u.tree)
}

// conformance: FR2.2
func TestPullMergesLayersAndKeepsConfig(t *testing.T) {
	r, s := newRegistry(t), openStore(t)
	img := r.push(t, "team/app:1", testLayer(t, dir("etc"), file("etc/a", "old"), file("etc/b", "gone")), testLayer(t, file("etc/a", "new"), file("etc/.wh.b", "")))
	var last Progress
	got, err := s.Pull(context.Background(), r.host+"/team/app:1", RegistryOptions{Progress: func(p Progress) { last = p }})
	if err != nil {
		t.Fatal(err)
	}
	if want := "/ 40755 0:0 0.000000000\n/etc 40755 0:0 0.000000000\n/etc/a 100644 0:0 0.000000000 \"new\"\n/srv 40755 0:0 0.000000000\n"; rootDescription(t, got) != want {
		t.Errorf("root:\n%s", rootDescription(t, got))
	}
	digest, _ := img.Digest()
	config := fmt.Sprint(got.Config)
	if got.Digest != digest.String() || config != "{[A=b] 7 /srv [] [serve] [80/tcp] map[k:v] []}" || len(got.Layers) != 2 || last.Stage != "convert" {
		t.Errorf("image %+v, last progress %+v", got, last)
	}
	requests := r.requests.Load()
	byDigest, err := s.Pull(context.Background(), r.host+"/team/app@"+digest.String(), RegistryOptions{})
	if err != nil || byDigest.Root != got.Root || byDigest.ID != got.ID {
		t.Errorf("by digest: %+v, %v", byDigest, err)
	}
	if extra := r.requests.Load() - requests; extra > 1 { // the configuration
		t.Errorf("%d layers fetched again", extra-1)
	}
}

// conformance: FR2.2
func TestPullResumesWhereConnectionWasCut(t *testing.T) {
	r, s := newRegistry(t), openStore(t)
	r.push(t, "big", noise(t, 1<<20))
	r.cut = 300_000
	got, err := s.Pull(context.Background(), r.host+"/big", RegistryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.ranges) < 3 || r.ranges[0] != "bytes=300000-" || r.ranges[1] != "bytes=600000-" {
		t.Errorf("ranges asked for: %q", r.ranges)
	}
	if !strings.Contains(rootDescription(t, got), "/noise") {
		t.Error("the file is missing")
	}
}

func TestPullGoesOnWithWhatFailedPullLeft(t *testing.T) {
	r, s := newRegistry(t), openStore(t)
	r.push(t, "big", noise(t, 1<<20))
	r.cut = 300_000
	ctx, cancel := context.WithCancel(context.Background())
	_, err := s.Pull(ctx, r.host+"/big", RegistryOptions{Progress: func(p Progress) {
		if p.Done > 0 && p.Done < p.Total {
			cancel()
		}
	}})
	if !sandbox.Is(err, sandbox.Canceled) {
		t.Fatalf("error %v", err)
	}
	r.cut = 0
	s, err = Open(s.dir, Options{}) // as after a crash
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Pull(context.Background(), r.host+"/big", RegistryOptions{}); err != nil {
		t.Fatal(err)
	}
	if len(r.ranges) != 1 {
		t.Errorf("ranges asked for: %q", r.ranges)
	}
}

func TestPullRepairsDamagedPartialLayer(t *testing.T) {
	r, s := newRegistry(t), openStore(t)
	img := r.push(t, "big", noise(t, 1<<20))
	layers, _ := img.Layers()
	digest, _ := layers[0].Digest()
	if err := os.WriteFile(s.path("partial", digest.Hex), make([]byte, 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Pull(context.Background(), r.host+"/big", RegistryOptions{}); err != nil {
		t.Fatal(err)
	}
}

// conformance: FR2.2
func TestCorruptLayerIsNamedAndLeavesNothing(t *testing.T) {
	r, s := newRegistry(t), openStore(t)
	img := r.push(t, "big", noise(t, 1<<20))
	layers, _ := img.Layers()
	digest, _ := layers[0].Digest()
	r.forge = true
	_, err := s.Pull(context.Background(), r.host+"/big", RegistryOptions{})
	if !sandbox.Is(err, sandbox.Invalid) || !strings.Contains(err.Error(), digest.String()) || !strings.Contains(err.Error(), "corrupt") {
		t.Errorf("error %v", err)
	}
	if list, err := s.List(); err != nil || len(list) != 0 {
		t.Errorf("images %v, %v", list, err)
	}
	for _, folder := range []string{"roots", "blobs", "tmp"} {
		if left, _ := filepath.Glob(s.path(folder, "*")); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	}
}

func TestPullErrorsSayWhatToDo(t *testing.T) {
	r, s := newRegistry(t), openStore(t)
	r.push(t, "here:1", testLayer(t, file("a", "b")))
	ctx := context.Background()
	check := func(ref string, kind sandbox.Kind, o RegistryOptions) {
		t.Helper()
		_, err := s.Pull(ctx, ref, o)
		if !sandbox.Is(err, kind) || sandbox.HintOf(err) == "" && kind != sandbox.Invalid {
			t.Errorf("%s: %v, kind %s, hint %q", ref, err, sandbox.KindOf(err), sandbox.HintOf(err))
		}
	}
	check(r.host+"/nowhere", sandbox.NotFound, RegistryOptions{})
	check(r.host+"/here:2", sandbox.NotFound, RegistryOptions{})
	check("not a name", sandbox.Invalid, RegistryOptions{})
	check("host", sandbox.Invalid, RegistryOptions{})
	check("127.0.0.1:1/closed", sandbox.Unavailable, RegistryOptions{})
	r.user = "me"
	check(r.host+"/here:1", sandbox.Denied, RegistryOptions{})
	check(r.host+"/here:1", sandbox.Denied, RegistryOptions{Username: "me", Password: "wrong"})
	if _, err := s.Pull(ctx, r.host+"/here:1", RegistryOptions{Username: "me", Password: "secret"}); err != nil {
		t.Error(err)
	}
	if _, err := s.Pull(ctx, r.host+"/here:1", RegistryOptions{Username: "me", Password: "secret", Platform: "linux/s390x"}); !sandbox.Is(err, sandbox.NotFound) || !strings.Contains(err.Error(), "s390x") {
		t.Errorf("other platform: %v", err)
	}
}

func TestPullsOfSameLayerAtOnceFetchItOnce(t *testing.T) {
	r, s := newRegistry(t), openStore(t)
	img := r.push(t, "big", noise(t, 1<<20))
	target, _ := name.ParseReference(r.host + "/twin")
	if err := remote.Write(target, img); err != nil {
		t.Fatal(err)
	}
	other, err := Open(s.dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for n := range 6 {
		group.Go(func() {
			store := []*Store{s, other}[n%2]
			if _, err := store.Pull(context.Background(), r.host+"/"+[]string{"big", "twin"}[n%2], RegistryOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	configs := int64(6)
	if n := r.requests.Load(); n > configs+1 {
		t.Errorf("%d requests", n)
	}
	if roots, _ := filepath.Glob(s.path("roots", "*")); len(roots) != 1 {
		t.Errorf("roots %q", roots)
	}
}

func TestARegistryThatRedirectsForEverIsGivenUp(t *testing.T) {
	r := newRegistry(t)
	r.push(t, "loop:1", noise(t, 2000))
	for name, loops := range map[string]func(path string) bool{
		"everywhere": func(string) bool { return true },
		"manifests":  func(path string) bool { return strings.Contains(path, "/manifests/") },
		"layers":     func(path string) bool { return strings.Contains(path, "/blobs/") },
	} {
		t.Run(name, func(t *testing.T) {
			var asked atomic.Int64
			target, err := url.Parse("http://" + r.host)
			if err != nil {
				t.Fatal(err)
			}
			inner := httputil.NewSingleHostReverseProxy(target)
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				if loops(req.URL.Path) {
					asked.Add(1)
					http.Redirect(w, req, req.URL.Path, http.StatusTemporaryRedirect)
					return
				}
				inner.ServeHTTP(w, req)
			}))
			defer srv.Close()
			s := openStore(t)
			_, err = s.Pull(t.Context(), strings.TrimPrefix(srv.URL, "http://")+"/loop:1", RegistryOptions{})
			if !sandbox.Is(err, sandbox.Unavailable) || !strings.Contains(err.Error(), "redirects") {
				t.Errorf("Pull: %v (kind %s)", err, sandbox.KindOf(err))
			}
			if n := asked.Load(); n > 25 {
				t.Errorf("it was asked %d times", n)
			}
		})
	}
}
