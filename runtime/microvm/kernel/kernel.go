// Package kernel gets the kernel of a microVM and the first user space that it
// starts: the distribution's own kernel for clouds, or one that the user gives.
//
// The kernel comes as a package through the host's apt configuration. It is
// never installed: the package is unpacked here, the kernel taken out of its
// boot image, and the modules that a machine needs go, with the guest agent as
// the first process, into an initramfs.
package kernel

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/zeebo/blake3"
	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/sandbox"
)

// Kernel is what a machine boots.
type Kernel struct {
	// Vmlinux is the path of an ELF kernel that can be entered directly (PVH), or
	// of a bzImage where that could not be had, which boots more slowly.
	Vmlinux   string
	Initramfs string // path
	Version   string // as uname -r says it
	Digest    string // "blake3:hex" of both files
}

// Args are the words of the kernel's command line that start the agent. They
// come last on it.
const Args = "-- -boot -listen serial:" + wire.MachineSerial

// Options says which kernel, and where it is kept.
type Options struct {
	Dir   string // keeps kernels; made if missing; processes may share it
	Guest string // path of the guest agent, a static binary

	// Kernel is the path of a vmlinux or bzImage to use instead of the
	// distribution's; empty for that. Its drivers must be built in, or Modules be
	// its directory of modules, such as /lib/modules/VERSION.
	Kernel  string
	Modules string

	Refresh bool         // look for a newer kernel of the distribution
	Log     *slog.Logger // not nil
}

// meta describes a kernel that is kept, in a directory of its own.
type meta struct {
	Version string   `json:"version"`
	Vmlinux string   `json:"vmlinux"` // hex of BLAKE3
	Modules []string `json:"modules"` // files, in the order of loading
}

const (
	metaName     = "kernel.json"
	vmlinuxName  = "vmlinux"
	newPrefix    = ".new-"
	currentName  = "current"           // a link to the distribution's newest kernel here
	keepUnused   = 30 * 24 * time.Hour // of initramfs files: others may be about to boot them
	maxDownload  = 1 << 30             // bytes of one file in a package, unpacked
	initramfsExt = ".initramfs"
)

// Fetch returns the kernel. It is downloaded if Dir does not hold it yet, which
// takes some 10 s and 30 MB; otherwise nothing but the initramfs may be made.
// What is kept is whole or not there, whatever happens meanwhile; a kernel that
// was damaged is fetched again. The error is Unavailable when there is none here
// and none can be downloaded.
func Fetch(ctx context.Context, o Options) (Kernel, error) {
	const op = "kernel.Fetch"
	if runtime.GOARCH != "amd64" && o.Kernel == "" {
		return Kernel{}, sandbox.Errorf(op, sandbox.Unsupported, runtime.GOARCH, "there is no kernel for this processor")
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return Kernel{}, sandbox.E(op, "", o.Dir, err)
	}
	unlock, err := lock(ctx, o.Dir)
	if err != nil {
		return Kernel{}, sandbox.E(op, "", o.Dir, err)
	}
	defer unlock()
	sweep(o.Dir)
	k, err := o.fetch(ctx)
	if err != nil {
		return Kernel{}, sandbox.E(op, kindOf(err), o.Kernel, err)
	}
	return k, nil
}

// kindOf knows what a full disk means, besides what sandbox.KindOf does.
func kindOf(err error) sandbox.Kind {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return sandbox.Exhausted
	case errors.Is(err, fs.ErrNotExist):
		return sandbox.NotFound
	}
	return sandbox.KindOf(err)
}

func (o Options) fetch(ctx context.Context) (Kernel, error) {
	var dir string
	var err error
	if o.Kernel != "" {
		dir, err = o.adopt()
	} else {
		dir, err = o.distribution(ctx)
	}
	if err != nil {
		return Kernel{}, err
	}
	m, err := load(dir)
	if err != nil {
		return Kernel{}, err
	}
	return o.assemble(dir, m)
}

// distribution returns the directory of the distribution's kernel.
func (o Options) distribution(ctx context.Context) (string, error) {
	current := filepath.Join(o.Dir, currentName)
	if !o.Refresh {
		dir, err := filepath.EvalSymlinks(current)
		if err == nil {
			if _, err = load(dir); err == nil {
				return dir, nil
			}
		}
		if !errors.Is(err, fs.ErrNotExist) {
			o.Log.Warn("the kernel that is kept cannot be used; it is fetched again", "error", err)
			if dir != "" {
				_ = os.RemoveAll(dir)
			}
		}
	}
	work, err := os.MkdirTemp(o.Dir, newPrefix)
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	u, err := o.download(ctx, work)
	if err != nil {
		return "", err
	}
	dir, err := o.keep(work, u)
	if err != nil {
		return "", err
	}
	return dir, relink(filepath.Base(dir), current)
}

