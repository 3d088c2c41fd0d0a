package node

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/sandbox"
)

// Main is a sandbox's main command: what it was made for by Run. The node starts
// it, sees how it ends and, where the sandbox was to go with it, removes that.
// Like a record it is a value: it is replaced, never changed.
type Main struct {
	Args     []string   `json:"args"`
	State    MainState  `json:"state"`
	PID      int        `json:"pid,omitempty"`    // inside; 0 until it has started
	ExitCode int        `json:"exitCode"`         // once exited, as a shell has it: 128 plus the signal that ended it
	Reason   string     `json:"reason,omitempty"` // why it did not end well: "signal: killed (out of memory)"
	EndedAt  *time.Time `json:"endedAt,omitempty"`
	// Attached is set in a sandbox with Lifecycle.Remove while a client carries
	// the command's output: should that client go away, the sandbox goes too.
	Attached bool `json:"attached,omitempty"`
}

// MainState is how far a main command has come.
type MainState string

// The states of a main command.
const (
	MainStarting MainState = "starting"
	MainRunning  MainState = "running"
	MainExited   MainState = "exited"
	MainLost     MainState = "lost" // it is gone and nobody saw how; its sandbox was lost, say
)

// over reports whether the command has ended; false for none.
func (m *Main) over() bool {
	return m != nil && (m.State == MainExited || m.State == MainLost)
}

// ended is m at its end; m itself when it has ended before, or is nil.
func (m *Main) ended(state MainState, code int, reason string) *Main {
	if m == nil || m.over() {
		return m
	}
	now, end := time.Now().UTC(), *m
	end.State, end.ExitCode, end.Reason, end.EndedAt, end.Attached = state, code, reason, &now, false
	return &end
}

// abandoned reports whether the sandbox is to go when the command's client does.
func (m *Main) abandoned() bool { return m != nil && m.Attached && !m.over() }

// detached is m without a client; nil for nil.
func (m *Main) detached() *Main {
	if m == nil {
		return nil
	}
	alone := *m
	alone.Attached = false
	return &alone
}

// String says how the command is: "running", "exited with code 1".
func (m *Main) String() string {
	switch {
	case m.State == MainExited && m.Reason != "":
		return fmt.Sprintf("exited with code %d, %s", m.ExitCode, m.Reason)
	case m.State == MainExited:
		return fmt.Sprintf("exited with code %d", m.ExitCode)
	case m.Reason != "":
		return string(m.State) + ": " + m.Reason
	}
	return string(m.State)
}

// RunRequest asks for a sandbox and its main command.
type RunRequest struct {
	Sandbox  CreateRequest     `json:"sandbox"`
	Command  []string          `json:"command,omitempty"`  // default: the image's, or a shell when there is a terminal
	Env      map[string]string `json:"env,omitempty"`      // of this command only
	Stdin    bool              `json:"stdin,omitempty"`    // give it a stdin to write to instead of /dev/null
	Terminal *guest.Size       `json:"terminal,omitempty"` // nil: none
	Attach   bool              `json:"attach,omitempty"`   // report what it writes, and wait for its end
}

// RunEvent is something that happened in a Run: first that the command has
// started, then what it writes. Only one field is set.
type RunEvent struct {
	Started *Sandbox `json:"started,omitempty"`
	Stdout  []byte   `json:"stdout,omitempty"` // a terminal's output too
	Stderr  []byte   `json:"stderr,omitempty"`
}

// Run makes a sandbox and starts its main command. Unless req.Attach is set it
// returns then; else it reports the command's output and returns when the
// command has ended, which the record in the answer shows. When the sandbox
// stops before, the error is that of Stopped. When ctx ends, the command goes
// on without its client; one in a sandbox with Lifecycle.Remove is removed with
// it. A command that cannot be started leaves nothing behind.
func (n *Node) Run(ctx context.Context, req RunRequest, report func(RunEvent)) (Sandbox, error) {
	e, sb, err := n.create(ctx, req.Sandbox, &req)
	if err != nil {
		return Sandbox{}, err
	}
	w := n.newWatch()
	p, err := n.startMain(ctx, w, sb, req)
	if err != nil {
		w.stop()
		n.discard(e)
		e.op.unlock()
		return Sandbox{}, err
	}
	running := *sb.Main
	running.State, running.PID = MainRunning, p.PID
	n.mu.Lock()
	// It reaches the disk with the next change; until then the guest knows.
	e.rec.Main = &running
	sb = e.rec
	n.mu.Unlock()
	n.emit(sandbox.Event{Sandbox: sb.ID, Kind: sandbox.EventMain, State: sb.State, Reason: "started"})
	if !req.Attach {
		n.follow(e, w, p, nil)
		e.op.unlock()
		report(RunEvent{Started: &sb})
		return sb, nil
	}
	client := &attachment{gone: ctx.Done(), out: make(chan guest.Event)}
	n.follow(e, w, p, client)
	e.op.unlock()
	report(RunEvent{Started: &sb})
	return n.serveClient(ctx, e, client, report)
}

