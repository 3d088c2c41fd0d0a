package worktree

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/runtime/proctree"
	"github.com/atoll-run/atoll/runtime/supervisor"
	"github.com/atoll-run/atoll/sandbox"
)

// box is one sandbox.
type box struct {
	r    *Runtime
	id   string
	dir  string
	busy chan struct{} // holds a value while a call works on the sandbox

	rec record // changed by whoever holds busy, with r.mu held

	// Guarded by r.mu.
	state  sandbox.State
	reason string
	ending bool          // its end is our own doing
	gone   chan struct{} // closed when its first process has ended; nil before start
}

func newBox(r *Runtime, rec record) *box {
	return &box{
		r: r, id: rec.Spec.ID, dir: filepath.Join(r.dir, "s", rec.Spec.ID), rec: rec,
		busy: make(chan struct{}, 1), state: sandbox.Creating,
	}
}

// add makes a sandbox that does not run yet, locked for the caller.
func (r *Runtime) add(op string, spec sandbox.Spec) (*box, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.boxes[spec.ID] != nil {
		return nil, sandbox.E(op, sandbox.Exists, spec.ID, nil)
	}
	b := newBox(r, record{Spec: spec.Clone()})
	b.busy <- struct{}{}
	r.boxes[spec.ID] = b
	return b, nil
}

// find locks a sandbox for the caller, who must unlock it, and fails with
// Conflict unless it is in one of the states.
func (r *Runtime) find(ctx context.Context, op, id string, states ...sandbox.State) (*box, error) {
	if err := ctx.Err(); err != nil {
		return nil, sandbox.E(op, "", id, err)
	}
	r.mu.Lock()
	b := r.boxes[id]
	r.mu.Unlock()
	if b == nil {
		return nil, sandbox.E(op, sandbox.NotFound, id, nil)
	}
	select {
	case b.busy <- struct{}{}:
	case <-ctx.Done():
		return nil, sandbox.E(op, "", id, ctx.Err())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.boxes[id] != b: // removed while we waited
		b.unlock()
		return nil, sandbox.E(op, sandbox.NotFound, id, nil)
	case !slices.Contains(states, b.state):
		err := sandbox.Errorf(op, sandbox.Conflict, id, "the sandbox is in the state %q", b.state)
		if b.reason != "" {
			err = sandbox.Errorf(op, sandbox.Conflict, id, "the sandbox is in the state %q: %s", b.state, b.reason)
		}
		b.unlock()
		return nil, err
	}
	return b, nil
}

func (b *box) unlock() { <-b.busy }

func (b *box) path(name string) string { return filepath.Join(b.dir, name) }

// change changes the record, in memory and on disk.
func (b *box) change(f func(rec *record)) error {
	b.r.mu.Lock()
	f(&b.rec)
	rec := b.rec
	b.r.mu.Unlock()
	return supervisor.WriteRecord(b.dir, rec)
}

// jail returns a jail that sees what the sandbox sees.
func (b *box) jail(writable bool) *jail {
	spec, base := b.rec.Spec, filepath.Join(b.r.dir, "bases", b.rec.Bases)
	hostname := spec.Hostname
	if hostname == "" {
		hostname = spec.ID
	}
	j := &jail{
		plan: plan{
			Hostname: hostname, Base: filepath.Join(base, "tree"), Upper: b.path(layersName + "/upper"),
			Binds: []bind{
				{Source: b.path(gitName), Target: workdir + "/.git"},
				{Source: b.path(homeName), Target: homeDir},
				{Source: b.path(tempName), Target: "/tmp"},
			},
			Etc: etcFiles(hostname, resolver(spec)),
			Dir: workdir,
			Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + homeDir, "LANG=C.UTF-8"},
		},
		uid: b.rec.UID, gid: b.rec.GID, network: spec.Network,
	}
	for i, dir := range b.rec.Objects {
		j.Binds = append(j.Binds, bind{Source: dir, Target: objectsDir + strconv.Itoa(i), ReadOnly: true})
	}
	if writable {
		j.Work = b.path(layersName + "/work")
		for _, m := range spec.Mounts {
			j.Binds = append(j.Binds, bind{m.Source, m.Target, m.ReadOnly})
		}
	}
	if spec.Network == sandbox.NetworkSandbox {
		j.netns = spec.Link.NetNS
	}
	if b.r.cgroups != nil {
		j.cgroup = func(pid int) error { return b.r.cgroups.add(b.id, pid) }
	} else {
		j.Pids = uint64(b.resources().Pids)
	}
	for name, value := range b.env() {
		j.Env = append(j.Env, name+"="+value)
	}
	return j
}

