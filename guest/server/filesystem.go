package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"connectrpc.com/connect"

	filesystempb "github.com/atoll-run/atoll/guest/gen/filesystem"
)

// maxEntries bounds one listing: some 50 MB of answer.
const maxEntries = 200_000

// filesystemService answers filesystem.Filesystem.
type filesystemService struct{ s *Server }

// path resolves a path for the caller.
func (fs filesystemService) path(ctx context.Context, path string) (string, account, error) {
	acct, err := fs.s.settings.account(userOf(ctx))
	if err != nil {
		return "", account{}, connect.NewError(connect.CodeUnauthenticated, err)
	}
	abs, err := fs.s.settings.resolve(path, acct)
	if err != nil {
		return "", account{}, connect.NewError(connect.CodeInvalidArgument, err)
	}
	return abs, acct, nil
}

func (fs filesystemService) Stat(ctx context.Context, req *filesystempb.StatRequest) (*filesystempb.StatResponse, error) {
	path, _, err := fs.path(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	entry, err := newDescriber().describe(path)
	if err != nil {
		return nil, fileError(err)
	}
	return &filesystempb.StatResponse{Entry: entry}, nil
}

func (fs filesystemService) MakeDir(ctx context.Context, req *filesystempb.MakeDirRequest) (*filesystempb.MakeDirResponse, error) {
	path, acct, err := fs.path(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	if info, err := os.Stat(path); err == nil {
		if info.IsDir() {
			return nil, connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("directory already exists: %s", path))
		}
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("path exists and is not a directory: %s", path))
	}
	if err := makeDirs(path, acct); err != nil {
		return nil, fileError(err)
	}
	entry, err := newDescriber().describe(path)
	if err != nil {
		return nil, fileError(err)
	}
	return &filesystempb.MakeDirResponse{Entry: entry}, nil
}

func (fs filesystemService) Move(ctx context.Context, req *filesystempb.MoveRequest) (*filesystempb.MoveResponse, error) {
	from, acct, err := fs.path(ctx, req.GetSource())
	if err != nil {
		return nil, err
	}
	to, _, err := fs.path(ctx, req.GetDestination())
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(from); err != nil {
		return nil, fileError(err)
	}
	if err := makeDirs(filepath.Dir(to), acct); err != nil {
		return nil, fileError(err)
	}
	if err := os.Rename(from, to); err != nil {
		return nil, fileError(err)
	}
	entry, err := newDescriber().describe(to)
	if err != nil {
		return nil, fileError(err)
	}
	return &filesystempb.MoveResponse{Entry: entry}, nil
}

func (fs filesystemService) Remove(ctx context.Context, req *filesystempb.RemoveRequest) (*filesystempb.RemoveResponse, error) {
	path, _, err := fs.path(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	if path == "/" {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("the root directory cannot be removed"))
	}
	if err := os.RemoveAll(path); err != nil {
		return nil, fileError(err)
	}
	return &filesystempb.RemoveResponse{}, nil
}

func (fs filesystemService) ListDir(ctx context.Context, req *filesystempb.ListDirRequest) (*filesystempb.ListDirResponse, error) {
	path, _, err := fs.path(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	if err := checkDir(path); err != nil {
		return nil, err
	}
	l := lister{ctx: ctx, describer: newDescriber()}
	if err := l.list(path, int(max(req.GetDepth(), 1))); err != nil {
		return nil, fileError(err)
	}
	return &filesystempb.ListDirResponse{Entries: l.entries}, nil
}

// checkDir fails unless path leads to a directory.
func checkDir(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fileError(err)
	}
	if !info.IsDir() {
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("path is not a directory: %s", path))
	}
	return nil
}

// lister collects a directory tree, without following symlinks below its root.
type lister struct {
	ctx context.Context
	describer
	entries []*filesystempb.EntryInfo
}

var errTooMany = fmt.Errorf("more than %d entries: ask for a smaller depth", maxEntries)

func (l *lister) list(dir string, depth int) error {
	if err := l.ctx.Err(); err != nil {
		return err
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	if len(l.entries)+len(files) > maxEntries {
		return errTooMany
	}
	for _, f := range files {
		info, err := f.Info()
		if errors.Is(err, os.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return err
		}
		path := filepath.Join(dir, f.Name())
		l.entries = append(l.entries, l.entry(path, info))
		if f.IsDir() && depth > 1 {
			if err := l.list(path, depth-1); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// fileError gives an error of the file system the code that E2B's clients test.
func fileError(err error) error {
	code := connect.CodeInternal
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, os.ErrNotExist):
		code = connect.CodeNotFound
	case errors.Is(err, os.ErrPermission):
		code = connect.CodePermissionDenied
	case isNoSpace(err), errors.Is(err, errTooMany), errors.Is(err, errTooManyWatchers):
		code = connect.CodeResourceExhausted
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.EINVAL),
		errors.Is(err, syscall.ENAMETOOLONG), errors.Is(err, syscall.EXDEV):
		code = connect.CodeInvalidArgument
	case errors.Is(err, os.ErrExist), errors.Is(err, syscall.ENOTEMPTY), errors.Is(err, syscall.ELOOP),
		errors.Is(err, syscall.EROFS), errors.Is(err, syscall.EBUSY):
		code = connect.CodeFailedPrecondition
	}
	return connect.NewError(code, err)
}
