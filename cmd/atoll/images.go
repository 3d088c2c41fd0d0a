package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/node"
)

// imageNames completes images and templates.
func imageNames(ctx context.Context, a *app) []string {
	names := []string{image.HostName + "\tthis host's own system, read-only"}
	b, err := a.openDaemon(ctx)
	if err != nil {
		return names
	}
	images, _ := b.Images(ctx)
	for _, i := range images {
		for _, n := range i.Names {
			names = append(names, strings.TrimSuffix(n, ":latest")+"\t"+formatBytes(i.Size))
		}
	}
	return append(names, templateNames(ctx, a)...)
}

func templateNames(ctx context.Context, a *app) []string {
	b, err := a.openDaemon(ctx)
	if err != nil {
		return nil
	}
	templates, _ := b.Templates(ctx, "")
	var names []string
	for _, t := range templates {
		for _, n := range t.Names {
			names = append(names, n+"\ttemplate")
		}
	}
	return names
}

func (a *app) imageCommand() *cobra.Command {
	return group("image", "Manage what sandboxes start from", a.imageListCommand(), a.imagePullCommand(), a.imagePushCommand(),
		a.imageBuildCommand(), a.imageImportCommand(), a.imageExportCommand(), a.imageInspectCommand(), a.imageTagCommand(), a.imageRemoveCommand())
}

// imageAge is empty for images that say nothing of when they were made, as those
// do that are to come out the same every time: they say nothing or 1970.
func imageAge(created, now time.Time) string {
	if created.Unix() <= 0 {
		return ""
	}
	return formatAge(now.Sub(created))
}

func (a *app) imageListCommand() *cobra.Command {
	return listVerb(a, a.open, "List images", "print IDs only", native.Backend.Images, func(i image.Image) string { return i.ID }, func(now time.Time) []column[image.Image] {
		return []column[image.Image]{
			{head: "NAME", cell: func(i image.Image) string { return strings.Join(i.Names, ", ") }},
			{head: "ID", cell: func(i image.Image) string { return shortID(i.ID) }},
			{head: "SIZE", cell: func(i image.Image) string { return formatBytes(i.Size) }},
			{head: "AGE", cell: func(i image.Image) string { return imageAge(i.Created, now) }},
			{head: "SOURCE", cell: func(i image.Image) string { return i.Source }},
			{head: "PLATFORM", wide: true, cell: func(i image.Image) string { return i.Platform }},
			{head: "DIGEST", wide: true, cell: func(i image.Image) string { return i.Digest }},
			{head: "ROOT", wide: true, cell: func(i image.Image) string { return i.Root.Digest }},
		}
	})
}

// printImage tells of one image: its ID with -q, else its name.
func (a *app) printImage(f *format, i image.Image) error {
	if done, err := f.structured(a.stdout, i); done {
		return err
	}
	if f.quiet || len(i.Names) == 0 {
		fmt.Fprintln(a.stdout, i.ID)
		return nil
	}
	fmt.Fprintf(a.stdout, "%s  %s  %s\n", i.Names[0], shortID(i.ID), formatBytes(i.Size))
	return nil
}

func (a *app) imageImportCommand() *cobra.Command {
	var f format
	cmd := &cobra.Command{
		Use: "import FILE|- [NAME]", Aliases: []string{"load"}, Short: "Make an image from a tar archive or a disk image", Args: cobra.RangeArgs(1, 2),
		Long: "Import reads what `docker save` wrote, an OCI layout, or the tar of a whole root file system, compressed or not; or a\n" +
			"disk image, raw or qcow2, as clouds have them, of which the runtime microvm makes machines that boot from it.",
		Example: "  docker save app | atoll image import -\n  atoll image import root.tar.gz mine\n  atoll image import debian-12-genericcloud-amd64.qcow2 debian-vm",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			in, total := a.stdin, int64(0)
			if args[0] != "-" {
				file, err := os.Open(args[0])
				if err != nil {
					return usageError(args[0], "name a tar archive, a disk image, or - for standard input", "cannot read the archive: %v", err)
				}
				defer file.Close()
				if info, err := file.Stat(); err == nil {
					if info.IsDir() {
						return usageError(args[0], "pack it: tar -C "+args[0]+" -c . | atoll image import - NAME", "a folder is not an archive")
					}
					total = info.Size()
				}
				in = file
			}
			name := ""
			if len(args) == 2 {
				name = args[1]
			}
			b, err := a.open(cmd.Context())
			if err != nil {
				return err
			}
			shown := a.bar("importing")
			i, err := b.ImportImage(cmd.Context(), name, &counted{r: in, total: total, bar: shown})
			shown.done()
			if err != nil {
				return err
			}
			return a.printImage(&f, i)
		},
	}
	f.flags(cmd, "print the ID only")
	return cmd
}

