package server

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	filesystempb "github.com/atoll-run/atoll/guest/gen/filesystem"
	"github.com/atoll-run/atoll/guest/wire"
)

const (
	maxWatchers      = 256    // that are polled
	maxPolledEvents  = 10_000 // kept for one client that polls
	maxWatchedDirs   = 50_000 // of one recursive watch
	watchLostMessage = "events were lost: too many changes at once"
)

// errTooManyWatchers is ResourceExhausted on the wire.
var errTooManyWatchers = fmt.Errorf("more than %d watchers: remove some", maxWatchers)

// watch observes one directory, with what is below it if recursive.
type watch struct {
	root      string
	recursive bool
	entries   bool // describe the entries in events
	notify    *fsnotify.Watcher
	dirs      int
}

// watchRequest is what WatchDir and CreateWatcher have in common.
type watchRequest interface {
	GetPath() string
	GetRecursive() bool
	GetIncludeEntry() bool
	GetAllowNetworkMounts() bool
}

func (fs filesystemService) newWatch(ctx context.Context, req watchRequest) (*watch, error) {
	path, _, err := fs.path(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	if err := checkDir(path); err != nil {
		return nil, err
	}
	if !req.GetAllowNetworkMounts() && isNetworkMount(path) {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("cannot watch a network file system: %s", path))
	}
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fileError(err)
	}
	w := &watch{root: path, recursive: req.GetRecursive(), entries: req.GetIncludeEntry(), notify: notify}
	if err := w.add(path, nil); err != nil {
		notify.Close()
		return nil, fileError(err)
	}
	return w, nil
}

// add watches dir and, if recursive, all directories below it. Entries that are
// found below dir are passed to found, which may be nil.
func (w *watch) add(dir string, found func(path string)) error {
	if !w.recursive {
		return w.notify.Add(dir)
	}
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
			return nil
		}
		if err != nil {
			return err
		}
		if found != nil && path != dir {
			found(path)
		}
		if !d.IsDir() {
			return nil
		}
		if w.dirs++; w.dirs > maxWatchedDirs {
			return fmt.Errorf("more than %d directories to watch: %w", maxWatchedDirs, unix.ENOSPC)
		}
		if err := w.notify.Add(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	})
}

// run passes events on until ctx ends, the watch is closed or emit fails.
func (w *watch) run(ctx context.Context, emit func(*filesystempb.FilesystemEvent) error) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err, ok := <-w.notify.Errors:
			if !ok {
				return nil
			}
			if errors.Is(err, fsnotify.ErrEventOverflow) {
				return connect.NewError(connect.CodeDataLoss, errors.New(watchLostMessage))
			}
			return fileError(err)
		case e, ok := <-w.notify.Events:
			if !ok {
				return nil
			}
			if err := w.translate(e, emit); err != nil {
				return err
			}
		}
	}
}

// translate turns one notification into events, and follows new directories.
// What appears in one before it is watched is reported as created.
func (w *watch) translate(e fsnotify.Event, emit func(*filesystempb.FilesystemEvent) error) error {
	for _, op := range []struct {
		op fsnotify.Op
		to filesystempb.EventType
	}{
		{fsnotify.Create, filesystempb.EventType_EVENT_TYPE_CREATE},
		{fsnotify.Rename, filesystempb.EventType_EVENT_TYPE_RENAME},
		{fsnotify.Chmod, filesystempb.EventType_EVENT_TYPE_CHMOD},
		{fsnotify.Write, filesystempb.EventType_EVENT_TYPE_WRITE},
		{fsnotify.Remove, filesystempb.EventType_EVENT_TYPE_REMOVE},
	} {
		if e.Has(op.op) {
			if err := emit(w.event(e.Name, op.to)); err != nil {
				return err
			}
		}
	}
	if !w.recursive || !e.Has(fsnotify.Create) {
		return nil
	}
	info, err := os.Lstat(e.Name)
	if err != nil || !info.IsDir() {
		return nil
	}
	var emitErr error
	err = w.add(e.Name, func(path string) {
		if emitErr == nil {
			emitErr = emit(w.event(path, filesystempb.EventType_EVENT_TYPE_CREATE))
		}
	})
	if err != nil {
		return fileError(err)
	}
	return emitErr
}

func (w *watch) event(path string, kind filesystempb.EventType) *filesystempb.FilesystemEvent {
	name := strings.TrimPrefix(strings.TrimPrefix(path, w.root), "/")
	if name == "" {
		name = "."
	}
	event := &filesystempb.FilesystemEvent{Name: wire.EncodeName(name), Type: kind}
	if w.entries {
		if entry, err := newDescriber().describe(path); err == nil {
			event.Entry = entry
		}
	}
	return event
}

