package server

import (
	"context"
	"errors"
	"net/http"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"

	"connectrpc.com/connect"

	processpb "github.com/atoll-run/atoll/guest/gen/process"
	"github.com/atoll-run/atoll/guest/wire"
)

// processService answers process.Process.
type processService struct{ s *Server }

func (ps processService) List(context.Context, *processpb.ListRequest) (*processpb.ListResponse, error) {
	t := &ps.s.processes
	t.mu.Lock()
	defer t.mu.Unlock()
	res := &processpb.ListResponse{}
	for pid, p := range t.all {
		res.Processes = append(res.Processes, &processpb.ProcessInfo{Config: p.config, Pid: uint32(pid), Tag: p.tag})
	}
	slices.SortFunc(res.Processes, func(a, b *processpb.ProcessInfo) int { return int(a.GetPid()) - int(b.GetPid()) })
	return res, nil
}

func (ps processService) Start(ctx context.Context, req *processpb.StartRequest, stream *connect.ServerStream[processpb.StartResponse]) error {
	acct, err := ps.s.settings.account(userOf(ctx))
	if err != nil {
		return connect.NewError(connect.CodeUnauthenticated, err)
	}
	l, err := ps.s.settings.plan(req.GetProcess(), acct)
	if err != nil {
		return startError(err)
	}
	p, sub, err := ps.s.start(l, req)
	if err != nil {
		return startError(err)
	}
	defer p.out.leave(sub)
	if deadline, ok := ctx.Deadline(); ok {
		// E2B's time-out is the command's: it ends even if the client is gone.
		timer := time.AfterFunc(time.Until(deadline), func() {
			p.killed.Store(true)
			_ = ps.s.reaper.signal(p.child, syscall.SIGKILL)
		})
		go func() {
			<-p.child.done
			timer.Stop()
		}()
	}
	return follow(ctx, p, sub, stream.Conn().RequestHeader(), func(e *processpb.ProcessEvent) error {
		return stream.Send(&processpb.StartResponse{Event: e})
	})
}

func (ps processService) Connect(ctx context.Context, req *processpb.ConnectRequest, stream *connect.ServerStream[processpb.ConnectResponse]) error {
	p, err := ps.find(req.GetProcess())
	if err != nil {
		return err
	}
	sub := p.out.subscribe()
	defer p.out.leave(sub)
	return follow(ctx, p, sub, stream.Conn().RequestHeader(), func(e *processpb.ProcessEvent) error {
		return stream.Send(&processpb.ConnectResponse{Event: e})
	})
}