// counted reports what is read through it.
type counted struct {
	r           io.Reader
	done, total int64
	bar         *bar
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.done += int64(n)
	c.bar.report(image.Progress{Stage: "reading", Done: c.done, Total: c.total})
	return n, err
}

func (a *app) imageInspectCommand() *cobra.Command {
	return inspectVerb(a, a.open, "an image", imageNames, native.Backend.GetImage)
}

func (a *app) imageTagCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "tag IMAGE NAME", Short: "Give an image another name", Args: exact("an image", "a name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := a.open(cmd.Context())
			if err != nil {
				return err
			}
			_, err = b.TagImage(cmd.Context(), args[0], args[1])
			return err
		},
	}
	a.completes(cmd, 1, imageNames)
	return cmd
}

func (a *app) imageRemoveCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "rm IMAGE...", Aliases: []string{"remove"}, Short: "Take names of images away; `atoll prune` frees the space", Args: atLeast("an image"),
		RunE: func(cmd *cobra.Command, refs []string) error {
			if _, err := a.open(cmd.Context()); err != nil { // a node of our own will do
				return err
			}
			return a.each(cmd, refs, func(b native.Backend, ref string) error { return b.RemoveImage(cmd.Context(), ref) })
		},
	}
	a.completes(cmd, -1, imageNames)
	return cmd
}

func (a *app) templateCommand() *cobra.Command {
	return group("template", "Manage named, versioned starting points", a.templateListCommand(), a.templateBuildCommand(), a.templateInspectCommand(),
		a.templateTagCommand(), a.templateRemoveCommand())
}

func (a *app) templateListCommand() *cobra.Command {
	var team string
	ofTeam := func(b native.Backend, ctx context.Context) ([]node.Template, error) { return b.Templates(ctx, team) }
	cmd := listVerb(a, a.openDaemon, "List templates", "print IDs only", ofTeam, func(t node.Template) string { return t.ID }, func(now time.Time) []column[node.Template] {
		return []column[node.Template]{
			{head: "NAME", cell: func(t node.Template) string { return strings.Join(t.Names, ", ") }},
			{head: "ID", cell: func(t node.Template) string { return shortID(t.ID) }},
			{head: "STATE", cell: templateState},
			{head: "CPUS", cell: func(t node.Template) string { return formatCPUs(t.Resources.CPUs) }},
			{head: "MEMORY", cell: func(t node.Template) string { return limit(t.Resources.Memory) }},
			{head: "USED", cell: func(t node.Template) string { return fmt.Sprint(t.Spawns) }},
			{head: "UPDATED", cell: func(t node.Template) string { return formatAge(now.Sub(t.Updated)) + " ago" }},
			{head: "BUILDS", wide: true, cell: func(t node.Template) string { return fmt.Sprint(len(t.Builds)) }},
			{head: "TAGS", wide: true, cell: func(t node.Template) string { return pairList(t.Tags) }},
			{head: "TEAM", wide: true, cell: func(t node.Template) string { return t.Team }},
		}
	})
	cmd.Flags().StringVar(&team, "team", "", "those that this `team` can use")
	return cmd
}

// templateState is that of the newest build.
func templateState(t node.Template) string {
	if len(t.Builds) == 0 {
		return "no build"
	}
	b := t.Builds[0]
	if b.Reason != "" {
		return string(b.State) + ": " + b.Reason
	}
	return string(b.State)
}

func (a *app) templateInspectCommand() *cobra.Command {
	return inspectVerb(a, a.openDaemon, "a template", templateNames, native.Backend.GetTemplate)
}

func (a *app) templateTagCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "tag TEMPLATE TAG BUILD", Short: "Make a tag mean one of a template's builds", Args: exact("a template", "a tag", "a build"),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := a.openDaemon(cmd.Context())
			if err != nil {
				return err
			}
			return b.TagTemplate(cmd.Context(), args[0], args[1], args[2])
		},
	}
	a.completes(cmd, 1, templateNames)
	return cmd
}

func (a *app) templateRemoveCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "rm TEMPLATE...", Aliases: []string{"remove"}, Short: "Remove templates and their builds", Args: atLeast("a template"),
		RunE: func(cmd *cobra.Command, refs []string) error {
			return a.each(cmd, refs, func(b native.Backend, ref string) error { return b.RemoveTemplate(cmd.Context(), ref) })
		},
	}
	a.completes(cmd, -1, templateNames)
	return cmd
}

// pairList prints a map as "a=1 b=2", by key.
func pairList(m map[string]string) string {
	words := make([]string, 0, len(m))
	for _, k := range sortedKeys(m) {
		words = append(words, k+"="+m[k])
	}
	return strings.Join(words, " ")
}
