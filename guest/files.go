package guest

import (
	"context"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"time"

	"connectrpc.com/connect"

	filesystempb "github.com/atoll-run/atoll/guest/gen/filesystem"
	"github.com/atoll-run/atoll/guest/wire"
)

// Paths are absolute, or relative to the user's home, as is "~". They may hold
// any bytes but NUL.

// Entry describes a file, a directory or a symlink.
type Entry struct {
	Name     string
	Path     string
	Type     fs.FileMode // 0 for a file, fs.ModeDir, fs.ModeSymlink (leading nowhere), fs.ModeIrregular for anything else
	Size     int64       // bytes
	Mode     fs.FileMode // permission bits; of a symlink those of its target
	Owner    string
	Group    string
	Modified time.Time
	Target   string            // where a symlink leads; empty for others
	Metadata map[string]string // may be nil
}

// IsDir reports whether the entry is a directory or leads to one.
func (e Entry) IsDir() bool { return e.Type == fs.ModeDir }

func entryOf(e *filesystempb.EntryInfo) Entry {
	kind := fs.ModeIrregular
	switch e.GetType() {
	case filesystempb.FileType_FILE_TYPE_FILE:
		kind = 0
	case filesystempb.FileType_FILE_TYPE_DIRECTORY:
		kind = fs.ModeDir
	case filesystempb.FileType_FILE_TYPE_SYMLINK:
		kind = fs.ModeSymlink
	}
	return Entry{
		Name: wire.DecodeName(e.GetName()), Path: wire.DecodeName(e.GetPath()), Type: kind,
		Size: e.GetSize(), Mode: fs.FileMode(e.GetMode()).Perm(), Owner: e.GetOwner(), Group: e.GetGroup(),
		Modified: e.GetModifiedTime().AsTime(), Target: wire.DecodeName(e.GetSymlinkTarget()), Metadata: e.GetMetadata(),
	}
}

// Stat describes one entry. The error is NotFound when there is none.
func (c *Client) Stat(ctx context.Context, path string) (Entry, error) {
	res, err := c.files.Stat(ctx, &filesystempb.StatRequest{Path: wire.EncodeName(path)})
	if err != nil {
		return Entry{}, rpcError("guest.Stat", path, err)
	}
	return entryOf(res.GetEntry()), nil
}

// ReadDir describes what is in a directory, down to depth levels (at least 1).
func (c *Client) ReadDir(ctx context.Context, path string, depth int) ([]Entry, error) {
	res, err := c.files.ListDir(ctx, &filesystempb.ListDirRequest{Path: wire.EncodeName(path), Depth: uint32(max(depth, 1))})
	if err != nil {
		return nil, rpcError("guest.ReadDir", path, err)
	}
	entries := make([]Entry, len(res.GetEntries()))
	for i, e := range res.GetEntries() {
		entries[i] = entryOf(e)
	}
	return entries, nil
}

// MakeDir makes a directory and its missing parents. The error is Exists when
// the directory is there already.
func (c *Client) MakeDir(ctx context.Context, path string) error {
	_, err := c.files.MakeDir(ctx, &filesystempb.MakeDirRequest{Path: wire.EncodeName(path)})
	return rpcError("guest.MakeDir", path, err)
}

// Move renames an entry, replacing a file at the destination.
func (c *Client) Move(ctx context.Context, from, to string) error {
	_, err := c.files.Move(ctx, &filesystempb.MoveRequest{Source: wire.EncodeName(from), Destination: wire.EncodeName(to)})
	return rpcError("guest.Move", from, err)
}

// Remove removes an entry with everything below. A missing one is no error.
func (c *Client) Remove(ctx context.Context, path string) error {
	_, err := c.files.Remove(ctx, &filesystempb.RemoveRequest{Path: wire.EncodeName(path)})
	return rpcError("guest.Remove", path, err)
}

// ReadFile opens a file for reading, as it is now. The caller closes it. The
// error is NotFound when there is none and Invalid for a directory.
func (c *Client) ReadFile(ctx context.Context, path string) (io.ReadCloser, error) {
	return c.open(ctx, "guest.ReadFile", "/files", path)
}

