package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/sandbox"
)

const (
	maxSynced  = 50_000                 // entries below a synced directory
	maxDepth   = 64                     // levels
	settle     = 150 * time.Millisecond // for a burst of changes to end
	lookEvery  = 10 * time.Second       // even when nobody told of a change
	retryEvery = 2 * time.Second        // after a round that failed
	maxRetries = 5                      // rounds in a row that may fail
)

func (a *app) syncCommand() *cobra.Command {
	var once bool
	var side string
	var exclude []string
	cmd := &cobra.Command{
		Use: "sync DIRECTORY SANDBOX:PATH", Short: "Keep a directory here and one in a sandbox the same", Args: exact("a directory", "a directory in a sandbox"),
		Long: "Sync carries changes in both directions until ctrl-c. A file that changed on both sides is reported as a conflict\n" +
			"and left alone on both, unless --prefer says which side wins; a deletion yields to a change.",
		Example: "  atoll sync . work:/home/user/project --exclude node_modules --exclude .git",
		RunE: func(cmd *cobra.Command, args []string) error {
			if p := prefer(side); p != preferNone && p != preferHost && p != preferSandbox {
				return usageError(side, "use --prefer none, host or sandbox", "there is no such side")
			}
			local, err := hostPath(args[0])
			if err != nil {
				return err
			}
			if info, err := os.Stat(local); err != nil || !info.IsDir() {
				return usageError(args[0], "create it first", "no such directory")
			}
			remote, err := parsePlace(args[1])
			if err != nil {
				return err
			}
			if remote.sandbox == "" {
				return usageError(args[1], "write SANDBOX:PATH", "that is not in a sandbox")
			}
			for _, pattern := range exclude {
				if _, err := path.Match(pattern, ""); err != nil {
					return usageError(pattern, "write for example --exclude '*.o'", "that is no pattern")
				}
			}
			b, sb, err := a.get(cmd.Context(), remote.sandbox)
			if err != nil {
				return err
			}
			g := guestOf(b, sb)
			defer g.CloseIdle()
			s := &syncer{a: a, g: g, local: local, remote: remote.path, side: prefer(side), exclude: exclude, reported: map[string]bool{}}
			return s.run(cmd.Context(), once)
		},
	}
	cmd.Flags().BoolVar(&once, "once", false, "once, and end with 1 if there are conflicts")
	cmd.Flags().StringVar(&side, "prefer", string(preferNone), "who wins when both changed: `none`, host or sandbox")
	cmd.Flags().StringArrayVar(&exclude, "exclude", nil, "leave out what has a name like this `pattern`")
	return cmd
}

// syncer keeps two directories the same. It belongs to one goroutine.
type syncer struct {
	a       *app
	g       *guest.Client
	local   string // absolute path on this host
	remote  string // absolute path in the sandbox, after prepare
	side    prefer
	exclude []string

	last     map[string]synced
	reported map[string]bool // conflicts that were told of
}

func (s *syncer) run(ctx context.Context, once bool) error {
	if err := s.prepare(ctx); err != nil {
		return err
	}
	if once {
		conflicts, err := s.round(ctx)
		if err == nil && conflicts > 0 {
			return exitError(1)
		}
		return err
	}
	changed := make(chan struct{}, 1) // holds one hint; more say nothing new
	stop, err := s.watch(ctx, changed)
	if err != nil {
		return err
	}
	defer stop()
	for failed := 0; ; {
		_, err := s.round(ctx)
		wait := lookEvery
		switch {
		case ctx.Err() != nil:
			return nil // ctrl-c is how one ends it
		case err != nil && (failed >= maxRetries || !sandbox.KindOf(err).Retryable() && !errors.Is(err, fs.ErrNotExist)):
			return err
		case err != nil:
			failed++
			wait = retryEvery
		default:
			failed = 0
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		case <-changed:
			select { // let a burst end
			case <-time.After(settle):
			case <-ctx.Done():
				return nil
			}
		}
	}
}

// prepare makes the remote directory if it is missing and learns its full path.
func (s *syncer) prepare(ctx context.Context) error {
	if err := s.g.MakeDir(ctx, s.remote); err != nil && !sandbox.Is(err, sandbox.Exists) {
		return err
	}
	e, err := s.g.Stat(ctx, s.remote)
	if err != nil {
		return err
	}
	if !e.IsDir() {
		return usageError(s.remote, "", "it is not a directory in the sandbox")
	}
	s.remote = e.Path
	return nil
}

// round looks at both sides once and makes them the same. It returns how many
// conflicts there are.
func (s *syncer) round(ctx context.Context) (conflicts int, err error) {
	host, err := s.scanHost()
	if err != nil {
		return 0, err
	}
	inside, err := s.scanSandbox(ctx)
	if err != nil {
		return 0, err
	}
	steps := plan(host, inside, s.last, nil, s.side)
	contents := map[string]likeness{}
	for _, st := range steps {
		if st.Act == actCompare {
			if contents[st.Path], err = s.compare(ctx, st.Path); err != nil {
				return 0, err
			}
		}
	}
	if len(contents) > 0 {
		steps = plan(host, inside, s.last, contents, s.side)
	}
	open := map[string]bool{}
	for _, st := range steps {
		if st.Act == actConflict {
			conflicts++
			open[st.Path] = true
			s.tell("conflict", st.Path)
		}
	}
	for p := range s.reported { // settled by hand since
		if !open[p] {
			delete(s.reported, p)
		}
	}
	if err := s.carry(ctx, steps, host); err != nil {
		return conflicts, err
	}
	return conflicts, s.remember(ctx, steps, host, inside, open)
}

