package image

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// DebianOptions says which packages of the host's distribution, Debian or
// Ubuntu, make up an image.
type DebianOptions struct {
	Name     string   // default: "debian" or "ubuntu", after the host
	Suite    string   // default: the host's own release, e.g. "bookworm"
	Packages []string // besides the essential ones and apt
	Script   string   // shell script, run at the end by the host's /bin/sh with the new root's path as $1; may be empty
	Config   Config
	Progress func(Progress) // nil: none
}

// Progress is how far a long operation is. Calls come one after another.
type Progress struct {
	Stage string `json:"stage"`           // what is being done, or the digest of the layer being fetched
	Done  int64  `json:"done,omitempty"`  // bytes
	Total int64  `json:"total,omitempty"` // bytes; 0: unknown
}

// distribution is the host's, from os-release.
type distribution struct{ id, codename string }

func hostDistribution() (distribution, error) {
	text, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return distribution{}, err
	}
	return parseRelease(string(text))
}

func parseRelease(text string) (distribution, error) {
	var d distribution
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		value = strings.Trim(value, `"'`)
		switch key {
		case "ID":
			d.id = value
		case "VERSION_CODENAME":
			d.codename = value
		}
	}
	if d.id != "debian" && d.id != "ubuntu" || d.codename == "" {
		return d, fmt.Errorf("this host runs %q, and only Debian and Ubuntu can build images from their packages", d.id)
	}
	return d, nil
}

// BuildDebian makes an image of the distribution's packages with mmdebstrap and
// the host's apt configuration (mirrors, proxies, credentials). It needs a
// package mirror and nothing else. The same packages give the same root. It
// fails with Unsupported when mmdebstrap is missing, Unavailable when the
// mirror does not answer and NotFound for an unknown package or suite.
func (s *Store) BuildDebian(ctx context.Context, o DebianOptions) (Image, error) {
	const op = "image.BuildDebian"
	host, err := hostDistribution()
	if err != nil {
		return Image{}, sandbox.E(op, sandbox.Unsupported, o.Name, err).WithHint("pull an image from a registry or import one")
	}
	if o.Suite == "" {
		o.Suite = host.codename
	}
	if o.Name == "" {
		o.Name = host.id
	}
	if err := checkPackages(append([]string{o.Suite}, o.Packages...)); err != nil {
		return Image{}, sandbox.E(op, sandbox.Invalid, o.Name, err)
	}
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		return Image{}, sandbox.E(op, sandbox.Unsupported, o.Name, err).WithHint("run 'apt-get install mmdebstrap'")
	}
	archive, err := s.temp()
	if err != nil {
		return Image{}, fail(op, o.Name, err)
	}
	defer archive.discard()
	start := time.Now()
	if err := s.mmdebstrap(ctx, host, o, archive.File); err != nil {
		return Image{}, fail(op, o.Name, err)
	}
	o.report("convert")
	image := Image{
		Config:   o.Config.clone(),
		Created:  time.Now().UTC(),
		Platform: HostPlatform(),
		Source:   host.id + " " + o.Suite + " packages",
		Key:      o.key(),
	}
	image, err = s.fromPackages(ctx, op, image, archive.File, start, o.Name)
	if err != nil {
		return Image{}, fail(op, o.Name, err)
	}
	return image, nil
}

// fromPackages converts what mmdebstrap wrote.
func (s *Store) fromPackages(ctx context.Context, op string, image Image, archive *os.File, start time.Time, name string) (Image, error) {
	u, err := newUnpacker(s.path("tmp"), s.opts.Limits, s.opts.Xattrs)
	if err != nil {
		return Image{}, err
	}
	defer u.Close()
	if err := u.addFile(ctx, archive); err != nil {
		return Image{}, err
	}
	settleTimes(u.tree, start.Unix())
	err = s.publishRoot(u.tree, func(root sandbox.Root, size int64) error {
		image.Root, image.Size = root, size
		image, err = s.addNames(op, image, []string{name})
		return err
	})
	return image, err
}

// settleTimes gives everything that was made after start the time of the newest
// packaged file, so that the result depends on the packages and not on when it
// was built. SOURCE_DATE_EPOCH would do the same, but makes Python compile its
// modules so that each import hashes the source.
func settleTimes(t *tree, start int64) {
	var newest int64
	_ = t.walk(func(_ string, n *inode) error {
		if n.mtime < start && n.mode&typeMask == typeReg {
			newest = max(newest, n.mtime)
		}
		return nil
	})
	_ = t.walk(func(_ string, n *inode) error {
		if n.mtime >= start {
			n.mtime = newest
		}
		n.nsec = 0
		return nil
	})
}

// key names what the image is made from, short of the packages' versions.
func (o *DebianOptions) key() string {
	packages := slices.Clone(o.Packages)
	slices.Sort(packages)
	sum := sha256.Sum256(fmt.Appendf(nil, "%q", []string{o.Suite, strings.Join(packages, " "), o.Script, setupScript, extractScript, finishScript}))
	return fmt.Sprintf("debian:%x", sum[:16])
}

func (o *DebianOptions) report(stage string) {
	if o.Progress != nil {
		o.Progress(Progress{Stage: stage})
	}
}

// checkPackages keeps options and file names out of a list of packages.
func checkPackages(names []string) error {
	for _, name := range names {
		if name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789+-.:=~_") != "" || strings.ContainsAny(name[:1], "+-.:=~_") {
			return fmt.Errorf("%q is not the name of a package or suite", name)
		}
	}
	return nil
}

