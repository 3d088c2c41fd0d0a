package microvm

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

// Templates that nothing is made of are kept up to these bounds: the ones that were
// used last stay.
const (
	templatesKept  = 16
	templatesBytes = 8 << 30
	templatesAge   = 30 * 24 * time.Hour
	// templatesRest is for how long after its last use none is removed: somebody
	// may be about to make a machine of it.
	templatesRest = time.Hour
)

// templateUse is what decides whether a template stays.
type templateUse struct {
	name  string
	used  time.Time // last
	bytes int64
	// linked says that a machine or a snapshot has its files. They keep them
	// whatever becomes of the template, so that removing it would free nothing.
	linked bool
}

// expired names the templates to remove.
func expired(all []templateUse, now time.Time) (names []string) {
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b templateUse) int { return b.used.Compare(a.used) })
	var kept int
	var bytes int64
	for _, t := range all {
		age := now.Sub(t.used)
		room := kept < templatesKept && bytes+t.bytes <= templatesBytes && age < templatesAge
		if !room && !t.linked && age > templatesRest {
			names = append(names, t.name)
			continue
		}
		kept, bytes = kept+1, bytes+t.bytes
	}
	return names
}

// sweep removes templates that nobody needs, and those that were never finished.
// Young ones of these may be in the making by other processes.
func (t *templates) sweep() error {
	const op = "microvm.sweep"
	dir := filepath.Join(t.r.cfg.Cache, "templates")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return sandbox.E(op, sandbox.Internal, dir, err)
	}
	var gone []string
	var uses []templateUse
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			continue // another process was faster
		}
		if !strings.HasPrefix(e.Name(), newPrefix) {
			uses = append(uses, templateUseOf(dir, e.Name()))
		} else if time.Since(info.ModTime()) > 2*templateTimeout {
			gone = append(gone, e.Name())
		}
	}
	for _, name := range expired(uses, time.Now()) {
		t.r.log.Info("removing a template that was not used for long", "template", name)
		// Renamed first, so that nobody meets half of one. What bears that name is
		// what is left of one that was removed.
		away := filepath.Join(dir, newPrefix+name)
		err := errors.Join(os.RemoveAll(away), os.Rename(filepath.Join(dir, name), away))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return sandbox.E(op, sandbox.Internal, name, err)
		}
		gone = append(gone, newPrefix+name)
	}
	for _, name := range gone {
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			return sandbox.E(op, sandbox.Internal, name, err)
		}
	}
	return nil
}

// templateUseOf looks at a template. One that has no description was never used.
func templateUseOf(dir, name string) templateUse {
	u := templateUse{name: name}
	if info, err := os.Stat(filepath.Join(dir, name, templateName)); err == nil {
		u.used = info.ModTime()
	}
	entries, _ := os.ReadDir(filepath.Join(dir, name))
	for _, e := range entries {
		var st unix.Stat_t
		if unix.Stat(filepath.Join(dir, name, e.Name()), &st) == nil {
			u.bytes += st.Blocks * 512
			u.linked = u.linked || st.Nlink > 1
		}
	}
	return u
}
