package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/runtime/layer"
)

// deviceWait bounds the wait for a device whose driver has been loaded.
const deviceWait = 10 * time.Second

// Where things are in the initramfs. They are out of reach afterwards.
const (
	lowerDir   = "/lower"   // the root disk
	overlayDir = "/overlay" // the disk that is written
	upperDir   = overlayDir + "/upper"
	workDir    = overlayDir + "/work"
	rootDir    = "/root" // both together
)

// boot goes from the initramfs over to the machine's root: it loads the drivers,
// mounts the read-only root with the overlay of the machine's own on it, and
// makes that the root of this process. It returns the directory with what the
// machine changes.
func boot() (upper *os.File, err error) {
	for _, m := range []struct{ kind, target string }{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return nil, err
		}
		if err := unix.Mount(m.kind, m.target, m.kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	if err := loadModules(); err != nil {
		return nil, err
	}
	root, err := awaitDisk(wire.DiskRoot)
	if err != nil {
		return nil, err
	}
	overlay, err := awaitDisk(wire.DiskOverlay)
	if err != nil {
		return nil, err
	}
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
		options              string
	}{
		{root, lowerDir, "erofs", unix.MS_RDONLY, ""},
		{overlay, overlayDir, "ext4", unix.MS_NOATIME, "discard,noinit_itable"},
		{"overlay", rootDir, "overlay", 0, "lowerdir=" + lowerDir + ",upperdir=" + upperDir + ",workdir=" + workDir},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return nil, err
		}
		if m.kind == "overlay" {
			if err := errors.Join(makeDir(upperDir), makeDir(workDir)); err != nil {
				return nil, err
			}
		}
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.options); err != nil {
			return nil, fmt.Errorf("mount %s at %s: %w", m.kind, m.target, err)
		}
	}
	if upper, err = os.Open(upperDir); err != nil {
		return nil, err
	}
	return upper, switchRoot()
}

// makeDir makes a directory of the overlay, which is there when the machine is
// not new.
func makeDir(path string) error {
	err := os.Mkdir(path, 0o755)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	return err
}

// switchRoot makes rootDir the root and frees the memory of the initramfs.
func switchRoot() error {
	for _, path := range []string{wire.ModulesDir, "/init"} {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	if err := os.Chdir(rootDir); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return os.Chdir("/")
}

// loadModules loads the modules of the initramfs.
func loadModules() error {
	entries, err := os.ReadDir(wire.ModulesDir) // sorted by name
	if err != nil {
		return err
	}
	for _, e := range entries {
		f, err := os.Open(filepath.Join(wire.ModulesDir, e.Name()))
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("load %s: %w", e.Name(), err)
		}
	}
	return nil
}

// awaitDisk waits for the device of a disk and returns its path.
func awaitDisk(name string) (string, error) {
	path := "/dev/" + name
	for deadline := time.Now().Add(deviceWait); ; time.Sleep(time.Millisecond) {
		_, err := os.Stat(path)
		if err == nil || !errors.Is(err, os.ErrNotExist) || time.Now().After(deadline) {
			return path, err
		}
	}
}

// changes returns what writes the machine's changes, without what we write.
func changes(upper *os.File) func(context.Context, io.Writer) error {
	ours := map[string]bool{"etc/hosts": true, "etc/hostname": true, "etc/resolv.conf": true, "proc": true, "sys": true, "dev": true}
	return func(ctx context.Context, w io.Writer) error {
		return layer.Write(ctx, w, fmt.Sprintf("/proc/self/fd/%d", upper.Fd()), layer.Options{
			Overlay: true,
			Skip:    func(rel string) bool { return ours[rel] },
		})
	}
}