// resolver is what /etc/resolv.conf says inside.
func resolver(spec sandbox.Spec) string {
	switch spec.Network {
	case sandbox.NetworkSandbox:
		return "nameserver " + spec.Link.Gateway.String() + "\n"
	case sandbox.NetworkHost:
		text, _ := os.ReadFile("/etc/resolv.conf")
		return string(text)
	}
	return ""
}

// env is what every process of the sandbox is told.
func (b *box) env() map[string]string {
	return map[string]string{
		"ATOLL_SANDBOX": b.id, "ATOLL_BRANCH": b.rec.Branch, "ATOLL_BASE": b.rec.Base,
		"ATOLL_PORT_BASE": strconv.Itoa(b.rec.Ports), "ATOLL_PORT_COUNT": strconv.Itoa(portBlock),
	}
}

// resources are the spec's with the defaults filled in.
func (b *box) resources() sandbox.Resources {
	return b.rec.Spec.Resources.Or(b.r.defaults)
}

// boot starts the agent of a sandbox whose files are in place and returns when
// it answers.
func (b *box) boot(ctx context.Context) error {
	listener, err := b.listen()
	if err != nil {
		return err
	}
	defer listener.Close()
	log, err := os.OpenFile(b.path(logName), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	j := b.jail(true)
	j.Binds = append(j.Binds, bind{Source: b.r.guest, Target: guestPath, ReadOnly: true})
	j.Command = []string{guestPath, "-listen", "fd:" + strconv.Itoa(fdExtra)}
	j.extra, j.stderr = []*os.File{listener}, log
	if b.r.cgroups != nil {
		groups, err := b.r.cgroups.openProcesses(b.id)
		if err != nil {
			return err
		}
		var fds []string
		for _, f := range groups {
			defer f.Close()
			fds = append(fds, strconv.Itoa(fdExtra+len(j.extra)))
			j.extra = append(j.extra, f)
		}
		j.Command = append(j.Command, "-groups", strings.Join(fds, ","))
	}
	cmd, err := j.start(ctx)
	if err != nil {
		return err
	}
	pid := cmd.Process.Pid
	if err := b.change(func(rec *record) { rec.PID, rec.Start = pid, startOf(pid) }); err != nil {
		_ = cmd.Process.Kill()
		return errors.Join(err, cmd.Wait())
	}
	if err := b.watch(); err != nil {
		_ = cmd.Process.Kill()
		return errors.Join(err, cmd.Wait())
	}
	_ = cmd.Process.Release() // watch collects it
	client := guest.New(b.dialGuest, guest.Options{})
	defer client.CloseIdle()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-b.gone:
			cancel(errors.New("the agent ended before it answered"))
		case <-ctx.Done():
		}
	}()
	err = client.WaitHealthy(ctx)
	if err == nil {
		err = client.Init(ctx, wire.Init{EnvVars: b.env()})
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return err
}

// listen makes the socket on which the agent answers. Its address would be too
// long for many directories, so it is reached by way of an open one.
func (b *box) listen() (*os.File, error) {
	dir, err := os.Open(b.dir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), socketName)})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	return l.File()
}

func (b *box) dialGuest(ctx context.Context) (net.Conn, error) {
	dir, err := os.Open(b.dir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var d net.Dialer
	return d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), socketName))
}

// dial reaches a port on the loopback that the sandbox has.
func (b *box) dial(ctx context.Context, port int) (conn net.Conn, err error) {
	if port == sandbox.GuestPort {
		return b.dialGuest(ctx)
	}
	connect := func() error {
		var d net.Dialer
		for _, host := range []string{"127.0.0.1", "::1"} {
			// A plain address is connected to on this very thread.
			if conn, err = d.DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port))); err == nil {
				return nil
			}
		}
		return err
	}
	if b.rec.Spec.Network == sandbox.NetworkHost {
		return conn, connect()
	}
	return conn, inNetwork(fmt.Sprintf("/proc/%d/ns/net", b.rec.PID), connect)
}

