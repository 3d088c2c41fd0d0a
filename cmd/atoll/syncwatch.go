package main

import (
	"context"
	"io/fs"
	"path/filepath"

	"github.com/fsnotify/fsnotify"
)

// maxWatched bounds how many directories of this host are watched; beyond it
// changes are found by looking every lookEvery.
const maxWatched = 8192

// watch puts a hint into changed when something below either directory may have
// changed. A hint may come too often or be missing: rounds look for themselves.
func (s *syncer) watch(ctx context.Context, changed chan<- struct{}) (stop func(), err error) {
	hint := func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	here, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	watched := 0
	add := func(dir string) {
		_ = filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return nil
			}
			if rel, err := filepath.Rel(s.local, file); err == nil && rel != "." && s.excluded(filepath.ToSlash(rel)) {
				return fs.SkipDir
			}
			if watched++; watched > maxWatched || here.Add(file) != nil {
				return fs.SkipAll // the system has a limit too
			}
			return nil
		})
	}
	add(s.local)
	go func() {
		for e := range here.Events {
			if e.Has(fsnotify.Create) {
				add(e.Name) // if it is a directory
			}
			hint()
		}
	}()
	go func() {
		for range here.Errors {
			hint() // events were lost
		}
	}()
	there, err := s.g.Watch(ctx, s.remote, true)
	if err != nil { // an old kernel, or too many directories: looking remains
		return func() { here.Close() }, nil
	}
	go func() {
		for {
			if _, err := there.Next(); err != nil {
				return
			}
			hint()
		}
	}()
	return func() {
		here.Close()
		there.Close()
	}, nil
}
