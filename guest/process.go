package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"

	processpb "github.com/atoll-run/atoll/guest/gen/process"
	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/sandbox"
)

// Command is what to run.
type Command struct {
	Args  []string // the command, looked up in the sandbox's PATH, and its arguments
	Env   map[string]string
	Dir   string // empty: the default working directory or the user's home
	Tag   string // a name to Connect by; output of wire.TagMain goes to the log; may be empty
	Stdin bool   // give it a stdin to write to instead of /dev/null
	PTY   *Size  // give it a terminal; nil: none
}

// Size is the size of a terminal in characters.
type Size struct {
	Cols uint32 `json:"cols"`
	Rows uint32 `json:"rows"`
}

// LoginShell is the best shell that a sandbox has, as a login shell.
var LoginShell = []string{"/bin/sh", "-c", "command -v bash >/dev/null 2>&1 && exec bash -l || exec sh -l"}

// Control reaches a process without seeing what it does.
type Control struct {
	PID    int
	client *Client
}

// Control reaches the process with a PID that Start gave.
func (c *Client) Control(pid int) Control { return Control{PID: pid, client: c} }

// Process is the view of one client on a process. The process goes on when the
// view is closed.
type Process struct {
	Control
	name   string // the command, or how it was selected
	cancel context.CancelFunc
	ended  bool // End was returned

	receive func() (*processpb.ProcessEvent, error) // without keepalives
	close   func() error
}

// EventKind is what an Event is about.
type EventKind int

// The kinds of Event.
const (
	Stdout EventKind = iota + 1
	Stderr
	PTY
	End // the last one
)

// Event is something that a process did.
type Event struct {
	Kind   EventKind
	Data   []byte  // of output
	Result *Result // of End
}

// Result is how a process ended.
type Result struct {
	ExitCode int            // 0 to 255; -1 when a signal ended it
	Signal   syscall.Signal // 0 when it ended by itself
	Status   string         // "exit status 1", "signal: killed"
	Message  string         // why it did not end well, such as "signal: killed (out of memory)"; empty when it did
}

// ShellCode is the exit code that a shell would report: 128 plus the signal
// when one ended the process.
func (r Result) ShellCode() int {
	if r.ExitCode < 0 {
		return 128 + int(r.Signal)
	}
	return r.ExitCode
}

// Start starts a command and returns once it runs. If ctx has a deadline, the
// process is killed at that time even if this client is gone by then; when ctx
// is canceled, the view ends and the process goes on. The error is NotFound
// when the command does not exist, Denied when it may not be executed, Invalid
// when the working directory does not exist.
func (c *Client) Start(ctx context.Context, cmd Command) (*Process, error) {
	const op = "guest.Start"
	if len(cmd.Args) == 0 {
		return nil, sandbox.Errorf(op, sandbox.Invalid, "", "no command given")
	}
	req := &processpb.StartRequest{
		Process: &processpb.ProcessConfig{Envs: map[string]string{}},
		Stdin:   &cmd.Stdin,
	}
	args := each(cmd.Args, wire.EncodeName)
	req.Process.Cmd, req.Process.Args = args[0], args[1:]
	for k, v := range cmd.Env {
		req.Process.Envs[wire.EncodeName(k)] = wire.EncodeName(v)
	}
	if cmd.Dir != "" {
		dir := wire.EncodeName(cmd.Dir)
		req.Process.Cwd = &dir
	}
	if cmd.Tag != "" {
		req.Tag = &cmd.Tag
	}
	if cmd.PTY != nil {
		req.Pty = &processpb.PTY{Size: &processpb.PTY_Size{Cols: cmd.PTY.Cols, Rows: cmd.PTY.Rows}}
	}
	ctx, cancel := context.WithCancel(ctx)
	stream, err := c.process.Start(ctx, req)
	return open(c, op, cmd.Args[0], cancel, stream, err)
}

// Connect watches a process that runs already, by its PID. It sees the output
// from now on.
func (c *Client) Connect(ctx context.Context, pid int) (*Process, error) {
	sel := &processpb.ProcessSelector{Selector: &processpb.ProcessSelector_Pid{Pid: uint32(pid)}}
	return c.connect(ctx, c.Control(pid).String(), sel)
}

// ConnectTag is Connect for the oldest process that has a tag.
func (c *Client) ConnectTag(ctx context.Context, tag string) (*Process, error) {
	sel := &processpb.ProcessSelector{Selector: &processpb.ProcessSelector_Tag{Tag: tag}}
	return c.connect(ctx, tag, sel)
}

func (c *Client) connect(ctx context.Context, subject string, sel *processpb.ProcessSelector) (*Process, error) {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := c.process.Connect(ctx, &processpb.ConnectRequest{Process: sel})
	return open(c, "guest.Connect", subject, cancel, stream, err)
}

