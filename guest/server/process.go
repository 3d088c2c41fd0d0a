package server

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	processpb "github.com/atoll-run/atoll/guest/gen/process"
	"github.com/atoll-run/atoll/guest/wire"
)

const (
	outputChunk = 32 << 10 // bytes of output in one event at most
	// A process that ended may have children that still hold its pipes. Their
	// output counts as the process's own for this long after its end...
	outputGrace = 100 * time.Millisecond
	// ...and then what is in the pipe, but no more than a pipe can hold.
	drainLimit = 1 << 20
)

// process is a process started through the API.
type process struct {
	child   *child
	config  *processpb.ProcessConfig
	tag     *string
	out     fanout
	tty     *os.File      // the terminal's master side; nil without a terminal
	stdin   *os.File      // nil without stdin or with a terminal; closing is guarded by inputs
	inputs  chan struct{} // holds one token: who has it may write input
	killed  atomic.Bool   // we were asked to kill it
	started time.Time
	ooms    int64 // the count of OOM kills when it started
}

// start starts a process. The subscription sees every event of it.
func (s *Server) start(l launch, req *processpb.StartRequest) (*process, *subscription, error) {
	p := &process{config: req.GetProcess(), tag: req.Tag, inputs: make(chan struct{}, 1), started: time.Now()}
	p.ooms, _ = s.oom.read()
	p.inputs <- struct{}{}
	attr := &syscall.SysProcAttr{Setsid: true}
	if l.acct.switches() {
		attr.Credential = l.acct.credential()
	}
	var files stdio
	var err error
	if pty := req.GetPty(); pty != nil {
		err = files.openPTY(pty.GetSize(), l.acct)
		attr.Setctty = true // of file 0
	} else {
		err = files.openPipes(req.Stdin == nil || req.GetStdin())
	}
	defer files.closeTheirs()
	if err != nil {
		files.closeOurs()
		return nil, nil, err
	}
	p.tty, p.stdin = files.tty, files.stdin
	sub := p.out.subscribe()
	p.child, err = s.reaper.spawn(l.path, l.argv, &syscall.ProcAttr{Dir: l.dir, Env: l.env, Files: files.theirs, Sys: attr})
	if err != nil {
		files.closeOurs()
		return nil, nil, fmt.Errorf("start %s: %w", l.path, err)
	}
	s.processes.add(p)
	s.logs.start(p, l)
	go s.attend(p, files.outputs)
	return p, sub, nil
}

// attend sees a process to its end.
func (s *Server) attend(p *process, outputs []*os.File) {
	var readers sync.WaitGroup
	for i, f := range outputs {
		readers.Go(func() { p.pump(f, s.sink(p, i)) })
	}
	<-p.child.done
	s.processes.remove(p)
	for _, f := range outputs {
		_ = f.SetReadDeadline(time.Now().Add(outputGrace))
	}
	readers.Wait()
	<-p.inputs // never given back: input after the end fails
	if p.stdin != nil {
		p.stdin.Close()
	}
	if p.tty != nil {
		p.tty.Close()
	}
	end := s.endEvent(p)
	s.logs.exit(p, end)
	p.out.publish(&processpb.ProcessEvent{Event: &processpb.ProcessEvent_End{End: end}})
}

// sink turns bytes of output number i into events.
func (s *Server) sink(p *process, i int) func([]byte) {
	var lines *lineWriter
	if p.tag != nil && *p.tag == wire.TagMain {
		lines = &lineWriter{logs: s.logs, p: p, event: []string{wire.LogStdout, wire.LogStderr}[i]}
	}
	return func(data []byte) {
		if lines != nil {
			lines.write(data)
		}
		if len(data) == 0 {
			return
		}
		out := &processpb.ProcessEvent_DataEvent{}
		switch {
		case p.tty != nil:
			out.Output = &processpb.ProcessEvent_DataEvent_Pty{Pty: data}
		case i == 0:
			out.Output = &processpb.ProcessEvent_DataEvent_Stdout{Stdout: data}
		default:
			out.Output = &processpb.ProcessEvent_DataEvent_Stderr{Stderr: data}
		}
		p.out.publish(&processpb.ProcessEvent{Event: &processpb.ProcessEvent_Data{Data: out}})
	}
}

// pump reads output until the process and all who share its pipe are done, or
// until the grace after the process's end is over. An empty slice tells sink
// that no more comes. Children that outlive the process can go on writing, into
// nothing, so that a server started in the background does not die of it.
func (p *process) pump(f *os.File, sink func([]byte)) {
	buf := make([]byte, outputChunk)
	for {
		n, err := f.Read(buf)
		if n > 0 {
			sink(append([]byte(nil), buf[:n]...))
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil { // the end, or EIO from a terminal that nobody holds
			sink(nil)
			if p.tty == nil {
				f.Close()
			}
			return
		}
	}
	for rest := drainLimit; rest > 0; {
		n := readNow(f, buf)
		if n <= 0 {
			break
		}
		sink(append([]byte(nil), buf[:n]...))
		rest -= n
	}
	sink(nil)
	if p.tty == nil {
		_ = f.SetReadDeadline(time.Time{})
		go func() {
			_, _ = io.Copy(io.Discard, f)
			f.Close()
		}()
	}
}

// readNow reads what is there without waiting.
func readNow(f *os.File, buf []byte) int {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0
	}
	n := 0
	if err := raw.Control(func(fd uintptr) { n, _ = syscall.Read(int(fd), buf) }); err != nil {
		return 0
	}
	return n
}

// endEvent says how the process ended.
func (s *Server) endEvent(p *process) *processpb.ProcessEvent_EndEvent {
	status := p.child.status
	end := &processpb.ProcessEvent_EndEvent{ExitCode: -1}
	if status.Exited() {
		end.Exited = true
		end.ExitCode = int32(status.ExitStatus())
		end.Status = fmt.Sprintf("exit status %d", end.ExitCode)
	} else {
		end.Status = "signal: " + status.Signal().String()
		if status.CoreDump() {
			end.Status += " (core dumped)"
		}
	}
	if end.ExitCode != 0 {
		reason := end.Status
		if status.Signaled() && status.Signal() == syscall.SIGKILL && !p.killed.Load() {
			// Nobody asked for it through us: was it the kernel?
			if n, _ := s.oom.read(); n > p.ooms {
				reason += " (out of memory)"
			}
		}
		end.Error = &reason
	}
	return end
}

// processTab holds the processes that run, by PID.
type processTab struct {
	mu  sync.Mutex
	all map[int]*process
}

func (t *processTab) add(p *process) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.all[p.child.pid] = p
}

func (t *processTab) remove(p *process) {
	t.mu.Lock()
	defer t.mu.Unlock()
	// The PID may already belong to a newer process.
	if t.all[p.child.pid] == p {
		delete(t.all, p.child.pid)
	}
}
