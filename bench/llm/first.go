package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/llm/engine"
	llmhost "github.com/atoll-run/atoll/llm/host"
)

// A start is a way to the first token, with the median of seconds that it takes.
type start struct {
	source, way string
	seconds     float64
}

// linkRate is how fast the network of these measurements is, in bytes a second.
const linkRate = 250 << 20

// starts measures the time until the first token of an answer to a prompt: with Atoll's way of beginning at once, and
// after loading all, from a slow link and from a disk whose file no cache holds.
func (b *bench) starts(ctx context.Context, file string) ([]start, error) {
	url, stop, err := serve(file)
	if err != nil {
		return nil, err
	}
	defer stop()
	dir := filepath.Dir(file)
	ways := []struct {
		start
		do func() error
	}{
		{start{source: "link", way: "at once"}, func() error { return b.first(ctx, url, false) }},
		{start{source: "link", way: "all weights, then the prompt"}, func() error { return b.first(ctx, url, true) }},
		{start{source: "link", way: "download, then load, then the prompt"}, func() error {
			copied := filepath.Join(dir, "copy.gguf")
			defer os.Remove(copied)
			if err := download(url, copied); err != nil {
				return err
			}
			return b.first(ctx, copied, true)
		}},
		{start{source: "disk", way: "at once"}, func() error { return b.first(ctx, file, false) }},
		{start{source: "disk", way: "all weights, then the prompt"}, func() error { return b.first(ctx, file, true) }},
	}
	times := make([][]float64, len(ways))
	for range 3 {
		for i, w := range ways {
			if err := forget(file); err != nil {
				return nil, err
			}
			begin := time.Now()
			if err := w.do(); err != nil {
				return nil, err
			}
			times[i] = append(times[i], time.Since(begin).Seconds())
		}
	}
	list := make([]start, len(ways))
	for i, w := range ways {
		list[i] = w.start
		list[i].seconds = median(times[i])
	}
	return list, nil
}

// first opens a model and asks for a token, at once or when all weights are there.
func (b *bench) first(ctx context.Context, ref string, wait bool) error {
	h, err := llmhost.New(llmhost.Config{Store: llmhost.OpenStore(filepath.Join(os.TempDir(), "none")), Engine: engine.Config{Window: 1024}})
	if err != nil {
		return err
	}
	defer h.Close()
	m, release, err := h.Use(ctx, ref)
	if err != nil {
		return err
	}
	defer release()
	if wait {
		if err := m.Weights.Wait(ctx); err != nil {
			return err
		}
	}
	tokens := make([]int32, b.prompt)
	for i := range tokens {
		tokens[i] = prompt(i)
	}
	s, err := m.Engine.Submit(ctx, engine.Request{Prompt: tokens, Limit: 1, Endless: true, Likely: -1})
	if err != nil {
		return err
	}
	defer s.Close()
	for {
		if p, err := s.Next(ctx); err != nil || p.Finish != "" {
			return err
		}
	}
}

// forget empties the page cache of a file.
func forget(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return err
	}
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

// serve makes a file available by HTTP, at linkRate.
func serve(file string) (url string, stop func(), err error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeFile(&slow{ResponseWriter: w, begin: time.Now()}, r, file)
	})}
	go func() { _ = srv.Serve(ln) }()
	return fmt.Sprintf("http://%s/model.gguf", ln.Addr()), func() { _ = srv.Close() }, nil
}

// slow sends no faster than linkRate.
type slow struct {
	http.ResponseWriter
	begin time.Time
	sent  int
}

func (s *slow) Write(p []byte) (int, error) {
	n, err := s.ResponseWriter.Write(p)
	s.sent += n
	time.Sleep(time.Until(s.begin.Add(time.Duration(s.sent) * time.Second / linkRate)))
	return n, err
}

func download(url, to string) error {
	res, err := http.Get(url) //nolint:gosec,noctx // our own server
	if err != nil {
		return err
	}
	defer res.Body.Close()
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	if _, err := io.Copy(f, res.Body); err != nil {
		_ = f.Close()
		return err
	}
	return f.Close()
}