// WriteFile writes a file, with missing parents, from data until its end. What
// the file held before is lost even when the write fails half-way.
func (c *Client) WriteFile(ctx context.Context, path string, data io.Reader) error {
	return c.send(ctx, "guest.WriteFile", "/files", path, "application/octet-stream", data)
}

// Download opens a tar stream of a directory or of one file. The names in it
// are relative to the directory. The caller closes it; a stream that was cut
// ends in an error, not in io.EOF.
func (c *Client) Download(ctx context.Context, path string) (io.ReadCloser, error) {
	return c.open(ctx, "guest.Download", "/archive", path)
}

// Upload extracts a tar stream into a directory, which is made if it is
// missing. The files are the user's; modes, times and symlinks are kept. Names
// that lead out of the directory fail with Invalid, and what was extracted
// before stays.
func (c *Client) Upload(ctx context.Context, path string, archive io.Reader) error {
	return c.send(ctx, "guest.Upload", "/archive", path, "application/x-tar", archive)
}

func (c *Client) open(ctx context.Context, op, call, path string) (io.ReadCloser, error) {
	res, err := c.call(ctx, op, http.MethodGet, call, url.Values{"path": {wire.EncodeName(path)}}, nil, nil)
	if err != nil {
		return nil, err
	}
	return res.Body, nil
}

func (c *Client) send(ctx context.Context, op, call, path, media string, data io.Reader) error {
	header := http.Header{"Content-Type": {media}}
	// Hidden from net/http, which would close a reader that it was not given to own.
	body := struct{ io.Reader }{data}
	res, err := c.call(ctx, op, http.MethodPost, call, url.Values{"path": {wire.EncodeName(path)}}, body, header)
	if err != nil {
		return err
	}
	return res.Body.Close()
}

// ChangeKind is what happened to an entry.
type ChangeKind string

// The kinds of Change.
const (
	Created ChangeKind = "create"
	Written ChangeKind = "write"
	Removed ChangeKind = "remove"
	Renamed ChangeKind = "rename" // the old name; the new one is Created
	Chmod   ChangeKind = "chmod"
)

// Change is something that happened in a watched directory.
type Change struct {
	Name string // relative to the directory
	Kind ChangeKind
}

var changeKinds = map[filesystempb.EventType]ChangeKind{
	filesystempb.EventType_EVENT_TYPE_CREATE: Created,
	filesystempb.EventType_EVENT_TYPE_WRITE:  Written,
	filesystempb.EventType_EVENT_TYPE_REMOVE: Removed,
	filesystempb.EventType_EVENT_TYPE_RENAME: Renamed,
	filesystempb.EventType_EVENT_TYPE_CHMOD:  Chmod,
}

// Watcher delivers what happens in a directory.
type Watcher struct {
	path   string
	cancel context.CancelFunc
	stream *connect.ServerStreamForClient[filesystempb.WatchDirResponse]
}

// Watch watches a directory, with all below it if recursive, until ctx ends or
// the Watcher is closed. What happens after Watch returned is seen.
func (c *Client) Watch(ctx context.Context, path string, recursive bool) (*Watcher, error) {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := c.files.WatchDir(ctx, &filesystempb.WatchDirRequest{Path: wire.EncodeName(path), Recursive: recursive})
	if err == nil && !stream.Receive() {
		if err = stream.Err(); err == nil {
			err = io.ErrUnexpectedEOF
		}
		_ = stream.Close()
	}
	if err != nil {
		cancel()
		return nil, rpcError("guest.Watch", path, err)
	}
	return &Watcher{path: path, cancel: cancel, stream: stream}, nil
}

// Next waits for the next change.
func (w *Watcher) Next() (Change, error) {
	for w.stream.Receive() {
		if e := w.stream.Msg().GetFilesystem(); e != nil {
			return Change{Name: wire.DecodeName(e.GetName()), Kind: changeKinds[e.GetType()]}, nil
		}
	}
	err := w.stream.Err()
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return Change{}, rpcError("guest.Watch", w.path, err)
}

// Close ends the watch. It never fails.
func (w *Watcher) Close() error {
	w.cancel()
	_ = w.stream.Close() // says only that it was canceled
	return nil
}
