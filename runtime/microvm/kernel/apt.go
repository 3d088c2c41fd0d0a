package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// metapackages are those that depend on the newest kernel for virtual machines:
// Debian's and Ubuntu's.
var metapackages = []string{"linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64"}

// payload matches the packages that hold a kernel and its modules, among what a
// metapackage depends on.
var payload = regexp.MustCompile(`^linux-(image|modules)-[0-9][0-9a-z.+~-]*$`)

// apt runs apt's tools. It changes nothing outside its own directories.
type apt struct {
	dir     string   // packages are downloaded here
	options []string // before every command's own words
}

// download gets the distribution's newest kernel into work and unpacks it.
func (o Options) download(ctx context.Context, work string) (unpacked, error) {
	if _, err := exec.LookPath("apt-get"); err != nil {
		return unpacked{}, sandbox.E("kernel.download", sandbox.Unavailable, "", err).
			WithHint("this host has no apt: name a kernel of your own (vmlinux or bzImage)")
	}
	a := apt{dir: filepath.Join(work, "packages"), options: []string{"-qq", "-o", "Acquire::Retries=3"}}
	if os.Geteuid() == 0 {
		// The directory is closed to the user that apt would become.
		a.options = append(a.options, "-o", "APT::Sandbox::User=root")
	}
	u := unpacked{modules: filepath.Join(work, "files")}
	for _, dir := range []string{a.dir, u.modules} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return unpacked{}, err
		}
	}
	o.Log.Info("fetching the distribution's kernel")
	err := o.packages(ctx, a, &u)
	if err != nil && ctx.Err() == nil {
		// The host's lists are missing or out of date: use lists of our own.
		o.Log.Info("fetching the lists of packages", "cause", err)
		if err = a.ownLists(ctx, work); err == nil {
			err = o.packages(ctx, a, &u)
		}
	}
	if ctx.Err() != nil {
		return unpacked{}, ctx.Err()
	}
	if err != nil {
		if kindOf(err) == sandbox.Exhausted {
			return unpacked{}, err
		}
		return unpacked{}, sandbox.E("kernel.download", sandbox.Unavailable, "", err).
			WithHint("apt must reach its mirrors once; or name a kernel of your own (vmlinux or bzImage)")
	}
	return u, nil
}

// ownLists has apt keep its state below work, and fetches it.
func (a *apt) ownLists(ctx context.Context, work string) error {
	for _, sub := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(work, sub), 0o700); err != nil {
			return err
		}
	}
	a.options = append(a.options,
		"-o", "Dir::State::Lists="+filepath.Join(work, "lists"),
		"-o", "Dir::Cache="+filepath.Join(work, "cache"),
		"-o", "Acquire::Languages=none")
	_, err := a.run(ctx, "apt-get", "update")
	return err
}

// packages downloads and unpacks the packages of a kernel.
func (o Options) packages(ctx context.Context, a apt, u *unpacked) error {
	names, err := a.resolve(ctx)
	if err != nil {
		return err
	}
	if err := a.unpack(ctx, names, u); err != nil {
		return err
	}
	if u.image == "" {
		return fmt.Errorf("no kernel in the packages %s", strings.Join(names, ", "))
	}
	_, err = chooseModules(u.modules)
	var missing missingModules
	if errors.As(err, &missing) {
		// Ubuntu has some in a package of their own.
		extra := extraModules(names)
		if extra == "" {
			return err
		}
		return a.unpack(ctx, []string{extra}, u)
	}
	return err
}

// resolve returns the packages of the newest kernel.
func (a apt) resolve(ctx context.Context) ([]string, error) {
	var errs []error
	for _, meta := range metapackages {
		var names []string
		queue := []string{meta}
		const deepest = 8 // packages; a metapackage, an image, its modules
		for i := 0; i < len(queue) && i < deepest; i++ {
			text, err := a.run(ctx, "apt-cache", "show", "--no-all-versions", queue[i])
			if err != nil {
				errs = append(errs, err)
				names = nil
				break
			}
			for _, name := range depends(text) {
				if !slices.Contains(queue, name) {
					queue = append(queue, name)
					names = append(names, name)
				}
			}
		}
		if len(names) > 0 {
			return names, nil
		}
	}
	return nil, fmt.Errorf("apt knows no kernel for virtual machines: %w", errors.Join(errs...))
}

// depends returns the packages with parts of a kernel that the description of a
// package names as needed.
func depends(description string) []string {
	var names []string
	for line := range strings.Lines(description) {
		list, ok := strings.CutPrefix(line, "Depends:")
		if !ok {
			continue
		}
		for need := range strings.SplitSeq(list, ",") {
			// The first of alternatives, without its version or architecture.
			first, _, _ := strings.Cut(need, "|")
			words := strings.FieldsFunc(first, func(r rune) bool { return strings.ContainsRune(" \t\n(:", r) })
			if len(words) > 0 && payload.MatchString(words[0]) {
				names = append(names, words[0])
			}
		}
	}
	return names
}

// extraModules returns the package with the rest of a kernel's modules; empty
// when the distribution has no such thing.
func extraModules(names []string) string {
	for _, name := range names {
		if version, ok := strings.CutPrefix(name, "linux-modules-"); ok && !strings.HasPrefix(version, "extra-") {
			return "linux-modules-extra-" + version
		}
	}
	return ""
}

// unpack downloads packages, whose digests apt checks against the signed lists,
// and takes what is needed out of them.
func (a apt) unpack(ctx context.Context, names []string, u *unpacked) error {
	if _, err := a.run(ctx, "apt-get", append([]string{"download"}, names...)...); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(a.dir, "*.deb"))
	if err != nil {
		return err
	}
	for _, file := range files {
		image, err := unpackDeb(file, u.modules)
		if err != nil {
			return err
		}
		if image != "" {
			u.image = image
		}
		if err := os.Remove(file); err != nil {
			return err
		}
	}
	return nil
}

// run runs one of apt's tools and returns what it prints.
func (a apt) run(ctx context.Context, tool string, words ...string) (string, error) {
	cmd := exec.CommandContext(ctx, tool, append(slices.Clone(a.options), words...)...)
	cmd.Dir = a.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	var out, messages bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &messages
	if err := cmd.Run(); err != nil {
		const longest = 600
		said := strings.TrimSpace(messages.String())
		return "", fmt.Errorf("%s %s: %w: %s", tool, words[0], err, said[:min(len(said), longest)])
	}
	return out.String(), nil
}
