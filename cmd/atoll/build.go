package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// dockerfileFlags are the flags of everything that builds from a Dockerfile.
type dockerfileFlags struct {
	file, target string
	args         []string
	noCache      bool
}

func (f *dockerfileFlags) flags(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&f.file, "file", "f", "", "the Dockerfile, or - for standard input; default: `Dockerfile` in the context")
	cmd.Flags().StringVar(&f.target, "target", "", "the `stage` to build; default: the last")
	cmd.Flags().StringArrayVar(&f.args, "build-arg", nil, "the value of an ARG: `KEY=VALUE`")
	cmd.Flags().BoolVar(&f.noCache, "no-cache", false, "do every step anew")
}

// maxDockerfile bounds a Dockerfile, in bytes.
const maxDockerfile = 1 << 20

// request reads the Dockerfile of a build whose context is dir.
func (f *dockerfileFlags) request(a *app, dir string) (native.BuildImageRequest, error) {
	req := native.BuildImageRequest{Target: f.target, NoCache: f.noCache}
	var err error
	if req.Args, err = parsePairs("build-arg", f.args); err != nil {
		return req, err
	}
	if req.Context, err = hostPath(dir); err != nil {
		return req, err
	}
	if info, err := os.Stat(req.Context); err != nil || !info.IsDir() {
		return req, usageError(dir, "name the directory that COPY reads, for example `.`", "no such directory")
	}
	in, name := a.stdin, f.file
	if name != "-" {
		if name == "" {
			name = filepath.Join(req.Context, "Dockerfile")
		}
		file, err := os.Open(name)
		if err != nil {
			return req, usageError(name, "name another with -f", "cannot read the Dockerfile: %v", err)
		}
		defer file.Close()
		in = file
	}
	text, err := io.ReadAll(io.LimitReader(in, maxDockerfile))
	req.Dockerfile = string(text)
	return req, err
}

// buildLog shows a build's steps and, between them, what their commands print.
func (a *app) buildLog(line node.LogLine) {
	switch line.Level {
	case "debug":
		fmt.Fprintln(a.stderr, "    "+printable(line.Text))
	default:
		step := line.Step
		if step != "" {
			step = "[" + step + "] "
		}
		fmt.Fprintln(a.stderr, step+printable(line.Text))
	}
}

func (a *app) imageBuildCommand() *cobra.Command {
	var f format
	var d dockerfileFlags
	var tags []string
	cmd := &cobra.Command{
		Use: "build [-t NAME] DIRECTORY", Short: "Build an image from a Dockerfile, each RUN in a sandbox", Args: exact("a directory"),
		Example: "  atoll image build -t mine .\n  atoll run --rm mine",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			req, err := d.request(a, args[0])
			if err != nil {
				return err
			}
			req.Names = tags
			b, err := a.open(cmd.Context())
			if err != nil {
				return err
			}
			i, err := b.BuildImage(cmd.Context(), req, a.logUnless(f.quiet))
			if err != nil {
				return err
			}
			return a.printImage(&f, i)
		},
	}
	f.flags(cmd, "print the ID only")
	d.flags(cmd)
	cmd.Flags().StringArrayVarP(&tags, "tag", "t", nil, "a `name` for the image, may be given several times")
	return cmd
}

func (a *app) logUnless(quiet bool) func(node.LogLine) {
	if quiet {
		return nil
	}
	return a.buildLog
}

func (a *app) imageExportCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "export IMAGE FILE|-", Aliases: []string{"save"}, Short: "Write an image as a tar archive that docker load reads", Args: exact("an image", "a file"),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			b, err := a.open(cmd.Context())
			if err != nil {
				return err
			}
			if args[1] == "-" {
				if _, terminal := isTerminal(a.stdout); terminal {
					return usageError("", "redirect it, or name a file", "an archive makes no sense on a terminal")
				}
				return b.ExportImage(cmd.Context(), args[0], a.stdout)
			}
			// Under another name first: a file that is there is a whole one.
			part := args[1] + ".part"
			out, err := os.Create(part)
			if err != nil {
				return sandbox.E("atoll image export", sandbox.Denied, args[1], errors.Unwrap(err))
			}
			err = b.ExportImage(cmd.Context(), args[0], out)
			if cerr := out.Close(); err == nil {
				err = cerr
			}
			if err == nil {
				err = os.Rename(part, args[1])
			}
			if err != nil {
				_ = os.Remove(part)
			}
			return err
		},
	}
	a.completes(cmd, 1, imageNames)
	return cmd
}

// registryFlags say how to talk to a registry.
func (a *app) registryFlags(cmd *cobra.Command, req *native.PullRequest) (readPassword func() error) {
	var passwordStdin bool
	cmd.Flags().StringVarP(&req.Username, "username", "u", "", "a `user` of the registry; default: what docker login left")
	cmd.Flags().BoolVar(&passwordStdin, "password-stdin", false, "read the password from standard input")
	cmd.Flags().BoolVar(&req.Insecure, "insecure", false, "talk plain HTTP to the registry")
	return func() error {
		if !passwordStdin {
			return nil
		}
		secret, err := io.ReadAll(io.LimitReader(a.stdin, maxPassword))
		req.Password = strings.TrimRight(string(secret), "\r\n")
		return err
	}
}

