package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/atoll-run/atoll/sandbox"
)

// excluded reports whether a path, or one of its parents, is left out.
func (s *syncer) excluded(name string) bool {
	for part := range strings.SplitSeq(name, "/") {
		if strings.HasPrefix(part, ".atoll-") { // half-written files of ours
			return true
		}
		for _, pattern := range s.exclude {
			if ok, _ := path.Match(pattern, part); ok {
				return true
			}
		}
	}
	return false
}

var errTooMany = sandbox.Errorf("atoll sync", sandbox.Exhausted, "", "there are more than %d files", maxSynced).
	WithHint("leave some out, for example --exclude node_modules")

func (s *syncer) scanHost() (map[string]fileState, error) {
	found := map[string]fileState{}
	err := filepath.WalkDir(s.local, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			if file != s.local && errors.Is(err, fs.ErrNotExist) {
				return nil // removed meanwhile
			}
			return err // the directory itself is gone: that is no deletion of all in it
		}
		rel, err := filepath.Rel(s.local, file)
		if err != nil || rel == "." {
			return err
		}
		name := filepath.ToSlash(rel)
		if s.excluded(name) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return nil
		}
		st := fileState{Kind: info.Mode().Type(), Mode: info.Mode().Perm(), Size: info.Size(), Time: info.ModTime().UnixNano(), present: true}
		switch st.Kind {
		case fs.ModeSymlink:
			st.Link, _ = os.Readlink(file)
		case 0, fs.ModeDir:
		default:
			return nil // sockets, pipes and devices
		}
		if found[name] = st; len(found) > maxSynced {
			return errTooMany
		}
		return nil
	})
	return found, err
}

func (s *syncer) scanSandbox(ctx context.Context) (map[string]fileState, error) {
	entries, err := s.g.ReadDir(ctx, s.remote, maxDepth)
	if err != nil {
		return nil, err
	}
	found := map[string]fileState{}
	for _, e := range entries {
		name, below := strings.CutPrefix(e.Path, strings.TrimSuffix(s.remote, "/")+"/")
		if !below || !filepath.IsLocal(name) || s.excluded(name) || e.Type == fs.ModeIrregular {
			continue
		}
		st := fileState{Kind: e.Type, Mode: e.Mode, Size: e.Size, Time: e.Modified.UnixNano(), present: true}
		if e.Target != "" {
			st.Kind, st.Link = fs.ModeSymlink, e.Target
		}
		if found[name] = st; len(found) > maxSynced {
			return nil, errTooMany
		}
	}
	return found, nil
}

// compare reads both files to their end.
func (s *syncer) compare(ctx context.Context, name string) (likeness, error) {
	here, err := os.Open(filepath.Join(s.local, filepath.FromSlash(name)))
	if err != nil {
		return unknown, err
	}
	defer here.Close()
	there, err := s.g.ReadFile(ctx, path.Join(s.remote, name))
	if err != nil {
		return unknown, err
	}
	defer there.Close()
	a, b := sha256.New(), sha256.New()
	_, err = io.Copy(a, here)
	_, err2 := io.Copy(b, there)
	if err := errors.Join(err, err2); err != nil {
		return unknown, err
	}
	if bytes.Equal(a.Sum(nil), b.Sum(nil)) {
		return equal, nil
	}
	return different, nil
}