// attachment is the client of a main command.
type attachment struct {
	gone <-chan struct{}
	out  chan guest.Event // what the command writes; closed when no more comes
}

// serveClient reports what the command writes, to its end or the client's.
func (n *Node) serveClient(ctx context.Context, e *entry, client *attachment, report func(RunEvent)) (Sandbox, error) {
	const op = "node.Run"
	for {
		select {
		case <-ctx.Done():
			return Sandbox{}, errors.Join(sandbox.E(op, "", n.record(e).Name, ctx.Err()), n.abandon(e))
		case ev, more := <-client.out:
			switch {
			case ev.Kind == guest.Stderr:
				report(RunEvent{Stderr: ev.Data})
			case more:
				report(RunEvent{Stdout: ev.Data})
			default:
				sb := n.record(e)
				if sb.Main.State == MainExited {
					return sb, nil
				}
				if err := Stopped(sb); err != nil {
					return sb, err
				}
				return sb, sandbox.Errorf(op, sandbox.Unavailable, sb.Name, "the node is stopping; the command goes on")
			}
		}
	}
}

// abandon removes a sandbox that was to go with the client that has just gone.
func (n *Node) abandon(e *entry) error {
	ctx, stop := context.WithTimeout(context.Background(), removeTimeout)
	defer stop()
	if err := e.op.lock(ctx); err != nil {
		return sandbox.E("node.Run", "", n.record(e).Name, err)
	}
	defer e.op.unlock()
	if rec := n.record(e); !rec.Main.abandoned() || rec.State != sandbox.Running && rec.State != sandbox.Paused {
		return nil
	}
	return n.end(e, "its client is gone")
}

// startMain starts the main command of a sandbox that has just been made.
func (n *Node) startMain(ctx context.Context, w *mainWatch, sb Sandbox, req RunRequest) (*guest.Process, error) {
	// The stream goes on when ctx has ended; starting does not.
	release := context.AfterFunc(ctx, w.stop)
	p, err := n.mainGuest(sb).Start(w.ctx, guest.Command{
		Args: sb.Main.Args, Env: req.Env, Dir: req.Sandbox.Workdir, Tag: wire.TagMain, Stdin: req.Stdin, PTY: req.Terminal,
	})
	if err == nil && !release() {
		_ = p.Close()
		err = sandbox.E("node.Run", "", sb.Name, ctx.Err())
	}
	return p, err
}

// OpStopped is the operation in the errors of Stopped, by which a client tells
// them from its own failures.
const OpStopped = "node.Stopped"

// Stopped says why nothing runs in a sandbox any more: Conflict when it was
// paused, NotFound when it was removed, Unavailable when it died, Exhausted
// when it died for want of memory. It is nil for one that runs.
func Stopped(sb Sandbox) error {
	stopped := func(kind sandbox.Kind, format string, args ...any) *sandbox.Err {
		return sandbox.Errorf(OpStopped, kind, sb.Name, format, args...)
	}
	switch {
	case sb.State == sandbox.Running, sb.State == sandbox.Creating, sb.State == sandbox.Pending:
		return nil
	case sb.State == sandbox.Paused:
		return stopped(sandbox.Conflict, "the sandbox was paused, and its commands with it").
			WithHint("`atoll resume " + sb.Name + "` lets them go on")
	case strings.Contains(sb.Reason, "out of memory"): // it may have been removed since
		return stopped(sandbox.Exhausted, "the sandbox ran out of memory").WithHint("give it more with `--memory`")
	case sb.State == sandbox.Error:
		return stopped(sandbox.Unavailable, "the sandbox died: %s", sb.Reason)
	case sb.Reason == reasonRemoved:
		return stopped(sandbox.NotFound, "the sandbox was removed")
	}
	return stopped(sandbox.NotFound, "the sandbox was removed: %s", sb.Reason)
}

// main is the main command that a request means for a drafted record.
func (req RunRequest) main(rec Sandbox) (*Main, error) {
	args := req.Command
	if len(args) == 0 {
		args = rec.Command
	}
	if len(args) == 0 && req.Terminal != nil {
		args = guest.LoginShell
	}
	if len(args) == 0 {
		return nil, sandbox.Errorf("node.Run", sandbox.Invalid, rec.Image, "the image names no command").
			WithHint("write one after the image, for example `atoll run " + rec.Image + " -- ls`")
	}
	return &Main{Args: args, State: MainStarting, Attached: req.Attach && rec.Lifecycle.Remove}, nil
}
