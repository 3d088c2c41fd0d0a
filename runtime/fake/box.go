package fake

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/atoll-run/atoll/runtime/layer"
	"github.com/atoll-run/atoll/runtime/proctree"
	"github.com/atoll-run/atoll/sandbox"
)

// box is one sandbox: an agent process and its directory.
//
//	home/        the files
//	guest.sock   where the agent answers
type box struct {
	world *World
	spec  sandbox.Spec
	dir   string
	busy  chan struct{} // holds a value while a call works on the sandbox

	// Guarded by world.mu; whoever holds busy after start may read cmd and gone.
	cmd     *exec.Cmd     // the agent; nil before start
	gone    chan struct{} // closed when the agent was collected
	current sandbox.State
	reason  string
	ending  bool // the end of the agent is our own doing
	ports   map[int]func(net.Conn)
}

func (b *box) unlock() { <-b.busy }

func (b *box) home() string { return filepath.Join(b.dir, "home") }

func (b *box) state() sandbox.State {
	b.world.mu.Lock()
	defer b.world.mu.Unlock()
	return b.current
}

// start brings a locked box up, with the files of a snapshot unless from is empty.
func (b *box) start(ctx context.Context, op, from string) error {
	if err := os.Mkdir(b.dir, 0o700); err != nil {
		return sandbox.E(op, sandbox.Internal, b.spec.ID, err)
	}
	if err := os.Mkdir(b.home(), 0o755); err != nil {
		return sandbox.E(op, sandbox.Internal, b.spec.ID, err)
	}
	if from != "" {
		if err := b.load(ctx, op, from); err != nil {
			return err
		}
	}
	cmd := exec.Command(b.world.guest, "-listen", "unix:guest.sock")
	cmd.Dir = b.dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + b.home()}
	// Should this process be killed, the agent must not stay.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() == 0 {
		// In a user namespace with one user the agent takes HOME for the home,
		// as it does for everybody but root.
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{Size: 1}}
	}
	if err := cmd.Start(); err != nil {
		return sandbox.E(op, sandbox.Internal, b.spec.ID, err)
	}
	b.world.mu.Lock()
	b.cmd, b.gone = cmd, make(chan struct{})
	b.world.mu.Unlock()
	go b.collect()
	if err := b.await(ctx); err != nil {
		return sandbox.E(op, "", b.spec.ID, err)
	}
	b.world.mu.Lock()
	defer b.world.mu.Unlock()
	if b.current == sandbox.Creating {
		b.current = sandbox.Running
	}
	return nil
}

// collect waits for the end of the agent and tells of it unless it was asked for.
func (b *box) collect() {
	err := b.cmd.Wait()
	close(b.gone)
	b.fail(fmt.Sprintf("the guest agent ended: %v", err))
}

// fail moves the box into the Error state, once.
func (b *box) fail(reason string) {
	b.world.mu.Lock()
	defer b.world.mu.Unlock()
	if b.ending || b.current == sandbox.Error {
		return
	}
	b.current, b.reason = sandbox.Error, reason
	b.world.feed.Send(sandbox.Event{Sandbox: b.spec.ID, Kind: sandbox.EventState, State: sandbox.Error, Reason: reason})
}