// eventMessage is a message of the streams of Start and Connect.
type eventMessage[M any] interface {
	*M
	GetEvent() *processpb.ProcessEvent
}

// open waits for the first event of a stream, which says that the process runs.
func open[M any, P eventMessage[M]](c *Client, op, subject string, cancel context.CancelFunc, stream *connect.ServerStreamForClient[M], err error) (*Process, error) {
	if err != nil {
		cancel()
		return nil, rpcError(op, subject, err)
	}
	p := &Process{Control: c.Control(0), name: subject, cancel: cancel}
	p.receive = func() (*processpb.ProcessEvent, error) {
		for stream.Receive() {
			if e := P(stream.Msg()).GetEvent(); e.GetKeepalive() == nil {
				return e, nil
			}
		}
		if err := stream.Err(); err != nil {
			return nil, err
		}
		return nil, io.ErrUnexpectedEOF
	}
	p.close = stream.Close
	first, err := p.receive()
	if err == nil && first.GetStart() == nil {
		err = errors.New("the stream does not begin with the start of the process")
	}
	if err != nil {
		_ = p.Close()
		return nil, rpcError(op, subject, err)
	}
	p.PID = int(first.GetStart().GetPid())
	return p, nil
}

// Next waits for the next event. After End it returns io.EOF. It must not be
// called by several goroutines at once. A process whose output is not fetched
// waits once the buffers between are full.
func (p *Process) Next() (Event, error) {
	if p.ended {
		return Event{}, io.EOF
	}
	e, err := p.receive()
	if err != nil {
		return Event{}, rpcError("guest.Next", p.name, err)
	}
	if end := e.GetEnd(); end != nil {
		p.ended = true
		result := newResult(end.GetExited(), int(end.GetExitCode()), end.GetStatus(), end.GetError())
		return Event{Kind: End, Result: &result}, nil
	}
	switch out := e.GetData().GetOutput().(type) {
	case *processpb.ProcessEvent_DataEvent_Stdout:
		return Event{Kind: Stdout, Data: out.Stdout}, nil
	case *processpb.ProcessEvent_DataEvent_Stderr:
		return Event{Kind: Stderr, Data: out.Stderr}, nil
	case *processpb.ProcessEvent_DataEvent_Pty:
		return Event{Kind: PTY, Data: out.Pty}, nil
	}
	return p.Next() // a kind of event that we do not know
}

// newResult reads how a process ended from what the protocol says of it.
func newResult(exited bool, code int, status, message string) Result {
	r := Result{ExitCode: code, Status: status, Message: message}
	if !exited {
		// The protocol names the signal only by its description.
		name, _ := strings.CutSuffix(strings.TrimPrefix(r.Status, "signal: "), " (core dumped)")
		for sig := syscall.Signal(1); sig <= 64; sig++ {
			if sig.String() == name {
				r.ExitCode, r.Signal = -1, sig
			}
		}
	}
	return r
}

// Wait passes output on until the process ends. Either writer may be nil:
// then that output is dropped. Terminal output goes to stdout.
func (p *Process) Wait(stdout, stderr io.Writer) (Result, error) {
	for {
		e, err := p.Next()
		if err != nil {
			return Result{}, err
		}
		to := stdout
		switch e.Kind {
		case End:
			return *e.Result, nil
		case Stderr:
			to = stderr
		}
		if to == nil {
			continue
		}
		if _, err := to.Write(e.Data); err != nil {
			return Result{}, sandbox.E("guest.Wait", sandbox.Canceled, p.name, err)
		}
	}
}

// Close ends this view; the process goes on. It never fails.
func (p *Process) Close() error {
	p.cancel()
	_ = p.close() // says only that it was canceled
	return nil
}

// String names the process in errors.
func (p Control) String() string { return fmt.Sprintf("process %d", p.PID) }

func (p Control) selector() *processpb.ProcessSelector {
	return &processpb.ProcessSelector{Selector: &processpb.ProcessSelector_Pid{Pid: uint32(p.PID)}}
}

// maxInput is how much input one message carries, in bytes.
const maxInput = 256 << 10

// Write sends input to the process's stdin, or to its terminal if it has one.
func (p Control) Write(ctx context.Context, data []byte, pty bool) error {
	for len(data) > 0 {
		part := data[:min(len(data), maxInput)]
		data = data[len(part):]
		in := &processpb.ProcessInput{Input: &processpb.ProcessInput_Stdin{Stdin: part}}
		if pty {
			in.Input = &processpb.ProcessInput_Pty{Pty: part}
		}
		_, err := p.client.process.SendInput(ctx, &processpb.SendInputRequest{Process: p.selector(), Input: in})
		if err != nil {
			return rpcError("guest.Write", p.String(), err)
		}
	}
	return nil
}

