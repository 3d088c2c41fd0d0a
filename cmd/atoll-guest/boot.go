package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
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
	if err := ownFiles(); err != nil {
		return nil, err
	}
	return upper, switchRoot()
}

// own are the files that say who the machine is. They are in memory, over those
// of the root, since they are written whenever a copy of the machine starts.
var own = []string{"etc/hosts", "etc/hostname", "etc/resolv.conf"}

// ownFiles mounts them, with the content that the root has for them.
func ownFiles() error {
	for _, name := range own {
		inside := filepath.Join(rootDir, name)
		content, err := os.ReadFile(inside)
		if info, serr := os.Lstat(inside); serr != nil || !info.Mode().IsRegular() {
			// A link leads out of the root while that is not ours yet.
			content = nil
			err = errors.Join(os.RemoveAll(inside), os.MkdirAll(filepath.Dir(inside), 0o755), os.WriteFile(inside, nil, 0o644))
		}
		source := "/" + filepath.Base(name)
		if err == nil {
			err = os.WriteFile(source, content, 0o644)
		}
		if err == nil {
			err = unix.Mount(source, inside, "", unix.MS_BIND, "")
		}
		if err != nil {
			return fmt.Errorf("mount %s: %w", name, err)
		}
	}
	return nil
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
	devices, err := os.ReadDir("/sys/bus/pci/devices")
	pci := err == nil && len(devices) > 0
	for _, e := range entries {
		if strings.Contains(e.Name(), "virtio_pci") && !pci {
			continue // takes a while, for nothing
		}
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
	ours := map[string]bool{"proc": true, "sys": true, "dev": true, "run": true}
	for _, name := range own {
		ours[name] = true
	}
	return func(ctx context.Context, w io.Writer) error {
		return layer.Write(ctx, w, fmt.Sprintf("/proc/self/fd/%d", upper.Fd()), layer.Options{
			Overlay: true,
			Skip:    func(rel string) bool { return ours[rel] },
		})
	}
}