// await returns when the agent answers.
func (b *box) await(ctx context.Context) error {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return b.dialGuest(ctx) },
	}}
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://guest/health", nil)
		if err != nil {
			return err
		}
		if resp, err := client.Do(req); err == nil {
			resp.Body.Close()
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-b.gone:
			return errors.New("the guest agent ended before it answered")
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// dialGuest reaches the socket by way of an open directory, since the path
// itself may be longer than an address can be.
func (b *box) dialGuest(ctx context.Context) (net.Conn, error) {
	dir, err := os.Open(b.dir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var d net.Dialer
	return d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/guest.sock", dir.Fd()))
}

func (b *box) dial(ctx context.Context, port int) (net.Conn, error) {
	if port == sandbox.GuestPort {
		return b.dialGuest(ctx)
	}
	b.world.mu.Lock()
	handler := b.ports[port]
	b.world.mu.Unlock()
	if handler == nil {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	}
	inside, outside, err := socketPair()
	if err != nil {
		return nil, err
	}
	go handler(inside)
	return outside, nil
}

// socketPair is a pipe that can be closed in one direction, as TCP can.
func socketPair() (inside, outside net.Conn, err error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ends := [2]net.Conn{}
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		var connErr error
		ends[i], connErr = net.FileConn(f)
		f.Close() // FileConn has its own copy
		err = errors.Join(err, connErr)
	}
	return ends[0], ends[1], err
}

// freeze stops or continues all processes of the box.
func (b *box) freeze(op string, to sandbox.State) error {
	if b.state() == to {
		return nil
	}
	sig := syscall.SIGSTOP
	if to == sandbox.Running {
		sig = syscall.SIGCONT
	}
	if err := proctree.Signal(b.cmd.Process.Pid, sig); err != nil {
		return sandbox.E(op, sandbox.Internal, b.spec.ID, err)
	}
	b.world.mu.Lock()
	defer b.world.mu.Unlock()
	if b.current != sandbox.Error {
		b.current = to
	}
	return nil
}

// end kills everything that belongs to the box and waits for it.
func (b *box) end() {
	b.world.mu.Lock()
	b.ending = true
	b.world.mu.Unlock()
	b.kill()
}

// die is end without having been asked for.
func (b *box) die(reason string) {
	b.fail(reason)
	b.kill()
}

func (b *box) kill() {
	b.world.mu.Lock()
	cmd, gone := b.cmd, b.gone
	b.world.mu.Unlock()
	if cmd == nil {
		return
	}
	select {
	case <-gone: // the PID may be somebody else's by now
	default:
		proctree.Kill(cmd.Process.Pid)
		<-gone
	}
}

// What a snapshot consists of.
const (
	filesName    = "files.tar"
	manifestName = "snapshot.json" // written last
)

// manifest tells a whole snapshot from a damaged one.
type manifest struct {
	SHA256 string `json:"sha256"` // of files.tar
}

// snapshot writes the files into dir while nothing changes them.
func (b *box) snapshot(ctx context.Context, op, dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 0 {
		return sandbox.Errorf(op, sandbox.Invalid, b.spec.ID, "%s is not an empty directory", dir)
	}
	if b.state() == sandbox.Running {
		if err := b.freeze(op, sandbox.Paused); err != nil {
			return err
		}
		defer func() { _ = b.freeze(op, sandbox.Running) }()
	}
	f, err := os.Create(filepath.Join(dir, filesName))
	if err != nil {
		return sandbox.E(op, sandbox.Internal, b.spec.ID, err)
	}
	defer f.Close()
	sum := sha256.New()
	if err := layer.Write(ctx, io.MultiWriter(f, sum), b.home(), layer.Options{}); err != nil {
		return sandbox.E(op, "", b.spec.ID, err)
	}
	text, err := json.Marshal(manifest{SHA256: hex.EncodeToString(sum.Sum(nil))})
	if err == nil {
		err = errors.Join(f.Sync(), os.WriteFile(filepath.Join(dir, manifestName), text, 0o600))
	}
	if err != nil {
		return sandbox.E(op, sandbox.Internal, b.spec.ID, err)
	}
	return nil
}

// load lays out the files of a snapshot.
func (b *box) load(ctx context.Context, op, dir string) error {
	var m manifest
	text, err := os.ReadFile(filepath.Join(dir, manifestName))
	if err == nil {
		err = json.Unmarshal(text, &m)
	}
	if err != nil {
		return sandbox.Errorf(op, sandbox.Invalid, b.spec.ID, "%s holds no snapshot: %w", dir, err)
	}
	f, err := os.Open(filepath.Join(dir, filesName))
	if err != nil {
		return sandbox.E(op, sandbox.Invalid, b.spec.ID, err)
	}
	defer f.Close()
	sum := sha256.New()
	err = layer.Extract(ctx, io.TeeReader(f, sum), b.home(), layer.Options{})
	if err == nil {
		_, err = io.Copy(sum, f)
	}
	if ctx.Err() != nil {
		return sandbox.E(op, "", b.spec.ID, ctx.Err())
	}
	if err != nil || hex.EncodeToString(sum.Sum(nil)) != m.SHA256 {
		return sandbox.Errorf(op, sandbox.Invalid, b.spec.ID, "the snapshot in %s is damaged: %w", dir, err)
	}
	return nil
}

func (b *box) changes(ctx context.Context, op string, w io.Writer) error {
	if err := layer.Write(ctx, w, b.home(), layer.Options{}); err != nil {
		return sandbox.E(op, "", b.spec.ID, err)
	}
	return nil
}

func (b *box) stats(op string) (sandbox.Stats, error) {
	s := sandbox.Stats{Time: time.Now()}
	for _, p := range proctree.Of(b.cmd.Process.Pid) {
		s.CPU += p.CPU
		s.Memory += p.Memory
		s.Pids++
	}
	err := filepath.WalkDir(b.home(), func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // changes as we look
		}
		if info, err := d.Info(); err == nil {
			s.Disk += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	})
	if err != nil {
		return s, sandbox.E(op, sandbox.Internal, b.spec.ID, err)
	}
	return s, nil
}