// remember records what both sides hold now. What was carried has new times on
// the other side, so that side is looked at again; what changed there in the
// meantime is found next time, as it differs from what was carried.
func (s *syncer) remember(ctx context.Context, steps []step, host, inside map[string]fileState, open map[string]bool) error {
	moved := map[string]bool{}
	for _, st := range steps {
		moved[st.Path] = st.Act != actConflict
	}
	if len(steps) > len(open) {
		newHost, err := s.scanHost()
		if err != nil {
			return err
		}
		newInside, err := s.scanSandbox(ctx)
		if err != nil {
			return err
		}
		for _, st := range steps {
			source, before, target := newHost[st.Path], host[st.Path], newInside[st.Path]
			if st.Act == actPull || st.Act == actPullDelete {
				source, before, target = newInside[st.Path], inside[st.Path], newHost[st.Path]
			}
			if st.Act != actConflict && (!source.same(before) || source.Kind == 0 && source.present && target.Size != source.Size) {
				open[st.Path] = true // changed while it was carried
			}
		}
		for p := range moved {
			if moved[p] {
				put(host, p, newHost[p])
				put(inside, p, newInside[p])
			}
		}
	}
	s.last = agree(host, inside, s.last, open)
	return nil
}

func put(m map[string]fileState, p string, s fileState) {
	if s.present {
		m[p] = s
	} else {
		delete(m, p)
	}
}

// tell prints a line for the user; a conflict only once.
func (s *syncer) tell(what, name string) {
	if what == "conflict" {
		if s.reported[name] {
			return
		}
		s.reported[name] = true
	}
	fmt.Fprintf(s.a.stdout, "%-9s %s\n", what, printable(name))
}

// carry does what the steps say: everything for the sandbox in one archive.
func (s *syncer) carry(ctx context.Context, steps []step, host map[string]fileState) error {
	var pushes []string
	for _, st := range steps {
		if st.Act == actPush {
			pushes = append(pushes, st.Path)
		}
	}
	if err := s.push(ctx, pushes, host); err != nil {
		return err
	}
	root, err := os.OpenRoot(s.local)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, st := range steps {
		var err error
		switch st.Act {
		case actPull:
			err = s.pull(ctx, st.Path)
		case actPushDelete:
			err = s.g.Remove(ctx, path.Join(s.remote, st.Path))
		case actPullDelete:
			// Not RemoveAll: what appeared below since the scan must not go along.
			if err = root.Remove(st.Path); errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
		default:
			continue
		}
		if sandbox.Is(err, sandbox.NotFound) {
			continue // gone since the scan; the next round sees it
		}
		if err != nil {
			return err
		}
		s.tell(map[act]string{actPull: "<-", actPushDelete: "-> delete", actPullDelete: "<- delete"}[st.Act], st.Path)
	}
	return nil
}

func (s *syncer) push(ctx context.Context, names []string, host map[string]fileState) error {
	if len(names) == 0 {
		return nil
	}
	r, archive := io.Pipe()
	defer r.Close()
	go func() {
		w := tar.NewWriter(archive)
		var err error
		for _, name := range names {
			file := filepath.Join(s.local, filepath.FromSlash(name))
			info, lerr := os.Lstat(file)
			if errors.Is(lerr, fs.ErrNotExist) {
				continue // the next round sees it
			}
			if err = lerr; err == nil {
				_, err = native.PackEntry(w, file, name, info)
			}
			if err != nil {
				break
			}
		}
		archive.CloseWithError(errors.Join(err, w.Close()))
	}()
	if err := s.g.Upload(ctx, s.remote, r); err != nil {
		return err
	}
	for _, name := range names {
		if host[name].Kind != fs.ModeDir {
			s.tell("->", name)
		}
	}
	return nil
}

// pull fetches one entry. A directory is only made: what is in it comes by steps
// of its own.
func (s *syncer) pull(ctx context.Context, name string) error {
	e, err := s.g.Stat(ctx, path.Join(s.remote, name))
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(s.local)
	if err != nil {
		return err
	}
	defer root.Close()
	if dir := path.Dir(name); dir != "." {
		if err := root.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	switch {
	case e.Target != "":
		if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return root.Symlink(e.Target, name)
	case e.IsDir():
		return root.MkdirAll(name, 0o755)
	}
	r, err := s.g.ReadFile(ctx, e.Path)
	if err != nil {
		return err
	}
	defer r.Close()
	return native.UnpackFile(root, &tar.Header{Name: name, Mode: int64(e.Mode.Perm()), ModTime: e.Modified}, r)
}