// CloseStdin ends the process's input.
func (p Control) CloseStdin(ctx context.Context) error {
	_, err := p.client.process.CloseStdin(ctx, &processpb.CloseStdinRequest{Process: p.selector()})
	return rpcError("guest.CloseStdin", p.String(), err)
}

// Resize changes the size of the process's terminal.
func (p Control) Resize(ctx context.Context, size Size) error {
	pty := &processpb.PTY{Size: &processpb.PTY_Size{Cols: size.Cols, Rows: size.Rows}}
	_, err := p.client.process.Update(ctx, &processpb.UpdateRequest{Process: p.selector(), Pty: pty})
	return rpcError("guest.Resize", p.String(), err)
}

// Signal signals the process and its group.
func (p Control) Signal(ctx context.Context, sig syscall.Signal) error {
	return p.client.Signal(ctx, p.PID, sig)
}

// Signal signals the process with a PID, and its group. The error is NotFound
// when no such process was started by Start or it has ended.
func (c *Client) Signal(ctx context.Context, pid int, sig syscall.Signal) error {
	sel := &processpb.ProcessSelector{Selector: &processpb.ProcessSelector_Pid{Pid: uint32(pid)}}
	_, err := c.process.SendSignal(ctx, &processpb.SendSignalRequest{Process: sel, Signal: processpb.Signal(sig)})
	return rpcError("guest.Signal", c.Control(pid).String(), err)
}

// Running is one process that List found.
type Running struct {
	PID  int
	Tag  string
	Args []string
	Env  map[string]string // as given to Start
	Dir  string
}

// List returns the processes that were started by Start and still run.
func (c *Client) List(ctx context.Context) ([]Running, error) {
	res, err := c.process.List(ctx, &processpb.ListRequest{})
	if err != nil {
		return nil, rpcError("guest.List", "", err)
	}
	var all []Running
	for _, p := range res.GetProcesses() {
		cfg := p.GetConfig()
		r := Running{PID: int(p.GetPid()), Tag: p.GetTag(), Dir: wire.DecodeName(cfg.GetCwd()), Env: map[string]string{}}
		r.Args = each(append([]string{cfg.GetCmd()}, cfg.GetArgs()...), wire.DecodeName)
		for k, v := range cfg.GetEnvs() {
			r.Env[wire.DecodeName(k)] = wire.DecodeName(v)
		}
		all = append(all, r)
	}
	return all, nil
}

// each returns the texts that f makes of others.
func each(texts []string, f func(string) string) []string {
	out := make([]string, len(texts))
	for i, text := range texts {
		out[i] = f(text)
	}
	return out
}

// Output is what Run returns.
type Output struct {
	Result
	Stdout, Stderr []byte // at most maxOutput bytes each; the rest is dropped
}

// maxOutput bounds what Run keeps of each output, in bytes.
const maxOutput = 64 << 20

// Run runs a command to its end and collects what it writes. A command that
// fails is no error; see Output.ExitCode. When ctx ends, the command is killed.
func (c *Client) Run(ctx context.Context, cmd Command) (Output, error) {
	const op = "guest.Run"
	if err := ctx.Err(); err != nil {
		return Output{}, sandbox.E(op, sandbox.KindOf(err), "", err)
	}
	// The start is seen to its end even when ctx ends meanwhile: only then is it known which process to take along.
	view, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	if at, ok := ctx.Deadline(); ok {
		var stop context.CancelFunc
		view, stop = context.WithDeadline(view, at)
		defer stop()
	}
	unbound := context.AfterFunc(ctx, func() { time.AfterFunc(killTimeout, end) })
	p, err := c.Start(view, cmd)
	unbound()
	if err != nil {
		return Output{}, err
	}
	defer p.Close()
	defer context.AfterFunc(ctx, end)()
	var stdout, stderr limitedBuffer
	result, err := p.Wait(&stdout, &stderr)
	if err != nil && ctx.Err() != nil {
		// A canceled view leaves the process alone; a run takes it along.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killTimeout)
		defer cancel()
		_ = p.Signal(ctx, syscall.SIGKILL) // fails when it has ended
	}
	return Output{Result: result, Stdout: stdout.Bytes(), Stderr: stderr.Bytes()}, err
}

// killTimeout bounds how long a canceled Run waits for its start, and the call that ends it.
const killTimeout = 5 * time.Second

// limitedBuffer keeps the first maxOutput bytes.
type limitedBuffer struct{ bytes.Buffer }

func (b *limitedBuffer) Write(data []byte) (int, error) {
	b.Buffer.Write(data[:max(0, min(len(data), maxOutput-b.Len()))])
	return len(data), nil
}