func isNetworkMount(path string) bool {
	var st unix.Statfs_t
	if unix.Statfs(path, &st) != nil {
		return false
	}
	switch uint32(st.Type) {
	case unix.NFS_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC:
		return true
	}
	return false
}

func (fs filesystemService) WatchDir(ctx context.Context, req *filesystempb.WatchDirRequest, stream *connect.ServerStream[filesystempb.WatchDirResponse]) error {
	w, err := fs.newWatch(ctx, req)
	if err != nil {
		return err
	}
	defer w.notify.Close()
	var sending sync.Mutex
	send := func(res *filesystempb.WatchDirResponse) error {
		sending.Lock()
		defer sending.Unlock()
		return stream.Send(res)
	}
	if err := send(&filesystempb.WatchDirResponse{Event: &filesystempb.WatchDirResponse_Start{Start: &filesystempb.WatchDirResponse_StartEvent{}}}); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var alive sync.WaitGroup
	alive.Go(func() { keepWatchAlive(ctx, cancel, stream.Conn().RequestHeader(), send) })
	err = w.run(ctx, func(e *filesystempb.FilesystemEvent) error {
		return send(&filesystempb.WatchDirResponse{Event: &filesystempb.WatchDirResponse_Filesystem{Filesystem: e}})
	})
	cancel(nil)
	alive.Wait() // the stream must not be used after we return
	return err
}

// keepWatchAlive sends keepalive events until ctx ends.
func keepWatchAlive(ctx context.Context, cancel context.CancelCauseFunc, h http.Header, send func(*filesystempb.WatchDirResponse) error) {
	tick := time.NewTicker(keepaliveInterval(h))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			alive := &filesystempb.WatchDirResponse_Keepalive{Keepalive: &filesystempb.WatchDirResponse_KeepAlive{}}
			if err := send(&filesystempb.WatchDirResponse{Event: alive}); err != nil {
				cancel(err)
				return
			}
		}
	}
}

// pollWatcher collects events for a client that fetches them.
type pollWatcher struct {
	watch  *watch
	mu     sync.Mutex
	events []*filesystempb.FilesystemEvent
	err    error // why it ended
}

// watcherTab holds the watchers that are polled, by id.
type watcherTab struct {
	mu  sync.Mutex
	all map[string]*pollWatcher
}

func (fs filesystemService) CreateWatcher(ctx context.Context, req *filesystempb.CreateWatcherRequest) (*filesystempb.CreateWatcherResponse, error) {
	w, err := fs.newWatch(ctx, req)
	if err != nil {
		return nil, err
	}
	t := &fs.s.watchers
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.all) >= maxWatchers {
		w.notify.Close()
		return nil, fileError(errTooManyWatchers)
	}
	id, p := "w"+strings.ToLower(rand.Text()), &pollWatcher{watch: w}
	t.all[id] = p
	go p.collect()
	return &filesystempb.CreateWatcherResponse{WatcherId: id}, nil
}

// collect runs until the watcher is removed or fails.
func (p *pollWatcher) collect() {
	err := p.watch.run(context.Background(), func(e *filesystempb.FilesystemEvent) error {
		p.mu.Lock()
		defer p.mu.Unlock()
		if len(p.events) == maxPolledEvents {
			return connect.NewError(connect.CodeDataLoss, errors.New(watchLostMessage))
		}
		p.events = append(p.events, e)
		return nil
	})
	p.watch.notify.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.err = err
}

func (fs filesystemService) GetWatcherEvents(_ context.Context, req *filesystempb.GetWatcherEventsRequest) (*filesystempb.GetWatcherEventsResponse, error) {
	t := &fs.s.watchers
	t.mu.Lock()
	p, ok := t.all[req.GetWatcherId()]
	t.mu.Unlock()
	if !ok {
		return nil, errNoWatcher(req.GetWatcherId())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil && len(p.events) == 0 {
		return nil, p.err
	}
	res := &filesystempb.GetWatcherEventsResponse{Events: p.events}
	p.events = nil
	return res, nil
}

func (fs filesystemService) RemoveWatcher(_ context.Context, req *filesystempb.RemoveWatcherRequest) (*filesystempb.RemoveWatcherResponse, error) {
	t := &fs.s.watchers
	t.mu.Lock()
	defer t.mu.Unlock()
	p, ok := t.all[req.GetWatcherId()]
	if !ok {
		return nil, errNoWatcher(req.GetWatcherId())
	}
	delete(t.all, req.GetWatcherId())
	p.watch.notify.Close()
	return &filesystempb.RemoveWatcherResponse{}, nil
}

func errNoWatcher(id string) error {
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("watcher with id %s not found", id))
}
