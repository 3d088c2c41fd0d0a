package cache

import (
	"encoding/hex"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// Answers keeps whole answers on disk, so that what was asked before needs no model.
// Keys must name the model by its digest and all that the answer depends on. The
// least recently used go when there are too many. It may be used by many goroutines.
type Answers struct {
	dir   string
	limit int64 // bytes

	mu   sync.Mutex
	size map[string]int64 // of each file
	used map[string]time.Time
	sum  int64

	hits, misses atomic.Int64
}

// OpenAnswers uses a directory, with at most so many bytes of answers.
func OpenAnswers(dir string, limit int64) (*Answers, error) {
	const op = "cache.OpenAnswers"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, sandbox.E(op, sandbox.Denied, dir, err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Denied, dir, err)
	}
	a := &Answers{dir: dir, limit: limit, size: map[string]int64{}, used: map[string]time.Time{}}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() {
			continue
		}
		if _, err := hex.DecodeString(e.Name()); err != nil { // what an interrupted Put left
			_ = os.Remove(filepath.Join(dir, e.Name()))
			continue
		}
		a.size[e.Name()], a.used[e.Name()] = info.Size(), info.ModTime()
		a.sum += info.Size()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.shrink()
	return a, nil
}

// Get returns an answer.
func (a *Answers) Get(key string) ([]byte, bool) {
	name := hex.EncodeToString([]byte(key))
	a.mu.Lock()
	_, ok := a.size[name]
	if ok {
		a.used[name] = time.Now()
	}
	a.mu.Unlock()
	var data []byte
	if ok {
		path := filepath.Join(a.dir, name)
		var err error
		data, err = os.ReadFile(path)
		ok = err == nil
		_ = os.Chtimes(path, time.Time{}, time.Now()) // the order for the next start; losing it is no harm
	}
	if ok {
		a.hits.Add(1)
	} else {
		a.misses.Add(1)
	}
	return data, ok
}

// Put keeps an answer. One that cannot be written is not kept.
func (a *Answers) Put(key string, data []byte) {
	name := hex.EncodeToString([]byte(key))
	if int64(len(data)) > a.limit/2 {
		return
	}
	f, err := os.CreateTemp(a.dir, ".new-*")
	if err != nil {
		return
	}
	_, err = f.Write(data)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(a.dir, name))
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return
	}
	a.sum += int64(len(data)) - a.size[name]
	a.size[name], a.used[name] = int64(len(data)), time.Now()
	a.shrink()
}

// shrink removes the least recently used until the rest fits. mu is held.
func (a *Answers) shrink() {
	if a.sum <= a.limit {
		return
	}
	names := make([]string, 0, len(a.size))
	for name := range a.size {
		names = append(names, name)
	}
	slices.SortFunc(names, func(x, y string) int { return a.used[x].Compare(a.used[y]) })
	for _, name := range names {
		if a.sum <= a.limit*9/10 { // some room, so that not each Put sorts
			return
		}
		_ = os.Remove(filepath.Join(a.dir, name)) // gone already is as good
		a.sum -= a.size[name]
		delete(a.size, name)
		delete(a.used, name)
	}
}

// Counts returns how often Get found something, and how often not.
func (a *Answers) Counts() (hits, misses int64) { return a.hits.Load(), a.misses.Load() }