// relink makes link point to target, at once.
func relink(target, link string) error {
	tmp := link + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, tmp); err != nil {
		return err
	}
	return os.Rename(tmp, link)
}

// adopt returns the directory of the kernel that the user gives.
func (o Options) adopt() (string, error) {
	work, err := os.MkdirTemp(o.Dir, newPrefix)
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	u := unpacked{image: o.Kernel}
	if o.Modules != "" {
		u.modules = filepath.Join(work, "modules")
		if err := gatherModules(o.Modules, u.modules); err != nil {
			return "", err
		}
	}
	return o.keep(work, u)
}

// unpacked is what a kernel is made from.
type unpacked struct {
	image   string // path of a vmlinux or bzImage
	modules string // directory of module files and modules.builtin; empty for none
}

// keep makes a kernel's directory, named after its content, and returns it.
func (o Options) keep(work string, u unpacked) (string, error) {
	data, err := os.ReadFile(u.image)
	if err != nil {
		return "", err
	}
	img, err := extract(data)
	if err != nil {
		return "", fmt.Errorf("%s: %w", u.image, err)
	}
	tmp := filepath.Join(work, "kernel")
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return "", err
	}
	sum := blake3.Sum256(img.data)
	m := meta{Version: img.version, Vmlinux: hex.EncodeToString(sum[:])}
	if err := writeSynced(filepath.Join(tmp, vmlinuxName), img.data); err != nil {
		return "", err
	}
	if u.modules != "" {
		chosen, err := chooseModules(u.modules)
		if err != nil {
			return "", err
		}
		for i, mod := range chosen {
			name := fmt.Sprintf("%02d-%s.ko", i, mod.name)
			if err := writeSynced(filepath.Join(tmp, name), mod.data); err != nil {
				return "", err
			}
			m.Modules = append(m.Modules, name)
		}
	}
	text, err := json.Marshal(m)
	if err != nil {
		return "", err
	}
	if err := writeSynced(filepath.Join(tmp, metaName), text); err != nil {
		return "", err
	}
	key := blake3.Sum256(text)
	dir := filepath.Join(o.Dir, hex.EncodeToString(key[:12]))
	if _, err := load(dir); err == nil {
		return dir, nil
	}
	if err := errors.Join(os.RemoveAll(dir), syncDir(tmp), os.Rename(tmp, dir), syncDir(o.Dir)); err != nil {
		return "", err
	}
	return dir, nil
}

// load reads a kept kernel's description and checks the kernel against it.
func load(dir string) (meta, error) {
	var m meta
	text, err := os.ReadFile(filepath.Join(dir, metaName))
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return m, fmt.Errorf("%s: %w", dir, err)
	}
	data, err := os.ReadFile(filepath.Join(dir, vmlinuxName))
	if err != nil {
		return m, err
	}
	if sum := blake3.Sum256(data); hex.EncodeToString(sum[:]) != m.Vmlinux {
		return m, fmt.Errorf("%s is damaged", filepath.Join(dir, vmlinuxName))
	}
	return m, nil
}

// assemble makes the initramfs of a kernel that is kept in dir.
func (o Options) assemble(dir string, m meta) (Kernel, error) {
	guest, err := os.ReadFile(o.Guest)
	if err != nil {
		return Kernel{}, err
	}
	var buf bytes.Buffer
	w := cpioWriter{out: &buf}
	w.dir("dev")
	w.dir(wire.ModulesDir[1:])
	w.file("init", 0o755, guest)
	for _, name := range m.Modules {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return Kernel{}, err
		}
		w.file(wire.ModulesDir[1:]+"/"+name, 0o644, data)
	}
	w.end()
	hash := blake3.New()
	fmt.Fprintln(hash, m.Vmlinux)
	_, _ = hash.Write(buf.Bytes())
	digest := hex.EncodeToString(hash.Sum(nil))
	path := filepath.Join(o.Dir, digest[:24]+initramfsExt)
	if err := o.place(path, buf.Bytes()); err != nil {
		return Kernel{}, err
	}
	return Kernel{
		Vmlinux: filepath.Join(dir, vmlinuxName), Initramfs: path,
		Version: m.Version, Digest: "blake3:" + digest,
	}, nil
}

// place makes the file at path hold data, and marks it as used now.
func (o Options) place(path string, data []byte) error {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
		now := time.Now()
		return os.Chtimes(path, now, now)
	}
	tmp := filepath.Join(o.Dir, newPrefix+filepath.Base(path))
	if err := writeSynced(tmp, data); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return errors.Join(os.Rename(tmp, path), syncDir(o.Dir))
}
