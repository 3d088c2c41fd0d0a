// Package disk makes the block devices of microVMs: empty file systems of a
// limited size, copy-on-write layers, and seeds for cloud-init.
package disk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

const (
	// MinSize is the smallest file system, in bytes.
	MinSize = 32 << 20
	// sizeUnit is what sizes are rounded up to, in bytes.
	sizeUnit = 1 << 20
)

// Round returns the size of the file system that Empty makes for one of size bytes.
func Round(size int64) int64 { return (max(size, MinSize) + sizeUnit - 1) / sizeUnit * sizeUnit }

// Empty returns the path of an image in dir with an empty ext4 file system of
// Round(size) bytes. It is made if it is missing, takes next to no room, depends
// on nothing but the size and is never written: machines have layers upon it.
// The error is Unsupported where mkfs.ext4 is not installed.
func Empty(ctx context.Context, dir string, size int64) (string, error) {
	const op = "disk.Empty"
	size = Round(size)
	path := filepath.Join(dir, fmt.Sprintf("ext4-%d.raw", size))
	if info, err := os.Stat(path); err == nil && info.Size() == size {
		return path, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", sandbox.E(op, "", dir, err)
	}
	tmp, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return "", sandbox.E(op, kindOf(err), dir, err)
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	if err := tmp.Truncate(size); err != nil {
		return "", sandbox.E(op, kindOf(err), path, err)
	}
	if err := format(ctx, tmp.Name()); err != nil {
		return "", sandbox.E(op, "", path, err)
	}
	if err := errors.Join(tmp.Chmod(0o400), tmp.Sync(), os.Rename(tmp.Name(), path)); err != nil {
		return "", sandbox.E(op, kindOf(err), path, err)
	}
	return path, nil
}

// kindOf knows what a full disk means, besides what sandbox.KindOf does.
func kindOf(err error) sandbox.Kind {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return sandbox.Exhausted
	}
	return sandbox.KindOf(err)
}

// fixedID stands where a file system has random numbers, so that images are equal.
const fixedID = "61746f6c-6c00-4000-8000-6f7665726c61"

// format makes an ext4 file system in a file of zeros. What mkfs leaves to the
// kernel to fill with zeros later is zero already (see the guest's option
// noinit_itable). A small journal is kept: a machine may be killed at any time.
func format(ctx context.Context, path string) error {
	mkfs, err := findTool("mkfs.ext4")
	if err != nil {
		return sandbox.E("disk.format", sandbox.Unsupported, "", err).WithHint("apt install e2fsprogs")
	}
	cmd := exec.CommandContext(ctx, mkfs, "-q", "-F", "-b", "4096", "-m", "0", "-J", "size=4", "-U", fixedID,
		"-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,hash_seed="+fixedID, path)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "E2FSPROGS_FAKE_TIME=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		const longest = 400
		return fmt.Errorf("mkfs.ext4: %w: %.*s", err, longest, strings.TrimSpace(string(out)))
	}
	return nil
}

// findTool looks where tools of administrators are, too.
func findTool(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", err
}
