package microvm

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/supervisor"
)

// basesKept is how many memories of other nodes' templates are kept for the next machine that comes from there.
const basesKept = 8

func (r *Runtime) bases() string { return filepath.Join(r.cfg.Cache, "bases") }

// baseName is the file in which a page file is kept.
func baseName(digest string) string { return strings.TrimPrefix(digest, "blake3:") }

// keepBase keeps a page file, of which many machines are made, beyond the one in dir. What was used last is kept.
func (r *Runtime) keepBase(dir string, p pageFile) error {
	if name := baseName(p.file()); name == "" || name != filepath.Base(name) || name[0] == '.' {
		return errDamaged
	}
	if err := os.MkdirAll(r.bases(), 0o700); err != nil {
		return err
	}
	path := filepath.Join(r.bases(), baseName(p.file()))
	_ = os.Remove(path) // the new link is the youngest
	if err := supervisor.LinkFile(path, filepath.Join(dir, p.Name)); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	type kept struct {
		name string
		at   int64
	}
	entries, err := os.ReadDir(r.bases())
	if err != nil {
		return err
	}
	var all []kept
	for _, e := range entries {
		if changed, err := changeTime(filepath.Join(r.bases(), e.Name())); err == nil {
			all = append(all, kept{e.Name(), changed})
		}
	}
	slices.SortFunc(all, func(a, b kept) int { return cmp.Compare(b.at, a.at) })
	for _, k := range all[min(len(all), basesKept):] {
		err = errors.Join(err, os.Remove(filepath.Join(r.bases(), k.name)))
	}
	return err
}

// changeTime is when a file got its last name.
func changeTime(path string) (int64, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	return st.Ctim.Nano(), err
}

// Holds returns the memories that this host has, of its own templates and of others', by digest: a machine that comes from
// another node need not bring what it was cloned from.
func (r *Runtime) Holds() map[string]string {
	out := make(map[string]string)
	if entries, err := os.ReadDir(r.bases()); err == nil {
		for _, e := range entries {
			out["blake3:"+e.Name()] = filepath.Join(r.bases(), e.Name())
		}
	}
	templates, err := filepath.Glob(filepath.Join(r.cfg.Cache, "templates", "*", templateName))
	if err != nil {
		return out
	}
	for _, path := range templates {
		var t template
		if data, err := os.ReadFile(path); err != nil || json.Unmarshal(data, &t) != nil {
			continue // one that is damaged is made anew when it is needed
		}
		for _, p := range t.Base {
			out[p.file()] = filepath.Join(filepath.Dir(path), p.Name)
		}
	}
	return out
}

// Prepare does what else the first machine would wait for.
func (r *Runtime) Prepare(ctx context.Context) error {
	_, err := r.prepare(ctx)
	return err
}
