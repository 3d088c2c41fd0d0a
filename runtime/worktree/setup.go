package worktree

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// What a repository says of its sandboxes. The scripts are part of a commit; the
// list of files to copy is read from the user's working tree.
const (
	setupScript   = ".atoll/setup"   // runs in a new sandbox before anybody can use it
	archiveScript = ".atoll/archive" // runs in a sandbox that is being destroyed
	copyList      = ".atoll/copy"    // git pathspecs of ignored files to copy, one a line
)

// archiveTimeout bounds how long a sandbox's end may be held up.
const archiveTimeout = 5 * time.Minute

// script runs a script of the sandbox's base commit in a jail with its files,
// while the sandbox does not run. It is no error that there is none.
func (b *box) script(ctx context.Context, name string) error {
	if b.rec.Bases == "" {
		return nil
	}
	info, err := os.Lstat(filepath.Join(b.r.dir, "bases", b.rec.Bases, "tree", name))
	if err != nil || !info.Mode().IsRegular() {
		return nil
	}
	if name == archiveScript {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, archiveTimeout)
		defer cancel()
	}
	j := b.jail(true)
	j.Command = []string{"/bin/sh", "-c", `if [ -x "$0" ]; then exec "./$0"; fi; exec /bin/sh "$0"`, name}
	if err := j.run(ctx); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// maxCopy bounds the files that are copied into one sandbox, in bytes.
const maxCopy = 1 << 30

// copyIgnored copies files that git ignores, such as .env, from the user's
// working tree, where the user asks for it.
func (b *box) copyIgnored(ctx context.Context, repo *repository) error {
	patterns := strings.Split(b.rec.Spec.Labels[LabelCopy], ",")
	top, err := repo.run(ctx, nil, "rev-parse", "--show-toplevel")
	if err != nil {
		return ctx.Err() // a bare repository has no such files
	}
	root, err := os.OpenRoot(strings.TrimSuffix(top, "\n"))
	if err != nil {
		return err
	}
	defer root.Close()
	if text, err := root.ReadFile(copyList); err == nil {
		patterns = append(patterns, strings.Split(string(text), "\n")...)
	}
	args := []string{"-C", root.Name(), "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--"}
	given := len(args)
	for _, p := range patterns {
		if p = strings.TrimSpace(p); p != "" && !strings.HasPrefix(p, "#") {
			args = append(args, p)
		}
	}
	if len(args) == given {
		return nil
	}
	names, err := repo.run(ctx, nil, args...)
	if err != nil {
		return err
	}
	upper, err := os.OpenRoot(b.path(layersName + "/upper"))
	if err != nil {
		return err
	}
	defer upper.Close()
	left := int64(maxCopy)
	for name := range strings.SplitSeq(strings.TrimSuffix(names, "\x00"), "\x00") {
		if name == "" {
			continue
		}
		n, err := copyWithin(root, upper, name, left)
		if err != nil {
			return fmt.Errorf("copy %s: %w", name, err)
		}
		if left -= n; left < 0 {
			return fmt.Errorf("the ignored files to copy have more than %d bytes", int64(maxCopy))
		}
	}
	return nil
}

// copyWithin copies a regular file between two trees and follows no link out of
// either: the user's tree may be another user's.
func copyWithin(from, to *os.Root, name string, limit int64) (int64, error) {
	info, err := from.Lstat(name)
	if errors.Is(err, os.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	src, err := from.Open(name)
	if err != nil {
		return 0, err
	}
	defer src.Close()
	if err := to.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return 0, err
	}
	dst, err := to.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_EXCL, info.Mode().Perm())
	if err != nil {
		return 0, err
	}
	n, err := io.Copy(dst, io.LimitReader(src, limit+1))
	return n, errors.Join(err, dst.Close())
}

// copyFile copies a file of ours.
func copyFile(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}
