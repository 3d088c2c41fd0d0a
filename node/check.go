package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

// checkWorkdir removes a new sandbox that lacks the directory that was asked
// for: its commands would run elsewhere. The entry's op is held.
func (n *Node) checkWorkdir(ctx context.Context, req CreateRequest, e *entry, sb Sandbox) (*entry, Sandbox, error) {
	if req.Workdir == "" {
		return e, sb, nil
	}
	ctx, stop := context.WithTimeout(ctx, guestTimeout)
	defer stop()
	g := n.mainGuest(sb)
	defer g.CloseIdle()
	dir, err := g.Stat(ctx, req.Workdir)
	if sandbox.Is(err, sandbox.NotFound) || err == nil && !dir.IsDir() {
		err = sandbox.Errorf("node.Create", sandbox.Invalid, req.Workdir, "the sandbox has no such directory to start in").
			WithHint("have the image make it, or leave it out")
	}
	if err != nil {
		n.discard(e)
		e.op.unlock()
		return nil, Sandbox{}, err
	}
	return e, sb, nil
}

// checkMemory refuses to promise more memory than this host has.
func checkMemory(op string, wanted int64) error {
	var host unix.Sysinfo_t
	if err := unix.Sysinfo(&host); err != nil {
		return nil // then the runtime finds out
	}
	if total := int64(host.Totalram) * int64(host.Unit); wanted > total { //nolint:gosec // no host has 8 EiB
		return sandbox.Errorf(op, sandbox.Invalid, fmt.Sprintf("%d MiB of memory", wanted>>20), "this host has %d MiB in all", total>>20)
	}
	return nil
}

// checkRequest refuses what runtimes do not look at.
func checkRequest(op string, rec Sandbox) error {
	r := rec.Spec.Resources
	switch {
	case r.Memory > 0 && r.Memory < 16<<20:
		return sandbox.Errorf(op, sandbox.Invalid, rec.Name, "%d bytes of memory are too few to start anything; ask for 16 MiB or more", r.Memory)
	case rec.Name != "" && !nameOK(rec.Name):
		return sandbox.Errorf(op, sandbox.Invalid, rec.Name, "a name has up to 63 letters, digits, '-', '_' or '.', and begins with a letter or digit")
	}
	for k, v := range rec.Env {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.ContainsRune(v, 0) || len(k)+len(v) > maxEnv {
			return sandbox.Errorf(op, sandbox.Invalid, rec.Name, "no process can have the environment variable %.40q: a name has no '=', neither part a NUL byte, and both together at most %d bytes", k, maxEnv)
		}
	}
	if rec.Lifecycle.Idle < 0 {
		return sandbox.Errorf(op, sandbox.Invalid, rec.Name, "a sandbox cannot be idle for less than no time")
	}
	for _, p := range rec.Ports {
		if p.Guest < 1 || p.Guest > 65535 || p.Host < 0 || p.Host > 65535 {
			return sandbox.Errorf(op, sandbox.Invalid, rec.Name, "no such port: %d:%d", p.Host, p.Guest)
		}
	}
	return nil
}

// fitting is Check in words that a user knows.
func fitting(op, runtime, image string, caps sandbox.Capabilities, spec sandbox.Spec) error {
	words := map[sandbox.RootKind]string{
		sandbox.RootEROFS: "images", sandbox.RootHost: "the image `host`", sandbox.RootRepository: "git repositories",
		sandbox.RootDisk: "disk images",
	}
	if slices.Contains(caps.Roots, spec.Root.Kind) {
		err := caps.Check(op, spec)
		var e *sandbox.Err
		if errors.As(err, &e) && e.Kind == sandbox.Unsupported {
			return sandbox.Errorf(op, e.Kind, image, "runtime %s does not offer %w", runtime, e.Err).WithHint("see `atoll runtime ls`")
		}
		return err
	}
	var runs []string
	for _, kind := range caps.Roots {
		runs = append(runs, words[kind])
	}
	err := sandbox.Errorf(op, sandbox.Unsupported, image, "runtime %s runs %s, not %s", runtime, strings.Join(runs, " and "), words[spec.Root.Kind])
	if slices.Contains(caps.Roots, sandbox.RootRepository) {
		return err.WithHint("give the path of a repository, for example `.`, or another --runtime")
	}
	return err.WithHint("leave out --runtime, or see `atoll runtime ls`")
}

// named is err with a sandbox's name in place of its ID, which means nothing to
// who asked for it.
func named(err error, id, name string) error {
	var e *sandbox.Err
	if !errors.As(err, &e) || error(e) != err { //nolint:errorlint // the outermost itself, since a wrapper has words of its own
		return err
	}
	c := *e
	if c.Subject == id {
		c.Subject = name
	}
	c.Err = named(c.Err, id, name)
	return &c
}