// maxPassword bounds what is read as a password, in bytes.
const maxPassword = 16 << 10

func (a *app) imagePushCommand() *cobra.Command {
	var req native.PullRequest
	cmd := &cobra.Command{Use: "push IMAGE [TARGET]", Short: "Upload an image to a registry", Args: cobra.RangeArgs(1, 2)}
	password := a.registryFlags(cmd, &req)
	to := cmd.Flags().String("to", "", "another `node` instead of a registry, see `atoll node`, or 'store'")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *to != "" {
			return a.carry(cmd.Context(), &format{}, native.CarryRequest{Kind: carry.Image, Ref: args[0], Node: *to})
		}
		if err := password(); err != nil {
			return err
		}
		req.Ref = args[len(args)-1]
		b, err := a.open(cmd.Context())
		if err != nil {
			return err
		}
		shown := a.bar("pushing " + req.Ref)
		defer shown.done()
		return b.PushImage(cmd.Context(), args[0], req, shown.report)
	}
	a.completes(cmd, 1, imageNames)
	return cmd
}

func (a *app) templateBuildCommand() *cobra.Command {
	var f format
	var d dockerfileFlags
	var req native.TemplateRequest
	var memory, disk size
	var from string
	cmd := &cobra.Command{
		Use: "build NAME [DIRECTORY]", Aliases: []string{"create"}, Short: "Make a template, or a new build of one", Args: cobra.RangeArgs(1, 2),
		Long: "Build makes a template from a Dockerfile in DIRECTORY, or with --from from an image or template that is there.\n" +
			"With --start the command is started in it, and once --ready succeeds its memory is kept along: sandboxes\n" +
			"made from the template begin with the command already up.",
		Example: "  atoll template build web . --start 'python3 -m http.server 80' --ready 'curl -sf localhost'\n  atoll create web",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			if (from == "") == (len(args) == 1) {
				return usageError("", "usage: "+cmd.UseLine(), "name a directory with a Dockerfile, or an image with --from")
			}
			req.Name, req.Resources.Memory, req.Resources.Disk = args[0], int64(memory), int64(disk)
			req.Build.FromImage, req.Build.Force = from, d.noCache
			b, err := a.openDaemon(cmd.Context())
			if err != nil {
				return err
			}
			if len(args) == 2 {
				build, err := d.request(a, args[1])
				if err != nil {
					return err
				}
				build.Names = []string{"atoll-template/" + strings.ToLower(req.Name)}
				i, err := b.BuildImage(cmd.Context(), build, a.logUnless(f.quiet))
				if err != nil {
					return err
				}
				req.Build.FromImage = i.Names[0]
			} else if _, err := b.GetTemplate(cmd.Context(), from); err == nil {
				req.Build.FromImage, req.Build.FromTemplate = "", from
			}
			t, err := b.BuildTemplate(cmd.Context(), req, a.logUnless(f.quiet))
			if err != nil {
				return err
			}
			if done, err := f.structured(a.stdout, t); done {
				return err
			}
			if f.quiet {
				fmt.Fprintln(a.stdout, t.ID)
			} else {
				fmt.Fprintln(a.stdout, req.Name)
			}
			return nil
		},
	}
	f.flags(cmd, "print the ID only")
	d.flags(cmd)
	fl := cmd.Flags()
	fl.StringVar(&from, "from", "", "an `image` or template to start from, instead of a directory")
	fl.StringVar(&req.Build.StartCmd, "start", "", "a `command` to start in it")
	fl.StringVar(&req.Build.ReadyCmd, "ready", "", "a `command` that succeeds once it is up")
	fl.StringVar(&req.Team, "team", "", "the `team` it belongs to")
	fl.BoolVar(&req.Public, "public", false, "other teams may use it")
	fl.Float64Var(&req.Resources.CPUs, "cpus", 0, "`cores` of its sandboxes")
	fl.VarP(&memory, "memory", "m", "memory of its sandboxes, for example 512m")
	fl.Var(&disk, "disk", "disk of its sandboxes, for example 2g")
	return cmd
}

func (a *app) imagePullCommand() *cobra.Command {
	var f format
	var req native.PullRequest
	cmd := &cobra.Command{Use: "pull IMAGE", Short: "Fetch an image from a registry; `base` is made from packages", Args: exact("an image")}
	password := a.registryFlags(cmd, &req)
	from := cmd.Flags().String("from", "", "another `node` instead of a registry, see `atoll node`, or 'store'")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *from != "" {
			return a.carry(cmd.Context(), &f, native.CarryRequest{Kind: carry.Image, Ref: args[0], Node: *from, Pull: true})
		}
		if err := f.check(); err != nil {
			return err
		}
		if err := password(); err != nil {
			return err
		}
		req.Ref = args[0]
		b, err := a.open(cmd.Context())
		if err != nil {
			return err
		}
		i, err := a.pull(cmd.Context(), b, req)
		if err != nil {
			return err
		}
		return a.printImage(&f, i)
	}
	f.flags(cmd, "print the ID only")
	cmd.Flags().StringVar(&req.Platform, "platform", "", "another platform, for example `linux/arm64`")
	return cmd
}
