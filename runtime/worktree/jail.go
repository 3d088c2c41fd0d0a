package worktree

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

// jail is a plan and what the host has to do with the process that carries it out.
type jail struct {
	plan
	uid, gid int                 // of the host, who the sandbox acts as
	network  sandbox.NetworkMode // NetworkNone has a network of its own with loopback only
	netns    string              // path of the namespace to join, for NetworkSandbox
	cgroup   func(pid int) error // puts the process into its control groups; nil: none
	extra    []*os.File          // passed on as fdExtra and those after it
	stdin    io.Reader           // nil: nothing
	stdout   io.Writer           // nil: discarded
	stderr   io.Writer           // nil: discarded
}

// start starts the jail and returns once its command is executing. The command
// goes on when ctx ends.
func (j *jail) start(ctx context.Context) (*exec.Cmd, error) {
	planRead, planWrite, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer planWrite.Close()
	resultRead, resultWrite, err := os.Pipe()
	if err != nil {
		planRead.Close()
		return nil, err
	}
	defer resultRead.Close()
	j.Loopback = j.network == sandbox.NetworkNone
	cmd := j.command(planRead, resultWrite)
	err = startIn(cmd, j.netns)
	planRead.Close()
	resultWrite.Close()
	if err != nil {
		return nil, namespaceError(err)
	}
	abandon := func(err error) (*exec.Cmd, error) {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, err
	}
	// The process waits for its plan, so it forks nothing before it is in its
	// control groups.
	if j.cgroup != nil {
		if err := j.cgroup(cmd.Process.Pid); err != nil {
			return abandon(err)
		}
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	err = json.NewEncoder(planWrite).Encode(j.plan)
	planWrite.Close()
	if err != nil {
		stop()
		return abandon(err)
	}
	message, err := io.ReadAll(io.LimitReader(resultRead, 4096))
	if !stop() {
		return abandon(ctx.Err())
	}
	if err != nil {
		return abandon(err)
	}
	if len(message) > 0 {
		err := errors.New(string(message))
		// Where AppArmor restricts user namespaces they can be made, but their
		// root may not even do the first of its steps.
		if strings.HasPrefix(err.Error(), stepPrivate+":") {
			err = namespaceError(errors.Join(err, os.ErrPermission))
		}
		return abandon(err)
	}
	return cmd, nil
}

// run runs the command of the jail to its end. What it writes to stderr is in
// the error if it fails.
func (j *jail) run(ctx context.Context) error {
	var complaint tail
	if j.stderr == nil {
		j.stderr = &complaint
	}
	cmd, err := j.start(ctx)
	if err != nil {
		return err
	}
	// The first process of a PID namespace takes all others with it.
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	err = cmd.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", j.Command[0], err, strings.TrimSpace(complaint.String()))
	}
	return nil
}

func (j *jail) command(plan, result *os.File) *exec.Cmd {
	flags := uintptr(syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS | syscall.CLONE_NEWCGROUP)
	if j.network == sandbox.NetworkNone {
		flags |= syscall.CLONE_NEWNET
	}
	cmd := &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{argJail}, Env: []string{}, Dir: "/",
		Stdin: j.stdin, Stdout: j.stdout, Stderr: j.stderr,
		ExtraFiles: append([]*os.File{plan, result}, j.extra...),
		SysProcAttr: &syscall.SysProcAttr{
			Cloneflags:  flags,
			UidMappings: []syscall.SysProcIDMap{{HostID: j.uid, Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{HostID: j.gid, Size: 1}},
			Setsid:      true, // a signal to our terminal is not for sandboxes
		},
	}
	if j.uid != os.Getuid() {
		// Then we are not the sandbox's root right after the start and would lose
		// the capabilities that being root gives.
		cmd.SysProcAttr.AmbientCaps = []uintptr{
			unix.CAP_SYS_ADMIN, unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_SETPCAP, unix.CAP_NET_ADMIN,
			unix.CAP_DAC_OVERRIDE, unix.CAP_CHOWN, unix.CAP_FOWNER,
		}
	}
	return cmd
}

// startIn starts a command, in a network namespace unless the path is empty.
func startIn(cmd *exec.Cmd, netns string) error {
	if netns == "" {
		return cmd.Start()
	}
	return inNetwork(netns, func() error {
		// In there, only we may.
		if err := loopbackUp(); err != nil {
			return fmt.Errorf("loopback: %w", err)
		}
		return cmd.Start()
	})
}

// inNetwork calls f on a thread in a network namespace. The thread is led back
// afterwards and not ended: the kernel may take its end for ours and kill
// processes that it started (see PR_SET_PDEATHSIG).
func inNetwork(netns string, f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// /proc/self shows what this thread is in. While we hold it, another goes.
			result <- inNetwork(netns, f)
			runtime.UnlockOSThread()
			return
		}
		err, back := visit(netns, f)
		if back == nil {
			runtime.UnlockOSThread()
		} // else the thread must not be used again, and ends with this goroutine
		result <- errors.Join(err, back)
	}()
	return <-result
}

// visit calls f with this thread in a network namespace. back tells why the
// thread could not return to its own.
func visit(netns string, f func() error) (err, back error) {
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err, nil
	}
	defer home.Close()
	ns, err := os.Open(netns)
	if err != nil {
		return err, nil
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter %s: %w", netns, err), nil
	}
	err = f()
	return err, unix.Setns(int(home.Fd()), unix.CLONE_NEWNET)
}

// namespaceError explains the refusal that users of a hardened host meet.
func namespaceError(err error) error {
	const op = "worktree.namespaces"
	if !errors.Is(err, os.ErrPermission) && !errors.Is(err, unix.ENOSPC) {
		return err
	}
	switch {
	case sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1" && os.Geteuid() != 0:
		return sandbox.E(op, sandbox.Denied, "", err).WithHint(
			"AppArmor forbids user namespaces to this program: install Atoll's AppArmor profile, run it as root, or set the sysctl kernel.apparmor_restrict_unprivileged_userns to 0")
	case sysctl("kernel/unprivileged_userns_clone") == "0" && os.Geteuid() != 0:
		return sandbox.E(op, sandbox.Denied, "", err).WithHint(
			"run as root, or set the sysctl kernel.unprivileged_userns_clone to 1")
	case sysctl("user/max_user_namespaces") == "0":
		return sandbox.E(op, sandbox.Denied, "", err).WithHint("set the sysctl user.max_user_namespaces to a number above 0")
	}
	return sandbox.E(op, sandbox.Denied, "", err).WithHint("this host does not let us make user namespaces; containers often forbid it")
}

func sysctl(name string) string {
	text, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// tail keeps the last bytes written to it.
type tail struct{ buf bytes.Buffer }

// tailSize is how many bytes a tail keeps at least.
const tailSize = 8 << 10

// Write implements io.Writer.
func (t *tail) Write(p []byte) (int, error) {
	if t.buf.Len() > 2*tailSize {
		keep := bytes.Clone(t.buf.Bytes()[t.buf.Len()-tailSize:])
		t.buf.Reset()
		t.buf.Write(keep)
	}
	t.buf.Write(p[max(0, len(p)-2*tailSize):])
	return len(p), nil
}

// String returns what was kept.
func (t *tail) String() string { return t.buf.String() }
