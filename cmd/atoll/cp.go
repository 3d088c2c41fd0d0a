package main

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/sandbox"
)

// place is one side of a copy.
type place struct {
	sandbox string // empty: this host
	path    string // "-": standard input or output
}

// parsePlace reads "SANDBOX:PATH", a path of this host, or "-". A path of this
// host that holds a colon is written with a slash before it: "./a:b".
func parsePlace(s string) (place, error) {
	if s == "" {
		return place{}, usageError("", "write SANDBOX:PATH or a path of this host", "a path is empty")
	}
	name, rest, ok := strings.Cut(s, ":")
	if !ok || strings.Contains(name, "/") || name == "" || name[0] == '.' || name[0] == '~' {
		return place{path: s}, nil
	}
	if rest == "" {
		rest = "." // the default working directory, as with scp
	}
	return place{sandbox: name, path: rest}, nil
}

func (a *app) cpCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "cp SOURCE TARGET", Short: "Copy files and directories into or out of a sandbox", Args: exact("a source", "a target"),
		Long: "One of the two is SANDBOX:PATH, the other a path of this host or `-`. Into a directory that exists the source is\n" +
			"put under its own name, and a target that ends in / is a directory; DIR/. means what is in DIR. `-` is the\n" +
			"content of a file, or a tar stream when the other side is a directory.",
		Example: "  atoll cp ./src work:/home/user\n  atoll cp work:/var/log/. logs/\n  atoll cp work:/etc/os-release -",
		RunE: func(cmd *cobra.Command, args []string) error {
			from, err := parsePlace(args[0])
			if err != nil {
				return err
			}
			to, err := parsePlace(args[1])
			if err != nil {
				return err
			}
			inside := to.sandbox
			switch {
			case from.sandbox != "" && to.sandbox != "":
				return usageError("", "copy by way of a pipe: `atoll cp "+args[0]+" - | atoll cp - "+args[1]+"`", "both sides are sandboxes")
			case from.sandbox == "" && to.sandbox == "":
				return usageError("", "write SANDBOX:PATH for one of them", "neither side is a sandbox")
			case from.sandbox != "":
				inside = from.sandbox
			}
			b, sb, err := a.get(cmd.Context(), inside)
			if err != nil {
				return err
			}
			g := guestOf(b, sb)
			defer g.CloseIdle()
			if to.sandbox == "" {
				return a.whyLost(cmd.Context(), b, sb, a.copyOut(cmd.Context(), g, from.path, to.path))
			}
			err = a.copyIn(cmd.Context(), g, from.path, to.path)
			if sandbox.Is(err, sandbox.Exhausted) {
				return sandbox.E("atoll cp", "", args[1], err).WithHint("what was there before is as it was; `--disk` gives a sandbox more")
			}
			return a.whyLost(cmd.Context(), b, sb, err)
		},
	}
	cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
		if len(args) >= 2 || strings.ContainsAny(typed, "/.:") {
			return nil, cobra.ShellCompDirectiveDefault
		}
		var names []string
		for _, n := range sandboxNames(sandbox.Running)(cmd.Context(), a) {
			name, about, _ := strings.Cut(n, "\t")
			names = append(names, name+":\t"+about)
		}
		return names, cobra.ShellCompDirectiveNoSpace
	}
	return cmd
}

// landing decides where a copy goes: the directory to put it in and its name
// there. An empty name means that the source's contents go into the directory.
// isDir says whether the target is an existing directory.
func landing(source, target string, sourceIsDir, isDir bool) (dir, name string) {
	base := path.Base(path.Clean("/" + source))
	contents := sourceIsDir && (strings.HasSuffix(source, "/.") || source == "." || base == "/")
	switch {
	case contents:
		return target, ""
	case isDir || strings.HasSuffix(target, "/"):
		return target, base
	}
	return path.Dir(target), path.Base(target)
}

// copyIn copies from this host into the sandbox.
func (a *app) copyIn(ctx context.Context, g *guest.Client, source, target string) error {
	isDir, err := guestDir(ctx, g, target)
	if err != nil {
		return err
	}
	if source == "-" {
		if isDir {
			return g.Upload(ctx, target, a.stdin)
		}
		return g.WriteFile(ctx, target, a.stdin)
	}
	local, err := hostPath(source)
	if err != nil {
		return err
	}
	info, err := os.Stat(local)
	if err != nil {
		return usageError(source, "", "nothing to copy: %v", errors.Unwrap(err))
	}
	if !info.IsDir() && !info.Mode().IsRegular() {
		return usageError(source, "pipe it instead: `atoll cp - ...`", "it is neither a file nor a directory")
	}
	if strings.HasSuffix(source, "/.") || source == "." {
		local += "/."
	}
	dir, name := landing(local, target, info.IsDir(), isDir)
	shown := a.bar("copying " + path.Base(local))
	defer shown.done()
	r, archive := io.Pipe()
	defer r.Close()
	go func() {
		w := tar.NewWriter(archive)
		err := native.Pack(w, filepath.Clean(local), name, func(file string, done int64) { shown.report(image.Progress{Stage: file, Done: done}) })
		archive.CloseWithError(errors.Join(err, w.Close()))
	}()
	return g.Upload(ctx, dir, r)
}

// guestDir reports whether a path in the sandbox is an existing directory.
func guestDir(ctx context.Context, g *guest.Client, name string) (bool, error) {
	e, err := g.Stat(ctx, name)
	if sandbox.Is(err, sandbox.NotFound) {
		return false, nil
	}
	return err == nil && e.IsDir(), err
}

// copyOut copies from the sandbox to this host.
func (a *app) copyOut(ctx context.Context, g *guest.Client, source, target string) error {
	e, err := g.Stat(ctx, source)
	if err != nil {
		return err
	}
	if target == "-" {
		fetch := g.ReadFile
		if e.IsDir() {
			fetch = g.Download
		}
		r, err := fetch(ctx, source)
		if err != nil {
			return err
		}
		defer r.Close()
		_, err = io.Copy(a.stdout, r)
		return err
	}
	local, err := hostPath(target)
	if err != nil {
		return err
	}
	info, err := os.Stat(local)
	isDir := err == nil && info.IsDir()
	if strings.HasSuffix(target, "/") {
		local += "/"
	}
	named := source
	if !strings.HasSuffix(source, "/.") && source != "." {
		named = e.Path // `~` and relative paths have a name of their own
	}
	dir, name := landing(named, local, e.IsDir(), isDir)
	r, err := g.Download(ctx, source)
	if err != nil {
		return err
	}
	defer r.Close()
	shown := a.bar("copying " + path.Base(source))
	defer shown.done()
	return native.Unpack(&counted{r: r, total: e.Size, bar: shown}, dir, name)
}