// follow sends a process's events to one client until the last one.
func follow(ctx context.Context, p *process, sub *subscription, h http.Header, send func(*processpb.ProcessEvent) error) error {
	start := &processpb.ProcessEvent_StartEvent{Pid: uint32(p.child.pid)}
	if err := send(&processpb.ProcessEvent{Event: &processpb.ProcessEvent_Start{Start: start}}); err != nil {
		return err
	}
	keepalive := time.NewTicker(keepaliveInterval(h))
	defer keepalive.Stop()
	for {
		var event *processpb.ProcessEvent
		select {
		case event = <-sub.events:
		case <-keepalive.C:
			event = &processpb.ProcessEvent{Event: &processpb.ProcessEvent_Keepalive{Keepalive: &processpb.ProcessEvent_KeepAlive{}}}
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := send(event); err != nil {
			return err
		}
		if event.GetEnd() != nil {
			return nil
		}
	}
}

func (ps processService) Update(_ context.Context, req *processpb.UpdateRequest) (*processpb.UpdateResponse, error) {
	p, err := ps.find(req.GetProcess())
	if err != nil {
		return nil, err
	}
	if size := req.GetPty().GetSize(); size != nil {
		if p.tty == nil {
			return nil, connect.NewError(connect.CodeFailedPrecondition, errNoTerminal)
		}
		if err := resizePTY(p.tty, size.GetCols(), size.GetRows()); err != nil {
			return nil, connect.NewError(connect.CodeInternal, err)
		}
	}
	return &processpb.UpdateResponse{}, nil
}

func (ps processService) StreamInput(ctx context.Context, stream *connect.ClientStream[processpb.StreamInputRequest]) (*processpb.StreamInputResponse, error) {
	var p *process
	for stream.Receive() {
		switch msg := stream.Msg(); {
		case msg.GetStart() != nil:
			var err error
			if p, err = ps.find(msg.GetStart().GetProcess()); err != nil {
				return nil, err
			}
		case msg.GetData() != nil:
			if p == nil {
				return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("data before the start event"))
			}
			if err := input(ctx, p, msg.GetData().GetInput()); err != nil {
				return nil, err
			}
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	return &processpb.StreamInputResponse{}, nil
}

func (ps processService) SendInput(ctx context.Context, req *processpb.SendInputRequest) (*processpb.SendInputResponse, error) {
	p, err := ps.find(req.GetProcess())
	if err != nil {
		return nil, err
	}
	return &processpb.SendInputResponse{}, input(ctx, p, req.GetInput())
}

func input(ctx context.Context, p *process, in *processpb.ProcessInput) error {
	var err error
	switch data := in.GetInput().(type) {
	case *processpb.ProcessInput_Stdin:
		err = p.write(ctx, data.Stdin, false)
	case *processpb.ProcessInput_Pty:
		err = p.write(ctx, data.Pty, true)
	default:
		return connect.NewError(connect.CodeInvalidArgument, errors.New("input is neither stdin nor pty"))
	}
	return preconditionError(err)
}

// preconditionError says that an input does not suit the process's state.
func preconditionError(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return connect.NewError(connect.CodeFailedPrecondition, err)
}

// killWait bounds the wait for the end of a killed process.
const killWait = time.Second

func (ps processService) SendSignal(ctx context.Context, req *processpb.SendSignalRequest) (*processpb.SendSignalResponse, error) {
	p, err := ps.find(req.GetProcess())
	if err != nil {
		return nil, err
	}
	sig := syscall.Signal(req.GetSignal())
	if sig < 1 || sig > 64 {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("no such signal: "+strconv.Itoa(int(sig))))
	}
	if sig == syscall.SIGKILL {
		p.killed.Store(true)
	}
	switch err := ps.s.reaper.signal(p.child, sig); {
	case errors.Is(err, syscall.ESRCH):
		return nil, errNoProcess
	case err != nil:
		return nil, connect.NewError(connect.CodePermissionDenied, err)
	}
	if sig == syscall.SIGKILL {
		// So that the process is gone when its killer hears of it, unless the
		// kernel takes very long to let go of it.
		select {
		case <-p.child.done:
		case <-time.After(killWait):
		case <-ctx.Done():
		}
	}
	return &processpb.SendSignalResponse{}, nil
}

func (ps processService) CloseStdin(ctx context.Context, req *processpb.CloseStdinRequest) (*processpb.CloseStdinResponse, error) {
	p, err := ps.find(req.GetProcess())
	if err != nil {
		return nil, err
	}
	return &processpb.CloseStdinResponse{}, preconditionError(p.closeStdin(ctx))
}

var errNoProcess = connect.NewError(connect.CodeNotFound, errors.New("process not found"))

// find returns the process that a selector means; of several with one tag, the
// oldest.
func (ps processService) find(sel *processpb.ProcessSelector) (*process, error) {
	t := &ps.s.processes
	t.mu.Lock()
	defer t.mu.Unlock()
	switch by := sel.GetSelector().(type) {
	case *processpb.ProcessSelector_Pid:
		if p, ok := t.all[int(by.Pid)]; ok {
			return p, nil
		}
	case *processpb.ProcessSelector_Tag:
		var found *process
		for _, p := range t.all {
			if p.tag != nil && *p.tag == by.Tag && (found == nil || p.started.Before(found.started)) {
				found = p
			}
		}
		if found != nil {
			return found, nil
		}
	default:
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("select the process by pid or tag"))
	}
	return nil, errNoProcess
}

// startError tells a missing command (NotFound) from one that may not run, an
// exhausted sandbox and a request that makes no sense.
func startError(err error) error {
	code := connect.CodeInvalidArgument
	switch {
	case errors.Is(err, errBadCwd):
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ENOENT):
		code = connect.CodeNotFound
	case errors.Is(err, os.ErrPermission):
		code = connect.CodePermissionDenied
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.ENOMEM), errors.Is(err, syscall.EMFILE),
		errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ENOSPC):
		code = connect.CodeResourceExhausted
	}
	return connect.NewError(code, err)
}

const (
	keepaliveDefault = 90 * time.Second
	keepaliveMax     = 3600 // seconds
)

// keepaliveInterval is how often a silent stream shows that it lives.
func keepaliveInterval(h http.Header) time.Duration {
	n, err := strconv.Atoi(h.Get(wire.HeaderKeepalive))
	if err != nil || n <= 0 {
		return keepaliveDefault
	}
	return time.Duration(min(n, keepaliveMax)) * time.Second
}