// watch makes the end of the sandbox known. It fails when it has ended already.
func (b *box) watch() error {
	gone := make(chan struct{})
	if err := watchEnd(b.rec.PID, func() {
		b.fail("its first process ended")
		close(gone)
	}); err != nil {
		return err
	}
	b.r.mu.Lock()
	defer b.r.mu.Unlock()
	b.gone = gone
	return nil
}

// fail moves the sandbox into the Error state, unless its end is our own doing.
func (b *box) fail(reason string) {
	if b.r.cgroups != nil && b.r.cgroups.oomKills(b.id) > 0 {
		reason += ": out of memory"
	}
	b.r.mu.Lock()
	defer b.r.mu.Unlock()
	if b.ending || b.state == sandbox.Error {
		return
	}
	b.state, b.reason = sandbox.Error, reason
	b.r.feed.Send(sandbox.Event{Sandbox: b.id, Kind: sandbox.EventState, State: sandbox.Error, Reason: reason})
}

// findAgain decides what became of a sandbox of the process before us.
func (b *box) findAgain() {
	if b.rec.Start != "" && startOf(b.rec.PID) == b.rec.Start && b.watch() == nil {
		b.r.mu.Lock()
		defer b.r.mu.Unlock()
		b.state = sandbox.Running
		if b.rec.Paused {
			b.state = sandbox.Paused
		}
		return
	}
	b.fail("it ended while nobody watched; its files are kept")
}

// end kills every process of the sandbox and waits until they are gone.
func (b *box) end() {
	b.r.mu.Lock()
	b.ending = true
	gone := b.gone
	b.r.mu.Unlock()
	if b.r.cgroups != nil {
		b.r.cgroups.kill(b.id)
	}
	if gone == nil {
		return
	}
	select {
	case <-gone: // the PID may be somebody else's by now
	default:
		_ = unix.Kill(b.rec.PID, unix.SIGKILL)
		<-gone
	}
}

// remove ends a locked sandbox and forgets it.
func (b *box) remove() error {
	b.end()
	err := b.r.erase(b.id)
	b.r.mu.Lock()
	defer b.r.mu.Unlock()
	delete(b.r.boxes, b.id)
	return err
}

// freezeTimeout bounds how long processes may resist being stopped, say in a
// system call to a slow disk.
const freezeTimeout = 30 * time.Second

// freeze stops or continues all processes.
func (b *box) freeze(ctx context.Context, frozen bool) error {
	ctx, cancel := context.WithTimeout(ctx, freezeTimeout)
	defer cancel()
	if b.r.cgroups != nil {
		return b.r.cgroups.freeze(ctx, b.id, frozen)
	}
	sig := syscall.SIGCONT
	if frozen {
		sig = syscall.SIGSTOP
	}
	return proctree.Signal(b.rec.PID, sig)
}

// still calls f while nothing in the sandbox runs.
func (b *box) still(ctx context.Context, f func() error) error {
	b.r.mu.Lock()
	running := b.state == sandbox.Running
	b.r.mu.Unlock()
	if !running {
		return f()
	}
	if err := b.freeze(ctx, true); err != nil {
		return errors.Join(err, b.freeze(context.WithoutCancel(ctx), false))
	}
	defer func() {
		// Whatever became of the caller, the sandbox goes on.
		if err := b.freeze(context.WithoutCancel(ctx), false); err != nil {
			b.fail("it could not be continued: " + err.Error())
		}
	}()
	return f()
}

func (b *box) stats() sandbox.Stats {
	var s sandbox.Stats
	if b.r.cgroups != nil {
		s = b.r.cgroups.usage(b.id)
	} else {
		for _, p := range proctree.Of(b.rec.PID) {
			s.CPU += p.CPU
			s.Memory += p.Memory
			s.Pids++
		}
	}
	s.Time = time.Now()
	if b.r.cgroups != nil {
		s.MemoryLimit = b.resources().Memory
	}
	for _, name := range []string{layersName + "/upper", gitName, homeName, tempName} {
		s.Disk += diskUse(b.path(name))
	}
	if b.rec.Spec.Network == sandbox.NetworkSandbox {
		s.RxBytes, s.TxBytes = traffic(b.rec.PID)
	}
	return s
}

// diskUse is how many bytes the files below dir take on disk.
func diskUse(dir string) (n int64) {
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // it changes while we look
		}
		if info, err := d.Info(); err == nil {
			n += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	})
	return n
}