// setupScript runs before anything else. It lays out /usr as both distributions
// have it now and keeps the package out that would convert the older layout,
// since that brings all of Perl into the part that is unpacked twice.
const setupScript = `set -eu
cd "$1"
mkdir -p etc/apt/preferences.d usr
printf 'Package: usrmerge\nPin: release *\nPin-Priority: -1\n' > etc/apt/preferences.d/no-usrmerge
for d in bin sbin lib; do mkdir -p usr/$d; ln -s usr/$d $d; done
if [ "$(dpkg --print-architecture)" = amd64 ]; then mkdir -p usr/lib64; ln -s usr/lib64 lib64; fi
`

// extractScript runs when the essential packages are extracted and before
// they are installed: from then on dpkg skips what no sandbox reads and does
// not wait for the disk.
const extractScript = `set -eu
cd "$1"
rm -rf usr/share/man usr/share/doc usr/share/info usr/share/locale usr/share/lintian
cat > etc/dpkg/dpkg.cfg.d/slim <<'X'
path-exclude=/usr/share/man/*
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/lintian/*
X
echo force-unsafe-io > etc/dpkg/dpkg.cfg.d/unsafe-io
`

// finishScript runs at the very end and removes what differs from build to build
// or tells of the host. The fixed day in shadow is that of the password's
// last change.
const finishScript = `set -eu
cd "$1"
sed -i -E 's/^(([^:]*:){2})[0-9]+:/\119000:/' etc/shadow
rm -f etc/shadow- etc/passwd- etc/group- etc/gshadow- etc/dpkg/dpkg.cfg.d/unsafe-io etc/apt/apt.conf.d/99mmdebstrap etc/apt/preferences.d/no-usrmerge
rm -f var/log/*.log var/log/apt/* var/lib/dpkg/*-old var/cache/debconf/*-old var/cache/ldconfig/aux-cache
rm -f etc/hostname etc/resolv.conf
`

// inMemoryScript runs mmdebstrap on a file system in memory, which is seen by
// nobody else and goes away with it. Unpacking packages is mostly waiting for
// the disk.
const inMemoryScript = `mount -t tmpfs -o mode=755,size="$1" atoll "$TMPDIR" && shift && exec mmdebstrap "$@"`

// memoryRoom is how many bytes of memory must be available for that; half of
// what is may be taken. The template needs some 500 MB.
const memoryRoom = 4 << 30

// mmdebstrap writes the root as a tar archive to out.
func (s *Store) mmdebstrap(ctx context.Context, host distribution, o DebianOptions, out *os.File) error {
	work, remove, err := s.tempDir()
	if err != nil {
		return err
	}
	defer remove()
	args := []string{"--variant=apt", "--format=tar"}
	if len(o.Packages) > 0 {
		args = append(args, "--include="+strings.Join(o.Packages, ","))
	}
	hooks, err := writeHooks(work, o.Script)
	if err != nil {
		return err
	}
	args = append(args, hooks...)
	for _, line := range aptOptions(ctx) {
		args = append(args, "--aptopt="+line)
	}
	args = append(args, o.Suite, "-")
	if sources := aptSources(ctx, host, o.Suite); sources != "" {
		args = append(args, sources)
	}
	root := work + "/root"
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	if available := availableMemory(); os.Geteuid() == 0 && available >= memoryRoom {
		script := []string{"sh", "-c", inMemoryScript, "sh", strconv.FormatInt(available/2, 10)}
		err := o.runTool(ctx, append(script, args...), root, syscall.CLONE_NEWNS, out)
		if err == nil || !sandbox.Is(err, sandbox.Exhausted) {
			return err
		}
		s.log.Info("building on disk, since memory does not suffice", "image", o.Name)
		if err := rewind(out); err != nil {
			return err
		}
	}
	return o.runTool(ctx, append([]string{"mmdebstrap"}, args...), root, 0, out)
}

func rewind(f *os.File) error {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return f.Truncate(0)
}

// runTool runs mmdebstrap with its temporary files below tmp, in new namespaces
// as the flags of clone(2) say.
func (o *DebianOptions) runTool(ctx context.Context, argv []string, tmp string, namespaces uintptr, out *os.File) error {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp, "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive")
	cmd.Env = slices.DeleteFunc(cmd.Env, func(v string) bool { return strings.HasPrefix(v, "SOURCE_DATE_EPOCH=") })
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Unshareflags: namespaces}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	messages := &mmdebstrapLog{report: o.report}
	cmd.Stdout, cmd.Stderr = out, messages
	err := cmd.Run()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return messages.explain(err)
	}
	return nil
}

// writeHooks writes the scripts that mmdebstrap runs and returns its options
// for them.
func writeHooks(dir, script string) ([]string, error) {
	var options []string
	for n, hook := range []struct{ when, text string }{
		{"setup", setupScript}, {"extract", extractScript}, {"customize", script}, {"customize", finishScript},
	} {
		if hook.text == "" {
			continue
		}
		path := fmt.Sprintf("%s/hook%d", dir, n)
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+hook.text), 0o700); err != nil {
			return nil, err
		}
		options = append(options, "--"+hook.when+"-hook="+path)
	}
	return options, nil
}

// availableMemory is how many bytes the host could give away without swapping;
// 0 when it does not say.
func availableMemory() int64 {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		var kib int64
		if n, _ := fmt.Sscanf(line, "MemAvailable: %d kB", &kib); n == 1 {
			return kib << 10
		}
	}
	return 0
}
