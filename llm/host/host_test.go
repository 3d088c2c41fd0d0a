package host

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/atoll-run/atoll/llm/engine"
	"github.com/atoll-run/atoll/llm/gguf"
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
	if _, err := s.Import(t.Context(), filepath.Join(dir, "cut.gguf"), "", nil); err == nil || strings.Contains(err.Error(), partPrefix) || !strings.Contains(err.Error(), "cut.gguf") {
		t.Errorf("the error does not name the file that was given: %v", err)
	}
	if list, err := s.List(); err != nil || len(list) != 0 {
		t.Errorf("%v, %v", list, err)
	}
}

// conformance: L1
func TestAModelInPartsIsImportedAndServedAsOne(t *testing.T) {
	r, err := gguf.Open(modeltest.Path(t, smol))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	dir := t.TempDir()
	const parts = 3
	for i := range parts {
		var m gguf.Meta
		if i == 0 {
			m = r.Meta.Clone()
		}
		if err := errors.Join(m.Set("split.no", uint16(i)), m.Set("split.count", uint16(parts)), m.Set("split.tensors.count", int32(len(r.Tensors)))); err != nil {
			t.Fatal(err)
		}
		n := len(r.Tensors)
		f, err := gguf.New(m, r.Tensors[i*n/parts:(i+1)*n/parts])
		if err != nil {
			t.Fatal(err)
		}
		err = f.Save(filepath.Join(dir, fmt.Sprintf("smol-%05d-of-%05d.gguf", i+1, parts)), func(w io.Writer, x *gguf.Tensor) error {
			_, err := io.Copy(w, r.Section(r.Tensor(x.Name)))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	server := httptest.NewServer(http.FileServer(http.Dir(dir)))
	defer server.Close()
	second := "/smol-00002-of-00003.gguf" // any part stands for all
	h := newHost(t, Config{})
	want, err := h.config.Store.Import(t.Context(), modeltest.Path(t, smol), "whole", nil)
	if err != nil {
		t.Fatal(err)
	}
	info, err := h.config.Store.Import(t.Context(), dir+second, "joined", nil)
	if err != nil || info.Parameters != want.Parameters {
		t.Errorf("%+v, %v", info, err)
	}
	for _, ref := range []string{"joined", dir + second, server.URL + second} {
		m, release, err := h.Use(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		if err := first(t.Context(), m); err != nil {
			t.Errorf("%s: %v", ref, err)
		}
		release()
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
	stalls atomic.Int64 // connections over which nothing more is to come after a while
	tag    atomic.Value // a string: the name of the content
}

func (f *flaky) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var from int
	if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err != nil || from >= len(f.data) {
		http.Error(w, "ranges only", http.StatusRequestedRangeNotSatisfiable)
		return
	}
	if tag, ok := f.tag.Load().(string); ok {
		w.Header().Set("ETag", tag)
		if want := r.Header.Get("If-Match"); want != "" && want != tag {
			w.WriteHeader(http.StatusPreconditionFailed)
			return
		}
	}
	w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(f.data)-1, len(f.data)))
	w.Header().Set("Content-Length", fmt.Sprint(len(f.data)-from))
	w.WriteHeader(http.StatusPartialContent)
	for at := from; at < len(f.data); {
		n := min(1<<18, len(f.data)-at)
		if f.halved && at > len(f.data)*9/10 {
			<-f.rest
		}
		if f.stalls.Load() > 0 && at-from > 1<<20 {
			f.stalls.Add(-1)
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
			return
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

// conformance: L7
func TestAnImportGoesOnAfterConnectionsBreakOrStall(t *testing.T) {
	path := modeltest.Path(t, smol)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f := &flaky{data: data}
	f.cuts.Store(2)
	srv := httptest.NewServer(f)
	defer srv.Close()
	s := OpenStore(t.TempDir())
	info, err := s.Import(t.Context(), srv.URL+"/m.gguf", "", nil)
	if err != nil || f.cuts.Load() != 0 {
		t.Fatalf("%v; %d cuts are left", err, f.cuts.Load())
	}
	if local, err := OpenStore(t.TempDir()).Import(t.Context(), path, "", nil); err != nil || local.Digest != info.Digest {
		t.Errorf("%v, %v: what came is not what was sent", local.Digest, err)
	}

	f.stalls.Store(2)
	r, err := openRanges(t.Context(), srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer r.drop()
	r.patient = 50 * time.Millisecond
	got := make([]byte, 8<<20)
	if _, err := r.ReadAt(got, 0); err != nil || !bytes.Equal(got, data[:len(got)]) || f.stalls.Load() != 0 {
		t.Errorf("%v; %d stalls are left", err, f.stalls.Load())
	}
}

// Half of one file and half of another are no model.
func TestAFileThatChangesOnItsServerIsRefused(t *testing.T) {
	f := &flaky{data: make([]byte, 4<<20)}
	f.tag.Store(`"one"`)
	srv := httptest.NewServer(f)
	defer srv.Close()
	r, err := openRanges(t.Context(), srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer r.drop()
	if _, err := r.ReadAt(make([]byte, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	r.drop()
	f.tag.Store(`"two"`)
	if _, err := r.ReadAt(make([]byte, 1<<20), 1<<20); !sandbox.Is(err, sandbox.Conflict) {
		t.Errorf("%v", err)
	}
}

// conformance: L5
func TestOneModelGuessesForAnotherOfTheSameTokensOnly(t *testing.T) {
	path := modeltest.Path(t, smol)
	h := newHost(t, Config{Draft: path})
	m, release, err := h.Use(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	if err := first(t.Context(), m); err != nil {
		t.Error(err)
	}
	if _, _, err := h.Use(t.Context(), modeltest.Path(t, "gemma-3-270m-q4_k_m.gguf")); !sandbox.Is(err, sandbox.Invalid) {
		t.Errorf("a model with other tokens guesses: %v", err)
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

// serveUntilKilled is what the process that is killed does: it answers one request after the other with little memory for
// keys and values, so that pages go to disk, and says when it is in the middle of an answer.
func serveUntilKilled(t *testing.T, store, keep string) {
	h, err := New(Config{Store: OpenStore(store), Keep: keep, Engine: engine.Config{Window: 224, CacheBytes: 1}})
	if err != nil {
		t.Fatal(err)
	}
	m, _, err := h.Use(t.Context(), "smol")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		tokens, err := m.Tokens.EncodePrompt(fmt.Sprint("Page ", i, strings.Repeat(" of a book about reefs", 30)), false)
		if err != nil {
			t.Fatal(err)
		}
		s, err := m.Engine.Submit(t.Context(), engine.Request{Prompt: tokens, Limit: 16, Likely: -1, Endless: true})
		if err != nil {
			t.Fatal(err)
		}
		for p := (engine.Piece{}); p.Finish == ""; {
			if p, err = s.Next(t.Context()); err != nil {
				t.Fatal(err)
			}
			if i == 3 {
				fmt.Println("in the middle")
			}
		}
	}
}

// conformance: L5 L8
func TestAfterAKillInTheMiddleOfAnAnswerTheNextServerServes(t *testing.T) {
	if dir := os.Getenv("ATOLL_TEST_KILLED"); dir != "" {
		serveUntilKilled(t, filepath.Join(dir, "store"), filepath.Join(dir, "keep"))
		return
	}
	dir := t.TempDir()
	store := OpenStore(filepath.Join(dir, "store"))
	if _, err := store.Import(t.Context(), modeltest.Path(t, smol), "smol", nil); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), "ATOLL_TEST_KILLED="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != "in the middle" {
		t.Fatalf("the server says %q", lines.Text())
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()

	answer := func(h *Host, prompt string) (ids []int32) {
		m, release, err := h.Use(t.Context(), "smol")
		if err != nil {
			t.Fatal(err)
		}
		defer release()
		tokens, err := m.Tokens.EncodePrompt(prompt, false)
		if err != nil {
			t.Fatal(err)
		}
		s, err := m.Engine.Submit(t.Context(), engine.Request{Prompt: tokens, Limit: 8, Likely: -1, Endless: true})
		if err != nil {
			t.Fatal(err)
		}
		for p := (engine.Piece{}); p.Finish == ""; {
			if p, err = s.Next(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, token := range p.Tokens {
				ids = append(ids, token.ID)
			}
		}
		return ids
	}
	clean := newHost(t, Config{Store: store})
	next := newHost(t, Config{Store: store, Keep: filepath.Join(dir, "keep")})
	for i := range 4 {
		prompt := fmt.Sprint("Page ", i, strings.Repeat(" of a book about reefs", 30))
		if got, want := answer(next, prompt), answer(clean, prompt); !slices.Equal(got, want) {
			t.Errorf("page %d: %v, want %v", i, got, want)
		}
	}
}
