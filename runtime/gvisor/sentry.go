package gvisor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/urpc"

	"github.com/atoll-run/atoll/runtime/cgroup"
	"github.com/atoll-run/atoll/runtime/gvisor/orders"
	"github.com/atoll-run/atoll/runtime/process"
	"github.com/atoll-run/atoll/sandbox"
)

// overlayName is the file in the sandbox's directory that holds what the sandbox
// wrote to its root.
const overlayName = "overlay"

// sentryOverhead is what a sandbox may use beyond its own memory, in bytes: the
// sentry's heap, page tables and the guest agent's image.
const sentryOverhead = 48 << 20

// limits bounds the group that holds the sentry, its stubs and the gofer. The
// number of host processes is bounded more widely than res.Pids says, since
// systrap keeps one stub process for every address space with several stub
// threads, and the sentry has threads of its own: one that reaches this bound
// stands still. Within it the sentry itself counts processes, see processLimits.
func limits(res sandbox.Resources) cgroup.Limits {
	return cgroup.Limits{CPUs: res.CPUs, Memory: res.Memory + sentryOverhead, Tasks: min(32*res.Pids+1024, 1<<20)}
}

// nobody is the host user as whom sentries run.
const nobody = 65534

// sentry is the processes of one sandbox and what they are made of.
type sentry struct {
	dir    string // of the sandbox
	group  *cgroup.Group
	proc   *process.Process // the sentry itself
	gofer  *process.Process // nil when all files come from images
	panics *os.File         // receives the sentry's last words; nil for an adopted one
}

// boot starts a sentry of a shape in dir, inside the control group, and returns
// when it waits for its orders (start or restore) on the control socket. mounts
// are those that the user wants. A failed boot leaves no process and no group.
func (r *Runtime) boot(ctx context.Context, dir, groupName string, want shape, mounts []sandbox.Mount) (*sentry, error) {
	s := &sentry{dir: dir, group: r.boxes.Groups.Group(groupName)}
	g, res := s.group, want.res
	l := plan(r.files(want), mounts, res, dir)
	b, err := json.Marshal(l.spec)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), b, 0o600); err != nil {
		return nil, err
	}
	var d, gd donation // of the sentry and of the gofer
	defer d.close()
	defer gd.close()
	sync, err := s.prepare(&d, &gd, l)
	if err != nil {
		return nil, err
	}
	defer sync.Close()
	if err := g.Create(); err != nil {
		return nil, fmt.Errorf("make control group: %w", err)
	}
	if err := g.Limit(limits(res)); err != nil {
		return nil, fmt.Errorf("limit control group: %w", err)
	}
	err = g.Run(func(cgroupFD int) error {
		if l.needsGofer() {
			if err := r.startGofer(s, &gd, l, cgroupFD); err != nil {
				return fmt.Errorf("start gofer: %w", err)
			}
		}
		return r.startSentry(s, &d, l, res, cgroupFD)
	})
	// Only they hold their ends now, so that each notices the end of the other, and we the sentry's on sync.
	d.close()
	gd.close()
	if err == nil {
		err = awaitBoot(ctx, sync)
	}
	if err != nil {
		return nil, errors.Join(err, s.lastWords(), s.End())
	}
	return s, nil
}

