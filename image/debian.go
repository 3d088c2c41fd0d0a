package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
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
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %q %q %q %q", o.Suite, packages, o.Script, extractScript, finishScript))
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
rm -f etc/shadow- etc/passwd- etc/group- etc/gshadow- etc/dpkg/dpkg.cfg.d/unsafe-io etc/apt/apt.conf.d/99mmdebstrap
rm -f var/log/*.log var/log/apt/* var/lib/dpkg/*-old var/cache/debconf/*-old var/cache/ldconfig/aux-cache
rm -f etc/hostname etc/resolv.conf
`

// mmdebstrap writes the root as a tar archive to out.
func (s *Store) mmdebstrap(ctx context.Context, host distribution, o DebianOptions, out *os.File) error {
	work, remove, err := s.tempDir()
	if err != nil {
		return err
	}
	defer remove()
	args := []string{
		"--variant=apt", "--format=tar",
		"--include=" + strings.Join(append([]string{"usr-is-merged"}, o.Packages...), ","),
	}
	for _, hook := range []struct{ when, text string }{
		{"extract", extractScript}, {"customize", o.Script}, {"customize", finishScript},
	} {
		if hook.text == "" {
			continue
		}
		path := fmt.Sprintf("%s/hook%d", work, len(args))
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+hook.text), 0o700); err != nil { //nolint:gosec // it must be executable
			return err
		}
		args = append(args, "--"+hook.when+"-hook="+path)
	}
	for _, line := range aptOptions(ctx) {
		args = append(args, "--aptopt="+line)
	}
	args = append(args, o.Suite, "-")
	if sources := aptSources(ctx, host, o.Suite); sources != "" {
		args = append(args, sources)
	}
	cmd := exec.CommandContext(ctx, "mmdebstrap", args...)
	cmd.Env = append(os.Environ(), "TMPDIR="+work, "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive")
	cmd.Env = slices.DeleteFunc(cmd.Env, func(v string) bool { return strings.HasPrefix(v, "SOURCE_DATE_EPOCH=") })
	cmd.Stdout = out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	messages := &mmdebstrapLog{report: o.report}
	cmd.Stderr = messages
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return messages.explain(err)
	}
	return nil
}

// aptOptions returns the host's settings for fetching packages, as lines of
// apt.conf.
func aptOptions(ctx context.Context) []string {
	// Packages are fetched as the user that we are: the directory is closed to others.
	options := []string{`APT::Sandbox::User "root"`, `Acquire::Languages "none"`, `Acquire::Retries "3"`}
	out, err := exec.CommandContext(ctx, "apt-config", "dump").Output()
	if err != nil {
		return options
	}
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSuffix(strings.TrimSpace(line), ";")
		lower := strings.ToLower(line)
		if strings.HasPrefix(lower, "acquire::http") || strings.HasPrefix(lower, "acquire::ftp") || strings.HasPrefix(lower, "acquire::check-") {
			options = append(options, line)
		}
	}
	for key, path := range map[string]string{"Dir::Etc::netrc": "/etc/apt/auth.conf", "Dir::Etc::netrcparts": "/etc/apt/auth.conf.d"} {
		if _, err := os.Stat(path); err == nil {
			options = append(options, fmt.Sprintf("%s %q", key, path))
		}
	}
	slices.Sort(options[3:])
	return options
}

// aptSources returns the host's own sources for a suite as lines of
// sources.list; empty when it has none, which leaves the choice to mmdebstrap.
func aptSources(ctx context.Context, host distribution, suite string) string {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT)", "Created-By: Packages").Output()
	if err != nil {
		return ""
	}
	return sourceLines(string(out), host.codename, suite)
}

// sourceLines turns "site release component" lines into sources, taking those
// of the host's release and writing them for suite. Other releases of one
// distribution are on the same mirrors, other vendors' repositories are not wanted.
func sourceLines(targets, codename, suite string) string {
	var lines []string
	for line := range strings.Lines(targets) {
		f := strings.Fields(line)
		if len(f) != 3 {
			continue
		}
		pocket, ok := strings.CutPrefix(f[1], codename)
		if !ok || pocket != "" && pocket != "-updates" && pocket != "-security" {
			continue
		}
		source := fmt.Sprintf("deb %s %s%s %s", f[0], suite, pocket, f[2])
		if !slices.Contains(lines, source) {
			lines = append(lines, source)
		}
	}
	return strings.Join(lines, "\n")
}

// mmdebstrapLog follows what mmdebstrap says and keeps the end of it, to explain
// a failure.
type mmdebstrapLog struct {
	report func(stage string)
	line   bytes.Buffer
	errors []string
}

// maxLogLine bounds a line of the log, maxLogErrors the lines kept.
const (
	maxLogLine   = 4 << 10
	maxLogErrors = 8
)

func (l *mmdebstrapLog) Write(p []byte) (int, error) {
	for _, c := range p {
		if c != '\n' && c != '\r' {
			if l.line.Len() < maxLogLine {
				l.line.WriteByte(c)
			}
			continue
		}
		l.add(strings.TrimSpace(l.line.String()))
		l.line.Reset()
	}
	return len(p), nil
}

func (l *mmdebstrapLog) add(line string) {
	if text, ok := strings.CutPrefix(line, "I: "); ok {
		if stage, ok := strings.CutSuffix(text, "..."); ok {
			l.report(stage)
		}
		return
	}
	if strings.HasPrefix(line, "E: ") || strings.HasPrefix(line, "Err:") || strings.Contains(line, "rror") {
		if len(l.errors) < maxLogErrors {
			l.errors = append(l.errors, line)
		}
	}
}

// explain turns what was said into an error of the right kind.
func (l *mmdebstrapLog) explain(err error) error {
	text := strings.Join(l.errors, "; ")
	if text == "" {
		text = err.Error()
	}
	e := sandbox.E("mmdebstrap", sandbox.Internal, "", errors.New(text))
	switch {
	case strings.Contains(text, "No space left"):
		return sandbox.E("mmdebstrap", sandbox.Exhausted, "", syscall.ENOSPC)
	case strings.Contains(text, "Unable to locate package"), strings.Contains(text, "has no installation candidate"):
		e.Kind = sandbox.NotFound
		return e.WithHint("'apt-cache search' finds the names of packages")
	case strings.Contains(text, "does not have a Release file"):
		e.Kind = sandbox.NotFound
		return e.WithHint("the mirror in /etc/apt does not have this suite")
	case strings.Contains(text, "resolve"), strings.Contains(text, "connect"), strings.Contains(text, "Failed to fetch"), strings.Contains(text, "timed out"):
		e.Kind = sandbox.Unavailable
		return e.WithHint("the package mirror in /etc/apt does not answer: check the network and apt's proxy settings")
	}
	return e
}
