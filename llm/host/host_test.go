package host

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/atoll-run/atoll/llm/engine"
	"github.com/atoll-run/atoll/llm/modeltest"
	"github.com/atoll-run/atoll/sandbox"
)

const smol = "smollm2-135m-instruct-q4_1.gguf"

func newHost(t *testing.T, c Config) *Host {
	t.Helper()
	if c.Store == nil {
		c.Store = OpenStore(t.TempDir())
	}
	if c.Engine.Window == 0 {
		c.Engine.Window = 256
	}
	h, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

// first asks a model for one token.
func first(ctx context.Context, m *Model) error {
	tokens, err := m.Tokens.EncodePrompt("The reef", false)
	if err != nil {
		return err
	}
	s, err := m.Engine.Submit(ctx, engine.Request{Prompt: tokens, Limit: 1, Likely: -1})
	if err != nil {
		return err
	}
	defer s.Close()
	_, err = s.Next(ctx)
	return err
}

func TestAModelIsImportedListedAndRemoved(t *testing.T) {
	s, path := OpenStore(t.TempDir()), modeltest.Path(t, smol)
	info, err := s.Import(t.Context(), path, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if info.Name != "smollm2-135m-instruct-q4_1" || info.Family != "llama" || info.Parameters < 130e6 || info.Type != "Q4_1" || !strings.HasPrefix(info.Digest, "blake3:") {
		t.Errorf("%+v", info)
	}
	if again, err := s.Import(t.Context(), path, "", nil); err != nil || again != info {
		t.Errorf("the same again: %+v, %v", again, err)
	}
	if list, err := s.List(); err != nil || !slices.Equal(list, []Info{info}) {
		t.Errorf("%v, %v", list, err)
	}
	if err := s.Remove(info.Name); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Info(info.Name); !sandbox.Is(err, sandbox.NotFound) || sandbox.HintOf(err) == "" {
		t.Errorf("%v", err)
	}
	if left, err := os.ReadDir(s.dir); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestWhatIsNoWholeModelIsNotImported(t *testing.T) {
	whole, err := os.ReadFile(modeltest.Path(t, smol))
	if err != nil {
		t.Fatal(err)
	}
	s, dir := OpenStore(t.TempDir()), t.TempDir()
	for name, data := range map[string][]byte{"cut.gguf": whole[:len(whole)/2], "head.gguf": whole[:100], "empty.gguf": nil, "text.gguf": []byte("hello, world, this is not a model")} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Import(t.Context(), path, "", nil); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Import(t.Context(), filepath.Join(dir, "none.gguf"), "", nil); !sandbox.Is(err, sandbox.NotFound) {
		t.Errorf("%v", err)
	}
	if list, err := s.List(); err != nil || len(list) != 0 {
		t.Errorf("%v, %v", list, err)
	}
}

func TestTheLeastRecentlyUsedGoNeverOneInUse(t *testing.T) {
	at := func(s int64) time.Time { return time.Unix(s, 0) }
	loaded := func() []resident {
		return []resident{{"old", 10, 0, at(1)}, {"busy", 10, 1, at(0)}, {"new", 10, 0, at(2)}}
	}
	for _, c := range []struct {
		bytes int64
		want  []string
		ok    bool
	}{{-5, nil, true}, {0, nil, true}, {1, []string{"old"}, true}, {10, []string{"old"}, true}, {11, []string{"old", "new"}, true}, {21, nil, false}} {
		if got, ok := evict(loaded(), c.bytes); ok != c.ok || !slices.Equal(got, c.want) {
			t.Errorf("%d bytes: %v, %v", c.bytes, got, ok)
		}
	}
}

// conformance: L1
func TestModelsBeyondMemoryTakeTurnsAndOneInUseStays(t *testing.T) {
	path, dir := modeltest.Path(t, smol), t.TempDir()
	other := filepath.Join(dir, "other.gguf")
	if err := os.Symlink(path, other); err != nil {
		t.Fatal(err)
	}
	h := newHost(t, Config{Memory: 200 << 20})
	m, release, err := h.Use(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if err := first(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	_, _, err = h.Use(t.Context(), other)
	if !sandbox.Is(err, sandbox.Exhausted) || !strings.Contains(err.Error(), "MB are needed") {
		t.Errorf("beside one in use: %v", err)
	}
	release()
	m, release, err = h.Use(t.Context(), other)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	if err := first(t.Context(), m); err != nil {
		t.Error(err)
	}
	if l := h.Loaded(); len(l) != 1 || l[0] != m {
		t.Errorf("%d are loaded", len(l))
	}
}

func TestAModelTooLargeIsRefusedWithTheFigure(t *testing.T) {
	h := newHost(t, Config{Memory: 50 << 20})
	_, _, err := h.Use(t.Context(), modeltest.Path(t, smol))
	if !sandbox.Is(err, sandbox.Exhausted) || !strings.Contains(err.Error(), "of 52 MB for models") || sandbox.HintOf(err) == "" {
		t.Errorf("%v", err)
	}
}

// A server that sends slowly, cuts connections, and counts what it sent.
type flaky struct {
	data   []byte
	sent   atomic.Int64
	cuts   atomic.Int64  // connections still to be cut
	rest   chan struct{} // closed when bytes after half may be sent
	halved bool
}

func (f *flaky) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var from int
	if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err != nil || from >= len(f.data) {
		http.Error(w, "ranges only", http.StatusRequestedRangeNotSatisfiable)
		return
	}
	w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(f.data)-1, len(f.data)))
	w.Header().Set("Content-Length", fmt.Sprint(len(f.data)-from))
	w.WriteHeader(http.StatusPartialContent)
	for at := from; at < len(f.data); {
		n := min(1<<18, len(f.data)-at)
		if f.halved && at > len(f.data)*9/10 {
			<-f.rest
		}
		if f.cuts.Load() > 0 && at-from > 20<<20 {
			f.cuts.Add(-1)
			panic(http.ErrAbortHandler)
		}
		if _, err := w.Write(f.data[at : at+n]); err != nil {
			return
		}
		at += n
		f.sent.Add(int64(n))
	}
}

// conformance: L7
func TestAModelIsUsedFromAnAddressOverCutConnections(t *testing.T) {
	data, err := os.ReadFile(modeltest.Path(t, smol))
	if err != nil {
		t.Fatal(err)
	}
	f := &flaky{data: data}
	f.cuts.Store(3)
	srv := httptest.NewServer(f)
	defer srv.Close()
	h := newHost(t, Config{})
	m, release, err := h.Use(t.Context(), srv.URL+"/m.gguf")
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	if err := first(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	if f.cuts.Load() != 0 || f.sent.Load() > int64(len(data))*2 {
		t.Errorf("%d bytes were sent for a model of %d, %d cuts are left", f.sent.Load(), len(data), f.cuts.Load())
	}
}

// A model that is still on its way computes its first layers, and one whose weights
// never come says why.
//
// conformance: L7
func TestPartOfAModelIsUsedWhileTheRestArrives(t *testing.T) {
	data, err := os.ReadFile(modeltest.Path(t, smol))
	if err != nil {
		t.Fatal(err)
	}
	f := &flaky{data: data, halved: true, rest: make(chan struct{})}
	srv := httptest.NewServer(f)
	defer srv.Close()
	h := newHost(t, Config{})
	m, release, err := h.Use(t.Context(), srv.URL+"/m.gguf")
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if err := m.Weights.Wait(ctx); err == nil {
		t.Error("all weights are there though the last tenth was held back")
	}
	close(f.rest)
	if err := first(t.Context(), m); err != nil {
		t.Error(err)
	}
}