// prepare opens what the sentry gets, d, and what the gofer gets, gd. sync is our
// end of the pipe on which the sentry says that it is ready.
func (s *sentry) prepare(d, gd *donation, l layout) (sync *os.File, err error) {
	for _, image := range l.images {
		if image != "" {
			err = d.open("io-fds", image, os.O_RDONLY)
		} else {
			err = joinByPair(d, "io-fds", gd, "io-fds")
		}
		if err != nil {
			return nil, err
		}
	}
	if l.needsGofer() {
		if err := s.prepareGofer(d, gd); err != nil {
			return nil, err
		}
	}
	store, err := os.OpenFile(filepath.Join(s.dir, overlayName), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make overlay: %w", err)
	}
	d.give("gofer-filestore-fds", store)
	control, err := bindControl(s.dir)
	if err != nil {
		return nil, err
	}
	d.give("controller-fd", control)
	if err := d.open("spec-fd", filepath.Join(s.dir, "config.json"), os.O_RDONLY); err != nil {
		return nil, err
	}
	overlay, err := memFile("presets", presets, len(presets))
	if err != nil {
		return nil, err
	}
	d.give("rootfs-upper-tar-fd", overlay)
	// The guest agent's own output, of which the first 64 KiB are kept until the sandbox runs.
	if s.panics, err = memFile("output", nil, 64<<10); err != nil {
		return nil, err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	d.give("stdio-fds", null)
	for range 2 {
		if err := d.dup("stdio-fds", null); err != nil {
			return nil, err
		}
	}
	if err := d.dup("panic-log-fd", s.panics); err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	d.give("start-sync-fd", w)
	return r, nil
}

// startSentry starts the process. It runs in the thread that group.run prepared.
func (r *Runtime) startSentry(s *sentry, d *donation, l layout, res sandbox.Resources, cgroupFD int) error {
	var host unix.Sysinfo_t
	err := unix.Sysinfo(&host)
	if err != nil {
		return err
	}
	cmd := exec.Command(r.executable())
	cmd.Args = append([]string{orders.ArgSentry}, r.flags(s.dir)...)
	d.before(cmd, "panic-log-fd")
	cmd.Args = append(cmd.Args, "boot", "--bundle="+s.dir,
		orders.MountFlag(l.confs),
		"--cpu-num="+strconv.Itoa(cpus(res.CPUs)),
		"--total-memory="+strconv.FormatInt(res.Memory, 10),
		"--total-host-memory="+strconv.FormatUint(host.Totalram*uint64(host.Unit), 10))
	d.transfer(cmd)
	cmd.Args = append(cmd.Args, orders.ContainerID)
	cmd.Env = []string{orders.EnvFiles + "=" + strconv.Itoa(len(cmd.ExtraFiles))}
	cmd.Stderr = s.panics
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true, // no signals from our terminal
		Cloneflags: unix.CLONE_NEWIPC | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWPID |
			unix.CLONE_NEWNET | unix.CLONE_NEWUSER,
		// Root of an own user namespace can set up its empty root, and is nobody outside.
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: nobody, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: nobody, Size: 1}},
		Credential:  &syscall.Credential{Uid: 0, Gid: 0},
	}
	if cgroupFD >= 0 {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, cgroupFD
	}
	s.proc, err = process.Start(cmd)
	return err
}

// prepareGofer opens what the gofer gets besides the sockets of its mounts.
func (s *sentry) prepareGofer(d, gd *donation) error {
	if err := gd.open("spec-fd", filepath.Join(s.dir, "config.json"), os.O_RDONLY); err != nil {
		return err
	}
	// The gofer tells the sentry where its mounts lie once links are resolved.
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	d.give("mounts-fd", r)
	gd.give("mounts-fd", w)
	// And it would ask its maker for files that it may not open; ours may open all.
	ours, theirs, err := socketPair()
	if err != nil {
		return err
	}
	ours.Close()
	gd.give("rpc-fd", theirs)
	return nil
}

// startGofer starts the process that opens host directories for the sentry.
func (r *Runtime) startGofer(s *sentry, d *donation, l layout, cgroupFD int) error {
	cmd := exec.Command(r.executable())
	cmd.Args = append([]string{orders.ArgGofer}, r.flags(s.dir)...)
	cmd.Args = append(cmd.Args, "gofer", "--bundle="+s.dir, orders.MountFlag(l.confs))
	d.transfer(cmd)
	cmd.Args = append(cmd.Args, orders.ContainerID)
	cmd.Env = []string{orders.EnvFiles + "=" + strconv.Itoa(len(cmd.ExtraFiles))}
	cmd.Stderr = s.panics
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: unix.CLONE_NEWIPC | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWPID | unix.CLONE_NEWNET,
	}
	if cgroupFD >= 0 {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, cgroupFD
	}
	var err error
	s.gofer, err = process.Start(cmd)
	return err
}

// flags are gVisor's own, the same for sentry and gofer.
func (r *Runtime) flags(dir string) []string {
	flags := []string{
		"--root=" + dir, "--platform=systrap", "--network=sandbox", "--directfs=false", "--overlay2=none",
		"--allow-suid=true", "--host-settings=ignore", "--control-rpc-stop-timeout=0s", "--ignore-cgroups=true",
		"--file-access-mounts=shared", "--net-disconnect-ok=true", "--gvisor-marker-file=true",
	}
	if r.cfg.Debug != "" {
		flags = append(flags, "--debug=true", "--debug-log="+r.cfg.Debug+"/")
	}
	return flags
}

// awaitBoot waits for the byte that says that the sentry is ready.
func awaitBoot(ctx context.Context, sync *os.File) error {
	stop := context.AfterFunc(ctx, func() { sync.Close() })
	defer stop()
	var b [1]byte
	if _, err := io.ReadFull(sync, b[:]); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return errors.New("the sentry ended before it was ready")
	}
	return nil
}

// lastWords is what the sentry wrote when it failed, nil when it wrote nothing.
func (s *sentry) lastWords() error {
	if s.panics == nil {
		return nil
	}
	buf := make([]byte, 8<<10)
	n, _ := s.panics.ReadAt(buf, 0)
	text := strings.TrimSpace(string(bytes.TrimRight(buf[:n], "\x00")))
	if text == "" {
		return nil
	}
	return errors.New(text)
}

// End kills the processes, waits until they are gone and removes their group.
func (s *sentry) End() error {
	var errs []error
	for _, p := range []*process.Process{s.proc, s.gofer} {
		if p == nil {
			continue
		}
		if err := p.Kill(); err != nil {
			errs = append(errs, err)
			continue
		}
		if err := p.Wait(context.Background()); err != nil && !errors.Is(err, os.ErrClosed) {
			errs = append(errs, err)
		}
		p.Close()
	}
	if s.panics != nil {
		s.panics.Close()
	}
	_ = os.Remove(filepath.Join(s.dir, overlayName)) // a lost sandbox needs no disk
	return errors.Join(append(errs, s.group.Remove())...)
}

// begin gives the sentry its network and starts the guest.
func (s *sentry) begin(ctx context.Context, link *sandbox.Link) error {
	if err := s.network(ctx, link, false); err != nil {
		return err
	}
	id := orders.ContainerID
	return call(ctx, s.dir, orders.CallStart, &id, nil)
}

// network hands over the link.
func (s *sentry) network(ctx context.Context, link *sandbox.Link, restore bool) error {
	args, err := networkArgs(link, restore)
	if err != nil {
		return err
	}
	defer closeAll(args.FilePayload.Files)
	return call(ctx, s.dir, orders.CallNetwork, args, nil)
}

// restore gives the sentry its network and the state in dir instead of a start.
func (s *sentry) restore(ctx context.Context, link *sandbox.Link, dir string) error {
	if err := s.network(ctx, link, true); err != nil {
		return err
	}
	opts := orders.Restore{HavePagesFile: true, Background: true}
	defer func() { closeAll(opts.FilePayload.Files) }()
	for _, name := range orders.StateFiles {
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		opts.FilePayload.Files = append(opts.FilePayload.Files, f)
	}
	return call(ctx, s.dir, orders.CallRestore, &opts, nil)
}

// identify tells the running sandbox who it is.
func (s *sentry) identify(ctx context.Context, spec sandbox.Spec, fresh bool) error {
	host := hostname(spec)
	args := orders.Identify{Hostname: host, Files: map[string]string{"/etc/hostname": host + "\n"}}
	if fresh {
		args.Files["/etc/hosts"] = "127.0.0.1\tlocalhost " + host + "\n::1\tlocalhost ip6-localhost ip6-loopback\n"
	}
	if spec.Link != nil {
		args.Files["/etc/resolv.conf"] = "nameserver " + spec.Link.Gateway.String() + "\noptions edns0\n"
	}
	return call(ctx, s.dir, orders.CallIdentify, &args, nil)
}

// connect joins the sentry's end of a socket pair with a port of the sandbox.
func (s *sentry) connect(ctx context.Context, port int, end *os.File) error {
	return call(ctx, s.dir, orders.CallConnect, &orders.Connect{
		FilePayload: urpc.FilePayload{Files: []*os.File{end}}, Port: uint16(port),
	}, nil)
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
